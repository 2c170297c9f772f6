# shellcheck shell=bash
# What torch is to know of the devices of this machine. Meant to be sourced: GPUS is "yes" where ranks see GPUs.

# CUDA_VISIBLE_DEVICES="" hides the GPUs of a machine that has some.
if { [ -e /dev/nvidiactl ] || [ -e /dev/kfd ]; } && [ -n "${CUDA_VISIBLE_DEVICES-all}" ]; then
    GPUS=yes
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
else
    # shellcheck disable=SC2034 # for who sources this
    GPUS=no
    export TITAN_ADAM_MINI_CPU="${TITAN_ADAM_MINI_CPU:-1}" # torchtitan itself needs a GPU
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"         # ranks share the cores; torch would give each of them all
fi
