"""Texts set in type: pictures whose every letter is known, as a data set that has no end.

Reading order:

  settings.py   what is drawn, as one value
  languages.py  what a language is: one file each in language_files/
  fonts.py      fonts of this machine, by what they cover
  words.py      what is written: grammars, CLDR, further texts
  corpora.py    further texts: a user's files, and what Debian packages carry
  shaping.py    a line of text to glyphs with their places
  breaking.py   where a line may end
  layout.py     a text in a frame: lines, size, columns, ink boxes
  colours.py    names, and contrast by WCAG
  drawing.py    paper and ink
  captions.py   what is said of a picture
  pages.py      what all kinds of pictures share: the page, texts in their places, their truth
  pure.py       words, lines and paragraphs on paper, with their truth
  templates.py  what a template of a complex page is: one file each in templates/
  filling.py    what fills it
  schemes.py    its colours
  shapes.py     boxes, lines, polygons and sectors
  regions.py    texts, rows, columns and boxes; tables.py, charts.py, scenes.py and formulas.py have more regions
  building.py   from a template to regions
  complex.py    pages from templates, with their truth
  page_captions.py   what is said of them
  warping.py    a plane in space, flat or bent, and back
  surfaces.py   signs, boards, paper, screens and cans; walls.py has what is behind them
  pictures.py   a user's pictures, and where in them there is room
  inking.py     objects and letters on the pixels of a picture, and their contrast there
  compositional.py   signs in scenes and on pictures, with their truth; objects_said.py has what is said of them
  letters.py    words that are spelt, and which of their letters a picture shows
  edits.py      another word, number, colour, font or place; texts that come, go or are translated: pairs of pictures with an instruction
  source.py     any picture by its number
  stored.py     the folder by which a mixture names it
"""
