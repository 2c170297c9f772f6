"""torchtitan's memory snapshots say which addresses are parameters, gradients and optimizer state.

What was allocated before recording began has no stack in a snapshot: parameters, and AdamMini's state, which is made
when the optimizer is built. `titan-adam-mini snapshot` goes by what is added here. Nothing else in a file changes, and
nothing happens where `[profiling] enable_memory_snapshot` is off.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torchtitan.tools.profiling as titan_profiling
import torchtitan.tools.utils as titan_utils

from titan_adam_mini.pickles import HELD
from titan_adam_mini.titan.held import held

_MARK = "titan_adam_mini_wraps"
_found = titan_profiling.maybe_enable_memory_snapshot
original = getattr(_found, _MARK, _found)

_container: Any = lambda: None  # noqa: E731


def watch(container: Any) -> Any:
    """Remember the optimizers of this run, with their model parts, without keeping them alive; returns them."""
    global _container
    _container = weakref.ref(container)
    return container


class _Memory:
    """A device's `memory` module whose snapshots say what the run holds."""

    def __init__(self, module: Any, device_type: str) -> None:
        self._module, self._device_type = module, device_type

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _snapshot(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        snapshot: dict[str, Any] = self._module._snapshot(*args, **kwargs)
        if (container := _container()) is None:
            return snapshot
        tensors = [
            (one.address, one.size, one.category) for one in held(container) if one.device.type == self._device_type
        ]
        return {**snapshot, HELD: {"optimizer": type(container.optimizers[0]).__name__, "tensors": tensors}}


class _Device:
    """A device module with such a `memory`."""

    def __init__(self, module: Any, device_type: str) -> None:
        self._module, self.memory = module, _Memory(module.memory, device_type)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextlib.contextmanager
def maybe_enable_memory_snapshot(profiling_config: Any, **where: Any) -> Iterator[Any]:
    """As torchtitan's; what it writes has one key more.

    Raises:
        ValueError: snapshots are asked for on a device whose memory torch does not record.
    """
    found = titan_profiling.device_module
    if profiling_config.enable_memory_snapshot:
        if not hasattr(found, "memory"):
            raise ValueError(
                f"[profiling] enable_memory_snapshot records the allocator of a GPU, and this run is on "
                f"{titan_utils.device_type!r}: set it to false"
            )
        titan_profiling.device_module = _Device(found, titan_utils.device_type)
    try:
        with original(profiling_config, **where) as profiler:
            yield profiler
    finally:
        titan_profiling.device_module = found


setattr(maybe_enable_memory_snapshot, _MARK, original)
