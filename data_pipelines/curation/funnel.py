"""One unit of work: some samples read, judged, and written as records.

It is done in two passes, because duplicates can only be told when all samples are known. The *survey* runs the operators before the step
"duplicate" and leaves the perceptual hash of what passed. *Curation* runs the rest and writes the records. Both leave one file per unit and
do nothing when it is there, so that a run can be interrupted anywhere; what they write depends on the unit and the job alone.

Steps belong to data stages (S1 to S6 of the Qwen-Image-2.0 report, arXiv 2605.10730, section 2.3). A sample that fails in the first stage of
the list is dropped. One that fails later is kept for the stages before: its record says with `stage` how far it came.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from data_pipelines import records
from data_pipelines.curation import encode, files
from data_pipelines.curation.measures import perceptual_hash
from data_pipelines.curation.operators import Step, make_operators
from data_pipelines.curation.reading import NeedsAnswer
from data_pipelines.curation.sample import Drop, Sample
from data_pipelines.curation.sources import Unit, read_unit
from data_pipelines.tokenizer import PromptTokenizer

THUMB_PX = 112
EXAMPLES = 24  # of each reason, and of what is kept, that the report shows; each unit leaves at least six
SENTENCES = 50  # kinds of them, that are counted of each reason
_VARYING = re.compile(r"'(?:[^'\\]|\\.)*'|\S*[\d./]\S*")  # names and numbers in a sentence
TOKENIZER_CAPTIONS = 200_000  # as many captions teach the tokenizer
DUPLICATE = "duplicate"


@dataclasses.dataclass(frozen=True)
class Job:
  """What every unit needs to know, small enough to travel.

  Attributes:
    work: folder of intermediate files.
    config: JSON of the curation config.
    num_units: how many units the source has.
    tokenizer: a tokenizer.json, or "" in the survey of a job that trains its own.
    validation_below: samples whose number, see `split_number`, is below are held out.
  """
  work: str
  config: str
  num_units: int
  tokenizer: str = ""
  validation_below: float = 0.0

  @property
  def settings(self) -> dict:
    """The curation config."""
    return json.loads(self.config)

  @property
  def errors(self) -> str:
    """The folder in which units leave sentences for the user."""
    return files.join(self.work, "errors")

  @property
  def questions(self) -> str:
    """The folder in which units leave what the user has to answer."""
    return files.join(self.work, "questions")

  def path(self, phase: str, unit: int, suffix: str) -> str:
    """The file that a phase leaves for a unit."""
    return files.join(self.work, phase, f"{unit:06d}{suffix}")


@dataclasses.dataclass(frozen=True)
class Row:
  """What the search for duplicates knows of a sample: its place, its name, what it can be a duplicate within, and two hashes."""
  unit: int
  position: int
  key: str
  group: str
  sha256: str
  perceptual: int


# ---- survey ----------------------------------------------------------------------------------------


def survey(job: Job, unit: Unit) -> list[Row]:
  """Runs the steps before "duplicate" on a unit; returns the samples that passed. None once the user has to be asked something: the question is left
  in a folder, and is no error, which a runner would show at length."""
  path = job.path("survey", unit.number, ".json")
  if not files.exists(path):
    if files.names(job.questions):
      return []
    try:
      leave_errors(job, unit.number, lambda: _write_survey(job, unit, path))
    except NeedsAnswer:
      return []
  return [Row(unit.number, *row) for row in json.loads(files.read(path))["rows"]]


def _write_survey(job: Job, unit: Unit, path: str) -> None:
  found, head = _survey(job, unit)
  files.write(job.path("survey", unit.number, ".head"), json.dumps(head).encode())
  files.write(path, json.dumps(found).encode())


def _survey(job: Job, unit: Unit) -> tuple[dict, dict]:
  """Returns (what the search for duplicates and curation need, the little that is needed of all units at once)."""
  steps = make_steps(job.settings["operators"][:survey_length(job.settings["operators"])])
  wants_hash = any(entry["name"] == DUPLICATE for entry in job.settings["operators"])
  rows, drops, captions = [], {}, {}
  for position, sample in enumerate(read_unit(unit)):
    failed = _first_failure(steps, sample)
    if failed is not None:
      drops[position] = [failed[0], *dataclasses.astuple(failed[1])]
      continue
    rows.append((position, sample.key, _group(sample), hashlib.sha256(sample.image).hexdigest(),
                 perceptual_hash(sample.pixels) if wants_hash else 0))
    captions |= {caption.text: split_number(caption.text) for caption in sample.captions}
  most = -(-TOKENIZER_CAPTIONS // job.num_units)
  return {"rows": rows, "drops": drops}, {"captions": sorted(captions, key=captions.get)[:most]}


def _group(sample: Sample) -> str:
  """Edits are duplicates only of edits with the same condition images and the same instructions, pairs only of pairs with the same rejected picture
  and the same captions."""
  others = [*sample.sources, *([b"rejected", sample.rejected] if sample.rejected else [])]
  if not others:
    return ""
  digest = hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in others))
  return hashlib.sha256(digest.digest() + json.dumps([caption.text for caption in sample.captions]).encode()).hexdigest()


def _split_key(sample: Sample) -> str:
  """A picture and all edits of it are in one split: an edit goes with its first condition image."""
  return hashlib.sha256(sample.sources[0] if sample.sources else sample.image).hexdigest()


def split_number(text: str) -> float:
  """A number in [0, 1) that only `text` decides, evenly spread over texts."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


# ---- curation --------------------------------------------------------------------------------------


def curate(job: Job, unit: Unit, first_id: int) -> None:
  """Judges a unit's samples and writes those that are kept: a shard and an index per split, and what became of all in a JSON file, last.

  `first_id` is the sample_id of the first; the others count on from there.
  """
  if not files.exists(job.path("curated", unit.number, ".json")):
    leave_errors(job, unit.number, lambda: _curate(job, unit, first_id))


def _curate(job: Job, unit: Unit, first_id: int) -> None:
  settings = job.settings
  steps = make_steps(settings["operators"], job.tokenizer)
  surveyed = json.loads(files.read(job.path("survey", unit.number, ".json")))["drops"]
  duplicates = json.loads(files.read(job.path("duplicates", unit.number, ".json")))
  tally, lowest = Tally(steps, max(6, EXAMPLES // job.num_units)), 1.0
  with tempfile.TemporaryDirectory(dir=None if files.is_remote(job.work) else job.work) as folder:
    outputs = {split: _Output(os.path.join(folder, split)) for split in records.SPLITS}
    for position, sample in enumerate(read_unit(unit)):
      failed = _verdict(steps, sample, surveyed.get(str(position)), duplicates.get(str(position)))
      tally.add(sample, failed)
      stage = last_stage(steps, failed)
      if stage:
        number = split_number(_split_key(sample))
        split, lowest = "validation" if number < job.validation_below else "train", min(lowest, number)
        outputs[split].write(encode.record(sample, settings["encode"], stage) | {"sample_id": first_id + position})
    shards = {split: output.close(job, unit, split) for split, output in outputs.items()}
  files.write(job.path("curated", unit.number, ".json"), json.dumps({"shards": shards, "tally": tally.plain(), "lowest": lowest}).encode())


def _verdict(steps: Sequence[Step], sample: Sample, surveyed: list | None, duplicate: list | None) -> tuple[int, Drop] | None:
  """(place of the step that drops the sample, why), or None."""
  if surveyed is not None:
    return surveyed[0], Drop(*surveyed[1:])
  if duplicate is not None:
    return duplicate_place(steps), Drop(*duplicate)
  return _first_failure(steps, sample)


class _Output:
  """A shard and its index, written record by record."""

  def __init__(self, path: str):
    self._writer, self._columns = records.ShardWriter(path), records.Columns()

  def write(self, record: dict) -> None:
    self._writer.write(self._columns.add(record))

  def close(self, job: Job, unit: Unit, split: str) -> dict:
    """Moves both to their place and returns the shard's description."""
    target, shard = job.path("curated", unit.number, f"-{split}"), self._writer.close()
    files.move(shard.path, f"{target}.array_record")
    buffer = io.BytesIO()
    np.savez(buffer, **self._columns.arrays(_load_tokenizer(job.tokenizer)))
    files.write(f"{target}.npz", buffer.getvalue())
    return dataclasses.asdict(dataclasses.replace(shard, path=f"{target}.array_record"))


def last_stage(steps: Sequence[Step], failed: tuple[int, Drop] | None) -> int:
  """The last data stage, 1 to 6, that a sample is good for; 0 if it failed in the first stage of the list."""
  if failed is None:
    return records.LAST_STAGE
  stage = steps[failed[0]].stage
  return 0 if stage == steps[0].stage else int(stage.removeprefix("S")) - 1


def _first_failure(steps: Sequence[Step], sample: Sample) -> tuple[int, Drop] | None:
  """(place of the first step that drops the sample, why), or None."""
  for number, step in enumerate(steps):
    drop = step.apply(sample) if step.apply is not None else None
    if drop is not None:
      return number, drop
  return None


# ---- what became of the samples --------------------------------------------------------------------


class Tally:
  """Counts per step, with a few examples of each reason and of what is kept."""

  def __init__(self, steps: Sequence[Step], most: int):
    """Args: the steps; how many examples of each reason."""
    self._most = most
    self._drops: list[dict] = [{} for _ in steps]
    self._kept: dict = {"count": 0, "examples": []}
    self._total = 0

  def add(self, sample: Sample, failed: tuple[int, Drop] | None) -> None:
    """Counts one sample."""
    self._total += 1
    entry = self._kept if failed is None else self._drops[failed[0]].setdefault(failed[1].reason, {"count": 0, "examples": [], "sentences": {}})
    entry["count"] += 1
    detail = failed[1].detail if failed else sample.captions[0].text[:200] if sample.captions else "(no caption)"
    if len(entry["examples"]) < self._most:
      entry["examples"].append({"key": sample.key, "detail": detail, "thumb": thumbnail(sample)})
    if failed:
      _count_sentence(entry["sentences"], _VARYING.sub("*", detail), {"count": 1, "key": sample.key, "detail": detail})

  def plain(self) -> dict:
    """As JSON: the number of samples; drops per step as reason -> count, examples, and the sentences that differ in more than names and numbers, each
    with its count and an example; and count and examples of those that passed every step."""
    return {"total": self._total, "drops": self._drops, "kept": self._kept}


def _count_sentence(to: dict, kind: str, entry: dict) -> None:
  """Adds the count of a sentence of one kind to those of several kinds; what is more than `SENTENCES` kinds counts as one, ""."""
  kind = kind if kind in to or len(to) < SENTENCES else ""
  to[kind] = to.get(kind, entry) | {"count": to.get(kind, {"count": 0})["count"] + entry["count"]}


def join_tallies(parts: Iterator[dict], num_steps: int, most: int = EXAMPLES) -> dict:
  """One tally of all parts; of each reason the first `most` examples."""
  joined = {"total": 0, "drops": [{} for _ in range(num_steps)], "kept": {"count": 0, "examples": []}}

  def add(to: dict, entry: dict) -> None:
    to["count"] += entry["count"]
    for kind, sentence in entry.get("sentences", {}).items():
      _count_sentence(to["sentences"], kind, sentence)
    to["examples"] += entry["examples"][:most - len(to["examples"])]

  for part in parts:
    joined["total"] += part["total"]
    add(joined["kept"], part["kept"])
    for drops, more in zip(joined["drops"], part["drops"]):
      for reason, entry in more.items():
        add(drops.setdefault(reason, {"count": 0, "examples": [], "sentences": {}}), entry)
  return joined


def thumbnail(sample: Sample) -> str:
  """A small JPEG of the target as base64, or "" if it cannot be decoded."""
  try:
    image = Image.fromarray(sample.pixels)
  except ValueError:
    return ""
  image.thumbnail((THUMB_PX, THUMB_PX))
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=80)
  return base64.b64encode(buffer.getvalue()).decode()


# ---- common ----------------------------------------------------------------------------------------


def make_steps(entries: Sequence[dict], tokenizer: str = "") -> tuple[Step, ...]:
  """The steps of a config's list, made once per process; `tokenizer` is a tokenizer.json, "" for none."""
  return _make_steps(json.dumps(entries), tokenizer)


@functools.lru_cache(maxsize=4)
def _make_steps(entries: str, tokenizer: str) -> tuple[Step, ...]:
  return tuple(make_operators(json.loads(entries), _load_tokenizer(tokenizer) if tokenizer else None))


def _load_tokenizer(path: str) -> PromptTokenizer:
  return PromptTokenizer.from_bytes(files.read(path), path)


def survey_length(entries: Sequence[dict]) -> int:
  """How many steps the survey runs: those of the first stage before "duplicate", and before any that counts tokens, for which there may be no
  tokenizer yet. What fails in the first stage leaves no record, so that nothing which a step does to a sample is missing in curation."""
  return next((number for number, entry in enumerate(entries)
               if entry["name"] in (DUPLICATE, "token_length") or entry["stage"] != entries[0]["stage"]), len(entries))


def duplicate_place(steps: Sequence[Step]) -> int:
  """The place of the step "duplicate", or the number of steps."""
  return next((number for number, step in enumerate(steps) if step.name == DUPLICATE), len(steps))


def leave_errors(job: Job, number: int, work: Callable[[], None]) -> None:
  """Runs `work`; a user's mistake, or a full disk, is written down for the process that started the pipeline, which sees only a wrapped traceback."""
  try:
    work()
  except (ValueError, OSError) as error:
    kind = "questions" if isinstance(error, NeedsAnswer) else "errors"
    files.write(job.path(kind, number, ".txt"), str(error).encode())
    raise
