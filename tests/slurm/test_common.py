"""What the batch scripts share, in a shell with pretended commands of Slurm and of GPU drivers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shell(tmp_path: Path) -> Any:
    """What a function of common.sh prints; `commands` are the pretended ones, by name."""

    def call(function: str, commands: dict[str, str] | None = None, **env: str) -> str:
        for name, text in (commands or {}).items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        script = f". {ROOT}/launch/slurm/common.sh; set -euo pipefail; {function}"
        env |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()

    return call


def test_root_and_port(shell: Any) -> None:
    assert shell("cd /; repository_root") == str(ROOT)
    assert [shell("port_of_job", SLURM_JOB_ID=job) for job in ("7", "15007", "4000000000")] == [
        "15007",
        "15007",
        "25000",
    ]


SCONTROL = """\
case "$*" in
"show hostnames node[7-9]") printf 'node7\\nnode8\\nnode9\\n' ;;
"--oneliner show node node7") echo "NodeName=node7 Arch=x86_64 NodeAddr=%s NodeHostName=node7 Port=1" ;;
*) exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("slurms", "nodes_own", "address"),
    [
        ("10.1.2.3", "never asked", "10.1.2.3"),
        ("fd00::7", "never asked", "fd00::7"),
        ("node7", "10.9.9.9 172.17.0.1 fd00::9 ", "10.9.9.9"),
        ("node7.cluster", "10.9.9.9", "10.9.9.9"),
    ],
)
def test_head_address(shell: Any, slurms: str, nodes_own: str, address: str) -> None:
    srun = f'[[ "$*" = *"--nodelist=node7 hostname -I" ]] && echo "{nodes_own}"'
    commands = {"scontrol": SCONTROL % slurms, "srun": srun}
    assert shell("head_address", commands, SLURM_JOB_NODELIST="node[7-9]") == address


def test_head_without_an_address(shell: Any) -> None:
    commands = {"scontrol": SCONTROL % "node7", "srun": "exit 0"}
    assert "IP address of node7" in shell("head_address", commands, SLURM_JOB_NODELIST="node[7-9]")


def test_gpus_per_node(shell: Any) -> None:
    nvidia = {"nvidia-smi": 'echo "GPU 0: H100 (UUID: a)"; echo "GPU 1: H100 (UUID: b)"; echo "  MIG 1g.10gb"'}
    assert shell("gpus_per_node", nvidia, NGPU="3", SLURM_GPUS_ON_NODE="8") == "3"
    assert shell("gpus_per_node", nvidia, NGPU="", SLURM_GPUS_ON_NODE="8") == "8"
    assert shell("gpus_per_node", nvidia) == "2"
    assert shell("gpus_per_node", {"nvidia-smi": "echo no driver; exit 9"}) == "0"


def test_gpus_per_node_of_amd_and_none(shell: Any) -> None:
    assert shell("gpus_per_node") == "0"
    lines = "".join(f"GPU[{index}]\\t\\t: {what}\\n" for index in range(4) for what in ("Device ID: 0x1", "Rev: 0x0"))
    assert shell("gpus_per_node", {"rocm-smi": f"printf '====\\n{lines}===='"}) == "4"


def test_python(shell: Any) -> None:
    call = f". {ROOT}/launch/python.sh; bash -c 'echo $PYTHON'"
    assert shell(call, PYTHON="/a/python", VIRTUAL_ENV="/b") == "/a/python"
    assert shell(call, VIRTUAL_ENV="/b") == "/b/bin/python"
    expected = ROOT / ".venv" / "bin" / "python"
    assert shell(call) == (str(expected) if expected.exists() else "python3")


def test_network_variables(shell: Any, tmp_path: Path) -> None:
    folder = tmp_path / "launch" / "slurm"
    shutil.copytree(ROOT / "launch" / "slurm", folder, ignore=shutil.ignore_patterns("network.sh"))
    call = f". {folder}/common.sh; network_variables; bash -c 'echo ${{NCCL_IB_HCA:-none}}'"
    assert shell(call) == "none"
    example = (folder / "network.example.sh").read_text()
    assert [line for line in example.splitlines() if line and not line.startswith("#")] == []
    (folder / "network.sh").write_text(re.sub("^#export", "export", example, flags=re.MULTILINE))
    assert shell(call, SLURM_SUBMIT_DIR="/", SLURM_JOB_ID="7") == "^mlx5_bond_0"


@pytest.mark.slow
@pytest.mark.parametrize(("tier", "status"), [("--slurm", 1), ("", 0)])
def test_a_tier_that_was_asked_for_and_ran_nothing_fails(tmp_path: Path, tier: str, status: int) -> None:
    """In a shell without Slurm's commands; launch/test.sh sets the variable."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "slurm and not nightly"]
    command += [f"--basetemp={tmp_path / 'temporary'}", "tests/slurm/test_cluster.py", "-k", "two_nodes or killed"]
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path), "TITAN_ADAM_MINI_TEST_TIER": tier}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == status, done.stdout
    line = "not installed: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client"
    assert (f"error: {tier} ran no test: slurmctld, " in done.stdout and line in done.stdout) == (status == 1)
    assert "2 skipped" in done.stdout
