#!/usr/bin/env bash
# `titan-adam-mini check` out of this repository: checks AdamMini on the GPUs of this machine in one call, without a
# network, and prints a table of PASS, FAIL and SKIPPED:
#
#   NGPU=8 bash launch/gpu_check.sh --json gpu_check.json
#
#   NGPU    GPUs to use (default: all; with DEVICE=cpu, 2 processes)
#   DEVICE  cuda (default), or cpu: the same logic in small over gloo; what needs a GPU is SKIPPED
#   BUDGET  seconds for everything (default 520); stages that no longer fit are SKIPPED
#
# Its arguments are the command's: --json FILE is rewritten after every stage (default gpu_check.json), --out FOLDER gets
# the logs (default outputs/gpu_check), --only a,b runs some stages. The Python is $PYTHON, else that of the active
# virtual environment, else the repository's .venv, else python3; nothing is installed. The exit status is 1 if any stage
# failed.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

. "$ROOT/launch/python.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$PYTHON" -m titan_adam_mini.cli check ${DEVICE:+--device "$DEVICE"} ${BUDGET:+--budget "$BUDGET"} "$@"
