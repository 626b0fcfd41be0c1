"""What a mixture is made of: data sets, and resolutions with their batch shapes."""

import dataclasses
from collections.abc import Mapping, Sequence

from data_pipelines import buckets as sizes

TASKS = ("t2i", "ti2i")
SLOT_PX = 32  # side of one vision slot


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
  """One data set of a mixture.

  Attributes:
    data_dir, name, split: where it is.
    weight: its share of the batches, relative to the other data sets.
    task: "t2i" or "ti2i".
    min_quality: records below it are not used.
    min_stage: records that did not pass the filters of this data stage (1 to 6) are not used.
    languages: captions in others are not used; empty takes all.
    caption_weights: kind of caption -> how often it is drawn where a record has several kinds; empty draws all kinds alike, and a kind that
      is not named, or has weight 0, is not used.
    max_enlarge: at each resolution, records whose picture would be scaled up by more than this to cover the nearest target size are not used; 0
      takes any.
    alpha: whether the pictures' transparency is kept, for a VAE of four channels; otherwise they are laid on white paper.
    shuffle_tags, drop_tags, keep_tags, tag_separator: of captions that are lists of tags, see `data_pipelines.tags`: whether their order is another
      in each epoch, the chance that a tag is left out, 0 to 1, how many of the first are always there in their places, and what is between them.
    loss_weight: what the loss of its examples is multiplied by. With `weight`, its share of the batches, this is prior preservation (arXiv
      2208.12242): pictures that the model drew before training, beside those of the new subject.
    ignore_rejected: whether a method that takes no pairs may train on the pictures of records that have a rejected one, too.
  """

  data_dir: str
  name: str
  split: str = "train"
  weight: float = 1.0
  task: str = "t2i"
  min_quality: float = 0.0
  min_stage: int = 0
  languages: tuple[str, ...] = ()
  caption_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  max_enlarge: float = 0.0
  alpha: bool = False
  shuffle_tags: bool = False
  drop_tags: float = 0.0
  keep_tags: int = 0
  tag_separator: str = ","
  loss_weight: float = 1.0
  ignore_rejected: bool = False


@dataclasses.dataclass(frozen=True)
class Resolution:
  """Buckets of nearly one area.

  Attributes:
    base_px: side of the square of that area.
    batch_size: rows of the global batch.
    ratios: width to height of the buckets.
    weight: how often its records are seen, relative to the other resolutions.
    multiple: what the sides are multiples of, px.
    ratio_weights: the same as `weight` for each of the ratios; empty for 1.0 each.
  """

  base_px: int
  batch_size: int
  ratios: tuple[float | str, ...] = sizes.RATIOS
  weight: float = 1.0
  multiple: int = 32
  ratio_weights: tuple[float, ...] = ()

  def __post_init__(self):
    if min(self.base_px, self.batch_size, self.multiple) < 1:
      raise ValueError(f"base_px={self.base_px}, batch_size={self.batch_size} and multiple={self.multiple} must be at least 1.")
    if not self.ratios:
      raise ValueError(f"The resolution of {self.base_px} px has no ratios: give at least one, such as '1:1'.")


def source_grids(source_sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
  """Returns (rows, columns) of vision slots of condition images of (height, width) px."""
  return tuple((height // SLOT_PX, width // SLOT_PX) for height, width in source_sizes)
