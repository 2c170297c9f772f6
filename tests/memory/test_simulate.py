"""The simulation of a step, held against the peaks of real memory and against the plan's arithmetic."""

import json
from pathlib import Path

import pytest
from measured_step import measured

from titan_adam_mini.memory.peaks import _simulate
from titan_adam_mini.tools.isolated_process import in_isolated_process

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "train_configs" / "debug_model.toml")
SMALL = ["--job.config_file", CONFIG, "--training.seq_len", "128", "--training.local_batch_size", "4"]
SMALL += ["--experimental.custom_import", "small_flavors", "--model.flavor", "two_layers"]
HELD_BY_FAKES = 1 << 17
"""Bytes: scalars that the trackers see and the allocator not, and a copy of AdamMini's exchange."""

INSIDE_KERNELS = 0.02
"""What kernels allocate for themselves (RMSNorm on a CPU, a copy of its input) no simulation sees."""

CASES = {
    "one rank, autocast": (1, []),
    "FSDP2": (4, []),
    "FSDP2, everything recomputed": (4, ["--activation_checkpoint.mode", "full"]),
    "FSDP2, operators recomputed": (4, ["--activation_checkpoint.mode", "selective"]),
    "HSDP, two passes": (
        4,
        ["--parallelism.data_parallel_replicate_degree", "2", "--training.global_batch_size", "32"],
    ),
    "FSDP2 x TP": (4, ["--parallelism.tensor_parallel_degree", "2"]),
    "pipeline": (4, ["--parallelism.pipeline_parallel_degree", "2"]),
    "bfloat16 parameters, int8 momentum": (
        2,
        ["--training.dtype", "bfloat16", "--optimizer.adam_mini.momentum_dtype", "int8"],
    ),
    "foreach": (2, ["--optimizer.implementation", "foreach"]),
}


REPEATED = ("FSDP2", "FSDP2, operators recomputed")
"""Whose parts are in other cases."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name in REPEATED else pytest.mark.slow) for name in CASES]
)
def test_a_simulated_step_has_the_peaks_of_a_real_one(name: str) -> None:
    ngpu, flags = CASES[name]
    arguments = [*SMALL, *flags]
    one = in_isolated_process(_simulate, arguments, ngpu, ngpu - 1, ("AdamW", "AdamMini"), None)
    real = in_isolated_process(measured, arguments, ngpu, ngpu - 1)
    print(name, real, {key: [peak.total for peak in peaks] for key, peaks in one.peaks.items()})
    for optimizer in ("AdamW", "AdamMini"):
        training, step = one.peaks[optimizer]
        state = step.held["optimizer state"]
        assert state == training.held["optimizer state"] == real[optimizer]["state"]
        assert training.total - state == pytest.approx(real["forward and backward"], rel=INSIDE_KERNELS)
        assert step.total == pytest.approx(real[optimizer]["step"], abs=HELD_BY_FAKES)


@pytest.mark.nightly
def test_a_gpu_peaked_where_the_simulation_does() -> None:
    """What the GPU check recorded on one H100: 3.6 billion parameters, compiled there and eager here. The peak
    is parameters, gradients and state, so this says little of activations."""
    stages = json.loads((ROOT / "benchmarks" / "h100" / "gpu_check.json").read_text())["stages"]
    (recorded,) = (stage["numbers"] for stage in stages if stage["name"] == "train")
    words = ["--experimental.custom_import", "titan_adam_mini.check.flavor", "--model.flavor", recorded["flavor"]]
    words += ["--training.seq_len", str(recorded["seq_len"]), "--training.local_batch_size", "1"]
    config = str(ROOT / "train_configs" / "llama3_8b.toml")
    names = ("AdamW", "AdamMini")
    one = in_isolated_process(_simulate, ["--job.config_file", config, *words], 1, 0, names, None)
    for name in names:
        simulated, measured_there = one.peak(name).total / 2**30, recorded[name]["peak_active_gib"]
        print(f"{name}: {simulated:.2f} GiB simulated, {measured_there:.2f} GiB active on the GPU")
        assert simulated == pytest.approx(measured_there, rel=0.005)
