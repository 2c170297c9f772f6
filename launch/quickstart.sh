#!/usr/bin/env bash
# From a bare Python to AdamW and AdamMini side by side on real text: installs into .venv, then runs launch/quickstart.py.
# Arguments go there (--steps, --out; see --help).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh
setup_venv titan
export HF_HOME="${HF_HOME:-$PWD/.cache/huggingface}" HF_HUB_OFFLINE=1 # the data are local; nothing is written elsewhere
exec .venv/bin/python launch/quickstart.py "$@"
