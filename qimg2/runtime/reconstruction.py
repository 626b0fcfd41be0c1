"""Pictures through the VAE of a run or of a published folder, and how much of them comes back: rows as in scores.jsonl, and their summary."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines.curation.source_tars import IMAGE_EXTENSIONS
from data_pipelines.records import open_split
from data_pipelines.transforms import composite_on_white, decode_image
from qimg2.evaluation import ERROR, Suite, Task, ocr
from qimg2.evaluation.reconstruction import FIGURES, Distance, resolution, score
from qimg2.models import lpips
from qimg2.published.lpips import load_lpips
from qimg2.runtime.evaluating.summary import in_words as figure_in_words
from qimg2.runtime.evaluating.summary import row_of, summarise
from qimg2.runtime.generator import Source, pad, pad_size
from qimg2.runtime.phases import Phases
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.run import Run

NAME = "reconstruction"
MAX_WAITING = 64  # decoded pictures that wait for others of their size


@dataclasses.dataclass(frozen=True)
class Original:
  """A picture to reconstruct.

  Attributes:
    name: unique; a file's path below its folder.
    kind: figures are given for each kind too.
    read: gives the encoded picture.
  """
  name: str
  kind: str
  read: Callable[[], bytes]


def folder_pictures(folder: str | pathlib.Path) -> Iterator[Original]:
  """The pictures below a folder in the order of their names; the kind of one is the sub-folder of the first level that it is in.

  Raises:
    ValueError: no such folder, or none in it.
  """
  root = pathlib.Path(folder)
  found = sorted(path for path in root.rglob("*") if path.suffix.lower()[1:] in IMAGE_EXTENSIONS)
  if not found:
    raise ValueError(f"There is no picture below {folder}: give a folder of PNG, JPEG or WebP files.")
  for path in found:
    parts = path.relative_to(root).parts
    yield Original("/".join(parts), parts[0] if len(parts) > 1 else "", path.read_bytes)


def record_pictures(data_dir: str, name: str, split: str = "validation") -> Iterator[Original]:
  """The pictures of a prepared data set in the order of its records; their kinds are "text", where text can be read in them, and "no text".

  Raises:
    ValueError: no such data set or split.
  """
  source, index = open_split(data_dir, name, split)
  for number, (sample_id, has_text) in enumerate(zip(index["sample_id"], index["has_text"])):
    yield Original(str(int(sample_id)), "text" if has_text else "no text", lambda number=number: source[number]["image"])


class Autoencoder:
  """Pictures of any one size [n, H, W, 3] uint8 -> (their reconstructions [n, H, W, 3] uint8, [n] whether their pixels were finite), n at most the
  batch size.

  Pictures are padded to multiples of 32 px by reflection at the bottom and on the right, and cut back. A VAE with transparency gets opaque pictures,
  and what it gives is laid on white. Each padded size is compiled once.
  """

  def __init__(self, source: Source, weights: Any, batch_size: int = 1, vae_tile: int = 0):
    """Args: networks and mesh; the VAE's weights; pictures at a time, up to the next multiple of the mesh's rows; side in px of the VAE's tiles, see
    `qimg2.models.vae_tiling`, 0 for none.

    Raises:
      ValueError: a tile that does not fit the VAE.
    """
    rows = source.mesh.shape["data"] * source.mesh.shape["fsdp"]
    self.batch_size, self._weights = -(-batch_size // rows) * rows, weights
    self._phases = Phases(source.nets, source.mesh, source.rules, np.array([1.0, 0.0]), 1.0, False, vae_tile)

  def __call__(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reconstructions, and which of them are some."""
    num, height, width, _ = pictures.shape
    filled = np.concatenate([pictures, np.repeat(pictures[-1:], self.batch_size - num, axis=0)])
    latents = self._phases.encode_image(self._weights, pad(filled, *pad_size((height, width))))
    found, good = (x[:num] for x in self._phases.decode_image(self._weights, latents))
    found = found[:, :height, :width]
    return found if found.shape[-1] == 3 else np.stack([composite_on_white(one) for one in found]), good


def vae_weights(source: Run | Pretrained, stage: str = "", step: int | None = None) -> tuple[str, Any]:
  """(stage, weights of the VAE) of a run's stage, the last that has a checkpoint where none is named; ("", weights) of a published folder. Other
  networks are not read.

  Raises:
    ValueError: no such stage or step, or nothing is trained.
  """
  if isinstance(source, Pretrained):
    return "", source.offloaded()["vae"]
  trained = [one.name for one in source.cfg.stages if (source.workdir / one.name / "checkpoints").is_dir()]
  name = stage or (trained[-1] if trained else "")
  if name not in trained:
    raise ValueError(f"Stage {name or '(any)'!r} of {source.workdir} has no VAE to reconstruct with; trained are: {', '.join(trained) or 'none'}.")
  return name, source.deployed_weights(name, step=step)["vae"]


def lpips_distance(path: str | pathlib.Path) -> tuple[str, Distance]:
  """("alex" or "vgg", LPIPS) of a file that `qimg2.published.lpips` describes; each size of pictures is compiled once.

  Raises:
    ValueError: no such file, or one of something else.
  """
  cfg, params = load_lpips(path)
  return cfg.net, functools.partial(jax.jit(lpips.distances, static_argnums=0), cfg, params)


def read_text(picture: np.ndarray) -> str:
  """What `qimg2.evaluation.ocr` reads in a picture [H, W, 3] uint8, a line of text each."""
  return "\n".join(line.text for line in ocr.read(picture))


def reconstruct(source: Source, weights: Any, pictures: Iterable[Original], batch_size: int = 1, vae_tile: int = 0,
                distance: Distance | None = None, read: Callable[[np.ndarray], str] | None = None) -> Iterator[dict[str, Any]]:
  """A row of scores.jsonl for each picture, as soon as those of its size fill a batch; see `qimg2.evaluation.reconstruction.score`.

  "category" is the kind, "details" have the "size" and the texts. A picture that cannot be decoded or scored has "error", the reason, in place of its
  metrics. At most `MAX_WAITING` pictures are held. Of several processes each must be given the same pictures.

  Args: as `Autoencoder`; pictures; LPIPS; OCR.
  """
  autoencode, waiting = Autoencoder(source, weights, batch_size, vae_tile), {}
  measure = functools.partial(score, distance=distance, read=read)
  for original in pictures:
    try:
      pixels = decode_image(original.read(), original.name)
    except (ValueError, OSError) as error:
      yield _row(original, {ERROR: str(error)})
      continue
    waiting.setdefault(pixels.shape, []).append((original, pixels))
    fullest = max(waiting, key=lambda shape: len(waiting[shape]))
    if len(waiting[fullest]) == autoencode.batch_size or sum(map(len, waiting.values())) > MAX_WAITING:
      yield from _scored(autoencode, measure, waiting.pop(fullest))
  for some in waiting.values():
    yield from _scored(autoencode, measure, some)


def _scored(autoencode: Autoencoder, measure: Callable[..., dict], some: Sequence[tuple[Original, np.ndarray]]) -> Iterator[dict[str, Any]]:
  for (original, pixels), found, good in zip(some, *autoencode(np.stack([pixels for _, pixels in some]))):
    try:
      yield _row(original, measure(pixels, found) if good else {ERROR: "the VAE gave pixels that are not finite"}, pixels.shape[:2])
    except ValueError as error:
      yield _row(original, {ERROR: str(error)}, pixels.shape[:2])


def _row(original: Original, scores: Mapping[str, Any], size: tuple[int, ...] = (0, 0)) -> dict[str, Any]:
  sized = scores if ERROR in scores else {**scores, "size": list(size)}
  return row_of(NAME, original.name, Task("", size, category=original.kind), 0, original.name, sized)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """What rows of `reconstruct` say: figures with their 95 % intervals over pictures, of all and by kind, as
  `qimg2.runtime.evaluating.summary.summarise`, and in "resolutions" of each class of sizes. Metrics that no row has are left out.

  Raises:
    ValueError: no row, or none with metrics.
  """
  good = [row for row in rows if ERROR not in row]
  if not good:
    raise ValueError(f"None of {len(rows)} pictures could be scored" + (f"; the first: {rows[0][ERROR]}" if rows else ": give some."))
  suite = Suite(lambda num, seed: [], figures={name: figure for name, figure in FIGURES.items() if any(name in row["metrics"] for row in good)})
  found = summarise(suite, rows)
  classes: dict[str, list[Mapping[str, Any]]] = {}
  for row in good:
    classes.setdefault(resolution(*row["details"]["size"]), []).append(row)
  return found | {"resolutions": {name: summarise(suite, some)["figures"] for name, some in sorted(classes.items())}}


def in_words(found: Mapping[str, Any]) -> str:
  """The figures of a `summary`, a line for all pictures and one for each kind and class of sizes, and why pictures were left out."""
  figures = lambda some: ", ".join(f"{name} {figure_in_words(value)}" for name, value in some.items())
  said = [f"{found['num_pictures']} pictures: {figures(found['figures'])}"]
  parts = {**found.get("categories", {}), **(found["resolutions"] if len(found["resolutions"]) > 1 else {})}
  said += [f"  {name or 'beside the folders'}: {figures(some)}" for name, some in parts.items()]
  if found["num_left_out"]:
    reason, count = next(iter(found["left_out"].items()))
    said.append(f"{found['num_left_out']} left out; {count} of them: {reason}")
  return "\n".join(said)
