"""`titan-adam-mini check` on the CPU, through launch/gpu_check.sh; its runner; how it reads traces, logs and sizes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(folder: Path, *words: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the rows of the json by stage, and what was printed."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "gpu_check.sh"), "--json", "check.json", "--out", str(folder / "out"), *words],
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "NGPU": "2", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = json.loads((folder / "check.json").read_text())
    return done.returncode, {row["name"]: row for row in report["stages"]}, done.stdout + done.stderr


@pytest.mark.nightly
def test_all_stages_on_the_cpu(tmp_path: Path) -> None:
    status, rows, printed = call(tmp_path)
    assert status == 0 and "nothing failed" in printed, printed
    passed = {"environment", "kernels", "oracle", "bench", "train", "trace"}
    assert {name for name, row in rows.items() if row["status"] == "PASS"} == passed, printed
    assert all("needs a GPU" in rows[name]["line"] for name in ("steady", "captured", "float8"))
    for name, row in rows.items():
        assert f"{name:12s} {row['status']}" in printed
    assert max(rows["oracle"]["numbers"]["errors"].values()) < 1e-5
    assert len(rows["oracle"]["numbers"]["bits"]) == 11
    assert rows["trace"]["numbers"]["steps"] == 3
    assert len(rows["train"]["numbers"]["AdamMini"]["losses"]) == 8
    assert rows["train"]["numbers"]["AdamMini"]["peak_active_gib"] > 0


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    status, rows, printed = call(tmp_path, BUDGET="5")
    assert status == 0, printed
    assert {row["line"] for row in rows.values()} == {"no time left"}
    assert len(rows) == 9


@pytest.mark.slow
def test_a_broken_stage_fails_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from titan_adam_mini.check.command import check
    from titan_adam_mini.check.runner import Stage

    file = tmp_path / "check.json"
    stages = [Stage("nonesuch", 60, 1), Stage("environment", 60, 1), Stage("environment", 0.2, 0.1)]
    assert check(stages, "cpu", 1, 200, file, tmp_path) == 1
    broken, good, late = json.loads(file.read_text())["stages"]
    assert broken["status"] == "FAIL" and "No module named 'titan_adam_mini.check.stages.nonesuch'" in broken["line"]
    assert any("ModuleNotFoundError" in line for line in broken["tail"])
    assert good["status"] == "PASS"
    assert late["status"] == "FAIL" and "still running after" in late["line"]
    assert "nonesuch, environment failed" in capsys.readouterr().out


def test_what_a_late_stage_started_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_adam_mini.check import runner

    # Deaf to being asked, and with a child in a session of its own, as torchrun's ranks are.
    code = "trap '' TERM; setsid bash -c 'trap \"\" TERM; echo $$; sleep 60; sleep 61' & sleep 62; sleep 63"
    monkeypatch.setattr(runner, "GRACE", 1.0)
    started = time.monotonic()
    assert runner.execute(["bash", "-c", code], 1.0, tmp_path / "log") is None
    assert time.monotonic() - started < 15
    child = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(process: int) -> bool:
    """Whether it runs: a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def event(category: str, name: str, start: float, length: float, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "pid": 1, "tid": 1, **more}


def test_a_trace_is_read() -> None:
    from titan_adam_mini.check.stages.trace import Trace, shared

    trace = Trace(
        [
            event("user_annotation", "step", 0, 100),
            event("gpu_user_annotation", "step", 50, 100, tid=7),
            event("cuda_runtime", "cudaLaunchKernel", 10, 1, args={"correlation": 1}),
            event("cuda_driver", "cuLaunchKernelEx", 20, 1, args={"correlation": 2}),
            event("cuda_runtime", "cudaMemcpyAsync", 30, 1, args={"correlation": 3}),
            event("cuda_runtime", "cudaStreamSynchronize", 31, 1, args={"correlation": 4}),
            event("cuda_runtime", "cudaEventSynchronize", 32, 1, tid=2, args={"correlation": 5}),
            event("cuda_runtime", "cudaStreamWaitEvent", 33, 1, args={"correlation": 6}),
            event("cuda_runtime", "cudaDeviceSynchronize", 120, 1, args={"correlation": 7}),
            event("kernel", "a", 60, 10, args={"correlation": 1}),
            event("kernel", "b", 70, 10, args={"correlation": 2}),
            event("kernel", "c", 90, 10, args={"correlation": 99}),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 80, 5, args={"correlation": 3}),
        ]
    )
    assert [one["name"] for one in trace.work("step", "kernel")] == ["a", "b"]
    assert trace.waits("step") == ["cudaStreamSynchronize", "Memcpy DtoH (Device -> Pageable)"]
    assert trace.device("kernel") == 3
    assert shared([(0, 10), (20, 30)], [(5, 25)]) == 10


def test_what_a_step_must_not_do() -> None:
    from titan_adam_mini.check.stages.steady import faults

    good = {
        "error": "",
        "grown": {"a": 0},
        "compiled": 0,
        "kernels": 3.0,
        "kernels_of_three": 3.0,
        "waits": [],
        "calls": 3,
    }
    assert faults(good) == []
    for change, said in (
        ({"error": "called a synchronizing CUDA operation"}, "synchronizing"),
        ({"grown": {"segment.all.allocated": 2}}, "segment.all.allocated grew by 2"),
        ({"compiled": 1}, "1 kernels compiled"),
        ({"kernels": 291.0}, "3 kernels for 3 tensors, 291 for 291"),
        ({"waits": ["cudaStreamSynchronize"]}, "waits: cudaStreamSynchronize"),
        ({"kernels": 0.0, "kernels_of_three": 0.0}, "saw no kernel"),
    ):
        (fault,) = faults({**good, **change})
        assert said in fault


def test_the_291_tensors_are_llama_3s() -> None:
    from titan_adam_mini import Partition
    from titan_adam_mini.check.tensors import THREE, shapes

    found = Partition.transformer(n_heads=8, n_kv_heads=2).assign(shapes())
    assert len(found) == 291
    assert [found[name].role for name in THREE] == ["norm", "query", "neuron"]


def test_the_sizes_are_torchtitans() -> None:
    import torch
    from torchtitan.models.llama3 import Transformer, llama3_args

    from titan_adam_mini.check import flavor
    from titan_adam_mini.check.sizes import SIZES, fitting

    for size in SIZES:
        with torch.device("meta"):
            model = Transformer(llama3_args[flavor.PREFIX + size.name])
        matrices = sum(param.numel() for param in model.parameters() if param.dim() > 1)
        assert matrices == size.parameters
    fits = {(gib, ranks): fitting(gib * 2**30, ranks, 2048)[0].name for gib in (16, 40, 78, 141) for ranks in (1, 8)}
    assert fits[78, 1] == "3B" and fits[78, 8] == "8B" and fits[16, 1] == "0.5B"


def test_a_trainers_log_is_read_and_judged(tmp_path: Path) -> None:
    from titan_adam_mini.check.stages.train import faults
    from titan_adam_mini.check.trainer import measurements
    from titan_adam_mini.tools.trainer import Run

    lines = []
    for step, loss in ((1, 8.0), (2, 4.0)):
        lines.append(f"[rank0]:[titan] - root - INFO - peak active: {20 + step}.5000GiB reserved: 30.0000GiB")
        tail = f"grad_norm:  0.{step}255  memory: 30.00GiB(2.70%)  tps: 1,584  tflops: 0.01  mfu: 0.00%"
        lines.append(f"[rank0]:[titan] - root - INFO - step:  {step}  loss:  {loss}  {tail}")
    log = tmp_path / "log"
    log.write_text("\n".join(lines))
    adamw = measurements(Run.load(log, 2))
    assert adamw["losses"] == [8.0, 4.0] and adamw["tokens_per_second"] == 3168
    assert adamw["peak_active_gib"] == 22.5 and adamw["grad_norms"] == [0.1255, 0.2255]
    assert faults(adamw, {**adamw, "peak_active_gib": 20.0}, 2, True) == []
    assert "peak is not lower" in faults(adamw, adamw, 2, True)[0]
    assert faults(adamw, adamw, 2, False) == []
    assert "within 10%" in faults(adamw, {**adamw, "losses": [8.0, 4.5]}, 2, False)[0]
    assert len(faults(adamw, {**adamw, "losses": [8.0, float("nan")]}, 2, False)) == 2
