"""The feature "named_snapshots": memory snapshots list the addresses of parameters, gradients and optimizer state.

Memory allocated before recording began has no stack in a snapshot: parameters, and AdamMini's state, which is created
when the optimizer is built. `titan-adam-mini snapshot` uses the list added here. Nothing else in the file changes, and
there is no effect if `[profiling] enable_memory_snapshot` is off.
"""

import weakref
from typing import Any

import torchtitan.tools.profiling as titan_profiling
import torchtitan.tools.utils as titan_utils

from titan_adam_mini.titan.private import attribute
from titan_adam_mini.titan.storages import SNAPSHOT_KEY, storages

_container: Any = lambda: None  # noqa: E731


def watch(container: Any) -> None:
    """Remember the optimizers of this run, with their model parts, without keeping them alive."""
    global _container
    _container = weakref.ref(container)


def install() -> None:
    """Give torchtitan's profiling a device module whose snapshots have the additional key."""
    if type(attribute(titan_profiling, "device_module")).__name__ != _Device.__name__:
        titan_profiling.device_module = _Device()


class _Device:
    """Replaces ``torchtitan.tools.profiling.device_module``: the same, with :class:`_Memory` as its `memory`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(titan_utils.device_module, name)

    @property
    def memory(self) -> Any:
        return _Memory(titan_utils.device_module.memory)


class _Memory:
    """A device's `memory` module whose snapshots list the run's storages."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _snapshot(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        snapshot: dict[str, Any] = self._module._snapshot(*args, **kwargs)
        if (container := _container()) is None:
            return snapshot
        kind = titan_utils.device_type
        tensors = [
            (storage.address, storage.size, storage.category)
            for storage in storages(container)
            if storage.device.type == kind
        ]
        return {**snapshot, SNAPSHOT_KEY: {"optimizer": type(container.optimizers[0]).__name__, "tensors": tensors}}
