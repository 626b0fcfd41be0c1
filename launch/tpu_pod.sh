#!/usr/bin/env bash
# One training job on a TPU pod slice of Cloud TPU VMs, from the request for machines to the exit code. docs/pods.md walks through it.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/tpu_pod.sh COMMAND [-- ARGUMENTS OF launch.train]

  all     create, wait, install, start, watch; asks for new machines when these are taken away, until training ends
  create  asks for the machines (gcloud queued resources)
  wait    returns when they are there
  install copies this commit to all workers, installs it, mounts the bucket at ~/bucket
  start   starts training on all workers; needs the arguments after --
  watch   returns when training ends: 0 done, 1 a mistake (see logs), 75 the machines are gone
  logs    follows the log of worker $WORKER (0)
  status  state of the request
  delete  gives the machines back
  worker  what `start` runs on each worker: training, started again whenever it ends with 75

Settings are environment variables: PROJECT, ZONE, NAME, BUCKET (without gs://) must be set; ACCELERATOR (v5p-256),
RUNTIME (v2-alpha-tpuv5), SPOT (1: spot machines, 0: on demand), SERVICE_ACCOUNT (the default one), POLL_S (60), MAX_RESTARTS (100).

example:
  export PROJECT=my-project ZONE=us-east5-a NAME=qimg2 BUCKET=my-bucket
  launch/tpu_pod.sh all -- --config=configs/pretrain.py:v5p-256:diffusers:bucket/published --workdir=gs://$BUCKET/runs/first --config.data_dir=bucket/data
USAGE
}

ACCELERATOR=${ACCELERATOR:-v5p-256}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}
SPOT=${SPOT:-1}
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-}
POLL_S=${POLL_S:-60}
MAX_RESTARTS=${MAX_RESTARTS:-100}
WORKER=${WORKER:-0}
TRY_AGAIN=75
# On a worker: ends an earlier `worker` with all that it started, or two would ask for the same chips. Any moment is good: checkpoints are atomic.
# shellcheck disable=SC2016  # it is the worker that expands it
END_EARLIER='[ ! -f qimg2.pid ] || kill -KILL -- -$(cat qimg2.pid) 2>/dev/null || true; rm -f qimg2.pid'

say() { printf '%s %s\n' "$(date '+%F %T')" "$*" >&2; }

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

need_settings() {
  local setting
  for setting in PROJECT ZONE NAME BUCKET; do
    [[ -n "${!setting:-}" ]] || fail "The environment variable $setting is not set: see launch/tpu_pod.sh --help."
  done
}

tpus() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }

on() { tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"; }  # worker or "all", command

state() {  # NONE when there is no request, UNKNOWN when gcloud cannot say: a bad connection must not look like machines that are gone
  local answer
  if answer=$(tpus queued-resources describe "$NAME" --format='value(state.state)' 2>&1); then
    tail -n 1 <<<"$answer"
  elif [[ "$answer" == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo UNKNOWN
  fi
}

create() {
  local more=()
  [[ "$SPOT" == 1 ]] && more+=(--spot)
  [[ -n "$SERVICE_ACCOUNT" ]] && more+=("--service-account=$SERVICE_ACCOUNT")
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${more[@]}"
}

wait_until_active() {
  local now last=
  while now=$(state); [[ "$now" != ACTIVE ]]; do
    [[ "$now" == "$last" ]] || say "The request $NAME is $now."
    last=$now
    case "$now" in
      FAILED|SUSPENDED|SUSPENDING|NONE)
        say "There is nothing to wait for: launch/tpu_pod.sh delete, then create."
        exit "$TRY_AGAIN" ;;
    esac
    sleep "$POLL_S"
  done
  say "The machines of $NAME are there."
}

install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git archive --format=tar.gz --output="$archive" HEAD
  tpus tpu-vm scp "$archive" "$NAME:qimg2.tar.gz" --worker=all
  rm -f "$archive"
  on all "set -e
    $END_EARLIER
    rm -rf qimg2 && mkdir -p qimg2 bucket && tar -xzf qimg2.tar.gz -C qimg2
    python3 -m pip install -q --user uv && export PATH=\$HOME/.local/bin:\$PATH  # the image's own Python is too old
    uv venv -q --clear --python 3.12 .venv && uv pip install -q --python .venv/bin/python \
      -r qimg2/requirements.txt 'jax[tpu]' -c qimg2/requirements.lock -c qimg2/requirements-tpu.lock
    command -v gcsfuse >/dev/null || {
      export CODENAME=gcsfuse-\$(lsb_release -c -s)
      echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt \$CODENAME main\" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list
      curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
      sudo apt-get -q update && sudo apt-get -q install -y gcsfuse; }
    mountpoint -q bucket || gcsfuse --implicit-dirs --rename-dir-limit=200000 '$BUCKET' bucket"
}

start() {
  (($#)) || fail "start needs the arguments of launch.train after --."
  local arguments
  printf -v arguments '%q ' "$@"
  say "Training starts on all workers."
  # HOME is the folder of relative paths, so that --config.data_dir=bucket/... is in the bucket.
  on all "$END_EARLIER; rm -f qimg2.exit; MAX_RESTARTS=$MAX_RESTARTS nohup setsid bash qimg2/launch/tpu_pod.sh worker -- $arguments >>qimg2.log 2>&1 </dev/null &"
}

worker() {
  local code restarts=0
  cd "${WORKER_HOME:-$HOME}"
  echo $$ >qimg2.pid
  while :; do
    code=0
    PYTHONPATH=qimg2 "${PYTHON:-.venv/bin/python}" -m launch.train --distributed=auto "${@/#--config=configs/--config=qimg2/configs}" || code=$?
    # Above 128 it was killed: by the machine when memory is short, or by the runtime when another worker is gone.
    ((code == TRY_AGAIN || code > 128)) || break
    ((restarts < MAX_RESTARTS)) || break
    restarts=$((restarts + 1))
    say "Training ended with $code and starts again, the ${restarts}th time."
    sleep "${PAUSE_S:-15}"
  done
  echo "$code" >qimg2.exit
  exit "$code"
}

watch() {
  local now code
  while :; do
    now=$(state)
    [[ "$now" == ACTIVE || "$now" == UNKNOWN ]] || { say "The machines of $NAME are gone ($now)."; return "$TRY_AGAIN"; }
    code=$(on 0 'cat qimg2.exit 2>/dev/null || true' 2>/dev/null || true)
    if [[ "$code" =~ ^[0-9]+$ ]]; then
      say "Training ended with $code."
      [[ "$code" == 0 ]] || on 0 'tail -n 30 qimg2.log' || true
      return "$code"
    fi
    sleep "$POLL_S"
  done
}

delete() { tpus queued-resources delete "$NAME" --force; }

all() {
  (($#)) || fail "all needs the arguments of launch.train after --."
  local code now tries=0
  while :; do
    if [[ "$(state)" == NONE ]]; then
      create
    fi
    # Each in a shell of its own: `if` and `||` would switch -e off inside functions.
    code=$TRY_AGAIN
    if "$0" wait && "$0" install && "$0" start -- "$@"; then
      code=0
      "$0" watch || code=$?
    fi
    ((code == TRY_AGAIN && tries < MAX_RESTARTS)) || return "$code"
    tries=$((tries + 1))
    now=$(state)
    case "$now" in FAILED|SUSPENDED|SUSPENDING) delete ;; esac
    say "The job begins again, the ${tries}th time; training goes on from its last checkpoint."
    sleep "$POLL_S"
  done
}

main() {
  local command=${1:-}
  (($#)) && shift
  [[ "${1:-}" == -- ]] && shift
  case "$command" in
    -h|--help|help) usage ;;
    worker) worker "$@" ;;
    create|install|start|watch|delete|all) need_settings; "$command" "$@" ;;
    wait) need_settings; wait_until_active ;;
    status) need_settings; state ;;
    logs) need_settings; on "$WORKER" 'tail -n 100 -F qimg2.log' ;;
    *) usage >&2; exit 2 ;;
  esac
}

main "$@"
