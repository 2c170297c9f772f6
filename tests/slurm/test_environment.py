"""launch/slurm/environment.py: what is written down of a job's environment, and who can read it; without Slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[2] / "launch" / "slurm"
sys.path.insert(0, str(SLURM))

import environment  # noqa: E402

SECRETS = {
    "SLURM_JWT": "secret-1",
    "SLURM_SPANK__SLURM_SPANK_OPTION_pyxis_container_image": "docker://user:secret-2@registry",
    "HF_TOKEN": "secret-3",
    "WANDB_API_KEY": "secret-4",
    "DATABASE_URL": "postgres://user:secret-5@host",
    "https_proxy": "http://user:secret-6@proxy",
    "MY_LINES": "begin\nsecret-7\nNCCL_DEBUG=secret-8",
    "HEALTH_CHECK": "curl -H 'X: secret-9' status",
    "BASH_FUNC_load%%": "() { secret-10; }",
    "nccl_debug": "secret-11",
}
NEEDED = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_GPUS_ON_NODE": "8",
    "NCCL_IB_HCA": "^mlx5_bond_0",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "1800",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "eth0",
    "FI_PROVIDER": "efa",
    "TITAN_ADAM_MINI_HANG_SECONDS": "1800",
    "HF_HOME": "/data/hf",
    "LD_LIBRARY_PATH": "/opt/lib",
    "CONFIG_FILE": "a.toml",
}


def test_only_what_is_listed_is_written_with_its_value() -> None:
    *lines, others = environment.variables(SECRETS | NEEDED)
    assert lines == [
        f"{name}={value}" if name not in ("NCCL_IB_HCA", "SLURM_JOB_NODELIST") else f"{name}='{value}'"
        for name, value in sorted(NEEDED.items())
    ]
    assert "secret" not in others and "HF_TOKEN" in others and "SLURM_JWT" in others


def test_a_value_of_many_lines_is_one_value() -> None:
    line, _ = environment.variables({"PATH": "/a\nNCCL_DEBUG=INFO"})
    shell = subprocess.run(["sh", "-c", f'{line}; printf %s "$PATH"'], capture_output=True, text=True, check=True)
    assert shell.stdout == "/a\nNCCL_DEBUG=INFO"


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_only_the_user_can_read_it(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        environment.write(tmp_path / "environment.txt", ["--training.steps", "9"], SECRETS | NEEDED)
    finally:
        os.umask(before)
    file = tmp_path / "environment.txt"
    assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text()
    assert "secret" not in text
    for words in ("flags: --training.steps 9\n", "job 7, restart , nodes n[1-2], head", "torch 2", "SLURM_JOB_ID=7\n"):
        assert words in text
