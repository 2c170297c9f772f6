"""Training jobs on a private cluster, submitted with the scripts of launch/slurm, and what they leave behind."""

import csv
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import corpus  # noqa: E402

from titan_adam_mini.tools.trainer import Run, arguments  # noqa: E402

STEPS, EVERY = 12, 4
TRAIN = ROOT / "launch" / "slurm" / "train.sbatch"
SWEEP = ROOT / "launch" / "slurm" / "sweep.sbatch"
LONG = 400
"""Seconds after which a job that is not where it should be never will be."""
PRETENDED = r"""#!/bin/bash
# PYTHON for jobs that do not train: torchrun and the plan are played, all else is the real one.
case "$*" in
*/launch/torchrun.py\ *) shift && exec {python} -I -S {here}/pretended.py "$@" ;;
*titan_adam_mini.cli\ plan\ *tensor_parallel_degree*) echo "the mesh does not divide 2 ranks" >&2 && exit 1 ;;
*titan_adam_mini.cli\ plan\ *) echo "AdamMini" ;;
*) exec {python} "$@" ;;
esac
"""


class Jobs:
    """Submits training jobs in a folder and reads what they leave there.

    Args:
        cluster: where.
        folder: of the jobs' output.
        real: whether torchtitan trains, or pretended.py plays it: a start then costs no 25 seconds.
    """

    def __init__(self, cluster: Cluster, folder: Path, real: bool) -> None:
        self.cluster, self.folder, self.real = cluster, folder, real
        if real:
            corpus.build(folder / "corpus", seq_len=64, global_batch=4, steps=20, ranks=[1, 2], validation=8)
            return
        python = folder / "python"
        python.write_text(PRETENDED.format(python=sys.executable, here=Path(__file__).parent))
        python.chmod(0o755)

    def __call__(
        self,
        name: str,
        *flags: str,
        script: Path = TRAIN,
        nodes: int = 2,
        sbatch: tuple[str, ...] = (),
        steps: int = STEPS,
        fault: dict[str, Any] | None = None,
        **environment: str,
    ) -> int:
        """Submit a job; by default our small Llama 3 on two nodes, one CPU rank each, a checkpoint every four steps."""
        words = arguments(self.settings(nodes, steps))
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        python = sys.executable if self.real else str(self.folder / "python")
        env = {"PYTHON": python, "PYTHONPATH": paths, "TRAIN_FILE": "faulty", "NGPU": "1", "PLAN": "no"}
        env |= {"FAULT": json.dumps({"restart": 0, **fault})} if fault else {}
        return self.cluster.submit(
            script,
            *words,
            *flags,
            sbatch_flags=(f"--nodes={nodes}", f"--job-name={name}", "--time=30", *sbatch),
            env={**env, **environment},
            cwd=self.folder,
        )

    def settings(self, nodes: int = 2, steps: int = STEPS) -> dict[str, Any]:
        """The trainer's settings by name."""
        return {
            "training.steps": steps,
            "training.seq_len": 64,
            "training.local_batch_size": 4 // nodes,
            "training.dataset_path": self.folder / "corpus" / f"train-{nodes}",
            "model.hf_assets_path": self.folder / "corpus" / "tokenizer",
            "checkpoint.interval": EVERY,
            "lr_scheduler.warmup_steps": 2,
            "debug.seed": 1,
        }

    def losses(self, name: str) -> dict[int, float]:
        """By step, of all attempts; a step that was done twice had the same loss."""
        found: dict[int, float] = {}
        for log in sorted((self.folder / "outputs" / name / "attempts").glob("*/rank-00000.log")):
            run = Run.load(log, 1)
            again = {step: loss for step, loss in run.losses.items() if step in found}
            assert again == {step: found[step] for step in again}
            found |= run.losses
        return found

    def attempts(self, name: str) -> list[dict[str, str]]:
        """The lines of attempts.tsv."""
        with open(self.folder / "outputs" / name / "attempts.tsv", encoding="utf-8") as table:
            return list(csv.DictReader(table, delimiter="\t"))

    def reach(self, name: str, step: int) -> None:
        """Wait until a run has told the loss of a step."""
        end = time.monotonic() + LONG
        while step not in self.losses(name):
            assert time.monotonic() < end, f"{name} does not reach step {step}"
            time.sleep(0.2)

    def done(self, job: int) -> dict[str, str]:
        """The fields of a job that completed."""
        fields = self.cluster.wait(job, ended, LONG)
        assert fields["JobState"] == "COMPLETED", self.cluster.log(job)
        return fields

    def tasks(self, job: int) -> dict[str, dict[str, str]]:
        """The fields of the tasks of an array, once all have ended."""
        states: dict[str, dict[str, str]] = {}

        def all_ended(fields: dict[str, str]) -> bool:
            shown = self.cluster.run("scontrol", "--oneliner", "show", "job", str(job))
            found = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in shown.splitlines()]
            states.update({one["ArrayTaskId"]: one for one in found})
            return all(map(ended, found))

        self.cluster.wait(job, all_ended, LONG)
        return states


def ended(fields: dict[str, str]) -> bool:
    return fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
