#!/usr/bin/env bash
# Checks AdamMini on the GPUs of this machine in one call, without a network, and prints a table of PASS and FAIL:
#
#   NGPU=8 bash launch/gpu_check.sh --json gpu_check.json
#
#   NGPU    GPUs to use (default: all; with DEVICE=cpu, 2 processes)
#   DEVICE  cuda (default), or cpu: the same logic in small over gloo; what needs a GPU is SKIPPED
#   BUDGET  seconds for everything (default 520); stages that no longer fit are SKIPPED
#
# --json FILE is rewritten after every stage (default gpu_check.json), --out FOLDER gets the logs (default
# outputs/gpu_check), --only a,b runs some stages. The Python is $PYTHON, else that of the active virtual environment,
# else the repository's .venv, else python3; nothing is installed. The exit status is 1 if any stage failed.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

. "$ROOT/launch/python.sh"
export PYTHONPATH="$ROOT:$ROOT/launch:$ROOT/tests${PYTHONPATH:+:$PYTHONPATH}"
export HF_HOME="${HF_HOME:-$ROOT/.cache/huggingface}" HF_HUB_OFFLINE=1 # the data is local; nothing outside is written
export PET_LOCAL_ADDR="${PET_LOCAL_ADDR:-127.0.0.1}"                   # torchrun: this machine's name need not resolve
export PYTHONUNBUFFERED=1
exec "$PYTHON" -m gpu_check "$@"
