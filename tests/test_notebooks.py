"""The notebooks: that what is saved in them is whole and clean, and that they run from the first cell to the last, at tiny sizes."""

import json
import os
import pathlib
import re
import sys

import nbformat
import pytest
from nbclient import NotebookClient

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
