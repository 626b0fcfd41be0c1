"""Prepares a data set and its tokenizer on disk.

  python -m launch.prepare_data --dataset=glyphs --out=/data     20800 letters and shapes, 10800 edits, half a minute
  python -m launch.prepare_data --dataset=emoji --out=/data      8202 emoji on paper, captions in 114 languages, 8085 edits

glyphs needs nothing but this project's packages; emoji needs the Debian packages fonts-noto-color-emoji and
unicode-cldr-core. The same command again uses what is there. An interrupted run leaves nothing that looks complete:
just start it again.
"""

from collections.abc import Sequence

from absl import flags

from data_pipelines import embedded
from launch import cli


def define_flags() -> None:
  flags.DEFINE_enum("dataset", "glyphs", sorted(embedded.SOURCES), "Which data set to prepare.")
  flags.DEFINE_string("out", None, "Folder that will hold <dataset>/.", required=True)
  flags.DEFINE_integer("num_examples", None, "Training pictures, editing pairs not counted; unset takes the data set's default.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Seed of everything random in the data set.", lower_bound=0)
  flags.DEFINE_integer("vocab_size", None, "Largest number of tokens; unset takes the data set's default.")


def prepare(dataset: str, out: str, num_examples: int | None = None, seed: int = 0,
            vocab_size: int | None = None) -> dict:
  """Returns the facts of the prepared data set, after printing them; see `data_pipelines.embedded.prepare`."""
  facts = embedded.prepare(dataset, out, num_examples, seed, vocab_size)
  print(f"{'Found' if facts['reused'] else 'Wrote'} {facts['path']}")
  for name, value in facts.items():
    if name not in ("path", "reused"):
      print(f"  {name:24} {value}")
  return facts


def main(_: Sequence[str]) -> None:
  args = flags.FLAGS
  prepare(args.dataset, args.out, args.num_examples, args.seed, args.vocab_size)


if __name__ == "__main__":
  cli.run(main, define_flags)
