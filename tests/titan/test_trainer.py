"""torchtitan's own trainer with AdamMini, from one seed checkpoint, on one and on many ranks."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "train_configs" / "debug_model.toml"
SEQ_LEN, GLOBAL_BATCH, STEPS = 64, 4, 12
HALF = STEPS // 2


class Trainer:
    """Starts runs that share settings, seed checkpoint and data; what differs is the mesh."""

    def __init__(self, out: Path, corpus: Path, flavor: str = "adam_mini_debug") -> None:
        self.out, self.corpus = out, corpus
        self.common = {
            "model.flavor": flavor,
            "model.hf_assets_path": corpus / "tokenizer",
            "training.seq_len": SEQ_LEN,
            "training.steps": STEPS,
            "lr_scheduler.total_steps": STEPS,
            "checkpoint.enable": True,
        }
        seed = {"checkpoint.create_seed_checkpoint": True, "training.dataset_path": corpus / "train-1", "debug.seed": 0}
        self("seed", ranks=1, start={}, **seed)

    def __call__(
        self, name: str, *, ranks: int, data: int = 1, start: dict[str, Any] | None = None, shown: int = 0, **mesh: Any
    ):
        """The finished run: `data` ranks of it see different documents, rank `shown` reports the losses."""
        from forked import train

        settings = {
            **self.common,
            "training.dataset_path": self.corpus / f"train-{data}",
            "training.local_batch_size": GLOBAL_BATCH // data,
            **({"checkpoint.initial_load_path": self.checkpoint("seed", 0)} if start is None else start),
            **mesh,
        }
        return train(name, settings, ranks=ranks, out=self.out, config=CONFIG, shown=shown)

    def checkpoint(self, name: str, step: int) -> Path:
        return self.out / name / "checkpoint" / f"step-{step}"


@pytest.fixture(scope="module")
def corpus_dir(work: Path) -> Path:
    """Documents of one sequence each, ordered for 1, 2 and 4 ranks, and a tokenizer."""
    import corpus

    corpus.build(work / "corpus", seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, steps=300, ranks=[1, 2, 4], validation=8)
    return work / "corpus"


TP = {"parallelism.tensor_parallel_degree": 2}
WHOLE = {"checkpoint.interval": HALF, "checkpoint.last_save_model_only": False}
"""A checkpoint with everything half way, and another at the end."""


@pytest.fixture(scope="module")
def trainer(work: Path, corpus_dir: Path) -> Trainer:
    return Trainer(work / "runs", corpus_dir)


@pytest.fixture(scope="module")
def even(work: Path, corpus_dir: Path) -> Trainer:
    """torchtitan's own debug model: its 16 heads can be shared out by tensor parallelism, our five cannot."""
    return Trainer(work / "even", corpus_dir, "debugmodel")


@pytest.fixture(scope="module")
def one(trainer: Trainer):
    """On one rank, nothing sharded."""
    return trainer("one", ranks=1)


@pytest.fixture(scope="module")
def two(trainer: Trainer):
    """FSDP2 over two ranks."""
    return trainer("two", ranks=2, data=2, **WHOLE)


@pytest.fixture(scope="module")
def fsdp_tp(even: Trainer):
    """FSDP2 over two times TP over two ranks."""
    return even("fsdp_tp", ranks=4, data=2, **TP, **WHOLE)


def difference(run: Any, other: Any, first: int = 1) -> float:
    """The largest difference between the losses of two runs, from step `first` on."""
    assert list(run.losses) == list(range(first, STEPS + 1))
    largest = max(abs(run.losses[step] - other.losses[step]) for step in run.losses)
    print(f"{run.log.stem} and {other.log.stem}: losses differ by at most {largest:.1e}")
    return largest


def said(run: Any, pattern: str) -> str:
    found = re.search(pattern, "\n".join(run.lines))
    assert found is not None, f"{pattern} is not in {run.log}"
    return found[1]


def test_one_rank_learns(one: Any) -> None:
    assert one.losses[STEPS] < 0.85 * one.losses[1]
    assert said(one, r"(\d+) heads cut") == "0"


def test_two_ranks_give_the_losses_of_one(one: Any, two: Any) -> None:
    assert difference(two, one) < 1e-3
    assert said(two, r"(\d+) heads cut") == "8"


@pytest.mark.parametrize(("name", "replicas"), [("fsdp", 1), ("hsdp", 2)])
def test_four_ranks_give_the_losses_of_one(trainer: Trainer, one: Any, name: str, replicas: int) -> None:
    run = trainer(name, ranks=4, data=4, **{"parallelism.data_parallel_replicate_degree": replicas})
    assert difference(run, one) < 1e-3


def test_tensor_parallel_gives_the_losses_of_one(even: Trainer, fsdp_tp: Any) -> None:
    assert difference(fsdp_tp, even("one", ranks=1)) < 1e-3


def test_two_pipeline_stages(trainer: Trainer, one: Any) -> None:
    """torchtitan does not normalise gradients under a pipeline, and clipping makes that another run: it learns."""
    stages = {"parallelism.pipeline_parallel_degree": 2, "parallelism.pipeline_parallel_schedule": "1F1B"}
    run = trainer("pipeline", ranks=2, shown=1, **stages)
    assert abs(run.losses[1] - one.losses[1]) < 1e-3
    assert run.losses[STEPS] < 0.85 * run.losses[1]


@pytest.mark.parametrize("name", ["llama4", "deepseek_v3"])
def test_mixtures_of_experts_train(even: Trainer, name: str) -> None:
    """Routers, 3-D experts and torchtitan's load-balancing hook over two ranks, on a CPU too."""
    run = even(name, ranks=2, data=2, start={}, **{"model.name": name, "training.steps": 6})
    assert run.losses[6] < 0.95 * run.losses[1]


def resume(trainer: Trainer, name: str, **mesh: Any) -> Any:
    """A run on two ranks that goes on from the middle of the run `name`."""
    shutil.copytree(trainer.checkpoint(name, HALF), trainer.checkpoint(f"{name}_resumed", HALF))
    return trainer(f"{name}_resumed", ranks=2, data=2, start={}, **mesh)


def test_resumed_on_the_same_mesh_the_losses_are_the_same(trainer: Trainer, two: Any) -> None:
    assert difference(resume(trainer, "two"), two, first=HALF + 1) == 0


def test_resumed_on_another_mesh_the_losses_are_the_same_to_rounding(even: Trainer, fsdp_tp: Any) -> None:
    assert difference(resume(even, "fsdp_tp"), fsdp_tp, first=HALF + 1) < 1e-3


def test_what_a_checkpoint_holds(trainer: Trainer, two: Any) -> None:
    from runs import optimizer_bytes
    from torch.distributed.checkpoint import FileSystemReader

    path = trainer.checkpoint("two", STEPS)
    total, seconds, parameters = optimizer_bytes(path)
    assert total == 4 * parameters + seconds + 4 * 39, "momentum, second moments, and a step for each of 39 parameters"
    assert 0 < seconds < 0.03 * parameters
    names = [key for key in FileSystemReader(path).read_metadata().state_dict_metadata if key.startswith("optimizer.")]
    kinds = {key.rpartition(".")[2] for key in names}
    assert kinds == {"exp_avg", "exp_avg_sq", "step", "lr", "betas", "eps", "weight_decay", "maximize", "initial_lr"}


@pytest.mark.parametrize("ranks", [64, 1024])
def test_a_dry_step_over_fake_ranks(work: Path, corpus_dir: Path, ranks: int) -> None:
    done = subprocess.run(
        [
            *("bash", str(ROOT / "launch" / "run_train.sh"), "--job.dump_folder", str(work / f"fake{ranks}")),
            *("--model.hf_assets_path", str(corpus_dir / "tokenizer"), "--training.seq_len", str(SEQ_LEN)),
            *("--training.dataset_path", str(corpus_dir / "train-1")),
        ],
        env={**os.environ, "NGPU": str(ranks), "CONFIG_FILE": str(CONFIG), "COMM_MODE": "fake_backend"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    assert re.search(r"step:\s+1\s", text), text[-4000:]
    assert "layers.*.attention.wq.weight" in text, "AdamMini's table"
    assert re.search(r"\b(\d+) heads cut", text)[1] == "40", "all 5 heads of queries and keys in 4 layers"  # type: ignore[index]


def test_a_run_of_the_launcher_that_fails_says_so(trainer: Trainer) -> None:
    from runs import RunFailed, train

    with pytest.raises(RunFailed, match="unknown role 'head'"):
        data = {"training.dataset_path": trainer.corpus / "train-2"}
        wrong = {**trainer.common, **data, "optimizer.adam_mini.roles": "*.wq.weight=head"}
        train("refused", wrong, ranks=2, out=trainer.out, config=CONFIG)
