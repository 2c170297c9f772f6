# shellcheck shell=bash
# Selects the Python for training: $PYTHON, else that of the active virtual environment, else the repository's .venv,
# else python3. Meant to be sourced: it sets PYTHON.

if [ -z "${PYTHON:-}" ]; then
    PYTHON="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python"
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        PYTHON="$VIRTUAL_ENV/bin/python"
    elif [ ! -x "$PYTHON" ]; then
        PYTHON=python3
    fi
fi
export PYTHON
