"""The same seven samples in every kind of source that curation reads."""

import base64
import csv
import dataclasses
import io
import json
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

from data_pipelines.transforms import encode_png


def png(shade):
  return encode_png(np.full((4, 5, 3), (shade, 255 - shade, 7), np.uint8))


@dataclasses.dataclass
class Row:
  name: str
  image: bytes
  captions: list
  language: str = "en"
  kind: str = "general"
  sources: list = dataclasses.field(default_factory=list)

  def record(self, give=lambda name, data: name):
    """The row as a record whose pictures are given as `give` says, by default as paths."""
    sources = [give(f"p/s{self.name}-{i}.png", data) for i, data in enumerate(self.sources)]
    return {"image": give(f"p/{self.name}.png", self.image), "captions": self.captions, "language": self.language, "kind": self.kind,
            "sources": sources or None}


# Captions with every separator, and with U+2028, which ends no line. Ten condition images, so that number 10 must come after 2.
ROWS = [Row(f"{i:02d}", png(i), [f"picture {i}"]) for i in range(7)]
ROWS[1].captions = ['a sign that says "Caf\u00e9, 10%"\there', "two\u2028parts", "\u732b\U0001f431"]
ROWS[2] = Row("02", png(2), ["ein Schild"], "de", "text")
ROWS[4].sources = [png(100 + i) for i in range(10)]
PICTURES = {f"p/{row.name}.png": row.image for row in ROWS} | {f"p/s{row.name}-{i}.png": data for row in ROWS for i, data in enumerate(row.sources)}


def write(folder, files):
  """Writes {relative name: bytes or text} below a folder, local or not, and returns the path of the first."""
  for name, data in files.items():
    with fsspec.open(f"{folder}/{name}", "wb", auto_mkdir=True) as file:
      file.write(data if isinstance(data, bytes) else data.encode())
  return f"{folder}/{next(iter(files))}"


def side_files(rows):
  """The files of a folder or the members of a tar."""
  files = {}
  for row in rows:
    text = {"txt": "\ufeff" + "\r\n\n  ".join(row.captions) + " \n"}
    side = {"json": json.dumps({"caption": row.captions[0], "language": row.language, "kind": row.kind})}
    files |= {f"{row.name}.{suffix}": data for suffix, data in ({"png": row.image} | (text if row.kind == "general" else side)).items()}
    files |= {f"{row.name}.source{i + 1}.png": data for i, data in enumerate(row.sources)}
  return files


def folder(at):
  write(at, {f"sub.d/{name}": data for name, data in side_files(ROWS).items()} | {"README.md": "no", ".hidden/a.png": "no", "sub.d/.b.png": "no"})
  return str(at)


def table(at, name, delimiter):
  text = io.StringIO(newline="")
  writer = csv.writer(text, delimiter=delimiter)
  writer.writerow(["file_name", "captions", "language", "kind", "sources"])
  for row in (row.record() for row in ROWS):
    sources = row["sources"] and json.dumps(row["sources"])
    writer.writerow([row["image"], json.dumps(row["captions"], indent=1), row["language"], row["kind"], sources])
  return write(at, {name: "\ufeff" + text.getvalue()} | PICTURES)


def json_lines(at, between="\n\n", give=lambda name, data: name):
  return write(at, {"rows.jsonl": "\ufeff" + between.join(json.dumps(row.record(give), ensure_ascii=False) for row in ROWS)} | PICTURES)


def parquet(at, records, name="rows.parquet", **options):
  buffer = io.BytesIO()
  pq.write_table(pa.Table.from_pylist(records), buffer, **options)
  return write(at, {name: buffer.getvalue()})


def parquet_folder(at):
  records = [row.record(lambda name, data: {"bytes": data, "path": "elsewhere.png"}) for row in ROWS]
  parquet(at, records[:2], "data/a.parquet")
  parquet(at, records[2:], "data/b.parquet")
  return str(at)


def tar(files):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as file:
    for name, data in files.items():
      member, data = tarfile.TarInfo(name), data if isinstance(data, bytes) else data.encode()
      member.size = len(data)
      file.addfile(member, io.BytesIO(data))
  return buffer.getvalue()


def tars(at, pattern):
  write(at, {"x-000.tar": tar(side_files(ROWS[:3])), "x-001.tar": tar(side_files(ROWS[3:])), "y.tar": "not this one"})
  return f"{at}/{pattern}"


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A few pictures."""
  VERSION, code_path = tfds.core.Version("1.0.0"), None
  features, examples = {}, []

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict(self.features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    yield from enumerate(self.examples)


def tiny(at, features, examples):
  Tiny.features, Tiny.examples = features, examples
  Tiny(data_dir=str(at), file_format="array_record").download_and_prepare()
  return f"tfds:{at}/tiny:train"


def tfds_records(at):
  data, text, several = tfds.features.Scalar(np.object_), tfds.features.Text(), tfds.features.Sequence
  features = {"image": data, "sources": several(data), "captions": several(text), "languages": several(text), "kind": text}
  return tiny(at, features, [{"image": row.image, "sources": row.sources, "captions": row.captions, "kind": row.kind,
                              "languages": [row.language] * len(row.captions)} for row in ROWS])


SOURCES = {
    "folder": folder, "folder of parquet": parquet_folder, "tfds": tfds_records, "jsonl": json_lines,
    "csv": lambda at: table(at, "rows.csv", ","), "tsv": lambda at: table(at, "rows.TSV", "\t"),
    "jsonl with bytes": lambda at: json_lines(at, "\n", lambda name, data: {"bytes": base64.b64encode(data).decode()}),
    "parquet with paths": lambda at: write(at, PICTURES) and parquet(at, [row.record() for row in ROWS], row_group_size=2),
    "parquet with bytes": lambda at: parquet(at, [row.record(lambda name, data: data) for row in ROWS], row_group_size=5),
    "tars *": lambda at: tars(at, "x-*.tar"), "tars {}": lambda at: tars(at, "x-{000..001}.tar"),
    "tar": lambda at: write(at, {"x.tar": tar({f"./{'long' * 40}/{name}": data for name, data in side_files(ROWS).items()})})}
