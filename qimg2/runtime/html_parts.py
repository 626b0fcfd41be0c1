"""Parts of HTML reports: a page with everything inside, tables, pictures, figures."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h1, h2, h3 { line-height: 1.2 } h2 { border-top: 1px solid #ccc; padding-top: 1em }
table { border-collapse: collapse; margin: .5em 0 } td, th { border: 1px solid #ccc; padding: .2em .6em; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100%; border: 1px solid #ddd }
pre { background: #f6f6f6; padding: 1em; overflow: auto; max-height: 40em } .figure { font-size: 1.3em; font-weight: 600 }
"""


def page(title: str, body: Iterable[str]) -> str:
  """A whole page of parts that are HTML; the title is text."""
  return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
          f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>")


def image(png: bytes) -> str:
  """A picture, as the bytes of its PNG file."""
  return f"<p><img alt='' src='data:image/png;base64,{base64.b64encode(png).decode()}'></p>"


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
  """A table of texts and numbers."""
  cells = lambda row: "".join(f"<td class='{'n' if isinstance(x, (int, float)) else ''}'>{html.escape(str(x))}</td>" for x in row)
  top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
  return f"<table><tr>{top}</tr>{''.join(f'<tr>{cells(row)}</tr>' for row in rows)}</table>"


def as_png(figure: "Figure") -> bytes:
  """A figure of matplotlib as the bytes of a PNG file."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()
