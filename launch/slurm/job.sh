# shellcheck shell=bash
# One attempt of a training job on Slurm, for the batch scripts in this folder: `train FLAGS...` plans, starts torchrun
# on every node, waits, forwards signals, and requeues the job if that may help. Meant to be sourced; LAUNCH is its
# folder.
#
# From the environment: CONFIG_FILE, NGPU, LOG_RANK, TRAIN_FILE, PYTHON as for launch/run_train.sh; OUTPUTS,
# MAX_REQUEUES, LEAD_SECONDS, HANG_SECONDS, HEALTH_CHECK, PLAN, RANKS: see launch/README.md.

# shellcheck source=launch/slurm/common.sh
. "$LAUNCH/common.sh"
REPOSITORY="$(repository_root)"
# shellcheck source=launch/python.sh
. "$REPOSITORY/launch/python.sh"

SAVED=75 REFUSED=78 # as in attempts.py
SIGNALLED="" CANCELLED="" JOB=""

log() { echo "titan-adam-mini: $*" >&2; }

refuse() {
    log "$@"
    exit "$REFUSED"
}

train() {
    # First of all: an unhandled signal would end the script, and the job with it.
    trap 'SIGNALLED=yes; log "USR1: asking the ranks to save and exit"; forward_signal' USR1
    trap 'CANCELLED=yes; log "TERM: the job is cancelled"' TERM
    identify
    if [[ "${1:-}" == *.toml ]]; then
        CONFIG_FILE="$1"
        shift
    fi
    CONFIG_FILE="${CONFIG_FILE:-$REPOSITORY/train_configs/debug_model.toml}"
    [ -f "$CONFIG_FILE" ] || refuse "CONFIG_FILE=$CONFIG_FILE does not exist. Configurations are in $REPOSITORY/train_configs."
    export NGPU
    NGPU="$(gpus_per_node)"
    [ "$NGPU" -gt 0 ] || NGPU=1 # no GPU: CPU with gloo
    local status=0 shown ranks=$((SLURM_JOB_NUM_NODES * NGPU))
    [ "${RANKS:-$ranks}" = "$ranks" ] ||
        refuse "RANKS=$RANKS is set, but $SLURM_JOB_NUM_NODES nodes with $NGPU ranks each are $ranks: submit with another -N, or with NGPU=ranks per node"
    OUTPUTS="$(dump_folder "$@")"
    number="$("$PYTHON" "$LAUNCH/attempts.py" begin "$OUTPUTS")" || exit "$?"
    ATTEMPT="$(cd "$OUTPUTS" && pwd)/attempts/$number"
    export REPOSITORY ATTEMPT PYTHON TRAIN_FILE="${TRAIN_FILE:-torchtitan.train}"
    export LOG_RANK="${LOG_RANK:-0}"
    # The user's flags come last and take precedence.
    set -- --job.config_file "$CONFIG_FILE" --checkpoint.enable --job.dump_folder "$OUTPUTS" \
        --comm.save_traces_folder "attempts/$number/comm_traces" "$@"
    prepare
    "$PYTHON" "$LAUNCH/environment.py" "$ATTEMPT/environment.txt" "$@" || true # a failure here must not lose the job
    log "job $SLURM_JOB_ID, attempt $number on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST): logs in $ATTEMPT"
    if ! plan "$@"; then
        status="$REFUSED"
    elif [ -n "$SIGNALLED$CANCELLED" ]; then
        status="$SAVED" # nothing to save yet
    else
        show_ranks &
        shown=$!
        start "$@" || status=$?
        sleep 1
        kill "$shown" 2>/dev/null || true
    fi
    finish "$status"
}

# The run's dump folder: --job.dump_folder among the flags, else OUTPUTS, else outputs/JOB_NAME.
dump_folder() {
    local folder="${OUTPUTS:-outputs/$SLURM_JOB_NAME}"
    while [ "$#" -gt 0 ]; do
        case "$1" in
        --job.dump_folder=* | --job.dump-folder=*) folder="${1#*=}" ;;
        --job.dump_folder | --job.dump-folder) folder="${2:-$folder}" ;;
        esac
        shift
    done
    echo "$folder"
}

# Slurm's record of this job, on one line. The first id of an array stands for all its tasks: select only ours.
record() {
    SLURM_TIME_FORMAT=standard scontrol show job --oneliner "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID "
}

# field RECORD NAME
field() { sed -n "s/.* $2=\([^ ]*\).*/\1/p" <<<"$1"; }

# Retries a command: the controller may be busy or restarting.
retry() {
    local try
    for try in 1 2 3 4 5 6; do
        if "$@"; then
            return
        fi
        [ "$try" -eq 6 ] || sleep 10
    done
    return 1
}

# Sets JOB (in an array, only this task) and the number of requeues. Slurm's variables may be those of a job that this
# one was submitted from. srun exports all our variables, regardless of sbatch --export.
identify() {
    local job task
    job="$(retry record)" || refuse "Slurm has no record of job $SLURM_JOB_ID"
    task="$(field "$job" ArrayTaskId)"
    JOB="${task:+$(field "$job" ArrayJobId)_$task}"
    JOB="${JOB:-$SLURM_JOB_ID}"
    SLURM_RESTART_COUNT="$(field "$job" Restarts)"
    export SLURM_RESTART_COUNT SLURM_EXPORT_ENV=ALL
}

# pre_empted RECORD: whether Slurm has pre-empted this start of the job.
pre_empted() {
    local at
    at="$(field "$1" PreemptTime)"
    [[ "$at" =~ ^[0-9] && ! "$at" < "$(field "$1" StartTime)" ]]
}

# The environment of the ranks: rendezvous, saving on signals, one curve for all attempts.
prepare() {
    HEAD_ADDRESS="${MASTER_ADDR:-$(head_address)}" || refuse "set MASTER_ADDR"
    HEAD_PORT="${MASTER_PORT:-$(port_of_job)}"
    RENDEZVOUS="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
    export HEAD_ADDRESS HEAD_PORT RENDEZVOUS
    export TITAN_ADAM_MINI_LEAD_SECONDS="${LEAD_SECONDS:-300}"
    export TITAN_ADAM_MINI_HANG_SECONDS="${HANG_SECONDS:-1800}"
    export TITAN_ADAM_MINI_PROGRESS="$ATTEMPT/progress.json"
    export TITAN_ADAM_MINI_SIGNALS=1 TITAN_ADAM_MINI_ONE_CURVE=1
    [ -f "$OUTPUTS/wandb_run_id" ] || echo "$SLURM_JOB_NAME-$SLURM_JOB_ID" | tr -c 'A-Za-z0-9_\n-' - >"$OUTPUTS/wandb_run_id"
    export WANDB_RUN_ID="${WANDB_RUN_ID:-$(cat "$OUTPUTS/wandb_run_id")}" WANDB_RESUME="${WANDB_RESUME:-allow}"
    network_variables
}

# Whether the run can start, checked once per job: the same flags give the same result.
plan() {
    if [ "${PLAN:-yes}" = no ] || [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        return
    fi
    "$PYTHON" -m titan_adam_mini.cli plan "$CONFIG_FILE" --ngpu "$ranks" "${@:3}" \
        >"$ATTEMPT/plan.txt" || return
    tail -n 1 "$ATTEMPT/plan.txt" >&2
}

# Follows the output of the ranks LOG_RANK.
show_ranks() {
    local files=() rank
    for rank in ${LOG_RANK//,/ }; do
        files+=("$ATTEMPT/rank-$(printf %05d "$rank").log")
    done
    exec tail -q -n +1 -F "${files[@]}" 2>/dev/null
}

# Runs torchrun on every node; returns srun's status. When one node ends, srun ends the others within a minute.
start() {
    local step beats=0
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=60 \
        ${SLURM_GPUS_ON_NODE:+--gpus-per-node="$SLURM_GPUS_ON_NODE"} bash "$LAUNCH/node.sh" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        sleep 2 &
        wait "$!" || true # a trap interrupts the wait
        beats=$((beats + 1))
        # Ranks that have just started do not handle signals yet: repeat it.
        if [ -n "$SIGNALLED" ] && [ $((beats % 5)) -eq 0 ]; then
            forward_signal
            if end_is_near; then
                log "the time limit is near and the ranks have not exited"
                return 1 # requeueing the job ends them
            fi
        fi
    done
    wait "$step"
}

forward_signal() { [ -z "$JOB" ] || scancel --signal=USR1 "$JOB" 2>/dev/null || true; }

# Whether Slurm is about to kill the job. After a pre-emption Slurm requeues it, at the time limit it does not.
end_is_near() {
    local job end margin=30
    job="$(record)" && end="$(date -d "$(field "$job" EndTime)" +%s 2>/dev/null)" || return
    ! pre_empted "$job" || margin=10
    [ $((end - $(date +%s))) -lt "$margin" ]
}

# Records the attempt, requeues the job if that may help, and exits with training's status.
finish() {
    local status="$1" bad="" job decision flags=()
    case "$status" in
    0 | "$SAVED" | "$REFUSED") ;;
    *) [ -n "$SIGNALLED" ] || bad="$(bad_nodes)" ;;
    esac
    job="$(retry record)" || log "Slurm has no record of job $JOB"
    if [ -n "$SIGNALLED" ] || pre_empted "$job"; then
        flags+=(--signalled)
    fi
    # A job that was cancelled, or submitted with --no-requeue, is not requeued.
    if [ -n "$CANCELLED" ] || [ "$(field "$job" JobState),$(field "$job" Requeue)" != RUNNING,1 ]; then
        flags+=(--no-requeue)
    fi
    decision="$("$PYTHON" "$LAUNCH/attempts.py" end "$OUTPUTS" "$number" --status "$status" \
        --limit "${MAX_REQUEUES:-50}" --bad "$bad" "${flags[@]}")"
    status="${decision% *}"
    if [ "${decision#* }" = requeue ] && [ -z "$CANCELLED" ]; then
        trap '' TERM # Slurm immediately sends it to this script and its children
        retry scontrol requeue "$JOB" || log "Slurm did not requeue job $JOB: submit it again to resume"
        [ -z "$bad" ] || exclude "$bad"
    fi
    exit "$status"
}

# Nodes that Slurm reports as down, drained or not responding, or that fail HEALTH_CHECK (a command run on each).
bad_nodes() {
    local node state healthy bad=()
    # shellcheck disable=SC2016
    healthy="$(timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --no-kill --wait=30 \
        bash -c '('"${HEALTH_CHECK:-true}"') >/dev/null && echo "$SLURMD_NODENAME"' 2>/dev/null)" || true
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        state="$(field "$(scontrol show node --oneliner "$node")" State)"
        if [[ "$state" =~ DOWN|DRAIN|FAIL|NOT_RESPONDING|\* ]] ||
            { [ -n "$healthy" ] && ! grep -q -x -F "$node" <<<"$healthy"; }; then
            bad+=("$node")
        fi
    done
    (IFS=, && echo "${bad[*]}")
}

# Excludes nodes from the requeued job if the partition has enough others; else the job would wait forever.
exclude() {
    local all left job partition
    job="$(record)" || return 0
    all="$(field "$job" ExcNodeList)"
    [ "$all" = "(null)" ] && all=""
    all="${all:+$all,}$1"
    partition="$(field "$job" Partition)"
    left="$(sinfo --noheader --Node --partition="$partition" --format=%N | sort -u |
        grep -c -v -x -F -f <(scontrol show hostnames "$all"))" || true
    if [ "$left" -lt "$SLURM_JOB_NUM_NODES" ]; then
        log "$1 not excluded: $partition has $left other nodes"
    else
        scontrol update "JobId=$JOB" "ExcNodeList=$all" || log "$1 could not be excluded"
    fi
}
