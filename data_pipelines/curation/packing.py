"""Files of records large enough to train from: the records of units that follow one another, in one file.

Units are small, so that little is done again after an interruption; files of a few hundred pictures are too many for a file system. Which units share
a file follows from their order and sizes alone. A file is written beside its place, its description last, and then those of its units go.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence

from data_pipelines import records
from data_pipelines.curation import files
from data_pipelines.curation.funnel import Job, leave_errors

PHASE = "packed"


@dataclasses.dataclass(frozen=True)
class Pack:
  """The files of units, in their order, that become file `number` of all splits together."""
  number: int
  split: str
  shards: tuple[records.Shard, ...]


def plan(shards: dict[str, Sequence[records.Shard]], most_bytes: float) -> list[Pack]:
  """Returns which files of units become one: as many that follow one another as have at most `most_bytes`, and one at least. Empty ones are left
  out."""
  groups = []
  for split in records.SPLITS:
    size = float("inf")
    for shard in (one for one in shards[split] if one.num_records):
      size += shard.num_bytes
      if size > most_bytes:
        groups.append((split, []))
        size = shard.num_bytes
      groups[-1][1].append(shard)
  return [Pack(number, split, tuple(some)) for number, (split, some) in enumerate(groups)]


def pack(job: Job, one: Pack) -> None:
  """Writes a file, unless it is there, or is that of one unit."""
  if len(one.shards) > 1 and not files.exists(job.path(PHASE, one.number, ".json")):
    leave_errors(job, one.number, lambda: _write(job, one))
  if len(one.shards) > 1:
    for shard in one.shards:
      files.remove_file(shard.path)


def _write(job: Job, one: Pack) -> None:
  target = job.path(PHASE, one.number, ".array_record")
  with tempfile.TemporaryDirectory(dir=None if files.is_remote(job.work) else job.work) as folder:
    writer = records.ShardWriter(os.path.join(folder, "records"))
    for shard in one.shards:
      with files.nearby(shard.path, folder) as path:
        writer.append(path)
    shard = writer.close()
    files.move(shard.path, target)
  files.write(job.path(PHASE, one.number, ".json"), json.dumps(dataclasses.asdict(dataclasses.replace(shard, path=target))).encode())


def packed(job: Job, packs: Sequence[Pack]) -> dict[str, list[records.Shard]]:
  """Returns the files of each split, in the order of their records."""
  shards = {split: [] for split in records.SPLITS}
  for one in packs:
    shards[one.split].append(one.shards[0] if len(one.shards) == 1 else
                             records.Shard(**json.loads(files.read(job.path(PHASE, one.number, ".json")))))
  return shards
