"""All private torch names that this package uses; another version of torch may lack them.

``from titan_adam_mini.private import NAME`` imports the module that defines the name, on demand. tests/test_private.py
reports those that the installed torch lacks.
"""

from importlib import import_module
from typing import Any

MODULES = {
    "_MEM_FORMAT_ENCODING": "torch.distributed.checkpoint.metadata",
    "_MemRefType": "torch.distributed._tools.mem_tracker",
    "_FSDPRefType": "torch.distributed._tools.fsdp2_mem_tracker",
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
    "_TOTAL_KEY": "torch.distributed._tools.mem_tracker",
    "_compute_local_shape_and_global_offset": "torch.distributed.tensor._utils",
    "_create_file_view": "torch.distributed.checkpoint.utils",
    "_get_available_device_type": "torch._utils",
    "_get_default_store": "torch.distributed.distributed_c10d",
    "_get_layout": "torch.serialization",
    "FSDPMemTracker": "torch.distributed._tools.fsdp2_mem_tracker",
    "FakeStore": "torch.testing._internal.distributed.fake_pg",
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    "MemTracker": "torch.distributed._tools.mem_tracker",
    "TorchDispatchMode": "torch.utils._python_dispatch",
    "active_fake_mode": "torch._guards",
    "flatten_state_dict": "torch.distributed.checkpoint._nested_dict",
    "tree_map_only": "torch.utils._pytree",
}
"""Name -> the torch module that defines it."""

ATTRIBUTES = {
    "torch:_disable_dynamo": "steps that are not traced",
    "torch:_foreach_add_": "sums of columns",
    "torch.cuda.memory:_record_memory_history": "memory snapshots, as torchtitan takes them",
    "torch.cuda.memory:_snapshot": "names of tensors in memory snapshots",
    "torch.distributed:ProcessGroup._device_types": "the devices that a process group reduces on",
    "torch.distributed.fsdp:FSDPModule._get_fsdp_state": "FSDP's groups of parameters",
    "torch.distributed.tensor:DTensor._local_tensor": "this rank's part of a DTensor, without waiting for it",
    "torch.distributed.tensor:DTensor._spec": "whether a gradient is laid out as in the step before",
    "torch.distributed.tensor._sharding_prop:detect_fake_mode": "shapes under a fake mode of their own",
    "torch.distributed._tools.fsdp2_mem_tracker:FSDPMemTracker._fsdp_param_group_post_backward": "microbatches",
    "torch.distributed._tools.fsdp2_mem_tracker:FSDPMemTracker._fsdp_state_pre_forward": "microbatches",
    "torch.distributed._tools.mem_tracker:MemTracker._pre_fw_hook": "microbatches",
    "torch.distributed._tools.mem_tracker:MemTracker._track": "temporaries of the optimizer's step",
    "torch.distributed._tools.mem_tracker:MemTracker._update_and_maybe_create_winfos": "temporaries of the step",
    "torch.distributed._tools.mem_tracker:MemTracker._update_peak_stats": "a peak for each phase of a step",
}
"""Other private attributes in use: "module:name" or "module:class.name" -> purpose."""

SET_ON_INSTANCES = {
    "torch.optim:Optimizer._optimizer_load_state_dict_pre_hooks": "hooks of users around load_state_dict",
    "torch.optim:Optimizer._optimizer_load_state_dict_post_hooks": "hooks of users around load_state_dict",
    "torch.optim.lr_scheduler:LRScheduler._last_lr": "the configuration's learning rate in place of a checkpoint's",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._fsdp_param_group": "FSDP's groups of parameters",
}
"""The same for attributes of instances."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = MODULES[name]
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        from torch import __version__

        raise ImportError(
            f"torch {__version__} has no {module}.{name}, which titan-adam-mini uses: install torch 2.11 to 2.13"
        ) from None
