"""What a run says of its memory: metrics to the byte, and snapshots that know its tensors by their addresses."""

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import HALF, STEPS, Trainer

from titan_adam_mini.memory.snapshot import TENSORS_KEY, read, summarize

from .cpu_memory import give_memory

pytestmark = pytest.mark.slow

SNAPSHOTS = {"profiling.enable_memory_snapshot": True, "profiling.profile_freq": HALF}
EVENTS = {"metrics.enable_tensorboard": True, "metrics.save_for_all_ranks": True}


@pytest.fixture(scope="module")
def mini(trainer: Trainer) -> Path:
    """AdamMini with bfloat16 momentum over two ranks, with everything on; its dump folder."""
    knobs = {"optimizer.adam_mini.log_memory": True, "optimizer.adam_mini.momentum_dtype": "bfloat16"}
    out = trainer.out / "memory"
    trainer("memory", ranks=2, data=2, hook=give_memory, given=(str(out),), **SNAPSHOTS, **EVENTS, **knobs)
    return out


@pytest.fixture(scope="module")
def adamw(trainer: Trainer) -> Path:
    """AdamW on one rank, the knob of AdamMini set."""
    knobs = {"optimizer.adam_mini.log_memory": True, "optimizer.name": "AdamW"}
    out = trainer.out / "memory_adamw"
    trainer("memory_adamw", ranks=1, hook=give_memory, given=(str(out),), **SNAPSHOTS, **EVENTS, **knobs)
    return out


def counted(out: Path, rank: int) -> dict[str, int]:
    sizes: dict[str, int] = json.loads(Path(f"{out}.rank{rank}.json").read_text())
    return sizes


def scalars(out: Path, rank: int, ranks: int) -> dict[str, list[float]]:
    """name -> a value for every logged step, from TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in out.rglob("events.out.*") if ranks == 1 or file.parent.name == f"rank_{rank}"}
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [one.value for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("rank", [0, 1])
def test_metrics_have_the_bytes_of_the_tensors(mini: Path, rank: int) -> None:
    sizes = counted(mini, rank)
    found = scalars(mini, rank, 2)
    state = ("exp_avg", "exp_avg_sq")
    for name in state:
        assert found[f"memory/{name}(GiB)"] == [sizes[name] / 2**30] * STEPS, name
    whole = sum(sizes[name] for name in (*state, "step"))
    assert found["memory/optimizer_state(GiB)"] == [whole / 2**30] * STEPS
    for name in ("parameters", "gradients"):  # FSDP pads uneven shards, in memory too
        held = found[f"memory/{name}(GiB)"][-1] * 2**30
        assert sizes[name] <= held <= 1.01 * sizes[name], name
    assert "memory/max_reserved(GiB)" in found and "lr" in found, "torchtitan's own are there too"
    assert "memory/max_allocated(GiB)" not in found, "a CPU does not count it"


def test_one_line_in_the_log_and_on_one_rank(mini: Path) -> None:
    lines = [path.read_text().count("bytes on this rank") for path in (Path(f"{mini}.log"), Path(f"{mini}.rank1.log"))]
    assert lines == [1, 0]
    sizes = counted(mini, 0)
    told = re.search(r"bytes on this rank: optimizer_state ([\d,]+), exp_avg ([\d,]+)", Path(f"{mini}.log").read_text())
    assert told is not None
    state = sum(sizes[name] for name in sizes if name not in ("parameters", "gradients"))
    assert [int(one.replace(",", "")) for one in told.groups()] == [state, sizes["exp_avg"]]


def test_scales_of_int8_are_state(parallel_dims: SimpleNamespace) -> None:
    from torchtitan.config import Optimizer as OptimizerConfig
    from torchtitan.models import llama3

    from titan_adam_mini.titan import build_optimizers, job_config
    from titan_adam_mini.titan.metrics import storage_bytes

    args = llama3.TransformerModelArgs(dim=128, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=16, multiple_of=128)
    config = OptimizerConfig(name="AdamMini", implementation="foreach")
    config.adam_mini = job_config.AdamMini(momentum_dtype="int8", log_memory=True)  # type: ignore[attr-defined]
    container = build_optimizers([llama3.Transformer(args)], config, parallel_dims)
    sizes = storage_bytes(container)
    matrices = [param for param in container.model_parts[0].parameters() if param.ndim == 2]
    assert sizes["exp_avg_scale"] == 4 * sum(param.numel() // 128 for param in matrices) > 0
    parts = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "step")
    assert sizes["optimizer_state"] == sum(sizes[part] for part in parts)
    assert "gradients" not in sizes


def test_other_optimizers_log_what_they_did(adamw: Path) -> None:
    found = scalars(adamw, 0, 1)
    assert "memory/max_reserved(GiB)" in found
    assert not [name for name in found if "state" in name or "exp_avg" in name]
    assert "bytes on this rank" not in Path(f"{adamw}.log").read_text()


@pytest.mark.parametrize(("name", "ranks"), [("AdamMini", 2), ("AdamW", 1)])
def test_snapshots_know_the_tensors_of_the_run(request: Any, name: str, ranks: int) -> None:
    out: Path = request.getfixturevalue({"AdamMini": "mini", "AdamW": "adamw"}[name])
    for rank in range(ranks):
        sizes = counted(out, rank)
        path = out / "memory_snapshot" / f"iteration_{STEPS}" / f"rank{rank}_memory_snapshot.pickle"
        found = summarize(read(path))
        assert read(path).optimizer == name
        assert found.strangers == 0, "every tensor is where it says"
        state = sum(size for key, size in sizes.items() if key not in ("parameters", "gradients"))
        assert found.end.categories["optimizer state"] == state
        for key in ("parameters", "gradients"):
            assert sizes[key] <= found.end.categories[key] <= 1.01 * sizes[key]
        tensors = pickle.loads(path.read_bytes())[TENSORS_KEY]["tensors"]
        assert len({address for address, _, _ in tensors}) == len(tensors), "each storage once"


def test_without_a_gpu_snapshots_are_refused_in_a_sentence(trainer: Trainer) -> None:
    from titan_adam_mini.tools.trainer import RunFailed

    with pytest.raises(
        RunFailed, match=r"enable_memory_snapshot records the allocator of a GPU, but this run is on the CPU"
    ):
        trainer("no_gpu", ranks=1, **SNAPSHOTS)
