"""The kernels' own tests on the GPU: `pytest tests/kernels` with TITAN_ADAM_MINI_TEST_DEVICE=cuda."""

import os
import re
import subprocess
import sys

from runs import ROOT

from gpu_check.stage import Check, Result, Skip, need_cuda


def run(check: Check) -> Result:
    """Passes if pytest does."""
    need_cuda(check, "this (on a CPU launch/test.sh runs them)")
    folder = ROOT / "tests" / "kernels"
    if not folder.is_dir():
        raise Skip("there is no tests/kernels")
    stacks = ["-o", f"faulthandler_timeout={max(10, check.left - 10):.0f}"]  # where it hangs, if it does
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(folder),
        "-q",
        "--maxfail=8",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        *stacks,
    ]
    environment = {**os.environ, "TITAN_ADAM_MINI_TEST_DEVICE": check.device}
    process = subprocess.Popen(
        [*command, "--durations=5", "--tb=short"],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    status = process.wait()
    summary = next((line.strip("= ") for line in reversed(lines) if re.search(r"\d+ \w+.* in [\d.]+s", line)), "")
    return Result(status == 0, summary or f"pytest ended with status {status}", {"status": status})
