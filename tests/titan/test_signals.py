"""What a run does about signals, hangs and its progress file, as far as no trainer is needed."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import python

from titan_adam_mini.titan import exit_after_save, interruption
from titan_adam_mini.titan.interruption import SIGNALS, STUCK, Interruption
from titan_adam_mini.titan.watchdog import Watchdog


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What a handler hears that was there before the run; both signals and the run are put back."""
    numbers: list[int] = []
    before = {one: signal.signal(one, lambda number, frame: numbers.append(number)) for one in SIGNALS}
    monkeypatch.setattr(interruption, "_current", None)
    yield numbers
    for one, handler in before.items():
        signal.signal(one, handler)


def test_signals_are_heard_from_before_the_ranks_meet(heard: list[int]) -> None:
    def torchtitans(*args: Any, **kwargs: Any) -> int:
        os.kill(os.getpid(), signal.SIGUSR1)
        return 7

    assert exit_after_save.listen_first(torchtitans, SimpleNamespace(mode="default"), base_folder="") == 7
    run = interruption.current()
    assert run is not None and run.should_exit(1, last_step=False) and heard == []


@pytest.mark.parametrize("mode", ["fake_backend", "local_tensor"])
def test_one_process_that_plays_many_ranks_is_left_alone(mode: str, heard: list[int]) -> None:
    assert exit_after_save.listen_first(lambda *args, **kwargs: 8, SimpleNamespace(mode=mode)) == 8
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.current() is None and heard == [signal.SIGTERM]


SOON_GONE = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.config import JobConfig
from torchtitan.distributed import utils
import titan_adam_mini.titan

utils.init_distributed(JobConfig().comm)
mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # lives on, as in DTensor's caches, and with it gloo's threads
for _ in range(20):
    dist.all_reduce(torch.ones(10_000))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_rank_that_ends_after_a_collective_keeps_its_exit_code(tmp_path: Path) -> None:
    """Without the wait about half of the ranks abort. In interpreters of their own: forked ones end in another way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "4"}
    env["TITAN_ADAM_MINI_CPU"] = "1"
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in map(str, range(4)):
        with open(tmp_path / rank, "wb") as log:
            command = [sys.executable, "-c", SOON_GONE]
            own = {**env, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen(command, cwd=tmp_path, env=own, stdout=log, stderr=log))
    try:
        codes = [one.wait(240) for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    assert codes == [0] * 4, [(tmp_path / str(rank)).read_text()[-2000:] for rank in range(4)]


def test_a_run_without_checkpoints_has_its_handlers_back(heard: list[int]) -> None:
    run = Interruption()
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == []
    run.restore_handlers()
    assert heard == [signal.SIGTERM], "what was heard meanwhile counts"
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard == [signal.SIGTERM, signal.SIGUSR1]
    assert not run.should_exit(1, last_step=False)


def test_a_run_in_a_thread_has_no_handlers(heard: list[int]) -> None:
    thread = threading.Thread(target=Interruption)
    thread.start()
    thread.join()
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_in_its_last_step_and_after_a_run_hears_nothing(heard: list[int]) -> None:
    run = Interruption()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not run.should_exit(1, last_step=True)
    assert all(signal.getsignal(one) is signal.SIG_IGN for one in SIGNALS) and heard == []


@pytest.mark.parametrize("name", ["TITAN_ADAM_MINI_LEAD_SECONDS", "TITAN_ADAM_MINI_HANG_SECONDS"])
@pytest.mark.parametrize("told", ["soon", "-1", "inf", "nan"])
def test_what_is_no_number_of_seconds_is_refused(name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, told)
    with pytest.raises(ValueError, match=f"{name} = '{told}' is not a number of seconds"):
        Interruption()


def test_a_progress_file_needs_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TITAN_ADAM_MINI_PROGRESS", str(tmp_path / "no" / "file"))
    with pytest.raises(ValueError, match="there is no folder"):
        Interruption()


def test_long_saves_are_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TITAN_ADAM_MINI_LEAD_SECONDS", "120")
    run = Interruption()
    with caplog.at_level(logging.WARNING, "titan_adam_mini"):
        for step, seconds in ((1, 59.0), (2, 61.0), (3, 60.5), (4, 95.5)):
            run.saved(step, seconds)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(
        "Saving step 2 took 61.0 seconds, more than half of the 120 seconds between a signal and the end "
    )
    assert (
        second.startswith("Saving step 4 took 95.5 seconds, more than half ")
        and "signal at least 191 seconds" in second
    )


def test_progress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    monkeypatch.setenv("TITAN_ADAM_MINI_PROGRESS", str(file))
    monkeypatch.setattr(interruption._Progress, "_EVERY", 1e9)

    def told() -> tuple[int, int, int | None]:
        read = json.loads(file.read_text())
        return read["first"], read["step"], read["saved"]

    run = Interruption()
    run.restore_handlers()
    run.begin(4, None)
    assert told() == (4, 4, None)
    run.passed(5, last_step=False)
    assert told() == (4, 5, None), "the first step"
    run.passed(6, last_step=False)
    assert told() == (4, 5, None), "not yet"
    run.saved(7, 1.0)
    run.saved(3, 1.0)
    assert told() == (4, 7, 7), "an asynchronous save that ends late"
    monkeypatch.setattr(interruption._Progress, "_EVERY", 0.0)
    run.passed(8, last_step=False)
    assert told() == (4, 8, 7)
    monkeypatch.setattr(interruption._Progress, "_EVERY", 1e9)
    run.passed(9, last_step=True)
    assert told() == (4, 9, 7)


WATCHED = """
import ctypes, os, time
from titan_adam_mini.titan import watchdog
watchdog._GRACE = 1.0
dog = watchdog.Watchdog({seconds})
"""
"""A process whose watchdog ends it after so long, and a second later if the interpreter is stuck."""


@pytest.mark.slow
def test_a_process_that_hangs_ends_and_one_that_goes_on_does_not(tmp_path: Path) -> None:
    endings = {
        "hangs": (1.0, "dog.passed(7)\ntime.sleep(100)"),
        "holds the interpreter": (1.0, "ctypes.PyDLL(None).sleep(100)"),
        "goes on": (4.0, "for step in range(12):\n    time.sleep(0.5)\n    dog.passed(step)\nos._exit(0)"),
    }
    programs = [WATCHED.format(seconds=seconds) + then for seconds, then in endings.values()]
    hangs, holds, goes_on = python(programs, tmp_path)
    assert hangs[0] == STUCK
    assert hangs[1].startswith("rank 0: no step boundary was passed for 1 seconds")
    assert "the last one was step 7" in hangs[1] and 'File "<string>", line 7 in <module>' in hangs[1]
    assert holds[0] == 1
    assert "Timeout" in holds[1] and 'File "<string>", line 6 in <module>' in holds[1]
    assert goes_on == (0, "")


def test_the_flight_recorder_is_read_unless_somebody_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Watchdog, "_arm", lambda self: None)
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(tmp_path / "rank_"))
    monkeypatch.setenv("RANK", "3")
    dog, file = Watchdog(1e6), tmp_path / "rank_3"
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "0")
    dog._dump_flight_recorder()
    assert not file.exists()
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    file.write_text("of this run")
    dog._dump_flight_recorder()
    assert file.read_text() == "of this run"
    os.utime(file, (1e9, 1e9))
    dog._dump_flight_recorder()
    assert b"of this run" not in file.read_bytes()
