"""torchtitan's own trainer with AdamMini, from one seed checkpoint, on one and on many ranks."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from forked import CONFIG, HALF, ROOT, SEQ_LEN, STEPS, TP, WHOLE, Trainer, difference, said


@pytest.fixture(scope="module")
def fsdp_tp(even: Trainer):
    """FSDP2 over two times TP over two ranks."""
    return even("fsdp_tp", ranks=4, data=2, **TP, **WHOLE)


def test_it_learns_and_two_ranks_give_the_losses_of_one(one: Any, two: Any) -> None:
    assert one.losses[STEPS] < 0.85 * one.losses[1]
    assert said(one, r"(\d+) heads cut") == "0"
    assert difference(two, one) < 1e-3
    assert said(two, r"(\d+) heads cut") == "8"


@pytest.mark.slow
def test_resumed_on_the_same_mesh_the_losses_are_the_same(trainer: Trainer, two: Any) -> None:
    assert difference(trainer.resume("two"), two, first=HALF + 1) == 0


def test_what_a_checkpoint_holds(trainer: Trainer, two: Any) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    entries = FileSystemReader(trainer.checkpoint("two", STEPS)).read_metadata().state_dict_metadata
    kinds = {key.rpartition(".")[2] for key in entries if key.startswith("optimizer.")}
    state = [(key.rpartition(".")[2], entry) for key, entry in entries.items() if key.startswith("optimizer.state.")]
    bytes_of = Counter[str]()
    for kind, entry in state:
        bytes_of[kind] += entry.size.numel() * entry.properties.dtype.itemsize
    parameters = sum(entry.size.numel() for kind, entry in state if kind == "exp_avg")
    assert bytes_of["exp_avg"] == 4 * parameters and bytes_of["step"] == 4 * 39
    assert 0 < bytes_of["exp_avg_sq"] < 0.03 * parameters
    assert kinds == {"exp_avg", "exp_avg_sq", "step", "lr", "betas", "eps", "weight_decay", "maximize", "initial_lr"}


@pytest.mark.slow
def test_four_ranks_give_the_losses_of_one(trainer: Trainer, one: Any) -> None:
    """FSDP2 over two times two replicas: every kind of group that a run without tensor parallelism has."""
    run = trainer("hsdp", ranks=4, data=4, **{"parallelism.data_parallel_replicate_degree": 2})
    assert difference(run, one) < 1e-3


@pytest.mark.slow
def test_tensor_parallel_gives_the_losses_of_one_and_resumes_on_another_mesh(even: Trainer) -> None:
    """FSDP2 over two times TP over two ranks, resumed on FSDP2 over two."""
    run = even("fsdp_tp", ranks=4, data=2, **TP, **WHOLE)
    assert difference(run, even("one", ranks=1)) < 1e-3
    assert difference(even.resume("fsdp_tp"), run, first=HALF + 1) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama4", "deepseek_v3"])
def test_mixtures_of_experts_train(even: Trainer, name: str) -> None:
    """Routers, 3-D experts and torchtitan's load-balancing hook over two ranks, on a CPU too."""
    run = even(name, ranks=2, data=2, start={}, **{"model.name": name, "training.steps": 6})
    assert run.losses[6] < 0.95 * run.losses[1]


@pytest.mark.slow
def test_a_dry_step_over_fake_ranks(work: Path, corpus_dir: Path) -> None:
    done = subprocess.run(
        [
            *("bash", str(ROOT / "launch" / "run_train.sh"), "--job.dump_folder", str(work / "fake")),
            *("--model.hf_assets_path", str(corpus_dir / "tokenizer"), "--training.seq_len", str(SEQ_LEN)),
            *("--training.dataset_path", str(corpus_dir / "train-1")),
        ],
        env={**os.environ, "NGPU": "1024", "CONFIG_FILE": str(CONFIG), "COMM_MODE": "fake_backend"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    assert re.search(r"step:\s+1\s", text), text[-4000:]
    assert "layers.*.attention.wq.weight" in text, "AdamMini's table"
    assert re.search(r"\b(\d+) heads cut", text)[1] == "40", "all 5 heads of queries and keys in 4 layers"  # type: ignore[index]
