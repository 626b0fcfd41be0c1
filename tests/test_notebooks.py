"""The notebooks: that what is saved in them is whole and clean, and that they run from the first cell to the last, at tiny sizes."""

import base64
import io
import json
import os
import pathlib
import re
import shutil
import sys

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from qimg2 import params
from qimg2.runtime import export, grid, sampling_weights
from qimg2.training.metrics import goodput, read_rows

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
MAX_BYTES = 400_000
# What only a machine says: its folders, and memory addresses.
PRIVATE = re.compile(r"/home/|/root/|/tmp/|/work/|/dev/shm|/usr/|0x[0-9a-f]{6}|Traceback|^error:", re.MULTILINE)
TAG = "parameters"


def read(name):
  return nbformat.read(NOTEBOOKS[name], as_version=4)


def texts(cell):
  """What a cell printed or showed as text."""
  for output in cell.outputs:
    yield output.get("text", "") + output.get("data", {}).get("text/plain", "")


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_all_are_there_and_in_the_readme():
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  assert set(NOTEBOOKS) == {"quickstart", "your_pictures", "draw_and_edit", "rehearse"}
  assert set(re.findall(r"notebooks/(\w+)\.ipynb", readme)) == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_saved_is_whole_and_clean(name):
  notebook = read(name)
  nbformat.validate(notebook)
  assert NOTEBOOKS[name].stat().st_size < MAX_BYTES
  assert not set(notebook.metadata) - {"kernelspec", "language_info", "accelerator", "colab"}
  cells = code_cells(notebook)
  run = [cell.execution_count for cell in cells if cell.execution_count]
  assert [cell.execution_count for cell in cells[:len(run)]] == list(range(1, len(run) + 1)), "run them anew, from the first one"
  assert not any(cell.outputs for cell in cells[len(run):])
  assert sum(TAG in cell.metadata.get("tags", ()) for cell in cells) == 1
  for cell in cells:
    assert not set(cell.metadata) - {"tags"}, f"times or settings of whoever ran it: {cell.metadata}"
    assert all(output.output_type != "error" for output in cell.outputs), cell.source
    found = [text for text in texts(cell) if PRIVATE.search(text)]
    assert not found, f"{cell.source}\n{found}"


def test_they_begin_alike_and_their_links_lead_somewhere():
  setups = {cell.source for name in NOTEBOOKS for cell in read(name).cells if "setup" in cell.metadata.get("tags", ())}
  assert len(setups) == 1
  for name in NOTEBOOKS:
    for link in re.findall(r"\]\(([^)#]+)", "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")):
      assert (ROOT / "notebooks" / link).exists(), f"{name} links to {link}"


def run_notebook(name, **after):
  """The executed notebook and all that it printed; `after`: tag -> code that is run behind the cell of that tag. Its kernel is as a
  user's, with one device."""
  notebook = read(name)
  for number, cell in reversed(list(enumerate(notebook.cells))):
    for tag in cell.metadata.get("tags", ()):
      if tag in after:
        notebook.cells.insert(number + 1, nbformat.v4.new_code_cell(after[tag]))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PATH", f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
  printed = "\n".join(text for cell in code_cells(notebook) for text in texts(cell))
  assert not re.search(r"^error:", printed, re.MULTILINE), printed
  return notebook, printed


def pictures(notebook):
  """The pictures that cells show, in their order, as arrays."""
  shown = [output["data"]["image/png"] for cell in code_cells(notebook) for output in cell.outputs if "image/png" in output.get("data", {})]
  return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")) for one in shown]


@pytest.fixture(scope="module")
def exported(smoke_run, tmp_path_factory):
  return export(smoke_run, tmp_path_factory.mktemp("exported") / "pipeline", dtype="float32")


def smoke_settings(smoke_config):
  """Code that puts the quickstart's smoke config into the place of a notebook's."""
  return f"from configs import quickstart; config = quickstart.get_config('smoke'); config.data_dir = {smoke_config.data_dir!r}"


def weight_files(folder):
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_the_quickstart_goes_on_where_the_session_ended(smoke_run, smoke_config, exported, tmp_path):
  """The session ended in the last stage, after the first of its two steps; what follows is what an undisturbed run has."""
  shutil.copytree(smoke_run.workdir, tmp_path / "quickstart")
  shutil.rmtree(tmp_path / "quickstart" / "sft" / "checkpoints" / "2")
  settings = f"PLAN, RUNS, DATA = 'smoke', {str(tmp_path)!r}, {smoke_config.data_dir!r}"
  notebook, printed = run_notebook("quickstart", parameters=settings, config=f"{smoke_settings(smoke_config)}; side = 32")
  for path in ("sft/metrics.jsonl", "evaluation.json"):
    assert (tmp_path / "quickstart" / path).read_bytes() == (smoke_run.workdir / path).read_bytes()
  assert weight_files(tmp_path / "quickstart_pipeline") == weight_files(exported)
  assert goodput(read_rows(tmp_path / "quickstart" / "sft" / "timing.jsonl"))["starts"] == 2
  assert "sft: 2 start(s)" in printed and "Evaluation of stage sft" in printed and "model_index.json" in printed
  _, _, drawn, edited = pictures(notebook)  # after the batches and the curves
  assert np.array_equal(edited[6:70, 6:70], drawn[6:70, 6:70])  # the first source of the edits, twice its size behind a margin of 6 px
  assert not np.array_equal(edited[6:70, 76:140], drawn[6:70, 6:70])


@pytest.mark.slow
def test_drawing_and_editing(smoke_run, exported, tmp_path):
  """What it says of the folder, and that it edits what it drew."""
  settings = f"FOLDER, RUNS, PLAN, SIDE = {str(exported)!r}, {str(tmp_path)!r}, 'cpu', 32"
  notebook, printed = run_notebook("draw_and_edit", parameters=settings)
  for network, tree in sampling_weights(smoke_run)[1].items():
    tree = {name: part for name, part in tree.items() if name != "head"}  # of the encoder: nothing that draws reads it
    assert f"{network}: {sum(array.size for array in params.flatten(tree).values()):,} weights" in printed
  assert "height, width, channels: (32, 32, 4)" in printed
  first, second, edited = pictures(notebook)
  assert first.shape == second.shape and not np.array_equal(first, second)
  with Image.open(tmp_path / "mine.png") as picture:  # the first that was drawn
    alone = grid([np.asarray(picture)], 1, scale=4)[6:134, 6:134]
  assert np.array_equal(first[6:134, 6:134], alone) and np.array_equal(edited[6:134, 6:134], alone)
  assert not np.array_equal(edited[6:134, 140:268], alone)


@pytest.mark.slow
def test_your_pictures(smoke_run, smoke_config, exported, tmp_path):
  """The training that it asks for is done already, on other data: what is tried is all that is before and after it."""
  shutil.copytree(smoke_run.workdir, tmp_path / "mine")
  settings = f"PLAN, RUNS, DATA, NUM_DRAWN = 'smoke', {str(tmp_path)!r}, {str(tmp_path / 'data')!r}, 60"
  notebook, printed = run_notebook("your_pictures", parameters=settings, config=smoke_settings(smoke_config))
  assert "63 pictures" in printed and "model_index.json" in printed
  funnel = json.loads((tmp_path / "data" / "mine" / "funnel.json").read_text())
  dropped = {reason: number for step in funnel["steps"] for reason, number in step["drops"].items()}
  assert funnel["samples"] == 63 and dropped["undecodable"] == dropped["too_small"] == 1 and sum(dropped.values()) < 10, dropped
  _, _, rebuilt, _ = pictures(notebook)  # batches, curves, what the VAE makes of pictures, drawn
  with Image.open(smoke_run.workdir / "vae" / "samples" / "00000002.png") as sheet:
    assert np.array_equal(rebuilt, np.asarray(sheet.convert("RGB")))
  assert weight_files(tmp_path / "mine_pipeline") == weight_files(exported)


@pytest.mark.slow
def test_a_rehearsal(tmp_path):
  """With rows of an earlier one in place of compiling, which tests/test_rehearse.py does."""
  bound = {"compute_s": 0.25, "hbm_s": 0.5, "ici_s": 0.0, "dcn_s": 0.0, "step_s": 0.5, "mfu": 0.25, "serial_mfu": 0.125}
  row = dict(stage="vae", task="t2i", height=64, width=64, num_tokens=31, batch_size=8, accumulate=2, mesh={"data": 1, "fsdp": 8}, bound=bound,
             peak_bytes=6 * 2**30, beside_bytes=2**29, limit_bytes=16 * 2**30)
  (tmp_path / "rows.json").write_text(json.dumps({"topology": "v5e:1x1", "num_slices": 1, "rows": [row]}))
  taken = f"--cost --rows={tmp_path / 'rows.json'}"
  settings = f"CONFIG, CHOICE, RUNS = 'configs/colab.py:smoke', {taken!r}, {str(tmp_path)!r}; TOPOLOGY = 'v5e:1x1'"
  _, printed = run_notebook("rehearse", parameters=settings)
  for text in ("exit code 0", "8 pictures a step in 2 parts", "mesh    data 1, fsdp 8", "6.0 GiB and 0.5 beside it, of 16.0",
               "0.500 s  the chip's memory", "25% can be used, 12% if nothing overlaps", "Not counted: generator"):
    assert text in printed, printed
