"""The feature "named_snapshots": memory snapshots say which addresses are parameters, gradients and optimizer state.

What was allocated before recording began has no stack in a snapshot: parameters, and AdamMini's state, which is made
when the optimizer is built. `titan-adam-mini snapshot` goes by what is added here. Nothing else in a file changes, and
nothing happens where `[profiling] enable_memory_snapshot` is off.
"""

import weakref
from typing import Any

import torchtitan.tools.profiling as titan_profiling
import torchtitan.tools.utils as titan_utils

from titan_adam_mini.titan.held import SNAPSHOT_KEY, held
from titan_adam_mini.titan.private import attribute

_container: Any = lambda: None  # noqa: E731


def watch(container: Any) -> None:
    """Remember the optimizers of this run, with their model parts, without keeping them alive."""
    global _container
    _container = weakref.ref(container)


def install() -> None:
    """Give torchtitan's profiling a device module whose snapshots have one key more."""
    if type(attribute(titan_profiling, "device_module")).__name__ != _Device.__name__:
        titan_profiling.device_module = _Device()


class _Device:
    """In place of ``torchtitan.tools.profiling.device_module``: torchtitan's, with :class:`_Memory` as its `memory`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(titan_utils.device_module, name)

    @property
    def memory(self) -> Any:
        return _Memory(titan_utils.device_module.memory)


class _Memory:
    """A device's `memory` module whose snapshots say what the run holds."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _snapshot(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        snapshot: dict[str, Any] = self._module._snapshot(*args, **kwargs)
        if (container := _container()) is None:
            return snapshot
        kind = titan_utils.device_type
        tensors = [(one.address, one.size, one.category) for one in held(container) if one.device.type == kind]
        return {**snapshot, SNAPSHOT_KEY: {"optimizer": type(container.optimizers[0]).__name__, "tensors": tensors}}
