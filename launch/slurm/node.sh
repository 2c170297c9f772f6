#!/usr/bin/env bash
# Started by srun on every node: torchrun, with one log per rank. job.sh sets the environment.
set -euo pipefail

# shellcheck source=launch/device.sh
. "$REPOSITORY/launch/device.sh"
export FAILURES="$ATTEMPT/failures-$SLURM_NODEID.json"

# shellcheck disable=SC2016 # the rank's shell expands them
exec "$PYTHON" "$REPOSITORY/launch/torchrun.py" --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" \
    --nproc-per-node="$NGPU" --master-addr="$HEAD_ADDRESS" --master-port="$HEAD_PORT" --rdzv-id="$RENDEZVOUS" \
    --log-dir="$ATTEMPT/torchrun" --no-python \
    bash -c 'exec "$@" >"$ATTEMPT/rank-$(printf %05d "$RANK").log" 2>&1' rank "$PYTHON" -u -m "$TRAIN_FILE" "$@"
