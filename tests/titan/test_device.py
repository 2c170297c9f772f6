"""The CPU as torchtitan's device: there where nothing else is, untouched where an accelerator is."""

import sys
from types import ModuleType

import pytest
import torch
import torchtitan.tools.utils as titan_utils
from torch.distributed.fsdp import FSDPModule

from titan_adam_mini.titan import device


@pytest.fixture
def uncured(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """torchtitan as it is imported on a machine without accelerator, and a module that copied its two names."""
    copied = ModuleType("torchtitan.some_module")
    copied.device_type, copied.device_module = "cuda", torch.cuda
    monkeypatch.setitem(sys.modules, copied.__name__, copied)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "torchtitan":
            for attribute, value in (("device_type", "cuda"), ("device_module", torch.cuda)):
                if attribute in vars(module):
                    monkeypatch.setattr(module, attribute, value)
    monkeypatch.setattr(device, "_cpu", None)
    monkeypatch.setattr(torch, "histc", torch.histc)
    return copied


def test_every_copy_of_the_names_is_replaced(uncured: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_accelerator", lambda: False)
    import torchtitan.distributed.utils as dist_utils

    device.install()
    for module in (uncured, titan_utils, dist_utils):
        assert module.device_type == "cpu"
        assert module.device_module is device._cpu


def test_tokens_per_expert_are_counted_from_integers(uncured: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the routers of torchtitan's mixtures of experts call it; the CPU's own histc takes floats only."""
    monkeypatch.setattr(device, "has_accelerator", lambda: False)
    device.install()
    experts = torch.tensor([0, 3, 3, 1, 3])
    assert torch.histc(experts, bins=5, min=0, max=5).tolist() == [1, 1, 0, 3, 0]
    assert torch.histc(experts, bins=5, min=0, max=5).dtype == torch.int64
    assert torch.histc(experts.float(), bins=2).tolist() == [2.0, 3.0]


def test_nothing_happens_where_an_accelerator_is(
    uncured: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "has_accelerator", lambda: True)
    with caplog.at_level("INFO"):
        device.install()
    assert uncured.device_type == titan_utils.device_type == "cuda"
    assert uncured.device_module is titan_utils.device_module is torch.cuda
    assert not caplog.records

    class Part(torch.nn.Module):
        def modules(self) -> list[torch.nn.Module]:  # type: ignore[override]
            raise AssertionError("a model part was looked at")

    device.prepare_model_parts([Part()])


def test_installed_and_logged_once(
    uncured: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "has_accelerator", lambda: False)
    with caplog.at_level("INFO"):
        device.install()
        first = device._cpu
        device.install()
    assert device._cpu is first
    assert len(caplog.records) == 1


def test_the_device_answers_what_torchtitan_asks() -> None:
    cpu = device.CpuDevice()
    assert cpu.current_device() == 0
    assert cpu.get_device_name("cpu:0") == "CPU"
    stats = cpu.memory_stats()
    assert 0 < stats["reserved_bytes.all.peak"] <= cpu.get_device_properties().total_memory
    cpu.reset_peak_memory_stats()
    cpu.empty_cache()
    cpu.set_device("cpu:1")  # the rest is torch.cpu
    cpu.synchronize()


def test_fsdp_sums_plainly_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Sharded(torch.nn.Linear, FSDPModule):
        # FSDPModule makes instances through fully_shard only.
        def __new__(cls) -> "Sharded":
            return object.__new__(cls)

        def __init__(self) -> None:
            torch.nn.Linear.__init__(self, 2, 2)

        def set_force_sum_reduction_for_comms(self, enable: bool) -> None:
            calls.append(enable)

    monkeypatch.setattr(device, "_cpu", device.CpuDevice())
    device.prepare_model_parts([torch.nn.Sequential(Sharded(), torch.nn.Linear(2, 2), Sharded())])
    assert calls == [True, True]
