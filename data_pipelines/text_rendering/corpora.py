"""Texts to be set beside those of the language files: a user's files, and what Debian packages carry.

"FILE" is a text file of UTF-8, with empty lines between its paragraphs. "debian:PACKAGE" are the texts of an installed package, such as
"debian:fortunes" or "debian:manpages-de", in the order of their paths:

  */fortunes/*              fortunes, with % between them; offensive ones, which are in a folder off/, are left out
  /usr/share/man/*          manual pages: running text alone, without tables, examples, headings and macros of mdoc
  */common-licenses/*       licences

Of a package only prose is kept: paragraphs of letters for the most part, neither short nor overlong, without words too long for a line. Which
characters the fonts have is asked in the end, and what they lack is counted. Left out: packages of other kinds, and what pip carries.
"""

import gzip
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from data_pipelines.text_rendering.words import clean

DEBIAN = "debian:"
ROOT = pathlib.Path("/")  # of the file system that packages are looked for in
_INFO = "var/lib/dpkg/info"  # where dpkg says what files a package has
_LENGTHS, _LONGEST_WORD, _LEAST_LETTERS = (20, 2000), 30, 0.75  # characters of prose, of a word, and the share of letters beside spaces
_WRAPPED = re.compile("(?<=[\u2e80-\u9fff\uff00-\uffef])\\s*\n\\s*(?=[\u2e80-\u9fff\uff00-\uffef])")  # lines of Chinese and Japanese, without spaces
_TERMINAL = re.compile(r"\x1b\[[\d;]*m")
_MAN_BREAKS = frozenset(".PP .P .LP .TP .IP .HP .SH .SS .TH .RS .RE .sp .br .nf .fi .EX .EE .TS .TE .UR .UE .MT .ME".split())
_MAN_FONTS = {".B": " ", ".I": " ", ".SM": " ", ".SB": " ", **dict.fromkeys((".BR", ".RB", ".BI", ".IB", ".IR", ".RI"), "")}  # and what joins words
_MAN_VERBATIM = {".nf": ".fi", ".EX": ".EE", ".TS": ".TE"}
_MAN_SIGNS = {"(em": "—", "(en": "–", "[em]": "—", "[en]": "–", "(aq": "'", "[aq]": "'", "(lq": "“", "(rq": "”", "[lq]": "“", "[rq]": "”", "(oq": "‘",
              "(cq": "’", "(co": "©", "(bu": "•", "(ti": "~", "(ha": "^", "*(lq": "“", "*(rq": "”", "-": "-", "e": "\\", "~": "\u00a0", " ": "\u00a0",
              "&": "", ":": "", "%": "", "|": "", "/": "", ",": "", "c": ""}
_MAN_ESCAPE = re.compile(r"\\(?:f(?:\([A-Z]{2}|\[[A-Z]*\]|.)|s[+-]?\d+|(\*?\(..|\[[^\]]*\]|.))")


def read_texts(names: str | Sequence[str], covers: Callable[[str], bool]) -> tuple[tuple[str, ...], int]:
  """Returns (the paragraphs of texts, cleaned, each once; how many are left out because no font has all of their characters).

  Args: names of texts, one or several, see the module's text; whether all fonts of the language have the characters of a text.

  Raises:
    ValueError: a file cannot be read as UTF-8, a package is not installed or has no texts, or nothing can be set.
  """
  names = (names,) if isinstance(names, str) else tuple(names)
  found = [text for name in names for text in (_package(name.removeprefix(DEBIAN)) if name.startswith(DEBIAN) else _file(name))]
  paragraphs = list(dict.fromkeys(one for one in map(_cleaned, found) if one))
  kept = tuple(one for one in paragraphs if covers(one))
  if not kept:
    raise ValueError(f"None of the {len(paragraphs)} paragraphs of {', '.join(names)} can be set with the fonts of its language: give others or "
                     "install fonts.")
  return kept, len(paragraphs) - len(kept)


def _cleaned(text: str) -> str:
  """A paragraph as one line, without colours of terminals and straight double quotes, which captions put around texts."""
  lines = _WRAPPED.sub("", _TERMINAL.sub("", text)).split("\n")
  return clean(" ".join(lines)).replace('"', "”")


def _split(text: str) -> list[str]:
  """Texts between empty lines."""
  return re.split(r"\n\s*\n", text.replace("\r\n", "\n"))


def _file(path: str) -> list[str]:
  try:
    return _split(pathlib.Path(path).expanduser().read_text(encoding="utf-8"))
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"Cannot read the texts in {path} ({error}): give a file of UTF-8, or debian:PACKAGE.") from error


# ---- packages -----------------------------------------------------------------------------------------


def _package(name: str) -> list[str]:
  """The prose of a package."""
  lists = sorted((ROOT / _INFO).glob(f"{name}.list")) + sorted((ROOT / _INFO).glob(f"{name}:*.list"))
  if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]*", name) or not lists:
    raise ValueError(f"The texts {DEBIAN}{name} are those of a Debian package that is not on this machine: apt-get install {name}, or name a file of "
                     "your own.")
  paths = [ROOT / path.lstrip("/") for path in lists[0].read_text(encoding="utf-8").splitlines()]
  found = [text for path in sorted(paths) if path.is_file() and not path.is_symlink() for text in _texts_of(path)]
  prose = [text for text in map(_cleaned, found) if _is_prose(text)]
  if not prose:
    raise ValueError(f"The Debian package {name} has no fortunes, manual pages or licences on this machine (where dpkg leaves such files out, "
                     f"/etc/dpkg/dpkg.cfg.d says so): mend that and apt-get install --reinstall {name}, or name a file of your own.")
  return prose


def _texts_of(path: pathlib.Path) -> Iterator[str]:
  """The texts of one file of a package; none of a file that is of no known kind or no UTF-8."""
  folders = path.parts[:-1]
  reader = next((reader for folder, reader in _READERS.items() if folder in folders), None)
  if reader is None or "off" in folders or path.suffix in (".dat", ".u8"):
    return
  data = path.read_bytes()
  try:
    yield from reader((gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8"))
  except UnicodeDecodeError:  # of a time before UTF-8: which encoding is not said
    return


def _fortunes(text: str) -> list[str]:
  without_overstrikes = re.sub(".\b", "", text)
  return [re.sub(r"\s-- ", " — ", one) for one in re.split(r"(?m)^%.*\n?", without_overstrikes)]


def _manual(text: str) -> Iterator[str]:
  """Paragraphs of running text of a page in the macros of man(7)."""
  if re.search(r"(?m)^\.(Dd|Sh|so)\b", text):
    return
  lines, end = [], ""
  for line in [*text.split("\n"), ".PP"]:
    macro, _, rest = line.partition(" ")
    if end:
      end = "" if macro == end else end
    elif macro in _MAN_BREAKS:
      end = _MAN_VERBATIM.get(macro, "")
      yield _unescaped(" ".join(lines))
      lines = []
    elif macro in _MAN_FONTS:
      lines.append(_MAN_FONTS[macro].join(a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', rest)))
    elif not line.startswith((".", "'")):
      lines.append(line)


def _unescaped(text: str) -> str:
  """A text without troff's escapes; "" where one is not known."""
  text = re.sub(r'\\".*', "", text)
  if any(found[1] is not None and found[1] not in _MAN_SIGNS for found in _MAN_ESCAPE.finditer(text)):
    return ""
  return _MAN_ESCAPE.sub(lambda found: _MAN_SIGNS[found[1]] if found[1] is not None else "", text)


_READERS: dict[str, Callable[[str], Sequence[str] | Iterator[str]]] = {"fortunes": _fortunes, "man": _manual, "common-licenses": _split}


def _is_prose(text: str) -> bool:
  least, most = _LENGTHS
  letters, spaces = sum(unicodedata.category(c)[0] in "LM" for c in text), text.count(" ")
  spaced = re.search("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]", text) or max(map(len, text.split()), default=0) <= _LONGEST_WORD
  return least <= len(text) <= most and letters >= _LEAST_LETTERS * (len(text) - spaces) and bool(spaced)
