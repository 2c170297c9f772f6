"""launch/slurm/train.sbatch and sweep.sbatch on a private cluster: a job that something happens to has the losses
of one that nothing happened to.

One job trains with torchtitan; in the others pretended.py plays the trainer, and before a release torchtitan trains in
all of them.
"""

import re
import time
from dataclasses import dataclass
from typing import Any

import pytest
from slurm.cluster import Cluster

pytest.importorskip("torchtitan", reason="training needs the extra: pip install -e '.[titan]'")

from slurm.jobs import EVERY, LONG, STEPS, SWEEP, Jobs, ended

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


@pytest.fixture(scope="session")
def training(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Jobs in which torchtitan trains."""
    return Jobs(cluster, tmp_path_factory.mktemp("training"), real=True)


@pytest.fixture(scope="session", params=["pretended", pytest.param("torchtitan", marks=pytest.mark.nightly)])
def jobs(request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    if request.param == "torchtitan":
        return request.getfixturevalue("training")
    return Jobs(cluster, tmp_path_factory.mktemp("jobs"), real=False)


@dataclass
class Outcome:
    """How a job ended."""

    state: str
    status: str
    restarts: int
    log: str


BAD_MESH = ("--parallelism.tensor_parallel_degree", "3")
UNDISTURBED: dict[str, Any] = {
    "steady": {"PLAN": "yes", "WANDB_API_KEY": "not to be seen"},
    "raises": {"fault": {"what": "raise", "rank": 1, "step": 6, "restart": -1}, "MAX_REQUEUES": "1"},
    "killed": {"fault": {"what": "kill", "rank": 1, "step": 6}},
    "hangs": {"fault": {"what": "hang", "rank": 0, "step": 6}, "HANG_SECONDS": "60"},
    "early": {"fault": {"what": "raise", "rank": 0, "step": 1, "restart": -1}},
    "plan": {"flags": BAD_MESH, "PLAN": "yes"},
    "mesh": {"flags": BAD_MESH},
    "flag": {"flags": ("--no.such_flag", "3")},
    "file": {"CONFIG_FILE": "nowhere.toml"},
    "limited": {"sbatch": ("--time=2", "--signal=B:USR1@60"), "STEP_SECONDS": "5", "LEAD_SECONDS": "60"},
}
"""Jobs that nobody else does anything to, two of them at a time."""


@pytest.fixture(scope="session")
def outcomes(jobs: Jobs) -> dict[str, Outcome]:
    numbers = {name: jobs(name, *job.get("flags", ()), **_but_flags(job)) for name, job in UNDISTURBED.items()}
    found = {}
    for name, number in numbers.items():
        fields = jobs.cluster.wait(number, ended, 2 * LONG)
        restarts, log = int(fields["Restarts"]), jobs.cluster.log(number)
        found[name] = Outcome(fields["JobState"], fields["ExitCode"].removesuffix(":0"), restarts, log)
    return found


def _but_flags(job: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in job.items() if name != "flags"}


@pytest.fixture(scope="session")
def steady(jobs: Jobs, outcomes: dict[str, Outcome]) -> dict[int, float]:
    """The losses of a run that nothing happens to."""
    return jobs.losses("steady")


def test_two_nodes_to_the_end(jobs: Jobs, outcomes: dict[str, Outcome], steady: dict[int, float]) -> None:
    one = outcomes["steady"]
    assert (one.state, one.status, one.restarts) == ("COMPLETED", "0", 0), one.log
    assert list(steady) == list(range(1, STEPS + 1))
    (line,) = jobs.attempts("steady")
    told = [line[name] for name in ("attempt", "restart", "from", "step", "saved", "status", "reason", "then")]
    # The last step's checkpoint holds the model alone.
    assert told == ["1", "0", "0", str(STEPS), str(STEPS - EVERY), "0", "complete", "stop"]
    folder = jobs.folder / "outputs" / "steady" / "attempts" / "1"
    assert [log.name for log in sorted(folder.glob("rank-*"))] == ["rank-00000.log", "rank-00001.log"]
    environment = (folder / "environment.txt").read_text()
    for word in ("torch 2", "torchtitan 0.2", "commit ", f"nodes {line['nodes']}", "SLURM_JOB_ID=", "--training.steps"):
        assert word in environment
    assert "not to be seen" not in environment
    assert "AdamMini" in (folder / "plan.txt").read_text()


def test_a_rank_raises_every_time(jobs: Jobs, outcomes: dict[str, Outcome]) -> None:
    one = outcomes["raises"]
    assert (one.state, one.status, one.restarts) == ("FAILED", "1", 1)
    assert one.log.count("failed first:\nTraceback (most recent call last):") == 2
    assert "in fail\n    raise RuntimeError" in one.log and "MAX_REQUEUES" in one.log
    lines = jobs.attempts("raises")
    assert [line["reason"].split(": ", 1)[1] for line in lines] == ["RuntimeError: a fault of the test"] * 2
    assert [line["then"] for line in lines] == ["requeue", "stop"]


def test_a_rank_is_killed(jobs: Jobs, outcomes: dict[str, Outcome], steady: dict[int, float]) -> None:
    assert (outcomes["killed"].state, outcomes["killed"].restarts) == ("COMPLETED", 1), outcomes["killed"].log
    first, _ = jobs.attempts("killed")
    assert first["status"] == "137" and "rank 1" in first["reason"] and "SIGKILL" in first["reason"]
    assert jobs.losses("killed") == steady


def test_a_rank_hangs(jobs: Jobs, outcomes: dict[str, Outcome], steady: dict[int, float]) -> None:
    assert (outcomes["hangs"].state, outcomes["hangs"].restarts) == ("COMPLETED", 1), outcomes["hangs"].log
    first, _ = jobs.attempts("hangs")
    assert (first["status"], first["reason"], first["saved"]) == ("76", "no step for too long", str(EVERY))
    folder = jobs.folder / "outputs" / "hangs" / "attempts" / "1"
    assert jobs.losses("hangs") == steady
    if jobs.real:
        assert (folder / "comm_traces" / "rank_0").stat().st_size > 0, "what the flight recorder knows"
        log = (folder / "rank-00000.log").read_text()
        assert re.search(r"faulty.py\W+line \d+ in fail", log), "the stacks say where"


def test_three_failures_before_the_first_step(outcomes: dict[str, Outcome]) -> None:
    one = outcomes["early"]
    assert (one.state, one.status, one.restarts) == ("FAILED", "1", 2)
    assert "3 attempts in a row failed before their first step" in one.log


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("plan", "78", "the mesh does not divide 2 ranks"),
        ("mesh", "1", "the configuration is refused"),
        ("flag", "2", "Unrecognized options: --no.such_flag"),
        ("file", "78", "CONFIG_FILE=nowhere.toml does not exist"),
    ],
)
def test_a_configuration_that_cannot_train_is_not_tried_again(
    outcomes: dict[str, Outcome], name: str, status: str, said: str
) -> None:
    one = outcomes[name]
    assert (one.state, one.status, one.restarts) == ("FAILED", status, 0)
    assert said in one.log


def test_two_jobs_at_once_do_not_mix(jobs: Jobs, steady: dict[int, float]) -> None:
    both = [jobs("one", STEP_SECONDS="1"), jobs("other", "--debug.seed", "7", STEP_SECONDS="1")]
    heads = [jobs.cluster.wait(job, "RUNNING", LONG)["NodeList"] for job in both]
    assert len(set(heads)) == 2, "both run at the same time"
    for job in both:
        jobs.done(job)
    assert jobs.losses("one") == steady
    assert list(jobs.losses("other")) == list(steady) and jobs.losses("other") != steady


def test_pre_empted_it_saves_waits_and_goes_on_and_so_it_does_after_a_failure(training: Jobs) -> None:
    """With torchtitan; beside it a run of the same settings that nothing happens to, without Slurm."""
    from forked import CONFIG, train
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    jobs = training
    fault = {"what": "raise", "rank": 1, "step": 11, "restart": 1}
    job = jobs(
        "preempted",
        "--metrics.enable_tensorboard",
        sbatch=("--signal=B:USR1@30",),
        fault=fault,
        STEP_SECONDS="3",
        PLAN="yes",
    )
    settings = {**jobs.settings(), "checkpoint.enable": True}
    steady = train("steady", settings, ranks=2, out=jobs.folder / "alone", config=CONFIG).losses
    jobs.reach("preempted", 5)
    script = jobs.folder / "urgent.sh"
    script.write_text("#!/bin/sh\nsleep 1\n")
    urgent = jobs.cluster.submit(script, sbatch_flags=("--nodes=4", "--partition=urgent"), cwd=jobs.folder)
    jobs.done(urgent)
    assert jobs.done(job)["Restarts"] == "2"
    first, second, third = jobs.attempts("preempted")
    assert first["reason"] == "exited on a signal, saved" and first["status"] == "75"
    assert first["step"] == first["saved"] == second["from"] and int(first["step"]) > EVERY
    assert second["reason"].endswith("RuntimeError: a fault of the test") and second["status"] == "1"
    assert "in fail\n    raise RuntimeError" in jobs.cluster.log(job)
    assert third["from"] == second["saved"] and int(third["from"]) >= 8 and third["reason"] == "complete"
    assert list(steady) == list(range(1, STEPS + 1)) and jobs.losses("preempted") == steady
    curve = EventAccumulator(str(jobs.folder / "outputs" / "preempted" / "tb"))
    curve.Reload()
    assert [point.step for point in curve.Scalars("loss_metrics/global_avg_loss")] == list(steady)
    folder = jobs.folder / "outputs" / "preempted" / "attempts" / "1"
    assert "AdamMini" in (folder / "plan.txt").read_text()
    environment = (folder / "environment.txt").read_text()
    assert "torch 2" in environment and "torchtitan 0.2" in environment


def test_the_time_limit(jobs: Jobs, outcomes: dict[str, Outcome], steady: dict[int, float]) -> None:
    assert outcomes["limited"].state == "COMPLETED" and outcomes["limited"].restarts >= 1, outcomes["limited"].log
    first, *_, last = jobs.attempts("limited")
    assert first["reason"] == "exited on a signal, saved" and last["reason"] == "complete"
    assert jobs.losses("limited") == steady


@pytest.mark.parametrize("which", ["first", pytest.param("second", marks=pytest.mark.nightly)])
def test_a_node_dies(jobs: Jobs, steady: dict[int, float], which: str) -> None:
    name = f"dead_{which}"
    job = jobs(name, STEP_SECONDS="1")
    jobs.reach(name, 5)
    nodes = jobs.cluster.run("scontrol", "show", "hostnames", jobs.cluster.state(job)["NodeList"]).split()
    dead = nodes[0] if which == "first" else nodes[1]
    jobs.cluster.kill_node(dead)
    try:
        fields = jobs.done(job)
    finally:
        jobs.cluster.revive(dead)
    assert int(fields["Restarts"]) >= 1
    lines = jobs.attempts(name)
    assert lines[-1]["from"] == str(EVERY) and lines[-1]["reason"] == "complete"
    assert dead not in jobs.cluster.run("scontrol", "show", "hostnames", lines[-1]["nodes"]).split()
    assert jobs.losses(name) == steady


def test_a_node_that_fails_the_health_check_is_left_out(jobs: Jobs, steady: dict[int, float]) -> None:
    bad = jobs.folder / "bad"
    bad.write_text("")
    check = f'! grep -qx "$SLURMD_NODENAME" {bad}'
    job = jobs("unhealthy", fault={"what": "kill", "rank": 1, "step": 6}, HEALTH_CHECK=check, STEP_SECONDS="1")
    jobs.reach("unhealthy", 2)
    node = jobs.cluster.run("scontrol", "show", "hostnames", jobs.cluster.state(job)["NodeList"]).split()[1]
    bad.write_text(f"{node}\n")
    fields = jobs.done(job)
    assert (fields["Restarts"], fields["ExcNodeList"]) == ("1", node)
    first, second = jobs.attempts("unhealthy")
    assert first["reason"].endswith(f"; bad nodes: {node}")
    assert node not in jobs.cluster.run("scontrol", "show", "hostnames", second["nodes"]).split()
    assert jobs.losses("unhealthy") == steady


def test_cancelled_it_stays_cancelled(jobs: Jobs) -> None:
    job = jobs("cancelled", STEP_SECONDS="1")
    jobs.reach("cancelled", 2)
    jobs.cluster.cancel(job)
    assert jobs.cluster.wait(job, ended, LONG)["JobState"] == "CANCELLED"
    time.sleep(8)  # longer than cred_expire, for which a job that was queued again would wait
    fields = jobs.cluster.state(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")


def test_another_number_of_ranks_than_was_asked_for(jobs: Jobs) -> None:
    job = jobs("few", nodes=2, RANKS="3")
    fields = jobs.cluster.wait(job, ended, LONG)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "78:0")
    assert "RANKS=3 is set, but 2 nodes with 1 ranks each are 2: submit with another -N, or" in jobs.cluster.log(job)
    assert not (jobs.folder / "outputs" / "few").exists(), "no attempt was made"


def test_a_sweep(jobs: Jobs) -> None:
    lines = jobs.folder / "sweep.txt"
    lines.write_text("# two runs\n\n--optimizer.name AdamW --job.description 'two words'\n--optimizer.name AdamMini\n")
    job = jobs("sweep", script=SWEEP, nodes=1, sbatch=("--array=0-2",), SWEEP=str(lines))
    states = jobs.tasks(job)
    assert [states[task]["JobState"] for task in "012"] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert "submit with --array=0-1" in (jobs.folder / f"sweep-{job}_2.log").read_text()
    losses = [jobs.losses(f"sweep/{task}") for task in (0, 1)]
    assert list(losses[0]) == list(losses[1]) == list(range(1, STEPS + 1)) and losses[0] != losses[1]


def test_a_task_of_a_sweep_leaves_alone(jobs: Jobs) -> None:
    lines = jobs.folder / "alone.txt"
    lines.write_text("--optimizer.name AdamW\n--optimizer.name AdamMini\n")
    job = jobs("alone", script=SWEEP, nodes=1, sbatch=("--array=0-1",), SWEEP=str(lines), STEP_SECONDS="1")
    for task in (0, 1):
        jobs.reach(f"alone/{task}", 1)
    jobs.cluster.run("scancel", "--signal=USR1", "--batch", f"{job}_1")  # the last task has the array's own id
    states = jobs.tasks(job)
    told = [(states[task]["JobState"], states[task]["Restarts"]) for task in "01"]
    assert told == [("COMPLETED", "0"), ("COMPLETED", "1")]
    assert [line["status"] for line in jobs.attempts("alone/1")] == ["75", "0"]


def test_two_jobs_of_one_name(jobs: Jobs) -> None:
    first = jobs("twice", STEP_SECONDS="2")
    jobs.reach("twice", 1)
    second = jobs("twice")
    fields = jobs.cluster.wait(second, ended, LONG)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "78:0")
    assert f"job {first} is training in" in jobs.cluster.log(second)
    assert jobs.done(first)["Restarts"] == "0"
