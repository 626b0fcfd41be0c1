"""Texts set in type: pictures whose every letter is known, as a data set that has no end.

Reading order:

  settings.py   what is drawn, as one value
  languages.py  what a language is: one file each in language_files/
  fonts.py      fonts of this machine, by what they cover
  words.py      what is written: grammars, CLDR, a user's texts
  shaping.py    a line of text to glyphs with their places
  breaking.py   where a line may end
  layout.py     a text in a frame: lines, size, columns, ink boxes
  colours.py    names, and contrast by WCAG
  drawing.py    paper and ink
  captions.py   what is said of a picture
  pages.py      what all kinds of pictures share: the page, texts in their places, their truth
  pure.py       words, lines and paragraphs on paper, with their truth
  source.py     any picture by its number
  stored.py     the folder by which a mixture names it

Left out: kinds with a user's pictures behind the text, templates, and edits.
"""
