"""launch/slurm/attempts.py: what is written down of a job's attempts, when it is queued again; without Slurm."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SLURM = Path(__file__).resolve().parents[2] / "launch" / "slurm"
sys.path.insert(0, str(SLURM))

pytest.importorskip("tyro", reason="launch/slurm needs the extra: pip install -e '.[titan]'")

import attempts  # noqa: E402
from attempts import SAVED, STUCK, Attempt, decide  # noqa: E402

STEPPED = {"first": 10, "step": 12, "saved": 10, "time": 5.0}
NOT = {"first": 10, "step": 10, "saved": 10, "time": 5.0}


def attempt(number: int, status: int | None, progress: dict[str, Any], restart: int = 0, job: str = "7") -> Attempt:
    return Attempt(number, job, restart, "n[1-2]", 1.0, 2.0, progress, status)


@pytest.mark.parametrize(
    ("history", "refused", "again"),
    [
        ([(0, STEPPED)], False, False),
        ([(SAVED, STEPPED)], False, True),
        ([(SAVED, NOT)] * 5, False, True),
        ([(STUCK, STEPPED)], False, True),
        ([(1, STEPPED)] * 5, False, True),
        ([(1, NOT)], False, True),
        ([(1, NOT)], True, False),
        ([(1, STEPPED), (1, NOT)], True, True),
        ([(2, {})], True, False),
        ([(1, NOT)] * 2, False, True),
        ([(1, NOT)] * 3, False, False),
        ([(137, {})] * 3, False, False),
        ([(1, NOT), (1, STEPPED), (1, NOT), (1, NOT)], False, True),
        ([(1, NOT), (SAVED, NOT), (1, NOT), (1, NOT)], False, True),
        ([(1, NOT), (None, NOT), (1, NOT), (1, NOT)], False, False),
        ([(1, NOT), (None, NOT), (1, NOT)], False, True),
    ],
)
def test_what_is_tried_again(history: list[tuple[int | None, dict[str, Any]]], refused: bool, again: bool) -> None:
    told = [attempt(number, *one) for number, one in enumerate(history, 1)]
    assert decide(told, refused=refused, limit=50)[0] is again


def test_three_failures_are_those_of_one_job() -> None:
    before = [attempt(number, 1, NOT, job="6") for number in (1, 2)]
    assert decide([*before, attempt(3, 1, NOT)], refused=False, limit=50)[0]


@pytest.mark.slow
def test_a_signal_that_kills_it_before_the_first_step_is_no_failure(run) -> None:
    told = [[failure(0, "Signal 10 (SIGUSR1) received by PID 7", 1, 138)]]
    assert [run(138, "--signalled", failures=told)[0] for _ in range(4)] == ["138 requeue"] * 4


def test_files_that_a_full_disk_left_empty(run) -> None:
    assert run(SAVED, **{"progress.json": "", "failures-3.json": ""})[0] == f"{SAVED} requeue"


def test_the_limit_of_requeues() -> None:
    assert decide([attempt(3, SAVED, STEPPED, restart=1)], refused=False, limit=2) == (True, "")
    again, why = decide([attempt(3, SAVED, STEPPED, restart=2)], refused=False, limit=2)
    assert not again and "MAX_REQUEUES" in why


def failure(rank: int, error: str, time: int, status: int = 1) -> dict[str, Any]:
    return {"rank": rank, "node": f"n{rank}", "status": status, "time": time, "error": error, "traceback": ""}


def test_a_rank_that_lost_its_peers_did_not_fail_first() -> None:
    lost = failure(0, "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", 100)
    nccl = failure(2, "DistBackendError: NCCL error: remote process exited or there was a network error", 99)
    own = failure(1, "RuntimeError: CUDA error: uncorrectable ECC error encountered", 101)
    killed = failure(3, "Signal 9 (SIGKILL) received by PID 77", 102, 137)
    assert attempts.first_failure([lost, nccl, own, killed]) == own
    assert attempts.first_failure([lost, nccl, killed]) == killed
    assert attempts.first_failure([lost, nccl]) == nccl
    assert attempts.first_failure([]) is None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`run(status, ...)` is one whole attempt through the command line; returns what it printed."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")

    def command(*words: str, status: int = 0) -> tuple[str, str]:
        done = subprocess.run([sys.executable, SLURM / "attempts.py", *words], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stdout.strip(), done.stderr

    def once(status: int, *flags: str, progress: Any = None, failures: Any = (), limit: int = 9, **files: str) -> Any:
        number, _ = command("begin", str(tmp_path))
        folder = tmp_path / "attempts" / number
        for file, text in files.items():
            (folder / file).write_text(text)
        if progress is not None:
            (folder / "progress.json").write_text(json.dumps(progress))
        for node, told in enumerate(failures):
            (folder / f"failures-{node}.json").write_text(json.dumps(told))
        return command("end", str(tmp_path), number, "--status", str(status), "--limit", str(limit), *flags)

    once.command = command  # type: ignore[attr-defined]
    return once


def lines(folder: Path) -> list[dict[str, str]]:
    head, *rest = (folder / "attempts.tsv").read_text().splitlines()
    return [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in rest]


def test_one_line_per_attempt_and_the_exit_status_of_training(run, tmp_path: Path) -> None:
    assert run(SAVED, "--signalled", progress=STEPPED)[0] == f"{SAVED} requeue"
    told = [[failure(0, "RuntimeError: Connection closed by peer", 9)], [failure(1, "OSError: disk\nfull", 9, 3)]]
    out, said = run(137, "--bad", "n2", progress=STEPPED, failures=told)
    assert out == "3 requeue"
    assert "rank 1 on n1 failed first:\nOSError: disk\nfull; the end of" in said
    assert run(0, progress=STEPPED)[0] == "0 stop"
    table = lines(tmp_path)
    assert [one["attempt"] for one in table] == ["1", "2", "3"]
    assert [one["status"] for one in table] == [str(SAVED), "3", "0"]
    assert [one["then"] for one in table] == ["requeue", "requeue", "stop"]
    assert table[1]["reason"] == "rank 1 on n1: OSError: disk; bad nodes: n2"
    assert (table[0]["from"], table[0]["step"], table[0]["saved"]) == ("10", "12", "10")


def test_an_attempt_that_was_killed_gets_its_line_when_the_next_begins(run, tmp_path: Path) -> None:
    assert run.command("begin", str(tmp_path))[0] == "1"
    (tmp_path / "attempts" / "1" / "progress.json").write_text(json.dumps(STEPPED))
    assert not (tmp_path / "attempts.tsv").exists()
    run(0)
    first, second = lines(tmp_path)
    assert first["reason"].startswith("ended without a report") and first["status"] == "" and first["step"] == "12"
    assert second["attempt"] == "2"


def test_of_a_rank_without_a_word_the_end_of_its_log_is_shown(run, tmp_path: Path) -> None:
    log = "\n".join(f"line {number}" for number in range(1, 101))
    _, said = run(2, failures=[[failure(1, "", 9, 2)]], **{"rank-00001.log": log})
    assert "line 100" in said and "line 81" in said and "line 80" not in said
    assert lines(tmp_path)[0]["reason"] == "rank 1 on n1: ended with status 2"


@pytest.mark.parametrize("error", ["ValueError: no such role", "ModuleNotFoundError: No module named 'wandb2'"])
def test_a_refused_configuration_is_not_tried_again(run, error: str) -> None:
    out, said = run(1, failures=[[failure(0, error, 1)]])
    assert out == "1 stop" and "refused" in said


def test_the_same_error_in_the_middle_of_training_is(run) -> None:
    assert run(1, progress=STEPPED, failures=[[failure(0, "ValueError: bad document", 1)]])[0] == "1 requeue"


@pytest.mark.parametrize("status", [2, attempts.REFUSED])
def test_refused_flags_and_plans(run, status: int) -> None:
    assert run(status)[0] == f"{status} stop"


def test_a_cancelled_job_stays_cancelled(run, tmp_path: Path) -> None:
    assert run(SAVED, "--no-requeue", progress=STEPPED)[0] == f"{SAVED} stop"
    assert lines(tmp_path)[0]["then"] == "left to Slurm"


def test_two_jobs_in_one_folder(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$3" = 7 ] && echo 7\nexit 0\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    run.command("begin", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    out, said = run.command("begin", str(tmp_path), status=attempts.REFUSED)
    assert out == "" and "job 7 is training in" in said and "--job-name" in said
    squeue.write_text("#!/bin/sh\nexit 0\n")
    assert run.command("begin", str(tmp_path))[0] == "2"


def test_two_jobs_that_begin_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(attempts.Attempts):
        def history(self) -> list[Attempt]:
            found = super().history()
            if not found:
                assert attempts.Attempts(tmp_path).begin("8", 0, "n1") == 1
            return found

    monkeypatch.setattr(attempts, "_is_alive", lambda job: True)
    with pytest.raises(ValueError, match="job 8 is training"):
        Slow(tmp_path).begin("7", 0, "n2")
    assert [one.job for one in attempts.Attempts(tmp_path).history()] == ["8"]
