# shellcheck shell=bash
# Device settings for torch. Meant to be sourced; sets GPUS to "yes" if ranks see GPUs.

# CUDA_VISIBLE_DEVICES="" hides the GPUs of a machine.
if { [ -e /dev/nvidiactl ] || [ -e /dev/kfd ]; } && [ -n "${CUDA_VISIBLE_DEVICES-all}" ]; then
    GPUS=yes
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
else
    # shellcheck disable=SC2034 # used by scripts that source this
    GPUS=no
    export TITAN_ADAM_MINI_CPU="${TITAN_ADAM_MINI_CPU:-1}" # torchtitan itself needs a GPU
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"         # ranks share the cores; torch would give each of them all
fi
