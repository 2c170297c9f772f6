"""launch/slurm/train.sbatch with commands in the place of Slurm's: what it asks of a Slurm that is not at its best."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "slurm"

pytest.importorskip("tyro", reason="launch/slurm needs the extra: pip install -e '.[titan]'")

pytestmark = pytest.mark.slow

RECORD = (
    "JobId=7 {array}JobName=run Requeue=1 Restarts=0 JobState=RUNNING Partition=normal NumNodes=2 ExcNodeList=(null) "
    "StartTime=2024-05-01T10:00:00 EndTime={end} PreemptTime=None"
)
COMMANDS = {
    "scontrol": r"""case "$*" in
        "show hostnames "*) tr , '\n' <<<"${*: -1}" ;;
        "show job --oneliner"*) cat "$FAKE/record" ;;
        "show job"*) echo "   Command=$FAKE/train.sbatch --flag" ;;
        "show node"*) echo "NodeName=x State=$(grep -q " ${*: -1}$" "$FAKE/down" && echo DOWN || echo IDLE) A=b" ;;
        *) echo "scontrol $*" >>"$FAKE/asked" ;;
    esac""",
    "scancel": 'echo "scancel $*" >>"$FAKE/asked"',
    "sinfo": 'printf "%s\\n" n1 n2 n3',
    "srun": '[[ "$*" == *node.sh* ]] || exit 1; echo "srun ${SLURM_EXPORT_ENV:-unset}" >>"$FAKE/asked"; . "$FAKE/step"',
}


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`train(step, ...)` runs the script with `step` as training; returns status, output, and what Slurm was asked."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (tmp_path / "down").write_text("")
    (tmp_path / "asked").write_text("")

    def add(name: str, body: str) -> None:
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)

    for name, body in COMMANDS.items():
        add(name, body)

    def once(
        step: str = "exit 0",
        flags: tuple[str, ...] = ("--training.steps", "9"),
        array: str = "",
        end: str = "2124-05-01T10:00:00",
        down: str = "",
        others: str = "",
        fakes: dict[str, str] | None = None,
        **environment: str,
    ) -> tuple[int, str, str]:
        (tmp_path / "record").write_text(RECORD.format(array=array, end=end) + f"\n{others}")
        (tmp_path / "step").write_text(step)
        (tmp_path / "down").write_text(f" {down}\n" if down else "")
        for name, body in (fakes or {}).items():
            add(name, body)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "PYTHON"))}
        slurm = {"JOB_ID": "7", "JOB_NAME": "run", "JOB_NODELIST": "n1,n2", "JOB_NUM_NODES": "2"}
        env = inherited | {f"SLURM_{key}": value for key, value in slurm.items()} | environment
        env |= {"FAKE": str(tmp_path), "PATH": f"{commands}{os.pathsep}{inherited['PATH']}", "NGPU": "1"}
        env = {"PYTHON": sys.executable, "MASTER_ADDR": "127.0.0.1", "PLAN": "no"} | env
        shutil.copytree(LAUNCH, tmp_path / "launch" / "slurm", dirs_exist_ok=True)
        shutil.copy(LAUNCH.parent / "python.sh", tmp_path / "launch")
        config = tmp_path / "train_configs" / "debug_model.toml"
        config.parent.mkdir(exist_ok=True)
        config.touch()
        add("scontrol", COMMANDS["scontrol"].replace("$FAKE/train", str(tmp_path / "launch" / "slurm" / "train")))
        done = subprocess.run(
            ["bash", tmp_path / "launch" / "slurm" / "train.sbatch", *flags],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )
        return done.returncode, done.stderr, (tmp_path / "asked").read_text()

    return once


def test_no_flags_are_needed(train) -> None:
    status, said, _ = train(flags=())
    assert status == 0, said


def test_every_srun_passes_the_environment_on(train) -> None:
    assert "srun ALL" in train(SLURM_EXPORT_ENV="NONE")[2]


def test_a_task_of_an_array_is_not_taken_for_all_of_it(train) -> None:
    other = "JobId=8 ArrayJobId=7 ArrayTaskId=0 Requeue=1 Restarts=0 JobState=RUNNING"
    asks = 'kill -USR1 "$PPID"; sleep 1; exit 75'
    status, said, asked = train(asks, array="ArrayJobId=7 ArrayTaskId=1 ", others=other)
    assert status == 75, said
    assert "scancel --signal=USR1 7_1\n" in asked and "scontrol requeue 7_1\n" in asked
    assert " 7\n" not in asked


def test_variables_of_another_job_around_the_submission_do_not_count(train) -> None:
    outer = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "5", "SLURM_RESTART_COUNT": "50"}
    assert "scontrol requeue 7\n" in train("exit 75", **outer)[2]


def test_a_signal_while_the_plan_is_asked_does_not_end_the_job(train) -> None:
    plan = f'[ "$2" = titan_adam_mini.cli ] || exec {sys.executable} "$@"; kill -USR1 "$PPID"; sleep 1'
    status, said, asked = train(PLAN="yes", fakes={"planning": plan}, PYTHON="planning")
    assert status == 75, said
    assert "scontrol requeue 7\n" in asked and "srun" not in asked


def test_a_driver_that_fails_does_not_end_the_job(train) -> None:
    status, said, asked = train("exit 1", fakes={"nvidia-smi": "exit 9"})
    assert status == 1 and "scontrol requeue 7\n" in asked, said


def test_the_environment_is_written_down_for_the_user_alone(train, tmp_path: Path) -> None:
    train(MY_VALUE="begin\nnot to be seen\nend", NCCL_DEBUG="INFO")
    written = tmp_path / "outputs" / "run" / "attempts" / "1" / "environment.txt"
    assert written.stat().st_mode & 0o777 == 0o600
    text = written.read_text()
    assert "not to be seen" not in text and "NCCL_DEBUG=INFO\n" in text and "--training.steps 9" in text


def test_a_controller_that_is_silent_does_not_end_a_save(train) -> None:
    saves = 'kill -USR1 "$PPID"; printf "" >"$FAKE/record"; sleep 14; printf "%s\\n" "$RECORD" >"$FAKE/record"; exit 75'
    record = RECORD.format(array="", end="2124-05-01T10:00:00")
    status, said, asked = train(saves, RECORD=record)
    assert status == 75 and "have not exited" not in said
    assert "scontrol requeue 7\n" in asked


def test_a_save_that_comes_too_late_for_the_time_limit(train) -> None:
    _, said, asked = train('kill -USR1 "$PPID"; sleep 20; exit 75', end="2024-05-01T10:00:00")
    assert "have not exited" in said and "scontrol requeue 7\n" in asked


@pytest.mark.parametrize(("have", "excluded"), [("n1 n2 n3", True), ("n1 n2", False)])
def test_a_bad_node_is_excluded_where_there_are_others(train, have: str, excluded: bool) -> None:
    _, said, asked = train("exit 1", down="n2", fakes={"sinfo": f"printf '%s\\n' {have}"})
    assert "scontrol requeue 7\n" in asked
    assert ("scontrol update JobId=7 ExcNodeList=n2\n" in asked) is excluded
    assert ("n2 not excluded: normal has 1 other nodes" in said) is not excluded
