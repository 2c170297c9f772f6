"""What the tests of the memory room share: torchtitan, children that start fast, no variables of torchtitan's."""

from collections.abc import Iterator

import pytest

pytest.importorskip("torchtitan", reason="plans are made from torchtitan's models: pip install -e '.[titan]'")

from ranks import forkserver

from titan_adam_mini import child


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """Children are forked from a server that has the slow imports behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "get_context", lambda _: forkserver())
        for name in ("CONFIG_FILE", "NGPU"):
            patch.delenv(name, raising=False)
        yield
