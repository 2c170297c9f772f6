"""What all tests share: hypothesis without its deadline, Triton without a GPU, which tests run side by side, and that a
tier which was asked for by name does not pass if it ran nothing."""

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

if os.environ.get("TITAN_ADAM_MINI_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whoever does so first

settings.register_profile("patient", deadline=None)  # a busy machine is no bug
settings.load_profile("patient")

RANKS = {"exchange", "models", "optimizer", "sharding"}
"""The folders whose tests share one pool of ranks."""
LONGEST = ("titan", "slurm", "kernels", "memory")
"""The folders that take longest, in the order in which they begin: what is short fills the gaps at the end."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Several workers would compile the same loops at the same time."""
    if hasattr(session.config, "workerinput"):
        importlib.import_module("compiled_loops")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In this order folders are handed to workers."""
    items.sort(key=lambda item: LONGEST.index(name) if (name := item.path.parent.name) in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A folder's tests go to one worker, in their order, so that what they share is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = Path(nodeid.split("::")[0]).parent.name
            return "ranks" if folder in RANKS else folder

    return ByFolder(config, log)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """launch/test.sh names the tier in the environment."""
    tier = os.environ.get("TITAN_ADAM_MINI_TEST_TIER")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if (
        not tier
        or reporter is None
        or exitstatus != 0
        or session.config.option.collectonly
        or "passed" in reporter.stats
    ):
        return
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", [])}
    reporter.write_line(f"\nerror: {tier} ran no test: {'; '.join(sorted(reasons))}")
