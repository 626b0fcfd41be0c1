"""The batches that a stage has, from its config alone or from the index of its data, and which of them to rehearse."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from data_pipelines.buckets import Bucket, bucket_size, parse_ratio
from data_pipelines.cache import DTYPES, Cache
from data_pipelines.loader import Loader
from data_pipelines.mixture import Mixture
from data_pipelines.specs import Resolution, source_grids
from data_pipelines.tokenizer import PromptTokenizer
from qimg2.runtime import micro_batches
from qimg2.runtime.config import RunConfig, StageConfig
from qimg2.runtime.config.rewards import declare
from qimg2.runtime.kept_data import tokenizer_path
from qimg2.runtime.methods import make_algorithm
from qimg2.runtime.rehearsal.table import EVALUATION, SAMPLES, STEP
from qimg2.runtime.run import fold_name

SYSTEM_TOKENS, WORDS_PER_IMAGE = 12, 6  # where there is no tokenizer


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which stages and buckets to rehearse; empty takes all. Without `all_buckets`, of each resolution the square and the widest alone, or with
  `squares` the square alone. With `index` the buckets are those that the stage's data sets give, and without `all_buckets` the heaviest of each task
  alone. `whole` rehearses what runs beside the step, too."""
  stages: tuple[str, ...] = ()
  tasks: tuple[str, ...] = ()
  base_px: tuple[int, ...] = ()
  all_buckets: bool = False
  squares: bool = False
  index: bool = False
  whole: bool = False


class Shapes:
  """The batches of a config's stages."""

  def __init__(self, cfg: RunConfig, tokenizer: PromptTokenizer | None, parts: int):
    """Args: the config; its tokenizer, None for estimates; over how many devices rows are divided."""
    self.cfg, self.tokenizer, self._parts = cfg, tokenizer, parts
    self._indexed: dict[str, tuple[Bucket, ...]] = {}

  def buckets(self, config: StageConfig, choice: Choice = Choice()) -> list[Bucket]:
    """The chosen batch shapes of a stage: tasks in the order of the mixture, resolutions in that of the config. Those of a stage with
    `offload_frozen` hold what launch.cache_latents --features would write.

    Raises:
      ValueError: `choice.index` without a tokenizer, or without the data.
    """
    if choice.index:
      return self._chosen_of_index(config, choice)
    found, algorithm = {}, make_algorithm(config.algorithm.name, config.algorithm.settings, self.cfg.schedule, declare(config.rewards))
    for task in _tasks(config, choice):
      for resolution in config.resolutions:
        if choice.base_px and resolution.base_px not in choice.base_px:
          continue
        for ratio in _ratios(resolution.ratios, choice):
          sources = (bucket_size(resolution.base_px, ratio, 32),) if task == "ti2i" else ()
          size = bucket_size(resolution.base_px, ratio, resolution.multiple)
          classes = [Bucket(task, *size, sources, self._cache(config), num_tokens=words + self.image_tokens(source_grids(sources)),
                            batch_size=resolution.batch_size, pairs=algorithm.pairs)
                     for words in (self.cfg.num_tokens, *sorted(self.cfg.prompt_classes, reverse=True))]
          found |= dict.fromkeys(self._heaviest(config, classes))
    return list(found)

  def _cache(self, config: StageConfig) -> Cache | None:
    """How the data of a stage would be cached, None for pixels."""
    system = self.tokenizer.num_system_tokens if self.tokenizer else SYSTEM_TOKENS
    cache = Cache(DTYPES[0], self.cfg.vae.latent_channels, self.cfg.vae.spatial_factor, self.cfg.encoder.width, system)
    return cache if config.offload_frozen else None

  def _heaviest(self, config: StageConfig, classes: list[Bucket]) -> list[Bucket]:
    """Of buckets in the order of their rows' lengths the longest, and of each policy that with the most tokens at once: of short rows more may
    fit into a micro-batch than fill it with long ones."""
    if not self.cfg.micro_batches:
      return classes[:1]
    fullest: dict[str, tuple[float, Bucket]] = {}
    for bucket in classes:
      remat, accumulate = micro_batches.choose(self.cfg, config, bucket, self._parts)
      tokens = bucket.batch_size / accumulate * micro_batches.num_tokens(bucket, self.cfg.vae.spatial_factor)
      if remat not in fullest or tokens > fullest[remat][0]:
        fullest[remat] = tokens, bucket
    return list(dict.fromkeys((classes[0], *(bucket for _, bucket in fullest.values()))))

  def _chosen_of_index(self, config: StageConfig, choice: Choice) -> list[Bucket]:
    found = {}
    for task in _tasks(config, choice):
      some = [one for one in self._of_index(config) if one.task == task
              and (not choice.base_px or resolution_of(config, one).base_px in choice.base_px)]
      some.sort(key=lambda one: micro_batches.num_tokens(one, self.cfg.vae.spatial_factor), reverse=True)
      found |= dict.fromkeys(some if choice.all_buckets or not some else self._heaviest(config, some))
    return list(found)

  def _of_index(self, config: StageConfig) -> tuple[Bucket, ...]:
    """All buckets of a stage's training data, as the run makes them."""
    if config.name not in self._indexed:
      if self.tokenizer is None:
        raise ValueError(f"--index needs the tokenizer that the data were prepared with, and {tokenizer_path(self.cfg)} is none: set "
                         "config.tokenizer, or config.data_dir to the folder of the data sets.")
      classes = () if config.kind == "autoencoder" else self.cfg.prompt_classes
      self._indexed[config.name] = Mixture(
          config.mixture, config.resolutions, self.cfg.num_tokens, self.tokenizer, fold_name(self.cfg.seed, config.name), classes, config.max_crop,
          config.min_bucket_records, config.max_programs, truncate=config.truncates,
          captions=config.kind != "autoencoder").buckets
    return self._indexed[config.name]

  def num_programs(self, config: StageConfig, choice: Choice) -> tuple[int, bool]:
    """(how many steps a stage compiles, whether that is exact): the buckets of its data, or at most `max_programs`, because records with other
    condition images than the config's buckets may come."""
    if choice.index:
      return len(self._of_index(config)), True
    sizes = sum(len({bucket_size(one.base_px, ratio, one.multiple) for ratio in one.ratios}) for one in config.resolutions)
    classes = 1 if config.kind == "autoencoder" else 1 + len(self.cfg.prompt_classes)
    known = sizes * classes if {part.task for part in config.mixture} == {"t2i"} else math.inf
    return (min(known, config.max_programs or known) if known < math.inf else config.max_programs), False

  # What is on the devices beside a training batch.

  def held_out(self, config: StageConfig, bucket: Bucket) -> Bucket:
    """`bucket` with as many rows as a held-out batch of its shape has."""
    rows = micro_batches.held_out_rows(self.cfg, config, bucket.task, resolution_of(config, bucket), self.image_tokens, self._parts)
    return dataclasses.replace(bucket, batch_size=rows)

  def beside_the_step(self, config: StageConfig, buckets: Sequence[Bucket]) -> list[tuple[str, Bucket]]:
    """(program, bucket) of what a stage runs besides its step: of each task, with the largest of the held-out batches of `buckets`."""
    found = []
    for task in dict.fromkeys(bucket.task for bucket in buckets):
      largest = max((self.held_out(config, bucket) for bucket in buckets if bucket.task == task), key=self.batch_bytes)
      sheet = dataclasses.replace(largest, batch_size=-(-self.cfg.sampling.num_images // self._parts) * self._parts)
      found += [(EVALUATION, largest), *([(SAMPLES, sheet)] if config.kind == "generator" else [])]
    return found

  def beside_bytes(self, config: StageConfig, choice: Choice, program: str) -> float:
    """Bytes of the batches that a device holds while a program of a stage runs, beside that program's own.

    These are: of training batches the one that is on its way and the next one, while something else than the step runs one alone; and of each
    task the held-out batch that sheets of samples are drawn from. Each counts as the largest that the stage has.
    """
    buckets = self.buckets(config, dataclasses.replace(choice, tasks=(), base_px=(), all_buckets=True))
    kept = sum(max(self.batch_bytes(self.held_out(config, one)) for one in buckets if one.task == task) for task in _tasks(config, Choice()))
    return kept + (2 if program == STEP else 1) * max(map(self.batch_bytes, buckets))

  def batch_bytes(self, bucket: Bucket) -> float:
    """Bytes of a batch of this shape on each device."""
    one = Loader.example(dataclasses.replace(bucket, batch_size=1))
    return -(-bucket.batch_size // self._parts) * sum(x.nbytes for x in _leaves(one))

  def image_tokens(self, grids: Sequence[tuple[int, int]]) -> int:
    return self.tokenizer.num_image_tokens(grids) if self.tokenizer else sum(h * w + WORDS_PER_IMAGE for h, w in grids)


def resolution_of(config: StageConfig, bucket: Bucket) -> Resolution:
  """The stage's resolution that a bucket is of: that with the nearest area."""
  return min(config.resolutions, key=lambda one: abs(math.log(bucket.height * bucket.width / one.base_px ** 2)))


def _tasks(config: StageConfig, choice: Choice) -> list[str]:
  return [task for task in dict.fromkeys(part.task for part in config.mixture) if not choice.tasks or task in choice.tasks]


def _leaves(batch: dict) -> list[Any]:
  return [leaf for value in batch.values() for leaf in (value if isinstance(value, tuple) else (value,))]


def _ratios(ratios: Sequence[Any], choice: Choice) -> list[Any]:
  """The chosen ones of a resolution's ratios: the one nearest to a square first."""
  if choice.all_buckets:
    return list(ratios)
  square, widest = min(ratios, key=lambda ratio: max(parse_ratio(ratio), 1 / parse_ratio(ratio))), max(ratios, key=parse_ratio)
  return [square] if choice.squares else list(dict.fromkeys((square, widest)))


def find_tokenizer(cfg: RunConfig) -> PromptTokenizer | None:
  """The tokenizer that the config names or whose data set is there; None if there is none."""
  path = tokenizer_path(cfg)
  return PromptTokenizer.load(path) if path.is_file() or (path / "tokenizer.json").is_file() else None
