"""The cluster of the tests: that it does what a real one would, and that nothing of it is left."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import Cluster, SlurmError, missing
from slurm.machine import descendants

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

HEARD = """\
echo "script starts ${SLURM_RESTART_COUNT:-0}"
trap 'echo "script heard USR1"' USR1
srun bash -c 'trap "echo step heard USR1" USR1; echo "step on $SLURMD_NODENAME"; while :; do sleep 0.2; done' &
while kill -0 $! 2>/dev/null; do wait $!; done
"""


@pytest.fixture
def one_node(tmp_path: Path) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path / "one", nodes=1, grace=3) as cluster:
        yield cluster


@pytest.fixture
def batch(tmp_path: Path) -> Any:
    """Writes a batch script; its log is continued when the job is requeued."""

    def write(text: str) -> Path:
        script = tmp_path / "script.sbatch"
        script.write_text(f"#!/bin/bash\n#SBATCH --open-mode=append\n{text}")
        return script

    return write


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def alive(pids: list[int], seconds: float = 10) -> list[int]:
    """Those of the processes that still live after some seconds."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_two_nodes(cluster: Cluster, batch: Any) -> None:
    job = cluster.submit(
        batch('srun bash -c \'echo "on $SLURMD_NODENAME: $1"\' _ "$1"; exit 3'), "hello", sbatch_flags=["-N2"]
    )
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["NumNodes"]) == ("FAILED", "3:0", "2")
    names = re.findall(r"on (node\d): hello", cluster.log(job))
    assert len(set(names)) == len(names) == 2


def test_environment(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, batch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SBATCH_PARTITION", "urgent")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    environment = Cluster(tmp_path).environment
    assert not {"SLURM_JOB_ID", "SBATCH_PARTITION", "HTTPS_PROXY"} & set(environment)
    assert environment["SLURM_CONF"] == str(tmp_path / "slurm.conf")

    flags = ["--job-name=two words", "--gpus-per-node=8"]
    job = cluster.submit(batch('echo "$GIVEN in $PWD"'), sbatch_flags=flags, env={"GIVEN": "given"}, cwd=tmp_path)
    fields = cluster.wait(job, "COMPLETED")
    assert (fields["JobName"], fields["Partition"]) == ("two words", "normal")
    assert cluster.log(job) == f"given in {tmp_path}\n"


def test_refused_and_late(cluster: Cluster, batch: Any) -> None:
    with pytest.raises(SlurmError, match="invalid partition"):
        cluster.submit(batch("true"), sbatch_flags=["-p", "elsewhere"])
    job = cluster.submit(batch("echo reached; sleep 100"))
    cluster.wait_for_log(job, "reached")
    with pytest.raises(SlurmError, match=r"(?s)'JobState': 'RUNNING'.*reached"):
        cluster.wait(job, timeout=0.5)


def test_signals(cluster: Cluster, batch: Any) -> None:
    """What `signal` reaches, and what a cancelled job is in the end."""
    job = cluster.submit(batch(HEARD))
    cluster.wait_for_log(job, "step on")
    cluster.signal(job, "USR1", "--batch")
    assert "step heard" not in cluster.wait_for_log(job, "script heard USR1")
    cluster.signal(job, "USR1")
    assert cluster.wait_for_log(job, "step heard USR1").count("script heard") == 1
    cluster.cancel(job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"


def test_preemption(one_node: Cluster, batch: Any) -> None:
    """A job in `urgent` has the script told, the steps not, and the job requeued once its grace is over."""
    flags = ["--exclusive", "--signal=B:USR1@60"]
    job = one_node.submit(batch(HEARD), sbatch_flags=flags)
    one_node.wait_for_log(job, "step on")
    urgent = one_node.submit(batch("sleep 100"), sbatch_flags=["--exclusive", "--partition=urgent"])
    one_node.wait_for_log(job, "script heard USR1")
    assert one_node.state(job)["JobState"] == "RUNNING"
    one_node.wait(urgent, "RUNNING")
    assert (one_node.state(job)["JobState"], one_node.state(job)["Restarts"]) == ("PENDING", "1")
    one_node.cancel(urgent)
    log = one_node.wait_for_log(job, "script starts 1")
    assert "script starts 0" in log and "step heard" not in log


@pytest.mark.nightly
def test_time_limit(cluster: Cluster, batch: Any) -> None:
    """The script is told before its time is over; then the job ends and is not requeued."""
    job = cluster.submit(batch(HEARD), sbatch_flags=["--time=1", "--signal=B:USR1@10"])
    assert "step heard" not in cluster.wait_for_log(job, "script heard USR1", timeout=150)
    assert cluster.state(job)["JobState"] == "RUNNING"
    fields = cluster.wait(job, timeout=150)
    assert (fields["JobState"], fields["Restarts"]) == ("TIMEOUT", "0")


@pytest.mark.nightly
def test_killed_node(cluster: Cluster, batch: Any) -> None:
    """The job of a node that falls silent starts again on others; the node comes back."""
    job = cluster.submit(batch("srun bash -c 'echo \"$SLURMD_NODENAME runs $$\"; sleep 300'"), sbatch_flags=["-N2"])
    running = dict(re.findall(r"(node\d) runs (\d+)", cluster.wait_for_log(job, "node2 runs")))
    cluster.kill_node("node2")
    assert not alive([int(running["node2"])], 0)
    fields = cluster.wait(job, lambda now: now["Restarts"] == "1" and now["JobState"] == "RUNNING", timeout=120)
    assert "node2" not in cluster.run("scontrol", "show", "hostnames", fields["NodeList"]).split()
    assert cluster.nodes()["node2"].startswith("DOWN")
    cluster.revive("node2")
    assert cluster.nodes()["node2"] == "IDLE"


LEAVES = """\
setsid env --ignore-environment sleep 301 &
echo "script $! $$"
srun bash -c 'trap "" TERM; sleep 302 & echo "step $! $$"; wait'
"""


def test_nothing_is_left(cluster: Cluster, batch: Any, tmp_path: Path) -> None:
    """Neither daemons nor processes of jobs, whatever session or environment they gave themselves; others live on."""
    with pytest.raises(KeyboardInterrupt), Cluster(tmp_path / "second", nodes=2) as second:
        job = second.submit(batch(LEAVES), sbatch_flags=["-N2", "--ntasks-per-node=1"])
        second.wait(job, lambda _: second.log(job).count("step ") == 2)
        started = [int(pid) for pid in re.findall(r"\b\d+\b", second.log(job))]
        machines = [machine.pid for machine in second._machines.values()]
        below = [pid for machine in machines for pid in descendants(machine)]
        assert len(started) == 6 and set(started) <= set(below)
        raise KeyboardInterrupt
    assert not alive(machines + below, 0)
    assert set(cluster.nodes().values()) == {"IDLE"}


@pytest.mark.parametrize("end", [pytest.param(signal.SIGTERM, marks=pytest.mark.nightly), signal.SIGKILL])
def test_the_tests_are_killed(batch: Any, tmp_path: Path, end: signal.Signals) -> None:
    """A cluster does not outlive the process that started it."""
    if reason := missing():
        pytest.skip(reason)
    program = f"""\
import signal
from pathlib import Path
from slurm.cluster import Cluster
with Cluster(Path({str(tmp_path / "killed")!r}), nodes=1) as cluster:
    cluster.wait_for_log(cluster.submit(Path({str(batch(LEAVES))!r})), "step ")
    print("running", flush=True)
    signal.pause()
"""
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=path) as tests:
        assert tests.stdout is not None and tests.stdout.readline() == b"running\n"
        below = descendants(tests.pid)
        tests.send_signal(end)
    assert len(below) >= 8
    assert not alive(below)
