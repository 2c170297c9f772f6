"""Checks every node of a Slurm job before a long run: its facts, then all-reduces of neighbours, then of all nodes.

preflight.sbatch runs this on the job's head node; preflight_node.py runs on all nodes. Nodes form a ring and each is
measured with both its neighbours, so a slow node is slow in both its pairs and its neighbours in one of theirs. A good
node between two bad ones is considered bad. Every step has a deadline, and bad nodes are excluded from the next.
"""

import ipaddress
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

COMPARED = ("GPU", "driver", "python", "torch", "torchtitan", "titan_adam_mini", "NCCL", "commit")
"""Facts that must be the same on all nodes."""

CLOCK = 5.0
"""Maximum difference of a node's clock from the median, in seconds."""

WIDTH = 120
"""Width of the table, since a log file has none."""

GRACE = 20
"""Seconds from the deadline of the command on the nodes to that of srun itself."""

# The script for each task on a node: the command with a deadline, then its status and last error line. Standard output
# is passed through, so a node that cannot write to the shared folder still responds.
ON_NODE = """\
{ errors="$(timeout --kill-after=5 "$@" 2>&1 >&3 3>&-)"; } 3>&1
status=$?
errors="$(grep -v -e '^$' -e '^frame #' <<<"$errors" | tail -n 1)"
echo "preflight $SLURMD_NODENAME $status ${errors:0:300}"
"""

LATE = (124, 137)
"""Exit statuses of commands ended by `timeout`."""

Reasons = dict[str, list[str]]
"""node -> why it is bad; no reasons for a good one."""


class Answer(NamedTuple):
    """How a node's command ended: exit status, and the last line of its error output."""

    status: int
    words: str


class Group(NamedTuple):
    """Nodes of an all-reduce: its bus bandwidth in GB/s, or None and the failure on each node."""

    nodes: tuple[str, ...]
    rate: float | None
    failed: Mapping[str, str] = {}


class Measured(NamedTuple):
    """A step of all-reduces: its groups, each node's clock at the end, and the nodes that did not respond."""

    groups: list[Group]
    clocks: dict[str, float]
    silent: list[str]


def read_answers(log: str) -> tuple[dict[str, Answer], dict[str, dict[str, Any]]]:
    """Parse a step's log: node -> its first failure, else its success, and node -> its report."""
    answers: dict[str, Answer] = {}
    reports: dict[str, dict[str, Any]] = {}
    for node, kind, words in re.findall(r"^preflight (\S+) (\d+|report) ?(.*)$", log, re.MULTILINE):
        if kind == "report":
            reports[node] = json.loads(words)
        elif node not in answers or not answers[node].status:
            answers[node] = Answer(int(kind), words.strip())
    return answers, reports


def judge_facts(
    nodes: Sequence[str],
    answers: Mapping[str, Answer],
    facts: Mapping[str, Mapping[str, Any]],
    gpus: int | None,
    seconds: float,
) -> Reasons:
    """The problems of each node before anything is measured.

    Args:
        nodes: all of the job.
        answers: how the nodes' commands ended; nodes that did not respond are missing.
        facts: written by the nodes into the shared folder, as far as the head node sees them.
        gpus: minimum per node; None if all nodes must have the most common number.
        seconds: the deadline.
    """
    reasons: Reasons = {}
    for node in nodes:
        if node not in answers or answers[node].status:
            reasons[node] = [_ended(answers.get(node), seconds)]
        elif node not in facts:
            reasons[node] = ["the head node does not see this node's file: the folder is not shared"]
        else:
            reasons[node] = list(facts[node]["errors"])
    able = [node for node in nodes if not reasons[node]]
    most = _majority(facts[node]["gpus"] for node in able)
    for node in able:
        found = facts[node]["gpus"]
        if found != most if gpus is None else found < gpus:
            reasons[node].append(f"{found} GPUs, not {most if gpus is None else gpus}")
    for name in COMPARED:
        usual = _majority(facts[node][name] for node in able)
        for node in able:
            if (version := facts[node][name]) != usual:
                reasons[node].append(f"{name} {version or 'missing'}, other nodes: {usual or 'missing'}")
    return reasons


def _ended(answer: Answer | None, seconds: float) -> str:
    if answer is None:
        return f"no response within {seconds:g} s"
    late = f"not finished within {seconds:g} s" if answer.status in LATE else ""
    return ": ".join(filter(None, (late, answer.words))) or f"ended with status {answer.status}"


def _majority(values: Iterable[Any]) -> Any:
    """The most frequent value; the first if there are several."""
    return next((value for value, _ in Counter(values).most_common(1)), None)


def ring(nodes: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """Rounds of pairs in which every node is paired with both its neighbours; an odd ring takes three rounds."""
    edges = [(node, nodes[(index + 1) % len(nodes)]) for index, node in enumerate(nodes)]
    if len(nodes) < 3:
        edges = edges[: len(nodes) - 1]
    even = len(edges) // 2 * 2
    rounds: list[list[tuple[str, ...]]] = [list(edges[0:even:2]), list(edges[1:even:2]), list(edges[even:])]
    return [pairs for pairs in rounds if pairs]


def judge_pairs(nodes: Sequence[str], pairs: Sequence[Group], slow: float) -> Reasons:
    """The problems of each node's all-reduces: none succeeded, or the best is below `slow` times the median."""
    best: dict[str, float] = {}
    for pair in pairs:
        for node in pair.nodes:
            if pair.rate is not None:
                best[node] = max(pair.rate, best.get(node, 0.0))
    usual = statistics.median(best.values()) if best else 0.0
    reasons: Reasons = {node: [] for node in nodes}
    for node in nodes:
        met = [pair for pair in pairs if node in pair.nodes]
        if met and node not in best:
            others = ", ".join(other for pair in met for other in pair.nodes if other != node)
            own = [pair.failed[node] for pair in met if node in pair.failed]
            theirs = [f"{other}: {words}" for pair in met for other, words in pair.failed.items()]
            reasons[node].append(f"all-reduce with {others} failed: {(own or theirs)[0]}")
        elif met and best[node] < slow * usual:
            reasons[node].append(f"all-reduce at most {best[node]:.2f} GB/s, median of all nodes {usual:.2f}")
    return reasons


def judge_clocks(times: Mapping[str, float]) -> Reasons:
    """Clocks that differ from the median; `times` were read at the same moment, in seconds since 1970."""
    usual = statistics.median(times.values()) if times else 0.0
    off = {node: shown - usual for node, shown in times.items()}
    return {
        node: [f"its clock is {abs(by):.0f} s {'ahead of' if by > 0 else 'behind'} the others"]
        if abs(by) > CLOCK
        else []
        for node, by in off.items()
    }


def table(reasons: Reasons, facts: Mapping[str, Mapping[str, Any]], pairs: Sequence[Group]) -> Table:
    """A row per node, bad ones first: its GPUs, the bandwidth with each neighbour, and its problems."""
    shown = Table(box=box.SIMPLE, width=WIDTH, pad_edge=False)
    for name in ("node", "", "GPUs"):
        shown.add_column(name, no_wrap=True)
    shown.add_column("all-reduce with, GB/s")
    shown.add_column("reason", ratio=1)
    for node in sorted(reasons, key=lambda node: not reasons[node]):
        met = [pair for pair in pairs if node in pair.nodes]
        others = [(" ".join(other for other in pair.nodes if other != node), pair.rate) for pair in met]
        rates = ", ".join(f"{other} {'none' if rate is None else f'{rate:.2f}'}" for other, rate in others)
        gpus = str(facts[node]["gpus"]) if node in facts else "?"
        shown.add_row(node, "BAD" if reasons[node] else "ok", gpus, rates, "; ".join(reasons[node]))
    return shown


def console(file: IO[str]) -> Console:
    """A console for a log file: plain text of fixed width, without markup."""
    return Console(file=file, width=WIDTH, color_system=None, highlight=False, markup=False)


class Job:
    """The job around this process: its nodes, the folder they share, and steps on some of them.

    Args:
        folder: for each step's log and the nodes' facts.
        port: the first port for rendezvous of groups.
        seconds: the deadline of each step.
    """

    def __init__(self, folder: Path, port: int, seconds: float) -> None:
        self.nodes = _slurm("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        self.folder, self.seconds, self._port = folder, seconds, port

    def facts(self) -> tuple[dict[str, Answer], dict[str, dict[str, Any]]]:
        """The nodes' answers, and their facts as seen by the head node."""
        token = f"{os.environ['SLURM_JOB_ID']} {time.time()}"
        (self.folder / "head").write_text(token)
        answers, _ = self._step("facts", self.nodes, 1, "facts", self.folder, token)
        facts: dict[str, dict[str, Any]] = {}
        deadline = time.monotonic() + 10  # a network file system shows new files late
        while True:
            for path in self.folder.glob("*.json"):
                if path.stem not in facts and (found := _json(path)) and found["token"] == token:
                    facts[path.stem] = found
            written = {node for node, answer in answers.items() if not answer.status}
            if written <= set(facts) or time.monotonic() > deadline:
                return answers, facts
            time.sleep(0.5)

    def allreduce(
        self, name: str, groups: Sequence[tuple[str, ...]], gpus: int, addresses: Mapping[str, str]
    ) -> Measured:
        """Run the all-reduces of all groups concurrently."""
        asked = []
        for nodes in groups:
            asked.append({"nodes": nodes, "address": addresses[nodes[0]], "port": self._port})
            self._port += 1
        taking_part = [node for group in groups for node in group]
        given = (json.dumps(asked), gpus, self.seconds)
        answers, reports = self._step(name, taking_part, max(gpus, 1), "allreduce", *given)
        done = []
        for group in groups:
            if all(node in reports and not answers.get(node, Answer(0, "")).status for node in group):
                done.append(Group(group, reports[group[0]]["rate"]))
                continue
            failed = [node for node in group if node not in answers or answers[node].status]
            # Nodes that only waited for others until the deadline come last.
            failed.sort(key=lambda node: node in answers and answers[node].status in LATE)
            done.append(Group(group, None, {node: _ended(answers.get(node), self.seconds) for node in failed}))
        clocks = {node: report["time"] for node, report in reports.items()}
        return Measured(done, clocks, [node for node in taking_part if node not in answers])

    def addresses(self, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """node -> an IP address: Slurm's, else the node's own, since its name need not resolve."""
        shown = _slurm("--oneliner", "show", "node", ",".join(facts))
        known = dict(re.findall(r"^NodeName=(\S+).*? NodeAddr=(\S+)", shown, re.MULTILINE))
        return {
            node: known[node] if _is_address(known.get(node, "")) else found["address"] for node, found in facts.items()
        }

    def _step(
        self, name: str, nodes: Sequence[str], tasks: int, *command: Any
    ) -> tuple[dict[str, Answer], dict[str, dict[str, Any]]]:
        begin = time.monotonic()
        script = Path(__file__).with_name("preflight_node.py")
        flags = ["--overlap", "--overcommit", "--cpu-bind=none", "--input=none"]
        flags += ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"]  # a failing node must not end the others
        flags += [f"--nodes={len(nodes)}", f"--ntasks={len(nodes) * tasks}", f"--ntasks-per-node={tasks}"]
        flags += [f"--nodelist={','.join(nodes)}"]
        if gpus := os.environ.get("SLURM_GPUS_ON_NODE"):
            flags += [f"--gres=gpu:{gpus}"]  # GPUs allocated by --exclusive alone must be requested for each step
        limited = [f"{self.seconds:g}", os.environ.get("PYTHON", sys.executable), script, *command]
        log = self.folder / f"{name.replace(' ', '-')}.log"
        with open(log, "wb") as out:
            step = subprocess.Popen(
                ["srun", *flags, "bash", "-c", ON_NODE, "_", *map(str, limited)], stdout=out, stderr=out
            )
            with suppress(subprocess.TimeoutExpired):
                step.wait(self.seconds + GRACE)
            step.terminate()
            with suppress(subprocess.TimeoutExpired):
                step.wait(GRACE)
            step.kill()
        text = log.read_text(errors="replace")
        answers, reports = read_answers(text)
        if not answers:
            print(f"srun output: {text[-2000:].strip()}")
        print(f"{name}: {len(nodes)} nodes, {time.monotonic() - begin:.0f} s", flush=True)
        return answers, reports


def _slurm(*words: str) -> str:
    return subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True).stdout


def _json(path: Path) -> dict[str, Any] | None:
    """The content of a file; None while it is incomplete."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        return None


def _is_address(word: str) -> bool:
    try:
        ipaddress.ip_address(word)
    except ValueError:
        return False
    return True


def _number(name: str, default: str) -> float:
    value = os.environ.get(name) or default
    with suppress(ValueError):
        if (number := float(value)) >= 0:
            return number
    sys.exit(f"error: {name} = {value!r} is not valid: it must be a number, 0 or more")


def main() -> int:
    """Print the table and the nodes to exclude; returns 1 if any node is bad."""
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    slow, slurms = _number("PREFLIGHT_SLOW", "0.5"), os.environ.get("SLURM_GPUS_ON_NODE", "")
    given = int(_number("NGPU", slurms)) if os.environ.get("NGPU") or slurms else None
    job = Job(folder, port, _number("PREFLIGHT_SECONDS", "120"))
    answers, facts = job.facts()
    reasons = judge_facts(job.nodes, answers, facts, given, job.seconds)

    def good() -> list[str]:
        return [node for node in job.nodes if not reasons[node]]

    def judge(more: Reasons) -> None:
        for node, why in more.items():
            reasons[node] += why

    gpus = (_majority(facts[node]["gpus"] for node in good()) or 0) if given is None else given
    addresses = job.addresses({node: facts[node] for node in good()}) if good() else {}
    pairs: list[Group] = []
    for number, groups in enumerate(ring(good()), 1):
        # A node that died in the previous round would keep Slurm from starting this one.
        alive = [group for group in groups if not any(reasons[node] for node in group)]
        if alive:
            done = job.allreduce(f"pairs {number}", alive, gpus, addresses)
            pairs += done.groups
            judge({node: [_ended(None, job.seconds)] for node in done.silent})
    judge(judge_pairs(good(), pairs, slow))
    all_nodes: list[Group] = []
    if len(good()) * max(gpus, 1) > 1:
        done = job.allreduce("all together", [tuple(good())], gpus, addresses)
        all_nodes = done.groups
        judge(judge_clocks(done.clocks))
        judge({node: [_ended(None, job.seconds)] for node in done.silent})

    out = console(sys.stdout)
    for name in COMPARED:
        if usual := _majority(found[name] for found in facts.values()):
            out.print(f"{name}: {usual}", soft_wrap=True)
    for group in all_nodes:
        node, words = next(iter(group.failed.items()), ("", ""))
        rate = f"{group.rate:.2f} GB/s" if group.rate is not None else f"FAILED: {node}: {words}"
        ranks = len(group.nodes) * max(gpus, 1)
        out.print(f"all-reduce over {len(group.nodes)} nodes, {ranks} ranks: {rate}", soft_wrap=True)
    out.print(table(reasons, facts, pairs))
    bad = [node for node in job.nodes if reasons[node]]
    if bad:
        print(f"Bad: {len(bad)} of {len(job.nodes)} nodes. The logs of all steps are in {folder}. To exclude them:")
        print(f"sbatch --exclude={_slurm('show', 'hostlist', ','.join(bad)).strip()}")
        return 1
    if any(group.rate is None for group in all_nodes):
        print(f"Each node is good with its neighbours, but the all-reduce over all nodes failed: see {folder}")
        return 1
    print(f"All {len(job.nodes)} nodes are good.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
