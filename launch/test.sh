#!/usr/bin/env bash
# Sets up .venv and runs the tests: the fast ones; with --all also the slow ones; with --slurm those that submit jobs to
# a private Slurm cluster; with --nightly those that take long. The last two fail if no test ran. Other arguments go to
# pytest:
#
#   bash launch/test.sh --all
#   bash launch/test.sh tests/titan -k config -x
#
# Two processes run the tests, one folder at a time each; use `-n 0` for a debugger.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh

marker=(-m "not slow and not nightly") workers=2
args=()
for arg in "$@"; do
    case "$arg" in
    --all) marker=(-m "not nightly") workers=3 ;; # one has the Slurm tests, which mostly wait
    --slurm)
        marker=(-m "slurm and not nightly") && export TITAN_ADAM_MINI_TEST_TIER=--slurm
        type slurmctld slurmd sbatch >/dev/null 2>&1 ||
            fail "Slurm is not installed; its tests need it." \
                "Install it: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client"
        [ "$(id -u)" = 0 ] || fail "The Slurm tests start a private cluster, which needs root. Run them as root."
        ;;
    --nightly) marker=(-m nightly) && export TITAN_ADAM_MINI_TEST_TIER=--nightly ;;
    *) args+=("$arg") ;;
    esac
done
setup_venv titan,test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n "$workers" "${marker[@]}" "${args[@]+"${args[@]}"}"
