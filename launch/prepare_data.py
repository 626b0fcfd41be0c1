"""Prepares a data set and its tokenizer on disk: your own pictures, or one that comes with the project.

  python -m launch.prepare_data --source=DIR --name=mine --out=/data       your pictures, curated; see docs/data.md
  python -m launch.prepare_data --source=SCORES --pairs_by=METRIC --name=pairs --out=/data   pairs of what launch.evaluate drew
  python -m launch.prepare_data --dataset=glyphs --out=/data     20800 letters and shapes, 10800 edits, half a minute
  python -m launch.prepare_data --dataset=emoji --out=/data      8202 emoji on paper, captions in 114 languages, 8085 edits
  python -m launch.prepare_data --dataset=rendered_text --out=/data   text in sixteen languages, drawn while training reads it
  python -m launch.prepare_data --verify --name=mine --out=/data           reads all of it back

--source is a folder of pictures with .txt or .json files or a metadata.jsonl beside them, a .csv, .jsonl or .parquet file, WebDataset tars such as
"shard-{000..127}.tar", or tfds:NAME; local, or gs://... It needs pip install -r requirements-data.txt. glyphs needs nothing but this project's
packages; emoji needs the Debian packages fonts-noto-color-emoji and unicode-cldr-core, rendered_text fonts-noto-core and fonts-noto-cjk.

The same command again uses what is there. An interrupted run leaves nothing that looks complete: just start it again. With --source it goes
on where it was, and its result is the same to the byte, whatever the number of workers.
"""

import importlib.util
import json
import os
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from configs import curation, rendered_text
from data_pipelines import embedded
from data_pipelines.verify import verify
from launch import cli

NEEDED = {"apache_beam": "apache-beam", "imagehash": "imagehash", "pyarrow": "pyarrow", "fsspec": "fsspec", "rapidocr": "rapidocr"}
TABLES = (".csv", ".tsv", ".jsonl")

RENDERED = "rendered_text"

READING = ("captions", "uncaptioned", "picture_root")  # flags that are also keys of config.reading


def define_flags() -> None:
  flags.DEFINE_string("source", None, "Your pictures: a folder, .csv, .jsonl, .parquet, .tar (also shard-{000..127}.tar) or tfds:NAME.")
  flags.DEFINE_enum("dataset", None, sorted([*embedded.SOURCES, RENDERED]), "A data set that comes with the project, in place of --source.")
  flags.DEFINE_string("name", None, f"Name of the data set that --source or {RENDERED} becomes, or that --verify reads.")
  flags.DEFINE_string("out", None, "Folder that will hold the data set's folder.", required=True)
  flags.DEFINE_bool("verify", False, "Read a data set back: checksums, and every record against the index.")
  default = pathlib.Path(__file__).parent.parent / "configs" / "curation.py"
  config_flags.DEFINE_config_file("config", str(default), f"What is kept of --source, and how it is stored; of {RENDERED}, what is drawn.")
  flags.DEFINE_enum("captions", None, ["whole", "lines"], "What a caption file with several lines is: one text, or a caption per line.")
  flags.DEFINE_enum("uncaptioned", None, ["drop", "keep", "file_name"],
                    "What becomes of a picture without a caption: it is dropped, kept (for a VAE), or has its file name as caption.")
  flags.DEFINE_string("picture_root", None, "Folder that the paths in a table are below, absolute ones too; unset takes the table's own folder.")
  flags.DEFINE_string("pairs_by", None, "With an evaluation's folder as --source: the metric by which the best and the worst picture of each prompt "
                      "become a pair, METRIC or SUITE/METRIC, with a - before it where less is better.")
  flags.DEFINE_string("runner", "DirectRunner", "The Beam runner: this machine's cores, or DataflowRunner, FlinkRunner, SparkRunner.")
  flags.DEFINE_integer("num_workers", 0, "Processes of the DirectRunner; 0 for one per core.", lower_bound=0)
  flags.DEFINE_string("beam_options", "", 'Further options of the runner, such as "--project=P --region=R --temp_location=gs://B/tmp".')
  flags.DEFINE_integer("num_examples", None, "Of --dataset: training pictures, editing pairs not counted; unset takes the data set's default, "
                       f"which for {RENDERED} is to store none.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Of --dataset: seed of everything random.", lower_bound=0)
  flags.DEFINE_integer("vocab_size", None, "Of --dataset: largest number of tokens; unset takes the data set's default.")


def prepare(dataset: str, out: str, num_examples: int | None = None, seed: int = 0,
            vocab_size: int | None = None) -> dict:
  """Returns the facts of an embedded data set, after printing them; see `data_pipelines.embedded.prepare`."""
  return _say(embedded.prepare(dataset, out, num_examples, seed, vocab_size))


def prepare_rendered(out: str, cfg: Mapping[str, Any], name: str = RENDERED, num_examples: int | None = None, seed: int = 0,
                     vocab_size: int | None = None) -> dict:
  """Returns the facts of rendered text, after printing them; see `data_pipelines.text_rendering.stored.prepare`. `cfg` is what
  configs/rendered_text.py returns."""
  from data_pipelines.text_rendering import stored  # with a shaper and dictionaries, which nothing else needs
  different = sorted(set(cfg.keys()) ^ set(rendered_text.get_config().keys()))
  if different:
    raise ValueError(f"--config is none for {RENDERED}: it and configs/rendered_text.py differ in the keys {', '.join(different)}: start from it.")
  settings = {key: value.to_dict() if hasattr(value, "to_dict") else value for key, value in cfg.items()}
  tokenizer, texts = settings.pop("tokenizer"), settings.pop("texts")
  read, left_out = stored.read_settings(seed, texts, **settings)
  return _say(stored.prepare(read, out, name, num_examples, vocab_size, tokenizer, left_out))


def curate(source: str, name: str, out: str, cfg: Mapping[str, Any], runner: str = "DirectRunner", num_workers: int = 0,
           beam_options: str = "", reading: Mapping[str, str] = {}) -> dict:
  """Returns the facts of the data set that a source becomes, after printing them; see `data_pipelines.curation.pipeline.curate`. `reading` changes
  keys of the config's section of that name."""
  missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
  if missing:
    raise ValueError(f"Curation needs {', '.join(missing)}: pip install -r requirements.txt -r requirements-data.txt")
  try:
    from data_pipelines.curation import pipeline  # here, because training must not need these packages
    from qimg2.runtime.config import plain  # and an embedded data set needs no JAX
  except ImportError as error:
    raise ValueError(f"A package that curation needs cannot be loaded ({error}): pip install -r requirements.txt -r requirements-data.txt") from error
  _check_config(cfg)
  _check_source(source)
  cfg = plain(cfg)
  facts = _say(pipeline.curate(source, name, out, cfg | {"reading": cfg["reading"] | reading}, runner, num_workers, shlex.split(beam_options)))
  funnel = json.loads(pipeline.files.read(f"{facts['path']}/funnel.json"))
  _say_funnel(funnel)
  print(f"Report: {facts['path']}/report.html")
  return facts


def curate_pairs(folder: str, by: str, name: str, out: str, *arguments: Any) -> dict:
  """Returns the facts of the data set of pairs that an evaluation gives, after printing them; see `data_pipelines.curation.evaluated.write_pairs` and
  `curate`."""
  from data_pipelines.curation import evaluated
  os.makedirs(out, exist_ok=True)
  table = f"{out}/{name}-pairs.jsonl"
  found = evaluated.write_pairs(folder, by, table)
  print(f"{table}: {found['pairs']} pairs; {found['tied']} prompts whose pictures are worth the same and {found['single']} with one give none.")
  return curate(table, name, out, *arguments, reading={"picture_root": folder})


def _say_funnel(funnel: dict) -> None:
  for step in funnel["steps"]:
    drops = ", ".join(f"{count} {reason}" for reason, count in step["drops"].items())
    print(f"  {step['stage']} {step['operator']:16} {step['entered']:>9} -> {step['passed']:<9} {drops}")
    if step["operator"] == "broken":
      for one in (one for some in step.get("sentences", {}).values() for one in some[:3]):
        print(f"    {one['count']}, such as {one['key']}: {one['detail']}")
  print("  A sample that fails after S1 is kept for the stages before.")
  for one in funnel.get("left_out", ()):
    print(f"  {one['count']} files are no part of a sample: {one['reason']}, such as {one['examples'][0]}")
  if funnel["not_run"]:
    print(f"  not run, though the report's funnel has them: {', '.join(funnel['not_run'])}")


def _check_source(source: str) -> None:
  """Finds what is missing on this machine, and a text table that is not UTF-8, before anything is read."""
  if re.search(r"://|^tfds:|[*?\[{]", source):
    return
  path = pathlib.Path(source).expanduser()
  if not path.exists():
    raise ValueError(f"There is no {source}: correct --source, which names a folder of pictures, a table, a Parquet file or tars.")
  if path.suffix.lower() in TABLES and path.is_file():
    with open(path, "rb") as file:
      head = file.read(1000)
    if b"\0" in head:  # in no text of UTF-8, and in every second byte of the ASCII of UTF-16
      raise ValueError(f"{source} is UTF-16 or UTF-32, or no text, and tables are read as UTF-8: save it so, such as with "
                       f"iconv -f UTF-16 -t UTF-8 {source} > utf8{path.suffix}.")


def _check_config(cfg: Mapping[str, Any]) -> None:
  known = curation.get_config()
  different = sorted(set(cfg.keys()) ^ set(known.keys()))
  if different:
    raise ValueError(f"--config is none for curation: it and configs/curation.py differ in the keys {', '.join(different)}; start from that file.")


def _say(facts: dict) -> dict:
  print(f"{'Found' if facts['reused'] else 'Wrote'} {facts['path']}")
  for name, value in facts.items():
    if name not in ("path", "reused"):
      print(f"  {name:24} {value}")
  return facts


def main(_: Sequence[str]) -> None:
  args = flags.FLAGS
  if sum([bool(args.source), bool(args.dataset), args.verify]) != 1:
    raise ValueError("Give one of --source (your pictures), --dataset (an embedded data set) and --verify.")
  if (args.source or args.verify) and not args.name:
    raise ValueError("Give the data set a --name: its folder is <out>/<name>.")
  if args.dataset in embedded.SOURCES and args.name:
    raise ValueError(f"--name={args.name} is not for --dataset={args.dataset}, which has its own: leave it out.")
  if (args.source or args.dataset) and args.name in embedded.SOURCES:
    raise ValueError(f"--name={args.name} is that of an embedded data set: choose another.")
  given = [name for name in READING if not args.source and args[name].present]
  if given:
    raise ValueError(f"--{given[0]} is for --source: it says how your own pictures are read.")
  if args.pairs_by and (not args.source or "://" in args.source + args.out or any(args[name].present for name in READING)):
    raise ValueError(f"--pairs_by={args.pairs_by} is for --source=FOLDER of an evaluation on this machine, and --out on it, without "
                     f"{', '.join(f'--{name}' for name in READING)}.")
  given = [name for name in ("num_examples", "seed", "vocab_size") if not args.dataset and args[name].present]
  if given:
    raise ValueError(f"--{given[0]} is for --dataset: of --source, set --config.vocab_size, and see configs/curation.py for the rest.")
  out = args.out if "://" in args.out else os.path.expanduser(args.out)
  if args.source and os.path.isdir(args.source) and pathlib.Path(out).resolve().is_relative_to(pathlib.Path(args.source).resolve()):
    raise ValueError(f"--out={args.out} lies in the source, whose files it would join: choose another folder.")
  if args.verify:
    found = verify(out, args.name)
    print(f"{out}/{args.name}: {found['files']} files and {found['records']} records are as written.")
  elif args.pairs_by:
    curate_pairs(args.source, args.pairs_by, args.name, out, args.config, args.runner, args.num_workers, args.beam_options)
  elif args.source:
    reading = {name: args[name].value for name in READING if args[name].present}
    curate(args.source, args.name, out, args.config, args.runner, args.num_workers, args.beam_options, reading)
  elif args.dataset == RENDERED:
    cfg = args.config if args["config"].present else rendered_text.get_config()
    prepare_rendered(out, cfg, args.name or RENDERED, args.num_examples, args.seed, args.vocab_size)
  else:
    prepare(args.dataset, out, args.num_examples, args.seed, args.vocab_size)


if __name__ == "__main__":
  cli.run(main, define_flags)
