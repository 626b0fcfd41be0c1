"""Imports point one way and files stay short."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OURS = {"qimg2", "configs", "launch", "data_pipelines", "benchmarks", "tests"}
ALLOWED = {
    "data_pipelines": {"data_pipelines", "numpy", "grain", "tensorflow_datasets", "PIL", "pyvips", "tokenizers", "matplotlib", "fontTools", "tqdm",
                       "absl", "array_record"},
    "data_pipelines/text_rendering": {"data_pipelines", "numpy", "PIL", "fontTools", "uharfbuzz", "bidi", "babel", "pyphen", "budoux", "pythainlp",
                                      "cv2", "matplotlib"},
    # What only curation needs is in requirements-data.txt.
    "data_pipelines/curation": {"data_pipelines", "numpy", "tensorflow_datasets", "PIL", "apache_beam", "cv2", "imagehash", "rapidocr",
                                "onnxruntime", "tokenizers", "pyarrow", "fsspec", "tqdm", "matplotlib", "absl"},
    "qimg2": {"qimg2", "numpy", "jax", "flax", "optax", "orbax", "tqdm", "tensorboardX", "safetensors", "absl", "etils", "fsspec", "gcsfs",
              "google", "google_crc32c", "wandb"},
    # jax for the judge and networks that look at pictures.
    "qimg2/evaluation": {"qimg2", "numpy", "scipy", "PIL", "absl", "jax", "rapidfuzz", "rapidocr", "onnxruntime", "cv2", "fontTools", "matplotlib"},
    "qimg2/published": {"qimg2", "numpy", "jax", "tqdm", "safetensors", "gguf"},  # gguf where it is installed
    # In processes without jax; the embedded data set knows what its pictures show.
    "qimg2/rewards": {"qimg2", "data_pipelines", "numpy", "absl"},
    # Joins config, data and networks.
    "qimg2/runtime": {"qimg2", "data_pipelines", "numpy", "jax", "grain", "tqdm", "absl", "matplotlib", "PIL"},
    # The only place that knows what a config file returns.
    "qimg2/runtime/config": {"qimg2", "data_pipelines", "ml_collections"},
    # Defaults are those of the classes that a section becomes.
    "configs": {"configs", "qimg2", "data_pipelines", "ml_collections"},
}
# A folder or module of qimg2 may import those in earlier rows, and itself.
ORDER = [["params", "products", "places"], ["sharding", "batch", "adapters"], ["layers"], ["attention"], ["models"], ["layout", "flax_module"],
         ["networks", "flow"], ["sampler"], ["sde"], ["algorithms"], ["training"], ["published", "analysis", "evaluation"], ["rewards"],
         ["runtime"]]
# Who may import qimg2.runtime, which holds everything together.
ABOVE_RUNTIME = {"configs", "launch", "notebooks", "benchmarks", "tests"}
FILES = sorted(path for folder in OURS for path in (ROOT / folder).rglob("*.py"))


def imports(path):
  """Dotted names of everything a file imports."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_import_what_they_may(folder):
  for path in (ROOT / folder).rglob("*.py") if (ROOT / folder).is_dir() else [ROOT / folder]:
    if any(other != folder and other.startswith(folder) and (ROOT / other) in (path, *path.parents) for other in ALLOWED):
      continue  # has a row of its own
    odd = {name.split(".")[0] for name in imports(path)} - ALLOWED[folder] - sys.stdlib_module_names
    assert not odd, f"{path} imports {sorted(odd)}"


def test_qimg2_imports_point_one_way():
  rank = {name: number for number, row in enumerate(ORDER) for name in row}
  for path in (ROOT / "qimg2").rglob("*.py"):
    mine = path.relative_to(ROOT / "qimg2").parts[0].removesuffix(".py")
    if mine == "__init__":
      continue
    for name in imports(path):
      if name.startswith("qimg2."):
        theirs = name.split(".")[1]
        assert theirs == mine or rank[theirs] < rank[mine], f"{path} imports {name}"


def test_algorithms_never_import_a_model_and_the_trainer_no_method():
  for path in (ROOT / "qimg2" / "algorithms").glob("*.py"):
    assert not [name for name in imports(path) if name.startswith("qimg2.models")], path
  for path in (ROOT / "qimg2" / "training").glob("*.py"):
    assert not [name for name in imports(path) if name.startswith("qimg2.models")], path
    odd = [name for name in imports(path) if name.startswith("qimg2.algorithms.") and not name.split(".")[2][0].isupper()]
    assert not odd, f"{path} imports {odd}"


def test_nobody_below_imports_the_runtime_and_no_main_another():
  for path in FILES:
    top = path.relative_to(ROOT).parts[0]
    names = set(imports(path))
    if top not in ABOVE_RUNTIME and "runtime" not in path.parts:
      assert not [name for name in names if name.startswith("qimg2.runtime")], path
    if top in ("launch", "qimg2", "data_pipelines", "configs"):
      odd = [name for name in names if name.startswith("launch.") and not name.startswith(("launch.cli", "launch.console"))]
      assert not odd, f"{path} imports {odd}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_documented(path):
  lines = path.read_text(encoding="utf-8").splitlines()
  assert len(lines) <= 400
  assert max(map(len, lines), default=0) <= 150
  assert not lines or ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_several_workers_get_whole_groups(request):
  """Else each of them trains every run that tests look at."""
  if getattr(request.config.option, "loadgroup", False):
    assert request.node.nodeid.endswith("@test_structure")


def test_functions_fit_a_screen():
  for path in FILES:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
