#!/usr/bin/env bash
# Sets up .venv and runs the tests: the fast tier; with --all also the slow one; with --slurm those that submit jobs to
# a Slurm cluster of their own; with --nightly those that take long. The last two fail if they ran nothing. Other arguments go to pytest:
#
#   bash launch/test.sh --all
#   bash launch/test.sh tests/titan -k config -x
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh
setup_venv titan,test

marker=(-m "not slow and not nightly")
args=()
for arg in "$@"; do
    case "$arg" in
    --all) marker=(-m "not nightly") ;;
    --slurm) marker=(-m "slurm and not nightly") && export TITAN_ADAM_MINI_TEST_TIER=--slurm ;;
    --nightly) marker=(-m nightly) && export TITAN_ADAM_MINI_TEST_TIER=--nightly ;;
    *) args+=("$arg") ;;
    esac
done
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest "${marker[@]}" "${args[@]+"${args[@]}"}"
