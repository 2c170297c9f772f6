#!/usr/bin/env bash
# Starts torchtitan's trainer on this machine, with the interface of torchtitan's own script of this name:
#
#   NGPU=4 CONFIG_FILE=train_configs/llama3_8b.toml bash launch/run_train.sh --training.steps 100
#
#   NGPU         processes, one per GPU; without GPUs, CPU processes (default 8 with GPUs, 2 without)
#   LOG_RANK     ranks whose output is shown, comma-separated (default 0)
#   CONFIG_FILE  TOML file (default train_configs/debug_model.toml)
#   TRAIN_FILE   module to run (default torchtitan.train)
#   COMM_MODE    fake_backend or local_tensor: one process simulates NGPU ranks for one step, to check a configuration
#
# Everything after the script's name goes to the trainer. The Python is $PYTHON, else that of the active virtual
# environment, else the repository's .venv, else python3. The exit status is that of the rank that failed first. TERM and
# USR1 are forwarded to the ranks, which save and exit with status 75; TITAN_ADAM_MINI_SIGNALS=0 disables this
# (docs/torchtitan.md). Without GPUs, TITAN_ADAM_MINI_CPU=1 is set too.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

. "$ROOT/launch/python.sh"

. "$ROOT/launch/device.sh"
[ "$GPUS" = yes ] && NGPU="${NGPU:-8}" || NGPU="${NGPU:-2}"
export NGPU
export LOG_RANK="${LOG_RANK:-0}" TITAN_ADAM_MINI_SIGNALS="${TITAN_ADAM_MINI_SIGNALS:-1}"
CONFIG_FILE="${CONFIG_FILE:-$ROOT/train_configs/debug_model.toml}"
TRAIN_FILE="${TRAIN_FILE:-torchtitan.train}"
COMM_MODE="${COMM_MODE:-}"

if [ ! -f "$CONFIG_FILE" ]; then
    echo "error: CONFIG_FILE=$CONFIG_FILE does not exist. Configurations are in $ROOT/train_configs." >&2
    exit 2
fi

case "$COMM_MODE" in
"")
    # With port 0 the rendezvous chooses a free one, so that jobs on a machine do not collide.
    exec "$PYTHON" "$ROOT/launch/torchrun.py" --nproc_per_node="$NGPU" --rdzv_backend=c10d --rdzv_endpoint=localhost:0 \
        --local-ranks-filter="$LOG_RANK" --role=rank --tee=3 \
        -m "$TRAIN_FILE" --job.config_file "$CONFIG_FILE" "$@"
    ;;
fake_backend | local_tensor)
    export LOCAL_RANK=0
    exec "$PYTHON" -m "$TRAIN_FILE" --job.config_file "$CONFIG_FILE" "$@" \
        --comm.mode="$COMM_MODE" --training.steps=1
    ;;
*)
    echo "error: unknown COMM_MODE=$COMM_MODE: leave it empty, or use fake_backend or local_tensor." >&2
    exit 2
    ;;
esac
