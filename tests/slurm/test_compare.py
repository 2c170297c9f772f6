"""`compare --slurm` on a private cluster: the printed line is submitted, and the same command reports the runs."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from slurm.cluster import Cluster

pytest.importorskip("torchtitan", reason="training needs the extra: pip install -e '.[titan]'")

from slurm.jobs import ROOT, Jobs

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
STEPS = 6


def compare(jobs: Jobs, out: Path, *more: str) -> str:
    """What the command prints for AdamW and AdamMini with two learning rates, of which the best is then at an edge."""
    corpus = jobs.folder / "corpus"
    settings = {
        "model.hf_assets_path": corpus / "tokenizer",
        "training.dataset_path": corpus / "train-1",
        "training.seq_len": 64,
        "training.local_batch_size": 4,
        "training.steps": STEPS,
        "validation.dataset_path": corpus / "validation",
        "validation.seq_len": 64,
        "validation.local_batch_size": 4,
        "validation.freq": 3,
        "validation.steps": 2,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "titan_adam_mini.cli", "compare", "train_configs/debug_model.toml", "--slurm"]
    command += ["--seeds", "1", "--lr", "1e-3,2e-3", "--out", str(out), *words, "--validation.enable", *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NGPU": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def submitted(jobs: Jobs, told: str) -> int:
    """The job of the line that was printed, given to a shell as it stands, but for what this cluster needs."""
    line = next(one for one in told.splitlines() if " sbatch " in one)
    needed = "--parsable --time=30 --job-name=compared"
    line = line.replace(" sbatch ", f" sbatch {needed} ").replace("launch/", f"{shlex.quote(str(ROOT))}/launch/")
    env = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PLAN": "no", "NGPU": "1"}
    return int(jobs.cluster.run("bash", "-c", line, env=env, cwd=jobs.folder))


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "runs.csv", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def test_a_comparison(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> None:
    jobs = Jobs(cluster, tmp_path_factory.mktemp("compared"))
    out = jobs.folder / "out"
    told = compare(jobs, out)
    assert "Submit the 4 runs:" in told and not rows(out)
    states = jobs.tasks(submitted(jobs, told))
    assert [states[task]["JobState"] for task in "0123"] == ["COMPLETED"] * 4

    told = compare(jobs, out)
    found = {(row["variant"], row["lr"]): row for row in rows(out)}
    assert {key: row["steps"] for key, row in found.items()} == {
        (name, lr): str(STEPS) for name in ("AdamW", "AdamMini") for lr in ("0.001", "0.002")
    }
    assert len({row["first_loss"] for row in found.values()}) == 1
    assert len({row["validation_loss"] for row in found.values()}) == 4
    # Six steps are best at the largest rate: the sweep goes on beyond it.
    wanted = Path(re.findall(r"SWEEP=(\S+)", told)[0]).read_text().splitlines()
    assert [re.findall(r"--optimizer.name (\w+).*--optimizer.lr (\S+)", line) for line in wanted] == [
        [("AdamW", "0.004")],
        [("AdamMini", "0.004")],
    ]
    assert "device: nodes of Slurm" in (out / "report.md").read_text() and "Submit the 2 runs" in told
