"""What the tests of the memory room share: torchtitan, processes that start fast, no variables of torchtitan's."""

from collections.abc import Iterator

import pytest

pytest.importorskip("torchtitan", reason="plans are made from torchtitan's models: pip install -e '.[titan]'")

from titan_worker import Forks

from titan_adam_mini.tools import isolated_process


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """Commands' own processes are forked from a server that has torchtitan loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolated_process, "ProcessPoolExecutor", Forks)
        for name in ("CONFIG_FILE", "NGPU"):
            patch.delenv(name, raising=False)
        yield
