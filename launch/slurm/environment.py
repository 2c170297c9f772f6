"""Records the environment of an attempt: `environment.py FILE FLAGS...`.

Flags, commit, versions, driver, and environment variables: the values of those in the tables below, and only the names
of all others, since any of them may be a token. Only the user can read the file.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchtitan", "titan-adam-mini", "triton", "torchdata", "datasets", "tokenizers")

VARIABLES = {
    # this folder's scripts (README.md); not HEALTH_CHECK, which is a command set by the user
    *("ATTEMPT", "CONFIG_FILE", "HANG_SECONDS", "HEAD_ADDRESS", "HEAD_PORT", "LEAD_SECONDS", "LOG_RANK", "MASTER_ADDR"),
    *("MASTER_PORT", "MAX_REQUEUES", "NGPU", "OUTPUTS", "PLAN", "PYTHON", "RANKS", "RENDEZVOUS", "REPOSITORY"),
    *("SWEEP", "TRAIN_FILE"),
    # Slurm, except its token SLURM_JWT and plugin options SLURM_SPANK_*
    *("SLURMD_NODENAME", "SLURM_CLUSTER_NAME", "SLURM_CONF", "SLURM_EXPORT_ENV", "SLURM_NNODES", "SLURM_NODEID"),
    *("SLURM_NODELIST", "SLURM_NPROCS", "SLURM_RESTART_COUNT", "SLURM_TASKS_PER_NODE"),
    # devices
    *("CUBLAS_WORKSPACE_CONFIG", "HIP_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    # where programs, libraries and data come from
    *("CONDA_PREFIX", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"),
    *("HOME", "HOSTNAME", "LANG", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PWD", "PYTHONHASHSEED", "PYTHONPATH"),
    *("TMPDIR", "TRANSFORMERS_OFFLINE", "USER", "VIRTUAL_ENV", "XDG_CACHE_HOME"),
    # Weights & Biases, except its key WANDB_API_KEY
    *("WANDB_MODE", "WANDB_PROJECT", "WANDB_RESUME", "WANDB_RUN_ID"),
}
"""Variables that are written with their values."""

PREFIXES = (
    *("TITAN_ADAM_MINI_", "SLURM_ARRAY_", "SLURM_CPUS_", "SLURM_GPUS_", "SLURM_JOB_", "SLURM_MEM_", "SLURM_NTASKS"),
    *(
        "SLURM_SUBMIT_",
        "SLURM_TOPOLOGY_",
        "CUDA_",
        "FI_",
        "GLOO_",
        "KMP_",
        "MKL_",
        "NCCL_",
        "OMP_",
        "PYTORCH_",
        "TORCH_",
    ),
    *("TORCHELASTIC_", "TORCHINDUCTOR_", "TRITON_", "UCX_"),
)
"""Prefixes of such names: families that do not contain credentials."""


def variables(environment: Mapping[str, str]) -> list[str]:
    """NAME=value of the variables above, shell-quoted; in the last line the names of the others."""
    written = {name for name in environment if name in VARIABLES or name.startswith(PREFIXES)}
    lines = [f"{name}={shlex.quote(environment[name])}" for name in sorted(written)]
    others = sorted(shlex.quote(name) for name in environment.keys() - written)
    return [*lines, f"set, values not recorded: {' '.join(others)}"]


def lines_of(flags: list[str], environment: Mapping[str, str]) -> Iterator[str]:
    """The file, line by line."""
    yield f"flags: {shlex.join(flags)}"
    yield time.strftime("%Y-%m-%dT%H:%M:%S%z")
    job = (environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST"))
    head = ":".join(environment.get(name, "") for name in ("HEAD_ADDRESS", "HEAD_PORT"))
    yield "job {}, restart {}, nodes {}, head {}".format(*job, head)
    git = ("git", "-C", str(REPOSITORY))
    yield _output(*git, "log", "-1", "--format=commit %H %cI") or "commit unknown: no git repository"
    yield from _output(*git, "status", "--short", "--untracked-files=no").splitlines()
    yield f"python {' '.join(sys.version.split())}"
    for name in PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name} not installed"
    yield from _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv").splitlines()
    yield from variables(environment)


def _output(*command: str) -> str:
    """The output of a command; "" if it is missing or fails, which the ranks will report."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip("\n") if done.returncode == 0 else ""


def write(file: Path, flags: list[str], environment: Mapping[str, str]) -> None:
    """Write the file, readable only by the user. Raises FileExistsError if it exists."""
    text = "\n".join(lines_of(flags, environment)) + "\n"
    with open(
        os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8", errors="replace"
    ) as out:
        out.write(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2:], os.environ)
