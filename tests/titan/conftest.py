"""What the tests of the torchtitan adapter share: launch/ on the path, a folder, a clean environment."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))

pytest.importorskip("torchtitan", reason="the torchtitan adapter needs the extra: pip install -e '.[titan]'")


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the whole session."""
    return tmp_path_factory.mktemp("titan")


@pytest.fixture(scope="session", autouse=True)
def environment(work: Path) -> Iterator[None]:
    """No network, no writes to the user's caches, this Python in launch/run_train.sh."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(work / "hf"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("PYTHON", sys.executable)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    patch.setenv("OMP_NUM_THREADS", "1")
    yield
    patch.undo()


@pytest.fixture
def parallel_dims() -> SimpleNamespace:
    """The part of torchtitan's ParallelDims that builders look at, for one process."""
    return SimpleNamespace(pp_enabled=False, ep_enabled=False, get_optional_mesh=lambda name: None)
