"""The scripts and manifests of a pod job, as far as they can be tried without a pod: their syntax, their fields, and the script with a gcloud
that only says what it was asked."""

import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from configs import pretrain
from qimg2.runtime.config import parse

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "launch" / "tpu_pod.sh"
SHELLCHECK = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
SETTINGS = {"PROJECT": "p", "ZONE": "z", "NAME": "job", "BUCKET": "b", "POLL_S": "0", "PAUSE_S": "0", "MAX_RESTARTS": "3"}
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$*" | tr '\\n' ' ' >>"$STUB/calls"; echo >>"$STUB/calls"
case "$*" in
  *'queued-resources describe'*)
    state=$(head -n 1 "$STUB/states"); sed -i '1{$!d}' "$STUB/states"
    case "$state" in
      NONE) echo 'ERROR: (gcloud) NOT_FOUND: no such resource' >&2; exit 1 ;;
      BROKEN) echo 'ERROR: no connection' >&2; exit 1 ;;
      *) echo "$state" ;;
    esac ;;
  *'cat qimg2.exit'*) head -n 1 "$STUB/exits"; sed -i '1{$!d}' "$STUB/exits" ;;
esac
"""


def script(*arguments, env=SETTINGS, **more):
  return subprocess.run([str(SCRIPT), *arguments], cwd=ROOT, env={**os.environ, **env, **more}, capture_output=True, text=True, timeout=60)


@pytest.fixture
def stub(tmp_path):
  """(folder of a gcloud that answers from the files `states` and `exits`, one line a call and the last for good; environment)."""
  (tmp_path / "gcloud").write_text(GCLOUD)
  (tmp_path / "gcloud").chmod(0o755)
  return tmp_path, {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STUB": str(tmp_path)}


def calls(folder):
  """What gcloud was asked, shortened to its verb."""
  lines = (folder / "calls").read_text().splitlines()
  verbs = [re.search(r"compute tpus (?:queued-resources|tpu-vm) (\w+)", line)[1] for line in lines]
  return [verb for verb, line in zip(verbs, lines) if verb != "describe" and "cat qimg2.exit" not in line], lines


def test_the_script_is_bash():
  subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
  assert os.access(SCRIPT, os.X_OK) and "set -euo pipefail" in SCRIPT.read_text()


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
  result = subprocess.run([SHELLCHECK, str(SCRIPT), str(ROOT / "notebooks" / "install.sh")], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout


def test_usage_and_mistakes():
  assert "usage: launch/tpu_pod.sh COMMAND" in script("--help").stdout
  result = script()
  assert result.returncode == 2 and "usage:" in result.stderr
  result = script("create", env={}, PROJECT="p", ZONE="z", NAME="")
  assert result.returncode == 2 and result.stderr.startswith("error: The environment variable NAME is not set")
  assert script("start").returncode == 2


def test_a_job_from_the_request_to_its_end(stub):
  folder, env = stub
  (folder / "states").write_text("NONE\nWAITING_FOR_RESOURCES\nBROKEN\nPROVISIONING\nACTIVE\nBROKEN\nACTIVE\n")
  (folder / "exits").write_text("\n\n0\n")
  result = script("all", "--", "--config=configs/pretrain.py", "--workdir=bucket/a run", **env)
  assert result.returncode == 0, result.stderr
  verbs, lines = calls(folder)
  assert verbs == ["create", "scp", "ssh", "ssh"]
  create = next(line for line in lines if " create " in line)
  assert "--node-id=job --accelerator-type=v5p-256 --runtime-version=v2-alpha-tpuv5 --spot" in create
  started = next(line for line in lines if "tpu_pod.sh worker" in line)
  assert "--worker=all" in started and r"--workdir=bucket/a\ run" in started


def test_machines_that_are_taken_away_are_asked_for_again(stub):
  folder, env = stub
  (folder / "states").write_text("ACTIVE\nACTIVE\nACTIVE\nSUSPENDED\nSUSPENDED\nNONE\nACTIVE\n")
  (folder / "exits").write_text("\n0\n")
  result = script("all", "--", "--config=c", **env)
  assert result.returncode == 0, result.stderr
  assert calls(folder)[0] == ["scp", "ssh", "ssh", "delete", "create", "scp", "ssh", "ssh"]


def test_a_mistake_is_not_tried_again(stub):
  folder, env = stub
  (folder / "states").write_text("ACTIVE\n")
  (folder / "exits").write_text("1\n")
  result = script("all", "--", "--config=c", **env)
  assert result.returncode == 1
  assert calls(folder)[0] == ["scp", "ssh", "ssh", "ssh"] and "tail -n 30 qimg2.log" in calls(folder)[1][-1]


@pytest.mark.parametrize("codes, ends, runs", [("75 75 0", 0, 3), ("75 1", 1, 2), ("75 75 75 75 75", 75, 4), ("137 0", 0, 2), ("2", 2, 1)])
def test_a_worker_starts_training_again_after_75(tmp_path, codes, ends, runs):
  python = tmp_path / "python"
  python.write_text('#!/usr/bin/env bash\necho "$*" >>runs\nread -r code rest <codes\necho "$rest" >codes\nexit "$code"\n')
  python.chmod(0o755)
  (tmp_path / "codes").write_text(codes + "\n")
  result = script("worker", "--", "--config=configs/pretrain.py:smoke", "--workdir=bucket/run", PYTHON=str(python), WORKER_HOME=str(tmp_path))
  assert result.returncode == ends and (tmp_path / "qimg2.exit").read_text() == f"{ends}\n"
  started = (tmp_path / "runs").read_text().splitlines()
  assert started == ["-m launch.train --distributed=auto --config=qimg2/configs/pretrain.py:smoke --workdir=bucket/run"] * runs


def test_what_is_lost_at_worst_follows_from_the_rehearsed_steps():
  """The table of docs/pods.md: of the longest step and the longest micro-batch the longest of the times and their sum; after a notice a step is lost,
  without one 20 min, a step and three micro-batches."""
  text, every_s, times = (ROOT / "docs" / "pods.md").read_text(), {stage.save_every_s for stage in pretrain.get_config().stages}, {}
  lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
  for plan, bucket, *cells in lines:
    if plan in pretrain.PLANS and len(cells) > 10:  # ... compute, HBM, ICI, DCN, bound, serial
      micro = int(cells[0].partition(" / ")[2])
      times.setdefault(plan, {})[bucket] = list(map(float, cells[-6:-2])), [float(cell) / micro for cell in cells[-6:-2]]
  assert set(times) == set(pretrain.PLANS) and every_s == {1200}
  for plan, found in times.items():
    longest = [[max((values[which] for bucket, values in found.items() if int(bucket.split()[1]) <= px), key=sum) for which in (0, 1)]
               for px in (512, 2048)]
    row, = [cells for cells in lines if cells[0] == plan and len(cells) == 8]
    spans = [f"{max(one):.{digits}f} to {sum(one):.{digits}f}" for pair in longest for one, digits in zip(pair, (0, 1))]
    without = [f"{(1200 + sum(step) + 3 * sum(micro)) / 60:.0f}" for step, micro in longest]
    assert row[1:] == [*spans, f"{sum(longest[1][0]) / 60:.1f}", *without]


# Manifests.


def pods(manifest):
  return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


# The fields that jobset.x-k8s.io/v1alpha2 and batch/v1 need or know, as far as the manifest uses them: a type, a set of values, or a dict whose
# keys end in "?" where they may be missing.
ONE_OF = lambda *values: set(values)
SCHEMA = {
    "apiVersion": ONE_OF("jobset.x-k8s.io/v1alpha2"), "kind": ONE_OF("JobSet"), "metadata": {"name": str, "annotations?": dict},
    "spec": {
        "failurePolicy?": {"maxRestarts": int, "rules?": [{
            "name": str, "action": ONE_OF("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
            "onJobFailureReasons?": [ONE_OF("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
                                            "PodFailurePolicy")]}]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": {
            "parallelism": int, "completions": int, "completionMode?": ONE_OF("Indexed"), "backoffLimit": ONE_OF(0),
            "podFailurePolicy?": {"rules": [{"action": ONE_OF("FailJob", "Ignore", "Count", "FailIndex"), "onExitCodes?": {
                "containerName?": str, "operator": ONE_OF("In", "NotIn"), "values": [int]}}]},
            "template": {"metadata?": dict, "spec": {
                "restartPolicy": ONE_OF("Never"), "serviceAccountName?": str, "terminationGracePeriodSeconds?": int, "nodeSelector": dict,
                "tolerations?": [dict], "volumes?": [dict],
                "containers": [{"name": str, "image": str, "args": [str], "ports?": [{"containerPort": int}], "resources": {"limits": dict},
                                "volumeMounts?": [{"name": str, "mountPath": str}]}]}}}}}]}}


def problems(value, schema, path):
  if isinstance(schema, dict):
    if not isinstance(value, dict):
      yield f"{path} is no mapping"
      return
    names = {key.rstrip("?"): (key, sub) for key, sub in schema.items()}
    yield from (f"{path}.{key} is unknown" for key in value if key not in names)
    for name, (key, sub) in names.items():
      if name in value:
        yield from problems(value[name], sub, f"{path}.{name}")
      elif not key.endswith("?"):
        yield f"{path}.{name} is missing"
  elif isinstance(schema, list):
    if not isinstance(value, list) or not value:
      yield f"{path} is no list of something"
      return
    for number, item in enumerate(value):
      yield from problems(item, schema[0], f"{path}[{number}]")
  elif isinstance(schema, set):
    if value not in schema:
      yield f"{path} is {value!r}"
  elif not isinstance(value, schema) or isinstance(value, bool):
    yield f"{path} is no {schema.__name__}"


@pytest.fixture(scope="module")
def manifest():
  return yaml.safe_load((ROOT / "deploy" / "jobset.yaml").read_text())


def test_the_jobset_fits_its_schema(manifest):
  assert not list(problems(manifest, SCHEMA, "jobset"))
  broken = yaml.safe_load((ROOT / "deploy" / "jobset.yaml").read_text())
  pods(broken)["backoffLimit"], pods(broken)["complections"] = 6, pods(broken).pop("completions")
  assert len(list(problems(broken, SCHEMA, "jobset"))) == 3


def test_the_jobset_is_whole(manifest):
  """Pods and chips fill the slice, every mounted volume is there, and only mistakes are not tried again."""
  job = pods(manifest)
  pod = job["template"]["spec"]
  container = pod["containers"][0]
  num_chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
  assert job["parallelism"] == job["completions"] == num_chips // container["resources"]["limits"]["google.com/tpu"]
  assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
  exits = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
  assert exits["values"] == [1, 2] and exits["containerName"] == container["name"]


def test_its_command_has_only_flags_that_exist(manifest):
  module, *arguments = pods(manifest)["template"]["spec"]["containers"][0]["args"]
  assert module == "launch.train"
  text = "".join((ROOT / "launch" / name).read_text() for name in ("train.py", "cli.py"))
  for argument in arguments:
    name = argument.removeprefix("--").partition("=")[0].partition(".")[0]
    assert f'"{name}"' in text, argument


def test_the_command_is_the_same_everywhere_and_its_encoder_is_trained(manifest):
  """In the script's example, in the manifest, and on the page once for each and for XPK."""
  texts = (SCRIPT.read_text(), "\n".join(pods(manifest)["template"]["spec"]["containers"][0]["args"]), (ROOT / "docs" / "pods.md").read_text())
  found = [re.findall(r"--config=configs/pretrain\.py:(v5p-256:\S+)", text.replace("/bucket/", "bucket/")) for text in texts]
  assert found == [["v5p-256:diffusers:bucket/published"]] * 2 + [["v5p-256:diffusers:bucket/published"] * 2]
  assert all("--config=configs/pretrain.py:v5p-256 --distributed" not in text and "pretrain.py:v5p-256 --workdir" not in text for text in texts)
  cfg = parse(pretrain.get_config(found[0][0]))
  assert {stage.frozen["encoder"] for stage in cfg.stages[1:]} == {"diffusers:bucket/published"} == {cfg.tokenizer}


def test_the_image_copies_what_is_there():
  text = (ROOT / "deploy" / "Dockerfile").read_text()
  sources = re.findall(r"^COPY (\S+) ", text, re.MULTILINE)
  assert {"qimg2", "launch", "configs", "data_pipelines", "requirements.txt", "requirements.lock", "requirements-tpu.lock"} == set(sources)
  assert all((ROOT / source).exists() for source in sources)
