#!/usr/bin/env bash
# `titan-adam-mini check` from this repository: tests AdamMini on the GPUs of this machine, without a network, and
# prints a table of PASS, FAIL and SKIPPED:
#
#   NGPU=8 bash launch/gpu_check.sh --json gpu_check.json
#
#   NGPU    GPUs to use (default: all; with DEVICE=cpu, 2 processes)
#   DEVICE  cuda (default), or cpu: small versions of the stages over gloo; those that need a GPU are SKIPPED
#   BUDGET  total seconds (default 520); stages that no longer fit are SKIPPED
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
