# shellcheck shell=bash
# What the batch scripts ask Slurm. Meant to be sourced. Slurm runs a copy of a batch script out of its spool, so a script
# finds this file by the path that it was submitted with (train.sbatch shows how).

# The top of the repository that this file is in.
repository_root() {
    cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd
}

# The address of the job's first node. A node's name need not resolve on the others, so this is an IP address: the one
# that Slurm has for the node, else the first that the node itself says it has.
head_address() {
    local head address
    head="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    head="${head%%$'\n'*}"
    address="$(scontrol --oneliner show node "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
    case "$address" in
    *:* | [0-9]*.[0-9]*.[0-9]*.[0-9]*) ;;
    *)
        address="$(timeout 60 srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname -I)"
        address="${address%% *}"
        ;;
    esac
    [ -n "$address" ] || {
        echo "error: neither Slurm nor the node $head itself (hostname -I) knows an IP address of $head." >&2
        return 1
    }
    echo "$address"
}

# A port for the job's ranks to meet at, the same on every node, another one in each restart, and below those that the
# kernel gives to outgoing connections.
port_of_job() {
    echo $((15000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 15000))
}

# GPUs per node: NGPU, else what Slurm gave the job on this node, else what the driver lists here, else 0.
gpus_per_node() {
    if [ -n "${NGPU:-}" ]; then
        echo "$NGPU"
    elif [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
        echo "$SLURM_GPUS_ON_NODE"
    elif type nvidia-smi >/dev/null 2>&1; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
    elif type rocm-smi >/dev/null 2>&1; then
        rocm-smi --showid 2>/dev/null | grep -o '^GPU\[[0-9]*\]' | sort -u | grep -c . || true
    else
        echo 0
    fi
}

# The variables of this cluster's network, from network.sh in this folder if there is one: see network.example.sh.
network_variables() {
    local file
    file="$(repository_root)/launch/slurm/network.sh"
    if [ -f "$file" ]; then
        # shellcheck source=launch/slurm/network.example.sh
        . "$file"
    fi
}
