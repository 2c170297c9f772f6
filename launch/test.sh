#!/usr/bin/env bash
# Sets up .venv and runs the tests: the fast ones, or everything with --all. Other arguments go to pytest:
#
#   bash launch/test.sh --all
#   bash launch/test.sh tests/titan -k config -x
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh
setup_venv titan,test

marker=(-m "not slow")
args=()
for arg in "$@"; do
    if [ "$arg" = --all ]; then
        marker=()
    else
        args+=("$arg")
    fi
done
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest "${marker[@]+"${marker[@]}"}" "${args[@]+"${args[@]}"}"
