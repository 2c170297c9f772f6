"""What the tests of the torchtitan adapter share: launch/ on the path, a folder, a clean environment."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))

pytest.importorskip("torchtitan", reason="the torchtitan adapter needs the extra: pip install -e '.[titan]'")

from ranks import forkserver  # noqa: E402

from titan_adam_mini import child  # noqa: E402


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the whole session."""
    return tmp_path_factory.mktemp("titan")


@pytest.fixture(scope="session", autouse=True)
def environment(work: Path) -> Iterator[None]:
    """No network, no writes to the user's caches, this Python in launch/run_train.sh, children that start fast."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(work / "hf"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("PYTHON", sys.executable)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setattr(child, "get_context", lambda _: forkserver())
    yield
    patch.undo()


@pytest.fixture
def parallel_dims() -> SimpleNamespace:
    """The part of torchtitan's ParallelDims that builders look at, for one process."""
    return SimpleNamespace(pp_enabled=False, ep_enabled=False, get_optional_mesh=lambda name: None)


@pytest.fixture(scope="session")
def corpus_dir(work: Path) -> Path:
    """Documents of one sequence each, ordered for 1, 2 and 4 ranks, and a tokenizer."""
    import corpus
    import sources
    from forked import GLOBAL_BATCH, SEQ_LEN

    found = sources.SOURCES["stdlib"](work)
    few = sources.Source(found.texts[:150], found.title)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "stdlib", lambda cache: few)
        texts = {"seq_len": SEQ_LEN, "global_batch": GLOBAL_BATCH, "steps": 60, "validation": 8}
        corpus.build(work / "corpus", ranks=[1, 2, 4], **texts)
    return work / "corpus"


@pytest.fixture(scope="session")
def trainer(work: Path, corpus_dir: Path) -> Any:
    """Runs of our small Llama 3, whose five heads no number of ranks divides."""
    from forked import Trainer

    return Trainer(work / "runs", corpus_dir)


@pytest.fixture(scope="session")
def even(work: Path, corpus_dir: Path) -> Any:
    """Runs of torchtitan's own debug model: its 16 heads can be shared out by tensor parallelism, our five cannot."""
    from forked import Trainer

    return Trainer(work / "even", corpus_dir, "debugmodel")


@pytest.fixture(scope="session")
def one(trainer: Any) -> Any:
    """AdamMini on one rank, nothing sharded."""
    return trainer("one", ranks=1)


@pytest.fixture(scope="session")
def adamw(trainer: Any) -> Any:
    """AdamW, FSDP2 over two ranks."""
    from forked import WHOLE

    return trainer("adamw", ranks=2, data=2, **WHOLE, **{"optimizer.name": "AdamW"})


@pytest.fixture(scope="session")
def two(trainer: Any) -> Any:
    """AdamMini, FSDP2 over two ranks."""
    from forked import WHOLE

    return trainer("two", ranks=2, data=2, **WHOLE)
