"""The look at all nodes before a long run: what makes a node bad, and that the table says so."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import Cluster

pytest.importorskip("rich", reason="preflight's table needs the extra: pip install -e '.[titan]'")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "slurm"
sys.path.insert(0, str(FOLDER))

import preflight  # noqa: E402
from preflight import Answer, Group, judge_clocks, judge_facts, judge_pairs, read_answers, ring, table  # noqa: E402

NODES = [f"node{number}" for number in range(1, 6)]
FINE = Answer(0, "")


def facts(**different: Any) -> dict[str, Any]:
    usual = {"errors": [], "address": "10.0.0.1", "gpus": 8, "GPU": "H100", "driver": "550.54", "python": "3.11.7"}
    versions = {"torch": "2.13.0", "torchtitan": "0.2.2", "titan_adam_mini": "0.1.0", "NCCL": "2.27", "commit": "abc"}
    return {**usual, **versions, **different}


def judged(
    answers: dict[str, Answer] | None = None, gpus: int | None = None, **different: dict[str, Any] | None
) -> dict[str, list[str]]:
    """What is said of nodes that are all alike, but for these."""
    told = {node: facts(**(different.get(node) or {})) for node in NODES if different.get(node, {}) is not None}
    answered = {**dict.fromkeys(NODES, FINE), **(answers or {})}
    return {node: why for node, why in judge_facts(NODES, answered, told, gpus, 60).items() if why}


def test_nodes_that_are_alike_are_good() -> None:
    assert judged() == {}
    assert judged(gpus=8) == {}
    assert judge_facts(NODES, {}, {}, None, 60) == {node: ["no response within 60 s"] for node in NODES}


def test_a_node_that_does_not_answer() -> None:
    missing = judge_facts(NODES, dict.fromkeys(NODES[1:], FINE), {node: facts() for node in NODES}, None, 60)
    assert missing == {**{node: [] for node in NODES}, "node1": ["no response within 60 s"]}
    ends = {"node2": Answer(124, "last words"), "node3": Answer(1, "cannot write to /shared: Read-only file system")}
    assert judged({**ends, "node4": Answer(139, "")}, node5=None) == {
        "node2": ["not finished within 60 s: last words"],
        "node3": ["cannot write to /shared: Read-only file system"],
        "node4": ["ended with status 139"],
        "node5": ["the head node does not see this node's file: the folder is not shared"],
    }


def test_versions_differ() -> None:
    found = judged(node1={"torch": "2.12.0"}, node4={"torch": "2.12.0", "commit": ""})
    assert found["node1"] == ["torch 2.12.0, other nodes: 2.13.0"]
    assert found["node4"] == ["torch 2.12.0, other nodes: 2.13.0", "commit missing, other nodes: abc"]
    assert list(found) == ["node1", "node4"]
    broken = ["cannot import torchtitan: ImportError: no"]
    assert judged(node2={"errors": broken, "torchtitan": ""}) == {"node2": broken}


def test_the_broken_are_no_majority() -> None:
    broken = {"errors": ["cannot import torch: no"], "torch": "", "gpus": 0}
    assert set(judged(node1=broken, node2=broken, node3=broken)) == {"node1", "node2", "node3"}


def test_gpus() -> None:
    assert judged(node3={"gpus": 7}) == {"node3": ["7 GPUs, not 8"]}
    assert judged(node3={"gpus": 7}, gpus=4) == {}, "four are enough for a run with four"
    assert judged(gpus=9) == {node: ["8 GPUs, not 9"] for node in NODES}
    assert judged(node3={"gpus": 0, "GPU": ""})["node3"] == ["0 GPUs, not 8", "GPU missing, other nodes: H100"]


def test_answers_are_read_from_a_log() -> None:
    log = """\
srun: error: something
preflight node1 report {"rate": 45.5, "bytes": 1048576, "time": 7.5}
preflight node1 0 a warning
preflight node2 1 RuntimeError: [1] broken
preflight node2 143
preflight node3 0
preflight node3 137 Killed
"""
    answers, reports = read_answers(log)
    assert answers == {
        "node1": Answer(0, "a warning"),
        "node2": Answer(1, "RuntimeError: [1] broken"),
        "node3": Answer(137, "Killed"),
    }
    assert reports == {"node1": {"rate": 45.5, "bytes": 1048576, "time": 7.5}}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 64, 65])
def test_ring(count: int) -> None:
    nodes = [f"n{number}" for number in range(count)]
    rounds = ring(nodes)
    assert len(rounds) == {1: 0, 2: 1}.get(count, 2 + count % 2)
    for pairs in rounds:
        busy = [node for pair in pairs for node in pair]
        assert len(set(busy)) == len(busy), "a node is in one pair at a time"
    edges = {frozenset(pair) for pairs in rounds for pair in pairs}
    met = {node: [edge for edge in edges if node in edge] for node in nodes}
    assert {len(one) for one in met.values()} == {min(count - 1, 2)}


def pairs_of(rates: dict[str, float]) -> list[Group]:
    """What is measured of nodes in a ring, each pair as fast as its slower node; no rate where one has 0."""
    pairs = [pair for pairs in ring(NODES) for pair in pairs]
    speed = [min(rates.get(node, 40.0) for node in pair) for pair in pairs]
    failed = {node: f"{node} is stuck" for node, rate in rates.items() if not rate}
    return [
        Group(pair, rate or None, {} if rate else {node: failed.get(node, "waited") for node in pair})
        for pair, rate in zip(pairs, speed, strict=True)
    ]


def test_a_slow_node_is_found_and_not_its_neighbours() -> None:
    bad = {node: why for node, why in judge_pairs(NODES, pairs_of({"node3": 12.0}), 0.5).items() if why}
    assert bad == {"node3": ["all-reduce at most 12.00 GB/s, median of all nodes 40.00"]}
    assert not any(judge_pairs(NODES, pairs_of({"node3": 21.0}), 0.5).values())
    assert not any(judge_pairs(NODES, pairs_of({"node3": 12.0}), 0.2).values())


def test_a_node_without_any_all_reduce() -> None:
    bad = {node: why for node, why in judge_pairs(NODES, pairs_of({"node3": 0.0}), 0.5).items() if why}
    assert bad == {"node3": ["all-reduce with node4, node2 failed: node3 is stuck"]}
    two = [Group(("node1", "node2"), None, {"node2": "no response within 60 s"})]
    assert judge_pairs(["node1", "node2"], two, 0.5) == {
        "node1": ["all-reduce with node2 failed: node2: no response within 60 s"],
        "node2": ["all-reduce with node1 failed: no response within 60 s"],
    }
    assert judge_pairs(["node1"], [], 0.5) == {"node1": []}


def test_clocks() -> None:
    assert judge_clocks({"node1": 1e9, "node2": 1e9 + 2, "node3": 1e9 - 37}) == {
        "node1": [],
        "node2": [],
        "node3": ["its clock is 37 s behind the others"],
    }
    assert judge_clocks({}) == {}


def test_the_table_has_bad_nodes_first() -> None:
    reasons: dict[str, list[str]] = {node: [] for node in NODES}
    reasons |= {"node2": ["cannot write: [Errno 30]", "7 GPUs"], "node4": ["no answer [/red]"]}
    out = io.StringIO()
    told = {node: facts() for node in NODES if node != "node4"}
    shown = table(reasons, told, [Group(("node1", "node3"), 40.5), Group(("node3", "node5"), None, {})])
    preflight.console(out).print(shown)
    rows = [line.split() for line in out.getvalue().splitlines() if line.lstrip().startswith("node")][1:]
    assert [row[0] for row in rows] == ["node2", "node4", "node1", "node3", "node5"]
    assert [row[1] for row in rows] == ["BAD"] * 2 + ["ok"] * 3
    assert " ".join(rows[0][2:]) == "8 cannot write: [Errno 30]; 7 GPUs"
    assert " ".join(rows[1][2:]) == "? no answer [/red]", "brackets are no markup"
    assert " ".join(rows[3][2:]) == "8 node1 40.50, node5 none"
    assert {len(line) for line in out.getvalue().splitlines()} == {preflight.WIDTH}


def test_a_step_has_a_deadline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where srun hears no signal."""
    stuck = f"#!{sys.executable}\nimport signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    for name, text in {"srun": f"{stuck}time.sleep(1000)\n", "scontrol": "#!/bin/sh\necho node1\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(preflight, "GRACE", 0.5)
    job = preflight.Job(tmp_path, 15007, 0.5)
    said: list[Any] = []
    step = threading.Thread(target=lambda: said.append(job.facts()), daemon=True)
    step.start()
    step.join(60)
    assert said == [({}, {})]


def node_says(folder: Path, **env: str) -> str:
    """The last line of what `preflight_node.py facts` has to complain of."""
    command = [sys.executable, FOLDER / "preflight_node.py", "facts", folder, "the token"]
    env = {**os.environ, "SLURMD_NODENAME": "node1", **env}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    return (done.stderr.splitlines() or [""])[-1] if done.returncode else ""


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    told = f"cannot read {nowhere}/head, written by the head node: No such file or directory"
    assert node_says(nowhere) == told
    (tmp_path / "head").write_text("another token")
    assert "differs from what the head node wrote" in node_says(tmp_path)


def test_a_node_tells_what_it_cannot_import_and_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "head").write_text("the token")
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "torch.py").write_text("raise ImportError('libcudart.so: not found\\nand more')")
    assert node_says(tmp_path, PYTHONPATH=str(modules)) == ""
    found = preflight._json(tmp_path / "node1.json")
    assert found is not None
    assert found["token"] == "the token"
    assert found["errors"] == ["cannot import torch: ImportError: libcudart.so: not found"]
    assert found["gpus"] == 0
    (tmp_path / "node1.json").unlink()
    (tmp_path / "node1.json").mkdir()
    assert node_says(tmp_path, PYTHONPATH=str(modules)) == f"cannot write to {tmp_path}: Is a directory"


@pytest.mark.slow
@pytest.mark.slurm
def test_on_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    """Three nodes, of which one has a Python that fails."""
    python = tmp_path / "python"
    fails = '[ "$SLURMD_NODENAME" != "${BROKEN:-}" ] || { echo "no Python [here]" >&2; exit 3; }'
    python.write_text(f'#!/bin/bash\n{fails}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = {"PYTHON": str(python), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NGPU": "0"}
    env |= {"PREFLIGHT_SLOW": "0", "PREFLIGHT_FOLDER": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def rows(job: int) -> list[list[str]]:
        lines = cluster.log(job).splitlines()
        return [line.split() for line in lines if line.startswith(" node") and "GPUs" not in line]

    env["BROKEN"] = "node2"
    job = cluster.submit(FOLDER / "preflight.sbatch", sbatch_flags=["-N3"], env=env, cwd=tmp_path)
    ended = cluster.wait(job, timeout=500)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), cluster.log(job)
    broken, *others = rows(job)
    assert broken == ["node2", "BAD", "?", "no", "Python", "[here]"]
    assert [row[:4] for row in others] == [["node1", "ok", "0", "node3"], ["node3", "ok", "0", "node1"]]
    assert "torchtitan: 0.2." in cluster.log(job) and "all-reduce over 2 nodes, 2 ranks: " in cluster.log(job)
    assert cluster.log(job).splitlines()[-1] == "sbatch --exclude=node2"
    folder = tmp_path / f"preflight-{job}"
    assert {path.name for path in folder.glob("*.json")} == {"node1.json", "node3.json"}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.slurm
def test_three_good_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """Every node is measured with both its neighbours, and all together."""
    env = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NGPU": "0"}
    env |= {"PREFLIGHT_SLOW": "0", "PREFLIGHT_FOLDER": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    job = cluster.submit(FOLDER / "preflight.sbatch", sbatch_flags=["-N3"], env=env, cwd=tmp_path)
    assert cluster.wait(job, timeout=500)["JobState"] == "COMPLETED", cluster.log(job)
    lines = cluster.log(job).splitlines()
    rows = [line.split() for line in lines if line.startswith(" node") and "GPUs" not in line]
    assert [row[:3] for row in rows] == [[node, "ok", "0"] for node in ("node1", "node2", "node3")]
    assert "all-reduce over 3 nodes, 3 ranks: " in cluster.log(job) and lines[-1] == "All 3 nodes are good."
