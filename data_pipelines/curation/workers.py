"""What workers on other machines need: this project as a package, and the packages of requirements-data.txt.

The direct runner's processes have both. For every other runner a wheel of this project (`--extra_package`) and a list of packages
(`--requirements_file`) go with the job, and a worker installs them when it starts. Nothing is added where the user says how workers come by
them: a container image, a setup file, packages of one's own, or workers inside this process.
"""

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, SetupOptions, WorkerOptions

ROOT = pathlib.Path(__file__).parent.parent.parent
PACKAGES = ("qimg2", "configs", "launch", "data_pipelines")
REQUIREMENTS = "requirements-data.txt"
OWN = "apache-beam"  # each worker has it, in the version of whoever sends the job
_BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def worker_options(options: Sequence[str], folder: str | os.PathLike) -> list[str]:
  """Returns the options that give a job's workers this project: [] where `options` say how they get it.

  Args:
    options: those of the job, such as ["--runner=DataflowRunner"].
    folder: where the wheel and the list of packages are written; they must stay until the job is sent.

  Raises:
    ValueError: this project is installed without its source, or setuptools cannot pack it.
  """
  given = PipelineOptions(list(options))
  setup = given.view_as(SetupOptions)
  if given.view_as(WorkerOptions).sdk_container_image or given.view_as(PortableOptions).environment_type == "LOOPBACK" or setup.setup_file:
    return []
  made = [] if setup.extra_packages else [f"--extra_package={build_wheel(folder)}"]
  return made if setup.requirements_file else [*made, f"--requirements_file={_write_requirements(folder)}"]


def build_wheel(folder: str | os.PathLike) -> pathlib.Path:
  """Returns the path of a wheel of this project, made in `folder` from a copy of the source, so that nothing old gets into it.

  Raises:
    ValueError: as `worker_options`.
  """
  _check_source()
  copy = pathlib.Path(folder, "source")
  copy.mkdir(parents=True)
  for path in (ROOT / "pyproject.toml", ROOT / "README.md", *ROOT.glob("requirements*.txt")):
    shutil.copy(path, copy)
  for package in PACKAGES:
    shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
  done = subprocess.run([sys.executable, "-c", _BUILD, str(pathlib.Path(folder).resolve())], cwd=copy, capture_output=True, text=True, check=False)
  if done.returncode:
    raise ValueError(f"No package for the workers could be made ({(done.stderr.strip().splitlines() or ['no message'])[-1]}): pip install -r "
                     f"{REQUIREMENTS}, or name a package of your own, --beam_options=--extra_package=FILE.")
  shutil.rmtree(copy)
  return pathlib.Path(folder, done.stdout.split()[-1])


def _write_requirements(folder: str | os.PathLike) -> pathlib.Path:
  """The packages of requirements-data.txt without comments, which Beam takes for part of a name."""
  _check_source()
  lines = [line.partition(" #")[0].strip() for line in (ROOT / REQUIREMENTS).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
  path = pathlib.Path(folder, "requirements.txt")
  path.write_text("".join(f"{line}\n" for line in lines if line and not line.startswith(OWN)), encoding="utf-8")
  return path


def _check_source() -> None:
  if not (ROOT / "pyproject.toml").is_file():
    raise ValueError(f"Workers on other machines need this project, but its source is not beside {ROOT / PACKAGES[-1]}: run in a clone, or name a "
                     "container image that has it, --beam_options=--sdk_container_image=IMAGE.")
