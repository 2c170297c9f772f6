"""launch/run_train.sh keeps the contract of torchtitan's script, seen by a module that only says how it was started."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SAYS = """\
import json, os, pathlib, signal, sys, time
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NGPU", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF")
print("SAID " + json.dumps({"argv": sys.argv[1:], **{name: os.environ.get(name) for name in names}}), flush=True)
if numbers := json.loads(os.environ.get("WAITS_FOR", "[]")):
    got = []
    for number in numbers:
        signal.signal(number, lambda number, frame: got.append(number))
    ready = pathlib.Path(__file__).parent
    (ready / os.environ["RANK"]).touch()
    if os.environ["RANK"] == "0":
        while not (ready / "1").exists():
            time.sleep(0.05)
    end = time.monotonic() + 60
    for number in numbers:
        if os.environ["RANK"] == "0":
            os.kill(os.getppid(), number)
        while number not in got and time.monotonic() < end:
            time.sleep(0.05)
    print("SAID " + json.dumps({"got": got}), flush=True)
    time.sleep(1)
    sys.exit(75)
status = int(os.environ.get("STATUS", "0"))
if status < 0:
    time.sleep(1)  # torchrun shows no more of a rank that has ended
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@pytest.fixture
def start(tmp_path: Path):
    """Run the script with the environment given; returns the finished process and what each shown rank said."""
    (tmp_path / "says.py").write_text(SAYS)

    def run(*arguments: str, cwd: Path = ROOT, **environment: str):
        kept = {name: value for name, value in os.environ.items() if name not in ("NGPU", "LOG_RANK", "CONFIG_FILE")}
        paths = os.pathsep.join([str(tmp_path), kept["PYTHONPATH"]])
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "run_train.sh"), *arguments],
            cwd=cwd,
            env={**kept, "TRAIN_FILE": "says", **environment, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
        said = [json.loads(line.partition("SAID ")[2]) for line in done.stdout.splitlines() if "SAID " in line]
        return done, said

    return run


@pytest.mark.slow
def test_ranks_arguments_the_rank_that_is_shown_and_one_ended_by_a_signal(start) -> None:
    words = ["--training.steps", "3", "--job.description", "two words"]
    done, said = start(*words, NGPU="2", LOG_RANK="1", STATUS="-9")
    assert done.returncode == 128 + 9, done.stderr
    assert [(one["RANK"], one["WORLD_SIZE"], one["LOCAL_RANK"]) for one in said] == [("1", "2", "1")]
    config = str(ROOT / "train_configs" / "debug_model.toml")
    assert said[0]["argv"] == ["--job.config_file", config, *words]
    assert said[0]["OMP_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_signals_are_handed_to_the_ranks_which_leave_in_their_own_time_and_with_their_own_status(
    start, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text("")
    numbers = [int(signal.SIGTERM), int(signal.SIGUSR1)]
    settings = {"CONFIG_FILE": "mine.toml", "NGPU": "2", "LOG_RANK": "0,1"}
    done, said = start(cwd=tmp_path, **settings, WAITS_FOR=json.dumps(numbers))
    assert done.returncode == 75, done.stderr
    assert [one["argv"] for one in said if "argv" in one] == [["--job.config_file", "mine.toml"]] * 2
    assert [set(one["got"]) for one in said if "got" in one] == [set(numbers)] * 2


def test_a_term_before_there_are_ranks_ends_it() -> None:
    words = ["--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1", "--master-port=0", "-m", "says"]
    waits = subprocess.Popen([sys.executable, str(ROOT / "launch" / "torchrun.py"), *words])
    try:
        caught = 0
        while not caught >> (signal.SIGTERM - 1) & 1:
            assert waits.poll() is None
            status = Path(f"/proc/{waits.pid}/status").read_text()
            caught = int(status.partition("SigCgt:")[2].split()[0], 16)
            time.sleep(0.05)
        waits.terminate()
        assert waits.wait(60) == 128 + signal.SIGTERM
    finally:
        waits.kill()


LATE = """\
import os, pathlib, sys, time
here = pathlib.Path(__file__).parent
(here / os.environ["RANK"]).touch()
while os.environ["RANK"] == "1" and not (here / "go").exists():
    time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_signal_after_the_ranks_of_a_node_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    words = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}", str(tmp_path / "late.py")]
    command = [sys.executable, str(ROOT / "launch" / "torchrun.py")]
    nodes = [subprocess.Popen([*command, f"--node-rank={node}", *words]) for node in (0, 1)]
    try:
        end = time.monotonic() + 60
        children = [*Path(f"/proc/{nodes[0].pid}/task").glob("*/children")]
        while not (tmp_path / "0").exists() or any(_read(file) for file in children):
            assert time.monotonic() < end and nodes[0].poll() is None
            time.sleep(0.05)
            children = [*Path(f"/proc/{nodes[0].pid}/task").glob("*/children")]
        nodes[0].send_signal(signal.SIGUSR1)
        time.sleep(1)
        (tmp_path / "go").touch()
        assert [node.wait(60) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # the thread has ended
        return ""


def test_fake_backend_is_one_process_and_one_step(start) -> None:
    done, said = start("--training.steps", "9", NGPU="64", COMM_MODE="fake_backend")
    assert done.returncode == 0, done.stderr
    (one,) = said
    assert (one["NGPU"], one["LOCAL_RANK"], one["WORLD_SIZE"]) == ("64", "0", None)
    assert one["argv"][-2:] == ["--comm.mode=fake_backend", "--training.steps=1"], "the last one counts"


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"CONFIG_FILE": "nowhere.toml"}, "nowhere.toml does not exist"), ({"COMM_MODE": "fake"}, "COMM_MODE=fake")],
)
def test_refusals(start, environment: dict[str, str], said: str) -> None:
    done, _ = start(NGPU="1", **environment)
    assert done.returncode == 2
    assert said in done.stderr
