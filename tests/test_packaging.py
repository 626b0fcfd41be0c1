"""The project as a package: every module and every requirement is in it, and a cluster's workers get it with the job."""

import contextlib
import importlib.metadata
import os
import pathlib
import re
import tomllib
import zipfile

import pytest
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions
from apache_beam.runners.portability.stager import Stager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

from data_pipelines.curation import workers
from data_pipelines.curation.pipeline import job_options

ROOT = pathlib.Path(__file__).parent.parent
DATAFLOW = ["--project=p", "--region=r", "--temp_location=gs://b/tmp"]


def requirements(*names):
  """What pip reads in requirements files, normalised."""
  lines = [re.sub(r"(^|\s)#.*", "", line).strip() for name in names for line in (ROOT / name).read_text().splitlines()]
  assert not [line for line in lines if line.startswith("-")], "setuptools reads no options in these files"
  return sorted(str(Requirement(line)) for line in lines if line)


def locked(*names):
  """{normalised name: version} of lock files, whatever the platform."""
  return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in map(Requirement, requirements(*names))}


def unlocked(required, versions):
  """Those of the required packages that have no version, or one that they do not allow."""
  return [one for one in map(Requirement, required) if not one.specifier.contains(versions.get(canonicalize_name(one.name), "0"), prereleases=True)
          or canonicalize_name(one.name) not in versions]


def modules():
  return {str(path.relative_to(ROOT)) for package in workers.PACKAGES for path in (ROOT / package).rglob("*.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  return workers.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-data.txt", "requirements-dev.txt"])
def test_the_lock_has_a_version_of_every_package_and_it_is_allowed(name):
  required = [one for one in requirements(name) if not one.startswith("libtpu")]
  assert not unlocked(required, locked("requirements.lock"))


def test_the_locks_name_one_version_each_and_no_place_to_get_it_from():
  lines = requirements("requirements.lock", "requirements-tpu.lock")
  assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; .*)?", line) for line in lines)
  assert len(locked("requirements.lock", "requirements-tpu.lock")) == len(lines) and "://" not in (ROOT / "requirements.lock").read_text()


def test_the_lock_fits_what_its_packages_ask_for():
  """Of what is installed here in the locked version."""
  versions, faults = locked("requirements.lock", "requirements-tpu.lock"), []
  for name, version in versions.items():
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found = importlib.metadata.distribution(name)
      extra = "tpu" if name == "jax" else ""
      required = [one for one in map(Requirement, found.requires or ()) if one.marker is None or one.marker.evaluate({"extra": extra})]
      faults += [f"{name}: {one}" for one in unlocked(map(str, required), versions)] if found.version.partition("+")[0] == version else []
  assert not faults


@pytest.mark.parametrize("name", ["Makefile", "deploy/Dockerfile", "launch/tpu_pod.sh", "notebooks/install.sh"])
def test_what_installs_keeps_to_the_lock(name):
  lines = [line for line in (ROOT / name).read_text().splitlines() if re.search(r"-r \S*requirements", line)]
  assert lines and all(re.search(r"-c \S*requirements\.lock", line) for line in lines)
  assert all(("jax[" in line) == ("requirements-tpu.lock" in line) for line in lines)


def test_every_package_is_found():
  include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
  assert set(find_packages(ROOT, include=include)) == {str(pathlib.Path(name).parent).replace("/", ".") for name in modules()}
  assert {name.removesuffix("*") for name in include} == set(workers.PACKAGES)


# What is not code: a script, rubrics of the judge, sets of prompts.
DATA = {"launch/tpu_pod.sh"} | {path.relative_to(ROOT).as_posix() for folder in (
    "qimg2/evaluation/rubrics", "qimg2/evaluation/prompts", "data_pipelines/text_rendering/language_files",
    "data_pipelines/text_rendering/templates")
                                for path in (ROOT / folder).glob("*.[tj]*")}


def test_the_wheel_holds_every_module(wheel):
  with zipfile.ZipFile(wheel) as file:
    assert {name for name in file.namelist() if ".dist-info/" not in name} == modules() | DATA
  assert os.listdir(wheel.parent) == [wheel.name]


@pytest.mark.parametrize("extra, files", [
    ("", ["requirements.txt"]), ("data", ["requirements-data.txt"]), ("dev", ["requirements-data.txt", "requirements-dev.txt"])])
def test_its_requirements_are_those_of_the_files(wheel, extra, files):
  with zipfile.ZipFile(wheel) as file:
    metadata = file.read(next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))).decode()
  found = []
  for one in map(Requirement, re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)):
    if (one.marker is None) == (not extra) and (one.marker is None or one.marker.evaluate({"extra": extra})):
      one.marker = None
      found.append(str(one))
  assert sorted(found) == requirements(*files)


def test_a_dataflow_job_carries_the_package(tmp_path):
  options = PipelineOptions(job_options("DataflowRunner", 4, [*DATAFLOW, "--requirements_cache=skip"], tmp_path))
  staged = {os.path.basename(path): path for path, name, _ in Stager.extract_staging_tuple_iter(
      Stager.create_job_resources(options, str(tmp_path), log_submission_env_dependencies=False))}
  package, = options.view_as(SetupOptions).extra_packages
  assert staged[os.path.basename(package)] == package and re.fullmatch(r"qimg2-[\d.]+-py3-none-any\.whl", os.path.basename(package))
  listed = pathlib.Path(staged["requirements.txt"]).read_text().splitlines()
  wanted = [line for line in requirements("requirements-data.txt") if not line.startswith("apache-beam")]
  assert sorted(str(Requirement(line)) for line in listed) == wanted  # no comments: Beam would take them for part of a name


@pytest.mark.parametrize("given, carried", [
    ("--setup_file=s/setup.py", []), ("--sdk_container_image=image", []), ("--environment_type=LOOPBACK", []),
    ("--requirements_file=mine.txt", ["--extra_package="]), ("--extra_package=mine.whl", ["--requirements_file="])])
def test_what_the_user_says_is_left_alone(tmp_path, monkeypatch, given, carried):
  monkeypatch.setattr(workers, "build_wheel", lambda folder: "w.whl")
  options = job_options("FlinkRunner", 4, [given], tmp_path)
  assert options[:2] == ["--runner=FlinkRunner", given]
  assert [option.partition("=")[0] + "=" for option in options[2:]] == carried


def test_the_direct_runner_needs_nothing(tmp_path):
  assert job_options("DirectRunner", 1, ["--x"], tmp_path) == ["--runner=DirectRunner", "--x"]
  assert "--direct_num_workers=3" in job_options("DirectRunner", 3, [], tmp_path)
  assert not os.listdir(tmp_path)


def test_without_the_source_the_mistake_is_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setattr(workers, "ROOT", tmp_path)
  with pytest.raises(ValueError, match="its source is not beside .*--sdk_container_image=IMAGE"):
    job_options("DataflowRunner", 4, DATAFLOW, tmp_path)
