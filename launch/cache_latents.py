"""Writes the VAE's latents of a stage's data sets, and with --features the condition encoder's states, as data sets that a stage can train on.

  python -m launch.cache_latents --config=configs/quickstart.py --stage=high_resolution --workdir=runs/quickstart [--features]

Next to every data set NAME of the stage's mixture is then NAME_latents, with the splits train and validation, for the stage's resolutions and
the tasks that the mixture names. Put that name in the mixture, and training reads latents in place of pixels: the same batches in the same
order, and the same losses up to rounding. See data_pipelines.cache for what is stored. The weights are those that the stage trains with.

A record is cached once for each resolution where it fits a bucket of the stage, in that bucket's shape, whatever min_quality, languages and
caption kinds say. dataset.json says for which buckets that was, and other stages with these can use the cache, too. Records that cannot be decoded
are left out and named. Interrupted, the same command goes on with the shards that are missing and ends with the same files. Several machines that
share a file system divide the work by --part=0/4 to --part=3/4, one process each; when all are done, the command without --part puts the data set
together.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from data_pipelines.cache import DTYPES
from launch import cli
from qimg2.runtime.caching.latents import cache_latents
from qimg2.runtime.caching.networks import Options
from qimg2.runtime.config import parse


def define_flags() -> None:
  """The flags of this launcher."""
  config_flags.DEFINE_config_file("config", None, "File of the config, such as configs/quickstart.py.")
  flags.mark_flag_as_required("config")
  flags.DEFINE_string("stage", None, "Stage whose resolutions, data sets and frozen weights to take.", required=True)
  flags.DEFINE_string("workdir", None, "Folder of the run, where the weights of earlier stages and of frozen networks are.", required=True)
  flags.DEFINE_string("name", "", "Name of the cache; empty for that of the data set with _latents.")
  flags.DEFINE_bool("features", False, "Store the condition encoder's states, too.")
  flags.DEFINE_enum("dtype", "float16", DTYPES, "Type of what is stored.")
  flags.DEFINE_integer("batch_size", 0, "Pictures at a time; 0 takes that of the stage.", lower_bound=0)
  flags.DEFINE_integer("shard_records", 1024, "Records of the original per shard; what is lost at most when interrupted.", lower_bound=1)
  flags.DEFINE_string("part", "", "i/n: write only every n-th shard from the i-th on, beside other processes; empty writes all and finishes.")


def _parse_part(text: str) -> tuple[int, int] | None:
  numbers = text.split("/")
  if text and not (len(numbers) == 2 and all(number.isdecimal() for number in numbers)):
    raise ValueError(f"--part={text} is not understood: write it as i/n, such as 0/4.")
  return (int(numbers[0]), int(numbers[1])) if text else None


def main(_: Sequence[str]) -> None:
  """Caches as the flags say."""
  args = flags.FLAGS
  options = Options(args.features, args.dtype, args.batch_size, args.shard_records, _parse_part(args.part))
  for facts in cache_latents(parse(args.config), args.stage, args.workdir, args.name, options):
    if facts["path"] is None:
      print(f"{facts['shards_done']} of {facts['shards']} shards are there; when all are, run the same command without --part.")
      continue
    print(f"{'Found' if facts['reused'] else 'Wrote'} {facts['path']}")
    for name, value in facts.items():
      if name not in ("path", "reused"):
        print(f"  {name:24} {value}")


if __name__ == "__main__":
  cli.run(main, define_flags)
