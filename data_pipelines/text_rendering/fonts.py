"""Fonts of this machine: what each covers, which are fit for a language, and a fingerprint of them all.

A *face* is one font of a file (a .ttc holds several). Its coverage is read from its cmap table, so a character that no face has is known before
anything is drawn. Fonts that Matplotlib brings (DejaVu) are always there; others are looked for where Debian and users put them. Colour fonts, fonts
of symbols and of mathematics, and those of extinct or decorative styles of a living script are left out.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import uharfbuzz as hb
from fontTools import unicodedata

from data_pipelines.text_rendering.languages import Language

FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
# Parts of family names. Nastaliq and Rashi are styles that most readers of the language do not expect; "Display" repeats a family at large sizes.
_UNFIT = ("Math", "Symbols", "Emoji", "Music", "Rashi", "Nastaliq", "SignWriting", "Display", "Unjoined", "Looped", "Mono CJK", "Hei Mono")
# Chinese characters differ in shape by region: a face made for one, by a word of its family's name, is not used for another.
_REGIONS = {"SC": "zh-Hans", "WenQuanYi": "zh-Hans", "TC": "zh-Hant", "HK": "zh-Hant-HK", "JP": "ja", "KR": "ko"}
_FAMILY, _STYLE = (hb.OTNameIdPredefined.FONT_FAMILY, hb.OTNameIdPredefined.FONT_SUBFAMILY)
_PREFERRED = (hb.OTNameIdPredefined.TYPOGRAPHIC_FAMILY, hb.OTNameIdPredefined.TYPOGRAPHIC_SUBFAMILY)


@dataclasses.dataclass(frozen=True)
class Face:
  """One font.

  Attributes:
    path, number: file, and place in it.
    family, style: names, such as "Noto Serif" and "Bold Italic".
    version: what tells it from other releases, hexadecimal digits.
  """

  path: str
  number: int
  family: str
  style: str
  version: str

  @property
  def name(self) -> str:
    """Family and style."""
    return f"{self.family} {self.style}"

  @property
  def is_bold(self) -> bool:
    return "Bold" in self.style or "Black" in self.style

  @property
  def is_thin(self) -> bool:
    """Whether its strokes are too thin to be read on what is not plain."""
    return "Light" in self.style or "Thin" in self.style

  @property
  def is_italic(self) -> bool:
    return "Italic" in self.style or "Oblique" in self.style

  @property
  def kind(self) -> str:
    """"monospaced", "serif" or "sans-serif", by the family's name."""
    if "Mono" in self.family:
      return "monospaced"
    return "serif" if any(word in self.family for word in ("Serif", "Naskh", "Times", "Roman")) and "Sans" not in self.family else "sans-serif"

  @functools.cached_property
  def font(self) -> hb.Font:
    """The font, in units of its em square."""
    return hb.Font(_open(self.path, self.number))

  @functools.cached_property
  def em(self) -> int:
    """Side of the em square, in units of the font."""
    return self.font.face.upem

  @functools.cached_property
  def coverage(self) -> hb.Set:
    """The code points that it has glyphs for."""
    return self.font.face.unicodes

  @functools.cached_property
  def extents(self) -> dict[int, tuple[float, float, float, float]]:
    """Ink boxes of glyphs that were asked for, see `ink`."""
    return {}

  def ink(self, glyph: int) -> tuple[float, float, float, float]:
    """Ink box of a glyph, (left, bottom, right, top) in ems from its origin, y upwards; all 0 for none."""
    found = self.extents.get(glyph)
    if found is None:
      box, em = self.font.get_glyph_extents(glyph), self.em
      found = (0.0, 0.0, 0.0, 0.0) if box is None else (
          box.x_bearing / em, (box.y_bearing + box.height) / em, (box.x_bearing + box.width) / em, box.y_bearing / em)
      self.extents[glyph] = found
    return found

  def covers(self, text: Iterable[str]) -> bool:
    """Whether it has all characters, but for spaces and what is not drawn."""
    return all(ord(c) in self.coverage for c in text if not is_blank(c))

  def suits(self, language: str) -> bool:
    """Whether its shapes are those of the region, where Chinese characters differ by region."""
    made_for = [code for word, code in _REGIONS.items() if word in self.family.split()]
    return not made_for or language in made_for


def is_blank(character: str) -> bool:
  """Whether a character is a space or a joiner, which needs no glyph."""
  return character.isspace() or character in "\u200b\u200c\u200d\u2060\ufeff\u00ad"


def _open(path: str, number: int) -> hb.Face:
  return hb.Face(hb.Blob.from_file_path(path), number)


def find_faces(folders: Sequence[str] = FOLDERS) -> tuple[Face, ...]:
  """Returns the fit faces below some folders and those that Matplotlib brings, each name once, ordered by name."""
  found = {}
  for path in [*_bundled(), *_files(folders)]:
    for face in _faces(path):
      known = found.get(face.name)
      if known is None or (face.version, face.path) > (known.version, known.path):
        found[face.name] = face
  return tuple(found[name] for name in sorted(found))


def _bundled() -> list[str]:
  spec = importlib.util.find_spec("matplotlib")  # importing it takes half a second
  folder = pathlib.Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" if spec else None
  return sorted(map(str, folder.glob("DejaVu*.ttf"))) if folder else []


def _files(folders: Sequence[str]) -> list[str]:
  paths = (path for folder in folders for path in pathlib.Path(os.path.expanduser(folder)).rglob("*"))
  return sorted(str(path) for path in paths if path.suffix.lower() in SUFFIXES)


def _faces(path: str) -> list[Face]:
  found = []
  for number in range(max(1, _open(path, 0).count)):
    face = _open(path, number)
    family, style = (face.get_name(first) or face.get_name(second) or "" for first, second in zip(_PREFERRED, (_FAMILY, _STYLE)))
    if not family or any(word in family for word in _UNFIT) or face.has_color_png or face.has_color_paint or face.has_color_layers:
      continue
    tables = b"".join(face.reference_table(tag).data for tag in ("head", "maxp", "OS/2"))
    found.append(Face(path, number, family, style or "Regular", hashlib.sha256(tables).hexdigest()[:16]))
  return found


# ---- which fonts set a language -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Typeface:
  """A face, and others that have what it lacks, such as Latin letters in Arabic text; the first that has a character sets it."""

  faces: tuple[Face, ...]

  @property
  def main(self) -> Face:
    """The face that gives it its name."""
    return self.faces[0]

  @functools.cached_property
  def _chosen(self) -> dict[str, int | None]:
    return {}

  def choose(self, character: str) -> int | None:
    """Place in `faces` of the first that has a character; None if none does."""
    if character not in self._chosen:
      self._chosen[character] = next((i for i, face in enumerate(self.faces) if ord(character) in face.coverage), None)
    return self._chosen[character]

  def covers(self, text: Iterable[str]) -> bool:
    """Whether some face has each of the characters, but for spaces and what is not drawn."""
    return all(is_blank(c) or self.choose(c) is not None for c in set(text))


def typefaces(faces: Sequence[Face], language: Language) -> tuple[Typeface, ...]:
  """Returns the typefaces for a language: a face that has all letters of its own scripts, with companions for whatever else its texts hold.

  Raises:
    ValueError: there is none; names the Debian package.
  """
  own = "".join(sorted(c for c in language.characters if unicodedata.script(c) in language.scripts))
  rest = language.characters
  fit = [face for face in faces if face.suits(language.code) and face.covers(own) and not (face.is_italic and not language.has_italics)]
  found = [Typeface((face, *_companions(faces, face))) for face in fit]
  found = [one for one in found if one.covers(rest)]
  if not found:
    raise ValueError(f"No font of this machine has all characters of {language.name} ({language.code}): apt-get install {language.package}, or leave "
                     f"{language.code} out of the languages.")
  noto = [one for one in found if "DejaVu" not in one.main.family]
  return tuple(noto if noto and not language.with_dejavu else found)


def _companions(faces: Sequence[Face], face: Face) -> list[Face]:
  """The faces of its style that set Latin, digits and signs beside a face."""
  family = {"serif": "Noto Serif", "monospaced": "Noto Sans Mono", "sans-serif": "Noto Sans"}[face.kind]
  names = [f"{name} {'Bold' if face.is_bold else plain}" for name, plain in (
      (family, "Regular"), ("DejaVu Serif" if face.kind == "serif" else "DejaVu Sans", "Book"))]
  return [one for name in names for one in faces if one.name == name and one != face]


@functools.cache
def monospaced(typeface: Typeface) -> Typeface:
  """The monospaced face that Matplotlib brings, with a typeface for what it lacks."""
  return Typeface((next(face for face in find_faces(()) if face.name == "DejaVu Sans Mono Book"), *typeface.faces))


def fingerprint(chosen: Mapping[str, Sequence[Typeface]]) -> str:
  """Sixteen hexadecimal digits that differ where the fonts of some language do, by name or release. Where they lie does not matter."""
  lines = sorted({f"{code} {place} {face.name} {face.version}"
                  for code, some in chosen.items() for one in some for place, face in enumerate(one.faces)})
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
