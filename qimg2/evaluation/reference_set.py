"""A set of reference features that is kept in a file, and the figures of a drawn set against it."""

import dataclasses
import io
import math
import pathlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from absl import logging

from qimg2.evaluation import Figure, fidelity
from qimg2.evaluation.moments import Moments, check_features
from qimg2.evaluation.statistics import Scores
from qimg2.evaluation.statistics.intervals import clustered_t
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

  def figures(self, blocks: Iterable[tuple[Sequence[str], np.ndarray]]) -> Mapping[str, float | str]:
    """`Suite.of_set`: {"num_pictures", "num_reference", "fid", "fid_full_rank", "kid", "kid_deviation", "cmmd", "precision", "recall", "density",
    "coverage", "diversity", "diversity_low", "diversity_high", "diverse_prompts", "notes"} of blocks of (names of prompts, features [b, D]).

    The numbers of pictures are those that the figures are of. "fid_full_rank" is 1 where both sets have more pictures than features have numbers. The
    ends of diversity are those of its 95 % interval over prompts. What pictures do not allow is missing: diversity where no prompt has two, its ends
    where fewer than two prompts have, the support's four where a set has at most three, CMMD and diversity where a vector has only zeros, all where
    fewer than two pictures were drawn, and what is not finite. "notes", a text, says so, and what else must be said; there is none for nothing.

    Raises:
      ValueError: features of another width or that are not finite.
    """
    names, parts = [], []
    for some, features in blocks:
      names += some
      parts.append(features)
    drawn = np.concatenate(parts) if parts else np.zeros((0, self.features.shape[1]), np.float32)
    parts.clear()
    sizes = {"num_pictures": len(drawn), "num_reference": len(self.features)}
    if len(drawn) < 2:
      return sizes | {"notes": f"Distances between sets need at least two pictures, but {len(drawn)} has features: no figures."}
    found, notes = self._distances(drawn)
    diverse, more = _diversity(names, drawn)
    found |= diverse
    odd = [name for name, value in found.items() if not math.isfinite(value)]
    notes += more + [f"Not finite, and left out: {', '.join(odd)}. Run the feature network in float32."] * bool(odd)
    for note in notes:
      logging.warning("%s", note)
    return sizes | {name: value for name, value in found.items() if name not in odd} | ({"notes": " ".join(notes)} if notes else {})

  def _distances(self, drawn: np.ndarray) -> tuple[dict[str, float], list[str]]:
    """(figures, notes) of at least two pictures against the reference."""
    one, other = (Moments.of_blocks(x[start:start + 1024] for start in range(0, len(x), 1024)) for x in (drawn, self.features))
    notes = fidelity.notes(one.num, other.num, drawn.shape[1])
    found = {"fid": fidelity.fid(one, other), "fid_full_rank": float(min(one.num, other.num) > drawn.shape[1])}
    found["kid"], found["kid_deviation"] = fidelity.kid(drawn, self.features)
    if zeros := _num_zeros(drawn) + _num_zeros(self.features):
      notes.append(f"CMMD: the network gave {zeros} of the pictures and references only zeros, which have no direction: no figure.")
    else:
      found["cmmd"] = fidelity.cmmd(drawn, self.features)
    if min(one.num, other.num) > fidelity.NEIGHBOURS:
      return found | fidelity.support(self.features, drawn), notes
    return found, notes + [f"Precision, recall, density and coverage need more than {fidelity.NEIGHBOURS} pictures in each set: no figures."]


def _diversity(names: Sequence[str], drawn: np.ndarray) -> tuple[dict[str, float], list[str]]:
  """(diversity with its interval, notes)."""
  if zeros := _num_zeros(drawn):
    return {}, [f"Diversity: the network gave {zeros} of the pictures only zeros, which have no direction: no figure."]
  of_prompts = fidelity.diversities(names, drawn)
  if not of_prompts:
    return {"diverse_prompts": 0}, ["Diversity: no prompt has two pictures: no figure."]
  interval = clustered_t(Scores(list(of_prompts.values()), None, list(of_prompts)))
  found = {"diversity": interval.value, "diversity_low": interval.low, "diversity_high": interval.high, "diverse_prompts": len(of_prompts)}
  return {name: value for name, value in found.items() if value is not None}, [f"Diversity: {interval.note}."] * bool(interval.note)


def _num_zeros(features: np.ndarray) -> int:
  """Number of vectors without a direction, as `fidelity` measures length."""
  return int((np.einsum("nd,nd->n", features, features, dtype=np.float64).astype(np.float32) == 0).sum())


def make_reference(blocks: Iterable[np.ndarray], network: str) -> ReferenceSet:
  """The set of all features of blocks [n, D].

  Raises:
    ValueError: no picture, or features that are not finite.
  """
  parts = list(blocks)
  if not parts:
    raise ValueError("The reference has no picture: give a folder with some.")
  found = np.concatenate(parts)
  check_features(found)
  return ReferenceSet(found, network)
