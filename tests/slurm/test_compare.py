"""`compare --slurm` on a private cluster: the printed line is submitted, and the same command reports the runs."""

import csv
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import Cluster

pytest.importorskip("torchtitan", reason="training needs the extra: pip install -e '.[titan]'")

from ranks import forkserver
from slurm.jobs import ROOT, Jobs, arguments

from titan_adam_mini.cli import main
from titan_adam_mini.tools import isolated_process

pytestmark = [pytest.mark.nightly, pytest.mark.slurm]
STEPS = 6


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Jobs, Path, str], str]:
    """What the command prints for AdamW and AdamMini with some learning rates; its children start fast."""
    monkeypatch.setattr(isolated_process, "get_context", lambda _: forkserver())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NGPU", "1")
    monkeypatch.chdir(ROOT)

    def printed(jobs: Jobs, out: Path, lr: str) -> str:
        corpus = jobs.folder / "corpus"
        settings = {
            "model.hf_assets_path": corpus / "tokenizer",
            "training.dataset_path": corpus / "train-1",
            "training.seq_len": 64,
            "training.local_batch_size": 4,
            "training.steps": STEPS,
            "validation.enable": True,
            "validation.dataset_path": corpus / "validation",
            "validation.seq_len": 64,
            "validation.local_batch_size": 4,
            "validation.freq": 3,
            "validation.steps": 2,
        }
        words = ["compare", "train_configs/debug_model.toml", "--slurm", "--seeds", "1", "--lr", lr, "--out", str(out)]
        main([*words, *arguments(settings)])
        return capsys.readouterr().out

    return printed


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


@pytest.mark.parametrize(
    ("lr", "more"),
    [("1e-3", ["0.0005", "0.002"]), ("1e-3,2e-3", ["0.004"])],
)
def test_a_comparison(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, compare: Callable[..., str], lr: str, more: list[str]
) -> None:
    jobs = Jobs(cluster, tmp_path_factory.mktemp("compared"), real=True)
    out, rates = jobs.folder / "out", lr.split(",")
    told = compare(jobs, out, lr)
    assert f"Submit the {2 * len(rates)} runs:" in told and not rows(out)
    states = jobs.tasks(submitted(jobs, told))
    tasks = [states[str(task)]["JobState"] for task in range(2 * len(rates))]  # beside them what was still pending
    assert tasks == ["COMPLETED"] * len(tasks)

    told = compare(jobs, out, lr)
    found = {(row["variant"], float(row["lr"])): row for row in rows(out)}
    assert set(found) == {(name, float(rate)) for name in ("AdamW", "AdamMini") for rate in rates}
    assert {row["steps"] for row in found.values()} == {str(STEPS)}
    assert len({row["first_loss"] for row in found.values()}) == 1
    assert len({row["validation_loss"] for row in found.values()}) == len(found)
    assert "device: nodes of Slurm" in (out / "report.md").read_text()
    # The sweep goes on: on both sides of a single rate, and beyond two, of which the larger is better in six steps.
    wanted = Path(re.findall(r"SWEEP=(\S+)", told)[0]).read_text().splitlines()
    assert [re.findall(r"--optimizer.name (\w+).*--optimizer.lr (\S+)", line) for line in wanted] == [
        [(name, rate)] for name in ("AdamW", "AdamMini") for rate in more
    ]
    assert f"Submit the {2 * len(more)} runs" in told
