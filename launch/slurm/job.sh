# shellcheck shell=bash
# One attempt of a training job on Slurm, for the batch scripts beside it: `train FLAGS...` plans, starts torchrun on
# every node, waits, hands signals on, and queues the job again where that helps. Meant to be sourced; LAUNCH is its
# folder.
#
# From the environment: CONFIG_FILE, NGPU, LOG_RANK, TRAIN_FILE, PYTHON as for launch/run_train.sh; OUTPUTS,
# MAX_REQUEUES, LEAD_SECONDS, HANG_SECONDS, HEALTH_CHECK, PLAN, RANKS: see launch/README.md.

# shellcheck source=launch/slurm/common.sh
. "$LAUNCH/common.sh"
REPOSITORY="$(repository_root)"
# shellcheck source=launch/python.sh
. "$REPOSITORY/launch/python.sh"

LEFT=75 REFUSED=78 # as in attempts.py
SIGNALLED="" CANCELLED="" JOB=""

say() { echo "titan-adam-mini: $*" >&2; }

refuse() {
    say "$@"
    exit "$REFUSED"
}

train() {
    # From here on: a signal that nobody expects ends the script, and the job with it.
    trap 'SIGNALLED=yes; say "USR1: the ranks are asked to save and leave"; hand_on' USR1
    trap 'CANCELLED=yes; say "TERM: the job is cancelled"' TERM
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
        refuse "RANKS=$RANKS were asked for, and $SLURM_JOB_NUM_NODES nodes with $NGPU each make $ranks: submit with another -N, or with NGPU=ranks per node"
    OUTPUTS="$(dump_folder "$@")"
    number="$("$PYTHON" "$LAUNCH/attempts.py" begin "$OUTPUTS")" || exit "$?"
    ATTEMPT="$(cd "$OUTPUTS" && pwd)/attempts/$number"
    export REPOSITORY ATTEMPT PYTHON TRAIN_FILE="${TRAIN_FILE:-torchtitan.train}"
    export LOG_RANK="${LOG_RANK:-0}"
    # A user's flags come last and count.
    set -- --job.config_file "$CONFIG_FILE" --checkpoint.enable --job.dump_folder "$OUTPUTS" \
        --comm.save_traces_folder "attempts/$number/comm_traces" "$@"
    prepare
    "$PYTHON" "$LAUNCH/environment.py" "$ATTEMPT/environment.txt" "$@" || true # a note is no reason to lose the job
    say "job $SLURM_JOB_ID, attempt $number on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST): logs in $ATTEMPT"
    if ! plan "$@"; then
        status="$REFUSED"
    elif [ -n "$SIGNALLED$CANCELLED" ]; then
        status="$LEFT" # there is nothing to save yet
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

# Slurm's record of this job, on one line. The first id of an array stands for all its tasks: only ours counts.
record() {
    SLURM_TIME_FORMAT=standard scontrol show job --oneliner "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID "
}

# field RECORD NAME
field() { sed -n "s/.* $2=\([^ ]*\).*/\1/p" <<<"$1"; }

# The controller may be busy, or be starting again.
patiently() {
    local try
    for try in 1 2 3 4 5 6; do
        if "$@"; then
            return
        fi
        [ "$try" -eq 6 ] || sleep 10
    done
    return 1
}

# JOB, which means this task alone in an array, and how often it was queued again. The variables of Slurm may be those
# of a job that this one was submitted from, and the sruns get all of ours, whatever sbatch --export said.
identify() {
    local job task
    job="$(patiently record)" || refuse "Slurm does not tell of job $SLURM_JOB_ID"
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

# Where the ranks meet, that they save on a signal, and one curve for all attempts.
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

# Whether the run can start at all, asked once per job: the same flags would get the same answer.
plan() {
    if [ "${PLAN:-yes}" = no ] || [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        return
    fi
    "$PYTHON" -m titan_adam_mini.cli plan "$CONFIG_FILE" --ngpu "$ranks" "${@:3}" \
        >"$ATTEMPT/plan.txt" || return
    tail -n 1 "$ATTEMPT/plan.txt" >&2
}

# The output of the ranks LOG_RANK, as it comes.
show_ranks() {
    local files=() rank
    for rank in ${LOG_RANK//,/ }; do
        files+=("$ATTEMPT/rank-$(printf %05d "$rank").log")
    done
    exec tail -q -n +1 -F "${files[@]}" 2>/dev/null
}

# Runs torchrun on every node; returns srun's status. A node that ends has the others end within a minute.
start() {
    local step beats=0
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=60 \
        ${SLURM_GPUS_ON_NODE:+--gpus-per-node="$SLURM_GPUS_ON_NODE"} bash "$LAUNCH/node.sh" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        sleep 2 &
        wait "$!" || true # a trap ends the wait at once
        beats=$((beats + 1))
        # A rank that has just started does not listen yet: it is asked again.
        if [ -n "$SIGNALLED" ] && [ $((beats % 5)) -eq 0 ]; then
            hand_on
            if end_is_near; then
                say "the end is near and the ranks have not left"
                return 1 # queueing the job again ends them
            fi
        fi
    done
    wait "$step"
}

hand_on() { [ -z "$JOB" ] || scancel --signal=USR1 "$JOB" 2>/dev/null || true; }

# Whether Slurm is about to kill the job: after a pre-emption it queues it again itself, at the time limit it does not.
end_is_near() {
    local job end margin=30
    job="$(record)" && end="$(date -d "$(field "$job" EndTime)" +%s 2>/dev/null)" || return
    ! pre_empted "$job" || margin=10
    [ $((end - $(date +%s))) -lt "$margin" ]
}

# Writes the attempt down, queues the job again if that helps, and ends with training's status.
finish() {
    local status="$1" bad="" job decision flags=()
    case "$status" in
    0 | "$LEFT" | "$REFUSED") ;;
    *) [ -n "$SIGNALLED" ] || bad="$(bad_nodes)" ;;
    esac
    job="$(patiently record)" || say "Slurm does not tell of job $JOB"
    if [ -n "$SIGNALLED" ] || pre_empted "$job"; then
        flags+=(--signalled)
    fi
    # A job that was cancelled, or submitted with --no-requeue, is not brought back.
    if [ -n "$CANCELLED" ] || [ "$(field "$job" JobState),$(field "$job" Requeue)" != RUNNING,1 ]; then
        flags+=(--no-requeue)
    fi
    decision="$("$PYTHON" "$LAUNCH/attempts.py" end "$OUTPUTS" "$number" --status "$status" \
        --limit "${MAX_REQUEUES:-50}" --bad "$bad" "${flags[@]}")"
    status="${decision% *}"
    if [ "${decision#* }" = requeue ] && [ -z "$CANCELLED" ]; then
        trap '' TERM # Slurm sends it at once to this script and what it calls
        patiently scontrol requeue "$JOB" || say "Slurm does not queue job $JOB again: submit it once more to go on"
        [ -z "$bad" ] || exclude "$bad"
    fi
    exit "$status"
}

# Nodes that Slurm calls down, drained or silent, or that do not pass HEALTH_CHECK (a command that is run on each).
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

# Slurm gives the waiting job other nodes than these, where the partition has enough: else the job would wait for ever.
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
        say "$1 not excluded: $partition has $left other nodes"
    else
        scontrol update "JobId=$JOB" "ExcNodeList=$all" || say "$1 could not be excluded"
    fi
}
