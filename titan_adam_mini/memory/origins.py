"""The category of an allocation, from its call site if that is known, else from the functions on its stack."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

Frames = Sequence[Mapping[str, Any]]
"""A stack of calls as torch records it, innermost first: `filename`, `line`, `name`."""

OTHER = "other"

# category, pattern of a file, pattern of a function: the first row that any frame of a stack matches. More specific
# callers come first: a forward pass calls FSDP, whose hooks call collectives.
_TABLE = (
    (
        "optimizer state",
        r"/titan_adam_mini/(momentum|state)\.py$",
        r"^(new_state|empty_momentum|adopt|_placed|follow_parameter)$",
    ),
    ("optimizer state", r"/torch/optim/\w+\.py$", r"^_init_group$"),
    ("temporaries", r"/titan_adam_mini/(optimizer|exchange/\w+|kernels/\w+)\.py$", r""),
    ("temporaries", r"/torch/optim/\w+\.py$", r""),
    ("temporaries", r"", r"^clip_grad_norm_$"),
    ("gradients", r"/_fsdp_param\.py$", r"^to_accumulated_grad_if_needed$"),
    ("all-gather", r"/_fsdp_param\.py$", r"all_gather_(in|out)puts$|^(alloc_storage|init_unsharded_param)$"),
    ("all-gather", r"/_fsdp_collectives\.py$", r"all_gather"),
    ("reduce-scatter", r"/_fsdp_collectives\.py$", r"^foreach_reduce"),
    ("parameters", r"/_fsdp_param\.py$", r"^(_init_sharded_param|reset_sharded_param)$"),
    ("parameters", r"/torch/nn/modules/module\.py$", r"^(to_empty|_apply)$"),
    ("activations", r"/torch/utils/checkpoint\.py$", r"^(recompute_fn|unpack_hook\w*)$"),
    ("temporaries", r"", r"torch::autograd::Engine::"),
    ("temporaries", r"/torch/autograd/\w+\.py$", r"backward"),
    ("activations", r"/torch/nn/modules/module\.py$", r"^_call_impl$"),
    ("activations", r"/torchtitan/", r"^forward_backward_step$"),
)
_ROWS = tuple((re.compile(file), re.compile(function)) for _, file, function in _TABLE)


class Origins:
    """Maps stacks to categories; learns call sites from allocations whose category is known.

    FSDP allocates the buffers of a reduce-scatter and the gradients in one function, on different lines; tensors whose
    category is known by their address show which line allocates which.

    Args:
        known: (frames, category) of allocations whose category is known. A call site with two categories is ignored.
    """

    def __init__(self, known: Iterable[tuple[Frames, str]]) -> None:
        seen: dict[tuple[Any, ...], set[str]] = {}
        for frames, category in known:
            seen.setdefault(_site(frames), set()).add(category)
        seen.pop((), None)  # autograd's own thread has no Python frames
        self._sites = {site: min(categories) for site, categories in seen.items() if len(categories) == 1}

    def of(self, frames: Frames) -> str:
        """The category of an allocation with this stack."""
        if (category := self._sites.get(_site(frames))) is not None:
            return category
        row = min((_row(frame["filename"], frame["name"]) for frame in frames), default=len(_ROWS))
        return _TABLE[row][0] if row < len(_ROWS) else OTHER


def _site(frames: Frames) -> tuple[Any, ...]:
    """The Python part of a stack."""
    return tuple(
        (frame["filename"], frame["line"], frame["name"]) for frame in frames if frame["filename"].endswith(".py")
    )


@lru_cache(1 << 16)
def _row(filename: str, name: str) -> int:
    """The number of the first row that a frame matches; one past the last if none."""
    path = filename.replace("\\", "/")
    matches = (number for number, (file, function) in enumerate(_ROWS) if file.search(path) and function.search(name))
    return next(matches, len(_ROWS))
