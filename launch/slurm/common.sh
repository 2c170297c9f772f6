# shellcheck shell=bash
# What the batch scripts ask Slurm. Meant to be sourced.

# GPUs of this node: NGPU, else as Slurm says, else as many as the driver lists; 0 where there are none.
gpus_per_node() {
    local listed=0
    if [ -n "${NGPU:-}" ]; then
        listed="$NGPU"
    elif [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
        listed="$SLURM_GPUS_ON_NODE"
    elif command -v nvidia-smi >/dev/null; then
        listed="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)"
    elif command -v rocm-smi >/dev/null; then
        listed="$(rocm-smi --showid --csv 2>/dev/null | grep -c '^card')"
    fi
    echo "$listed"
}

# The address of the job's first node, where the ranks meet. Names of nodes need not resolve.
head_address() {
    local head address
    head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    address="$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
    if [[ "$address" =~ ^[0-9.]+$ || "$address" == *:* ]]; then
        echo "$address"
    else
        # Some systems resolve a node's own name to 127.0.1.1: the first address of an interface, not of the name.
        address="$(timeout 60 srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname -I)"
        [ -n "$address" ] && echo "${address%% *}"
    fi
}

# A port of this job's own, another one in each restart, below those that systems give to outgoing connections.
port_of_job() {
    echo $((15000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 15000))
}
