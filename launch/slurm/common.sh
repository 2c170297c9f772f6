# shellcheck shell=bash
# Functions for the batch scripts that query Slurm. Meant to be sourced. Slurm runs a copy of a batch script from its
# spool, so a script finds this file by the path it was submitted with (see train.sbatch).

# The root of this repository.
repository_root() {
    cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd
}

# The IP address of the job's first node, since its name need not resolve on the others: the address that Slurm has for
# the node, else the first one reported by the node itself.
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
        echo "error: neither Slurm nor the node itself (hostname -I) reports an IP address of $head." >&2
        return 1
    }
    echo "$address"
}

# The rendezvous port of the job's ranks: the same on every node, different in each restart, and below the kernel's
# ephemeral ports.
port_of_job() {
    echo $((15000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 15000))
}

# GPUs per node: NGPU, else the GPUs that Slurm allocated on this node, else those listed by the driver, else 0.
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

# Network variables of this cluster, from network.sh in this folder if it exists: see network.example.sh.
network_variables() {
    local file
    file="$(repository_root)/launch/slurm/network.sh"
    if [ -f "$file" ]; then
        # shellcheck source=launch/slurm/network.example.sh
        . "$file"
    fi
}
