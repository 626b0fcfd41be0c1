"""Rendered text measured: how fast it is drawn, whether OCR reads it back, whether another renderer draws the same, and sheets to look at.

  python -m benchmarks.text_rendering --measure=speed [--base_px=256] [--num=400] [--kind=complex] [--pictures=FOLDER]
  python -m benchmarks.text_rendering --measure=ocr [--base_px=512] [--num=40] [--languages=en,zh-Hans]
  python -m benchmarks.text_rendering --measure=pango [--num=200] [--languages=en,ru,el,ar,he,hi,th,zh-Hans,ja,ko]
  python -m benchmarks.text_rendering --measure=sheet --out=F.png [--base_px=256] [--columns=6] [--languages=...] [--kind=complex] [--layout=menu]

speed: pictures with captions per second of processor time, median and range of rounds, and how many a core could draw if it did nothing but fill
outlines (the same glyphs, nothing else). ocr: 1 - edits / characters over all pictures, and the share of pictures read without an edit. pango: ink
boxes of strings beside those that pango-view draws unhinted at the same size, by width and height; needs Debian's pango1.0-tools.
"""

import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from absl import flags
from PIL import Image

from data_pipelines.text_rendering import drawing, languages, layout
from data_pipelines.text_rendering.fonts import find_faces, typefaces
from data_pipelines.text_rendering.settings import KINDS, RATIOS, Settings
from data_pipelines.text_rendering.source import RenderedText
from launch import cli
from qimg2.evaluation import ocr
from qimg2.evaluation.text import score_text

ROUNDS = 5
REMEMBERED = 12  # templates that do not come again in a sheet
PANGO_PX, MARGIN_PX, AGREE_PX = 40, 60, 2


def source_of(base_px: int, codes: Sequence[str], ratios: Sequence[str] = RATIOS, kind: str = "pure", layout_name: str = "") -> RenderedText:
  """The pictures that are measured: of a kind, and of one layout or template of it where that is named; signs stand on those of --pictures."""
  only = {{"pure": "layouts", "complex": "templates"}[kind]: {layout_name: 1.0}} if layout_name else {}
  return RenderedText(Settings(base_px=base_px, languages=dict.fromkeys(codes, 1.0), ratios=tuple(ratios), kinds={kind: 1.0},
                               pictures=flags.FLAGS.pictures, **only), "train", 2**20)


def speed(base_px: int, codes: Sequence[str], num: int, kind: str) -> str:
  """How many pictures are drawn, in a sentence."""
  source, settings, plain = source_of(base_px, codes, kind=kind), [], drawing.coverage
  for number in range(num):  # dictionaries and tables are read
    source.record(number)
  drawing.coverage = lambda setting, box: settings.append((setting, box)) or plain(setting, box)
  rates, bare = [], []
  for turn in range(1, ROUNDS + 1):
    settings.clear()
    begin = time.process_time()
    for number in range(turn * num, (turn + 1) * num):
      source.record(number)
    rates.append(num / (time.process_time() - begin))
    begin = time.process_time()
    for setting, box in settings:
      plain(setting, box)
    bare.append(num / (time.process_time() - begin))
  drawing.coverage = plain
  return (f"{kind}, {base_px} px, {len(codes)} languages: {statistics.median(rates):.0f} pictures per CPU second ({min(rates):.0f} to "
          f"{max(rates):.0f} in {ROUNDS} rounds of {num}); outlines alone {statistics.median(bare):.0f}")


def read_back(base_px: int, code: str, num: int, kind: str) -> str:
  """What OCR reads of pictures of one language."""
  source, errors, characters, right = source_of(base_px, [code], ("1:1",), kind), 0, 0, 0
  for number in range(num):
    record = source.record(number)
    score = score_text(RenderedText.truth(record)["texts"], [line.text for line in ocr.read(record["image"])])
    errors, characters, right = errors + score["errors"], characters + score["characters"], right + (score["errors"] == 0)
  return f"{code} at {base_px} px: {1 - errors / characters:.2%} of {characters} characters, {right} of {num} pictures without an edit"


def beside_pango(code: str, num: int) -> str:
  """How far ink boxes are from those of pango."""
  language, rng = languages.load(code), np.random.default_rng(0)
  fit = [one for one in typefaces(find_faces(), language) if "Noto" in one.main.family and not one.main.is_italic]
  texts = [*language.sentences, *language.headings, *language.words]
  worst, far = 0, 0
  for _ in range(num):
    face, text = fit[rng.integers(len(fit))], texts[rng.integers(len(texts))]
    style = layout.Style(face, language, 1.5, breaks="never")
    found = layout.fit([text], style, 10**5, 10**3, (PANGO_PX, PANGO_PX + 1e-3)).moved(MARGIN_PX, MARGIN_PX)
    own = _extent(drawing.coverage(found, (0, 0, int(found.ink[2]) + MARGIN_PX, int(found.ink[3]) + MARGIN_PX)))
    apart = max(abs(a - b) for a, b in zip(own, _pango(text, face.main.family, "Bold" if face.main.is_bold else "", code)))
    worst, far = max(worst, apart), far + (apart > AGREE_PX)
  return f"{code}: {num - far} of {num} strings within {AGREE_PX} px, the furthest {worst} px apart"


def _pango(text: str, family: str, weight: str, code: str) -> tuple[int, int]:
  """(width, height) in px of the ink that pango-view draws."""
  with tempfile.NamedTemporaryFile(suffix=".png") as file:
    subprocess.run(["pango-view", "-q", f"--output={file.name}", f"--font={family} {weight} {PANGO_PX}px", f"--margin={MARGIN_PX}",
                    "--hinting=none", "--hint-metrics=off", "--subpixel-positions", "--antialias=gray", f"--language={code}", f"--text={text}"],
                   check=True, stdin=subprocess.DEVNULL)
    return _extent(255 - np.asarray(Image.open(file.name).convert("L")))


def _extent(ink: np.ndarray) -> tuple[int, int]:
  rows, columns = np.nonzero(ink > 5)  # of 255
  return int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


def sheet(base_px: int, codes: Sequence[str], columns: int, kind: str, layout_name: str) -> Image.Image:
  """Pictures beside each other, a row for each language, templates that were there a while ago only."""
  edge, rows, known = ((2, 2), (2, 2), (0, 0)), [], []
  for row, code in enumerate(codes):
    source, images = source_of(base_px, [code], ("1:1",), kind, layout_name), []
    for number in range(row * columns, 2**20):
      record = source.record(number)
      layout = RenderedText.truth(record)["layout"]
      if kind != "complex" or layout_name or layout not in known[-REMEMBERED:]:
        known.append(layout)
        images.append(np.pad(record["image"], edge, constant_values=128))
      if len(images) == columns:
        break
    rows.append(np.hstack(images))
  return Image.fromarray(np.vstack(rows))


def main(_: Sequence[str]) -> None:
  """The command; see the module docstring."""
  f = flags.FLAGS
  codes = f.languages or languages.codes()
  if f.measure == "speed":
    print(speed(f.base_px, codes, f.num, f.kind))
  elif f.measure == "sheet":
    found = sheet(f.base_px, codes, f.columns, f.kind, f.layout)
    (found.quantize(200) if f.out.endswith(".png") else found).save(f.out, optimize=True)
  else:
    for code in codes:
      print(read_back(f.base_px, code, f.num, f.kind) if f.measure == "ocr" else beside_pango(code, f.num), flush=True)


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_enum("measure", "speed", ["speed", "ocr", "pango", "sheet"], "What is measured.")
  flags.DEFINE_integer("base_px", 256, "About the square root of a picture's area.", lower_bound=64)
  flags.DEFINE_integer("num", 200, "Pictures of a round, or strings of a language.", lower_bound=1)
  flags.DEFINE_integer("columns", 6, "Of a sheet: pictures of each language.", lower_bound=1)
  flags.DEFINE_list("languages", [], "Their codes; all where none is given.")
  flags.DEFINE_enum("kind", "pure", KINDS, "The kind of pictures, but for pango.")
  flags.DEFINE_string("pictures", "", "A folder of pictures for the compositional kind.")
  flags.DEFINE_string("layout", "", "Of a sheet: one layout, or template, in place of all.")
  flags.DEFINE_string("out", "sheet.png", "Of a sheet: its file.")


if __name__ == "__main__":
  cli.run(main, define_flags)
