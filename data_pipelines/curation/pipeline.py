"""Curation of a whole source: an Apache Beam pipeline over units of work, on this machine's cores or on a cluster.

  plan_units -> survey of each unit -> duplicates -> tokenizer -> curation of each unit -> larger files -> one data set, funnel.json, report.html

Intermediate files are in <out>/.<name>.work. A run that is interrupted goes on with the units that are done; what comes out is the same to the
byte, whatever the number of workers. The data set appears in its place when it is complete, and the work folder goes.
"""

import dataclasses
import functools
import io
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from tqdm import tqdm

from data_pipelines import folders, records
from data_pipelines.curation import duplicates, encode, files, funnel, packing, report
from data_pipelines.curation.funnel import Job
from data_pipelines.curation.operators import missing_report_operators
from data_pipelines.curation.reading import Reading
from data_pipelines.curation.sources import Found, Unit, fingerprint, fingerprint_of_pictures, look_up, plan_units
from data_pipelines.curation.workers import worker_options
from data_pipelines.tokenizer import PromptTokenizer, train_tokenizer

DIRECT = "DirectRunner"
_REPORT = "-report"  # behind the path of a data set: the folder of the report where no data set came out


def curate(source: str, name: str, out: str, config: dict, runner: str = DIRECT, num_workers: int = 0, beam_options: Sequence[str] = ()) -> dict:
  """Returns the facts of the data set <out>/<name>, which is made of `source` unless the same one is there already.

  Args:
    source: see `data_pipelines.curation.sources.plan_units`.
    name, out: the data set's folder is <out>/<name>.
    config: see configs/curation.py.
    runner: a Beam runner; the direct one uses this machine.
    num_workers: processes of the direct runner; 0 for one per core.
    beam_options: further options of the runner, such as "--project=...".

  Raises:
    ValueError: a source, config or model that cannot be used, another data set in that place, or nothing left of the source.
  """
  _check(config, name)
  found = look_up(source, Reading(**config["reading"]))
  units = plan_units(found, config["samples_per_unit"])
  request = {"source": source, "fingerprint": fingerprint(found, units), "pictures": fingerprint_of_pictures(units), "config": config}
  path, work = files.join(out, name), files.join(out, f".{name}.work")
  if files.exists(files.join(path, "dataset.json") if files.is_remote(path) else path):
    return {"path": path, "reused": True} | _facts_of(path, request)
  _claim(work, request)
  job = Job(work, json.dumps(config), len(units))
  with tempfile.TemporaryDirectory() as scratch:
    pool = _Runner(job_options(runner, num_workers or os.cpu_count() or 1, beam_options, scratch), job)
    _find_duplicates(pool, units, job)
    job = _settle(job, config)
    _curate_units(pool, units, job)
    job = _hold_out_some(pool, units, job, config)
    shards = _pack(pool, job, config["shard_gb"] * 1e9)
  return {"path": path, "reused": False} | _assemble(path, name, job, request, found, shards)


def _check(config: dict, name: str) -> None:
  """Finds the mistakes in a config before any work."""
  if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name):
    raise ValueError(f"The name {name!r} cannot be that of a data set: use letters, digits and _, and begin with a letter.")
  encode.check(config["encode"])
  if not config["shard_gb"] > 0:
    raise ValueError(f"config.shard_gb is {config['shard_gb']}: choose the size of a file of records in GB, such as 2.")
  if not 0 <= config["validation_share"] < 1:
    raise ValueError(f"config.validation_share is {config['validation_share']}: choose 0 or more and less than 1.")
  entries = config["operators"]
  funnel.make_operators(entries, PromptTokenizer.load(config["tokenizer"]) if config["tokenizer"] else train_tokenizer([], 300))
  if not entries or entries[0]["name"] != "broken":
    raise ValueError("The first of config.operators must be 'broken': the others need pictures that can be decoded.")


def _claim(work: str, request: dict) -> None:
  """Begins a work folder, or goes on with one that was begun for the same request."""
  path, text = files.join(work, "request.json"), json.dumps(request, indent=1)
  difference = _difference(json.loads(files.read(path)), request) if files.exists(path) else ""
  if difference:
    raise ValueError(f"{work} holds an unfinished run {difference}: remove that folder to begin anew, or go on as it was begun.")
  files.write(path, text.encode())  # also of one that goes on: it may have got an answer that it lacked


def _facts_of(path: str, request: dict) -> dict:
  """The facts of the data set that is there; `ValueError` unless it was made for the same request."""
  meta = json.loads(files.read(files.join(path, "dataset.json"))) if files.is_remote(path) else records.read_meta(path)
  difference = _difference(meta["request"], request)
  if difference:
    raise ValueError(f"{path} holds a data set {difference}: remove that folder, or choose another --name or --out.")
  return meta["facts"]


def _difference(stored: dict, request: dict) -> str:
  """In what a stored request differs, in words, "" for nothing. The source may have moved."""
  if "fingerprint" not in stored:
    return "of another kind"
  if stored["fingerprint"] != request["fingerprint"]:
    return f"of {stored['source']} as it was then; files were added, removed or changed"
  pictures = request.get("pictures")
  if stored.get("pictures") not in (None, "", pictures):  # earlier versions did not look at them, or not at those of a Parquet file
    return f"of {stored['source']} with the pictures that it named then; some were added, removed or changed"
  now = json.loads(json.dumps(request["config"]))
  # Before they could be chosen the records were as they are with these.
  before = {"captions": "lines", "uncaptioned": "drop", "picture_root": ""}
  if now["reading"] == before | {"captions": "ask"}:
    before["captions"] = "ask"  # nobody has chosen now either
  old = {"shard_gb": now["shard_gb"], "reading": before} | stored["config"] | {"encode": {"alpha": False} | stored["config"]["encode"]}
  if old["reading"] | {"captions": now["reading"]["captions"]} == now["reading"] and old["reading"]["captions"] == "ask":
    old["reading"] = now["reading"]  # what was read so far did not depend on the answer
  keys = sorted(key for key in old.keys() | now.keys() if old.get(key) != now.get(key))
  return f"with another config ({', '.join(keys)})" if keys else ""


def job_options(runner: str, num_workers: int, options: Sequence[str], folder: str) -> list[str]:
  """Returns the options of a Beam job: processes of this machine for the direct runner, what workers elsewhere need for any other.

  Args:
    runner, num_workers: as in `curate`; at least one worker.
    options: the user's.
    folder: where files may be put that go with the job.

  Raises:
    ValueError: workers elsewhere could not be given this project.
  """
  flags = [f"--runner={runner}", *options]
  if runner != DIRECT:
    return flags + worker_options(flags, folder)
  if num_workers > 1:
    flags += ["--direct_running_mode=multi_processing", f"--direct_num_workers={num_workers}", "--default_sdk_harness_log_level=ERROR"]
  return flags


# ---- the two passes --------------------------------------------------------------------------------


class _Runner:
  """Runs pipelines, shows how far they are, and hands on a user's mistake as such."""

  def __init__(self, options: Sequence[str], job: Job):
    self._options, self._job = options, job

  def __call__(self, build: Callable[[beam.Pipeline], None], phase: str, description: str, num: int = 0) -> None:
    """Builds and runs one pipeline; `phase` is the folder in which each unit leaves its .json, or each of `num` pieces of work that are not units."""
    for folder in (self._job.errors, self._job.questions):
      files.remove_folder(folder)
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    try:
      with _Progress(files.join(self._job.work, phase), num or self._job.num_units, description):
        with beam.Pipeline(options=PipelineOptions(self._options)) as pipeline:
          build(pipeline)
    except Exception as error:  # A runner wraps what a worker raised in a type of its own.
      if "KeyboardInterrupt" in str(error):
        raise KeyboardInterrupt from error
      self._raise_sentence(self._job.errors, error)
      raise
    self._raise_sentence(self._job.questions)  # errors are of tries that the runner has repeated with success

  def _raise_sentence(self, folder: str, error: Exception | None = None) -> None:
    """Raises `ValueError` with the first of the sentences that units have left in a folder."""
    sentences = sorted(files.names(folder))
    if sentences:
      raise ValueError(files.read(files.join(folder, sentences[0])).decode()) from error


class _Progress:
  """A bar that counts the files of a phase while it runs; quiet when not at a terminal."""

  def __init__(self, folder: str, total: int, description: str):
    self._folder, self._bar, self._stop = folder, tqdm(total=total, desc=description, unit="unit", disable=None, leave=False), threading.Event()

  def __enter__(self):
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def _watch(self) -> None:
    while not self._stop.wait(1.0):
      self._bar.update(sum(name.endswith(".json") for name in files.names(self._folder)) - self._bar.n)

  def __exit__(self, *error) -> None:
    self._stop.set()
    self._thread.join()
    self._bar.close()


def _find_duplicates(pool: _Runner, units: Sequence[Unit], job: Job) -> None:
  """Surveys every unit and leaves a file of duplicates for each."""
  step = next((entry for entry in job.settings["operators"] if entry["name"] == funnel.DUPLICATE), None)
  done = files.join(job.work, "duplicates.done")
  if files.exists(done):
    return

  def build(pipeline: beam.Pipeline) -> None:
    rows = (pipeline | "units" >> beam.Create(units) | "spread" >> beam.Reshuffle()
            | "survey" >> beam.FlatMap(lambda unit: funnel.survey(job, unit)))
    found = duplicates.find(rows, _max_distance(step)) if step else rows | beam.Filter(lambda row: False) | beam.Map(lambda row: (row.unit, None))
    duplicates.write(found, job, pipeline)
  pool(build, "survey", "survey")
  files.write(done, b"")


def _max_distance(step: dict) -> int:
  return funnel.make_steps([step])[0].settings["max_distance"]


def _settle(job: Job, config: dict) -> Job:
  """The job with a tokenizer, which may have to be trained on the captions of the whole survey, and with the share that is held out."""
  path = files.join(job.work, "tokenizer.json")
  settled = files.join(job.work, "settled.json")
  if not files.exists(settled):
    heads = (json.loads(files.read(job.path("survey", number, ".head"))) for number in range(job.num_units))
    captions = dict.fromkeys(text for head in heads for text in head["captions"])
    tokenizer = PromptTokenizer.load(config["tokenizer"]) if config["tokenizer"] else train_tokenizer(captions, config["vocab_size"])
    files.write(path, tokenizer.to_bytes())
    files.write(settled, json.dumps({"validation_below": config["validation_share"]}).encode())
  return dataclasses.replace(job, tokenizer=path, **json.loads(files.read(settled)))


def _curate_units(pool: _Runner, units: Sequence[Unit], job: Job) -> None:
  first_ids = np.cumsum([0] + [unit.stop - unit.start for unit in units])
  if first_ids[-1] >= 2**31:
    raise ValueError(f"The source has {first_ids[-1]} samples, more than the 2147483648 that ids can name: split it.")
  jobs = [(unit, int(first)) for unit, first in zip(units, first_ids)]

  def build(pipeline: beam.Pipeline) -> None:
    _ = (pipeline | "units" >> beam.Create(jobs) | "spread" >> beam.Reshuffle() | "curate" >> beam.Map(lambda item: funnel.curate(job, *item)))
  pool(build, "curated", "curate")


def _hold_out_some(pool: _Runner, units: Sequence[Unit], job: Job, config: dict) -> Job:
  """The job with at least one record held out, if any are wanted, and one left for training, where there are two: of few pictures the numbers
  may fall all on one side. The units that this changes are curated again."""
  results = [(result["shards"]["train"]["num_records"], result["shards"]["validation"]["num_records"], result["lowest"]) for result in _results(job)]
  train, validation = (sum(one[which] for one in results) for which in range(2))
  if train and (validation or not config["validation_share"] or train == 1):
    return job
  if not train + validation:
    return job
  lowest = min(own for _, _, own in results)
  below = float(np.nextafter(lowest, 1)) if train + validation > 1 else 0.0
  for number, (_, held_out, own) in enumerate(results):
    if held_out or own == lowest:
      files.remove_file(job.path("curated", number, ".json"))
  files.write(files.join(job.work, "settled.json"), json.dumps({"validation_below": below}).encode())
  job = dataclasses.replace(job, validation_below=below)
  _curate_units(pool, units, job)
  return job


def _results(job: Job) -> Iterator[dict]:
  """What became of the samples of each unit, one after the other: they have pictures in them."""
  return (json.loads(files.read(job.path("curated", number, ".json"))) for number in range(job.num_units))


def _pack(pool: _Runner, job: Job, most_bytes: float) -> dict[str, list[records.Shard]]:
  """Puts the records of units that follow one another into files of at most `most_bytes`; returns those of each split."""
  shards = [{split: records.Shard(**result["shards"][split]) for split in records.SPLITS} for result in _results(job)]
  packs = packing.plan({split: [one[split] for one in shards] for split in records.SPLITS}, most_bytes)
  few = [one for one in packs if len(one.shards) > 1]

  def build(pipeline: beam.Pipeline) -> None:
    _ = (pipeline | "packs" >> beam.Create(few) | "spread" >> beam.Reshuffle() | "pack" >> beam.Map(lambda one: packing.pack(job, one)))
  if few:
    pool(build, packing.PHASE, "pack", len(few))
  return packing.packed(job, packs)


# ---- one data set ----------------------------------------------------------------------------------


def _assemble(path: str, name: str, job: Job, request: dict, found: Found, shards: dict[str, list[records.Shard]]) -> dict:
  """Makes the data set of all files of records, with its report, and removes the work folder. Returns its facts."""
  steps = funnel.make_steps(job.settings["operators"], job.tokenizer)
  tally = funnel.join_tallies((result["tally"] for result in _results(job)), len(steps))
  write_report = functools.partial(_write_report, tally, steps, name, found)
  if not shards["train"]:
    write_report(f"{path}{_REPORT}", {"train": 0, "validation": 0})
    files.remove_folder(job.work)
    raise ValueError(f"No picture of {found.source} is left for training: {report.why_nothing_is_left(tally, steps)} All reasons, with pictures: "
                     f"{path}{_REPORT}/report.html.")
  read = lambda split: (_read_index(job, number, split) for number in range(job.num_units))
  index = {split: records.join_indices(functools.partial(read, split)) for split in records.SPLITS}
  tokenizer = PromptTokenizer.from_bytes(files.read(job.tokenizer), job.tokenizer)
  with tempfile.TemporaryDirectory() as scratch:
    complete, moves = os.path.join(scratch, name) if files.is_remote(path) else files.join(job.work, "complete"), {}
    files.remove_folder(complete)  # of a run that was interrupted here
    facts = records.finish(complete, name, shards, index, tokenizer, request, funnel_facts(tally, steps),
                           functools.partial(_mark, moves) if files.is_remote(path) else folders.link)
    write_report(complete, facts)
    _publish(complete, path, moves)
  files.remove_folder(job.work)
  files.remove_folder(f"{path}{_REPORT}")  # of a run that nothing was left of
  return facts


def _write_report(tally: dict, steps: Sequence[funnel.Step], name: str, found: Found, folder: str, facts: dict) -> None:
  funnel_json, page = report.write(tally, steps, missing_report_operators(steps), name, found.source, facts, found.left_out.plain())
  files.write(files.join(folder, "funnel.json"), funnel_json)
  files.write(files.join(folder, "report.html"), page)


def _mark(moves: dict[str, str], source: str, target: str) -> None:
  """Notes a copy between remote places that is still to be made; an empty file stands for it until then."""
  files.write(target, b"")
  moves[target] = source


def _publish(complete: str, path: str, moves: dict[str, str]) -> None:
  if not files.is_remote(path):
    if not folders.publish(complete, path):
      raise ValueError(f"{path} was made by another process in the meantime: look at it, and remove {os.path.dirname(complete)}.")
    return
  found = [os.path.join(folder, name) for folder, _, some in os.walk(complete) for name in some]
  # dataset.json comes last: with it the data set is whole.
  for file in sorted(found, key=lambda file: (file.endswith("dataset.json"), file)):
    files.copy(moves.get(file, file), files.join(path, os.path.relpath(file, complete)))


def funnel_facts(tally: dict, steps: Sequence[funnel.Step]) -> dict:
  """Figures of the funnel for the data set's facts: samples read, and samples that every step kept."""
  return {"samples": tally["total"], "passed_all": tally["kept"]["count"],
          "dropped": sum(entry["count"] for step, drops in zip(steps, tally["drops"]) if step.stage == steps[0].stage for entry in drops.values())}


def _read_index(job: Job, number: int, split: str) -> dict:
  with np.load(io.BytesIO(files.read(job.path("curated", number, f"-{split}.npz")))) as file:
    return {column: file[column] for column in file.files}
