"""From raw pictures to batches. Needs no accelerator and no deep-learning library.

Reading order:

  transforms.py   encoded bytes <-> uint8 pixels, fitted to a size
  buckets.py      the few sizes a batch can have
  tokenizer.py    prompt templates and byte-level BPE
  drawing.py      anti-aliased masks of letters, digits and shapes
  glyphs.py       the embedded data set: exact pictures, exact captions, an exact score
  glyph_edits.py  its editing pairs: a picture, an instruction, the picture after it
  emoji.py        an optional one: emoji with names in a hundred languages
  emoji_pairs.py  its editing pairs: skin tone, gender, direction
  embedded.py     builds these
  text_rendering/ texts set in type, any number of them; its __init__.py gives the reading order
  records.py      writing and reading data sets (TFDS, ArrayRecord)
  curation/       your own pictures to such data sets; needs requirements-data.txt
  cache.py        data sets that hold latents in place of pixels
  order.py        shuffles and shares that can be asked at any point
  mixture.py      which records batch k holds
  loader.py       batch k of a run, and one pass for evaluation
"""
