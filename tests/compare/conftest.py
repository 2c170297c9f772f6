"""What the tests of the comparison share: torchtitan, processes that start fast, a clean environment, a corpus."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torchtitan", reason="torchtitan's trainer does the training: pip install -e '.[titan]'")

from titan_worker import Forks

from titan_adam_mini.tools import isolated_process

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "train_configs" / "debug_model.toml"
SEQ_LEN, BATCH = 64, 4


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands' own processes are forked from a server that has torchtitan loaded; trainers find this package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolated_process, "ProcessPoolExecutor", Forks)
        for name in ("CONFIG_FILE", "NGPU"):
            patch.delenv(name, raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of one sequence each, and a tokenizer; more for validation than one validation reads."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "launch"))
    import corpus

    folder = tmp_path_factory.mktemp("corpus")
    corpus.build(folder, seq_len=SEQ_LEN, global_batch=BATCH, steps=80, ranks=[1], validation=20)
    patch.undo()
    return folder
