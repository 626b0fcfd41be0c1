"""A set of reference features that is kept in a file, and the figures of a drawn set against it."""

import dataclasses
import io
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from absl import logging

from qimg2.evaluation import Figure, fidelity
from qimg2.evaluation.moments import Moments, check_features
from qimg2.places import write_file

# What the figures of a set are, for tables.
FIGURES = {"fid": Figure("fid", is_share=False, lower_is_better=True), "kid": Figure("kid", is_share=False, lower_is_better=True),
           "cmmd": Figure("cmmd", is_share=False, lower_is_better=True), "precision": Figure("precision"), "recall": Figure("recall"),
           "density": Figure("density", is_share=False), "coverage": Figure("coverage"), "diversity": Figure("diversity", is_share=False)}


@dataclasses.dataclass(frozen=True)
class ReferenceSet:
  """Features of reference pictures.

  Attributes:
    features: [n, D] float32.
    network: what made them; features of another one do not compare.
  """
  features: np.ndarray
  network: str

  def save(self, path: str | pathlib.Path) -> None:
    """Writes an .npz file that `load` reads, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, features=self.features, network=np.array(self.network))
    write_file(pathlib.Path(path), content.getvalue())

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "ReferenceSet":
    """The set of a file that `save` wrote.

    Raises:
      ValueError: no such file, a damaged one, or one of something else.
    """
    if not pathlib.Path(path).is_file():
      raise ValueError(f"There is no reference file {path}: give the .npz that was kept, or the folder of the reference pictures.")
    try:
      found = np.load(path, allow_pickle=False)
      if isinstance(found, np.ndarray):
        raise ValueError("it holds one array")
      with found:
        made = cls(found["features"].astype(np.float32, copy=False), str(found["network"]))
      check_features(made.features)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
      raise ValueError(f"{path} is no file of reference features ({error}): make it anew from the reference pictures.") from error
    return made

  def check_network(self, network: str) -> None:
    """Raises a `ValueError` if another network than `network` made this set."""
    if self.network != network:
      raise ValueError(f"The reference features are of {self.network}, those of the pictures of {network}: make the reference anew with this network "
                       "and these settings.")

  def figures(self, blocks: Iterable[tuple[Sequence[str], np.ndarray]]) -> Mapping[str, float]:
    """`Suite.of_set`: {"fid", "fid_full_rank", "kid", "kid_deviation", "cmmd", "precision", "recall", "density", "coverage", "diversity",
    "diverse_prompts"} of blocks of (names of prompts, features [b, D]).

    "fid_full_rank" is 1 where both sets have more pictures than features have numbers. "diversity" is there where a prompt has two pictures, and the
    support's four where both sets have more than three. What must be said beside them is logged.

    Raises:
      ValueError: features of another width or that are not finite, or fewer than two pictures in a set.
    """
    names, parts = [], []
    for some, features in blocks:
      names += some
      parts.append(features)
    drawn = np.concatenate(parts) if parts else np.zeros((0, self.features.shape[1]), np.float32)
    parts.clear()
    one, other = (Moments.of_blocks(x[start:start + 1024] for start in range(0, len(x), 1024)) for x in (drawn, self.features))
    found = {"fid": fidelity.fid(one, other), "fid_full_rank": float(min(one.num, other.num) > drawn.shape[1])}
    for note in fidelity.notes(one.num, other.num, drawn.shape[1]):
      logging.warning("%s", note)
    found["kid"], found["kid_deviation"] = fidelity.kid(drawn, self.features)
    found["cmmd"] = fidelity.cmmd(drawn, self.features)
    if min(one.num, other.num) > fidelity.NEIGHBOURS:
      found |= fidelity.support(self.features, drawn)
    diverse, found["diverse_prompts"] = fidelity.diversity(names, drawn)
    return found if diverse is None else found | {"diversity": diverse}


def make_reference(pictures: Iterable[np.ndarray], features: Callable[..., np.ndarray], network: str, block: int = 32) -> ReferenceSet:
  """The set of pictures [H, W, 3] uint8, read a block at a time.

  Raises:
    ValueError: no picture, or features that are not finite.
  """
  parts, some = [], []
  for picture in pictures:
    some.append(picture)
    if len(some) == block:
      parts.append(features([None] * block, some))
      some = []
  if some:
    parts.append(features([None] * len(some), some))
  if not parts:
    raise ValueError("The reference has no picture: give a folder with some.")
  found = np.concatenate(parts)
  check_features(found)
  return ReferenceSet(found, network)
