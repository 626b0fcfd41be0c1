#!/usr/bin/env bash
# Installs what the project needs into the environment of a notebook, on Colab or elsewhere, with the JAX of the accelerator that the machine has:
#   bash notebooks/install.sh [PYTHON]
# Again it only looks. Two variables are for tests: DEV, where device files are, and PIP.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${1:-python3}
DEV=${DEV:-/dev}
PIP=${PIP:-$PYTHON -m pip}

if compgen -G "$DEV/accel[0-9]*" >/dev/null || compgen -G "$DEV/vfio/[0-9]*" >/dev/null; then
  EXTRA=tpu
elif [[ -e $DEV/nvidiactl ]]; then
  EXTRA=cuda12  # the drivers of Colab's machines are of CUDA 12
else
  EXTRA=cpu
fi
echo "Installing for $EXTRA: two minutes, the first time."
# shellcheck disable=SC2086  # the command may have arguments
$PIP install -q -r requirements.txt -r requirements-data.txt "jax[$EXTRA]" -c requirements.lock -c requirements-tpu.lock
echo "Installed."
