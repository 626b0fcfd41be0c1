"""Captions that are lists of tags, "1girl, solo, red hair": their order and some of them are left to chance, so that a model depends on neither."""

import numpy as np

from data_pipelines.specs import DatasetSpec


def varies(spec: DatasetSpec) -> bool:
  """Whether training sees a data set's captions otherwise than they are written."""
  return spec.shuffle_tags or spec.drop_tags > 0


def vary(caption: str, spec: DatasetSpec, key: tuple[int, ...]) -> str:
  """Returns a caption as one epoch sees it: the first `keep_tags` tags as they are; of the others each is left out with the chance `drop_tags`, and
  the rest are in any order, if `shuffle_tags` says so.

  Args:
    caption: tags with the separator between them; without any it is no list, and stays as it is.
    spec: the data set.
    key: numbers that name the draw; the same ones give the same caption.
  """
  tags = [tag.strip() for tag in caption.split(spec.tag_separator) if tag.strip()]
  if len(tags) < 2:
    return caption
  first, others, rng = tags[:spec.keep_tags], np.array(tags[spec.keep_tags:], object), np.random.default_rng(key)
  stays, order = rng.random(len(others)) >= spec.drop_tags, rng.permutation(len(others))
  places = order if spec.shuffle_tags else np.arange(len(others))
  return f"{spec.tag_separator.rstrip()} ".join([*first, *others[places[stays[places]]]])
