"""What all tests share: hypothesis without its deadline, since a busy machine is no bug; Triton without a GPU; and that
a tier which was asked for by name does not pass if it ran nothing."""

import os

import pytest
from hypothesis import settings

if os.environ.get("TITAN_ADAM_MINI_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whoever does so first

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """launch/test.sh names the tier in the environment."""
    tier = os.environ.get("TITAN_ADAM_MINI_TEST_TIER")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not tier or exitstatus != 0 or session.config.option.collectonly or "passed" in reporter.stats:
        return
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", [])}
    reporter.write_line(f"\nerror: {tier} ran no test: {'; '.join(sorted(reasons))}")
