"""torch's own memory trackers, with the categories of this package and a peak for each phase of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..private import _TOTAL_KEY, FSDPMemTracker, MemTracker, _FSDPRefType, _MemRefType

CATEGORIES = {
    _FSDPRefType.SHARDED_PARAM: "parameters",
    _FSDPRefType.SHARDED_GRAD: "gradients",
    _FSDPRefType.OPT: "optimizer state",
    _FSDPRefType.ACT: "activations",
    _FSDPRefType.UNSHARDED_PARAM: "all-gather",
    _FSDPRefType.ALL_GATHER: "all-gather",
    _FSDPRefType.UNSHARDED_GRAD: "reduce-scatter",
    _FSDPRefType.REDUCE_SCATTER: "reduce-scatter",
    _FSDPRefType.TEMP: "temporaries",
    _FSDPRefType.BUFFER: "other",
    _FSDPRefType.INP: "other",
    _MemRefType.PARAM: "parameters",
    _MemRefType.GRAD: "gradients",
    _MemRefType.OPT: "optimizer state",
    _MemRefType.ACT: "activations",
    _MemRefType.TEMP: "temporaries",
    _MemRefType.BUFFER: "other",
    _MemRefType.OTH: "other",
}
"""torch's reference type -> category. Gathered parameters count as all-gather, and unsharded gradients that wait to be
reduced as reduce-scatter: both belong to FSDP and live for a layer or two."""


class _Phases:
    """Mixin for both trackers: one peak at a time, and temporaries of the optimizer's step that are not state.

    torch's trackers count all tensors of a step as optimizer state, and record a peak of every module, which takes half
    the time of a simulation and is not needed here.
    """

    stepping = False
    _marking = False

    def restart(self: Any) -> None:
        """Reset the peak to the memory in use now."""
        self._peak_mem_snap = self.get_tracker_snapshot()
        self._peak_mem = {device: snap[_TOTAL_KEY] for device, snap in self._peak_mem_snap.items()}

    def mark_state(self: Any, tensors: Iterable[Tensor]) -> None:
        """Record tensors as optimizer state."""
        self._marking = True
        for tensor in tensors:
            self._update_and_maybe_create_winfos(tensor, self._ref_class.OPT)
        self._marking = False

    def memory(self: Any, when: str = "current") -> dict[str, int]:
        """Bytes by category, "current" or at the "peak"."""
        sizes = dict.fromkeys(CATEGORIES.values(), 0)
        for snap in self.get_tracker_snapshot(when).values():
            for kind, size in snap.items():
                if kind != _TOTAL_KEY:
                    sizes[CATEGORIES[kind]] += size
        return sizes

    def _update_and_maybe_create_winfos(self: Any, t: Tensor, reftype: Any, update_existing: bool = False) -> Any:
        return super()._update_and_maybe_create_winfos(t, self._kind(reftype), update_existing)  # type: ignore[misc]

    def _track(self: Any, reftype: Any, t: Tensor) -> None:
        super()._track(self._kind(reftype), t)  # type: ignore[misc]

    def __torch_dispatch__(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.stepping and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # the step number, which implementations that are not fused read from the (fake) `step` tensor
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[misc]

    def _kind(self: Any, reftype: Any) -> Any:
        temporary = self.stepping and not self._marking and reftype in (self._ref_class.ACT, self._ref_class.OPT)
        return self._ref_class.TEMP if temporary else reftype

    def _update_peak_stats(self: Any, peak_state: Any) -> None:
        for device, snap in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < snap[_TOTAL_KEY]:
                self._peak_mem[device] = snap[_TOTAL_KEY]
                self._peak_mem_snap[device] = dict(snap)


class _Sharded(_Phases, FSDPMemTracker):
    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__(parts[0])
        self._root_mod = nn.ModuleList(parts)

    def _fsdp_state_pre_forward(self, fsdp_mod: Any, orig_fsdp_state_pre_fw: Any) -> Any:
        inner = super()._fsdp_state_pre_forward(fsdp_mod, orig_fsdp_state_pre_fw)

        def every_time(*args: Any, **kwargs: Any) -> Any:
            if not self._mod_tracker.is_bw:  # torch's tracker allows one microbatch only
                self.memory_tracking.pop(fsdp_mod, None)
            return inner(*args, **kwargs)

        return every_time

    def _fsdp_param_group_post_backward(self, fsdp_mod: Any, orig_fsdp_param_group_post_backward: Any) -> Any:
        inner = super()._fsdp_param_group_post_backward(fsdp_mod, orig_fsdp_param_group_post_backward)

        def with_accumulated(*args: Any, **kwargs: Any) -> None:
            inner(*args, **kwargs)
            group = fsdp_mod._get_fsdp_state()._fsdp_param_group
            for fsdp_param in group.fsdp_params if group else []:
                grad = fsdp_param.unsharded_accumulated_grad
                if grad is not None:  # a pipeline reduces once, after its last microbatch
                    self._update_and_maybe_create_winfos(grad, _FSDPRefType.UNSHARDED_GRAD)

        return with_accumulated


class _Unsharded(_Phases, MemTracker):
    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.track_external(*parts)

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        if not self._mod_tracker.is_bw:
            self.memory_tracking.pop(module, None)
        super()._pre_fw_hook(module, inputs)


def tracker_of(parts: Sequence[nn.Module]) -> Any:
    """The tracker that fits the parallelised parts of a model: torch's FSDPMemTracker, or MemTracker without FSDP."""
    return _Sharded(parts) if all(isinstance(part, FSDPModule) for part in parts) else _Unsharded(parts)


def separate_fake_mode() -> Any:
    """A context in which DTensor propagates shapes under its own fake mode.

    It does so on tensors of the global shape, which no rank has. The trackers ignore them only in a mode that is not
    theirs; otherwise clipping alone would count the full model's gradients.
    """
    return patch("torch.distributed.tensor._sharding_prop.detect_fake_mode", return_value=None)


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every state tensor of an optimizer."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
