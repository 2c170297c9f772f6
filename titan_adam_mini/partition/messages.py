"""The sentences of errors about parameters that have no role, and about patterns that match nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from titan_adam_mini.partition import roles as _roles
from titan_adam_mini.partition.rules import collapse

_SHOWN = 5
_ATTENTION = re.compile(r"(?:^|[._])(?:q\w*|k|kv\w*|keys?|c?attn|in_proj\w*|to_k)(?=[._]|$)")
"""Names of what may make queries or keys, which have one block per head."""


def proposal(name: str, shape: Sequence[int]) -> str:
    """A role that fits the shape and that nothing in the name speaks against; "" where several roles are likely.

    A vector gets elementwise blocks, AdamW's: right for every vector, even for a slice of something else.
    """
    dims = len(shape)
    role = {0: "bias", 1: "bias", 2: "neuron", 4: "convolution", 5: "convolution"}.get(dims, "")
    return "" if dims > 1 and _ATTENTION.search(name) else role


def unknown(parameters: Mapping[str, tuple[int, ...]]) -> str:
    """No rule knows these: name -> shape."""
    proposals: dict[str, set[str]] = {}
    for name, shape in parameters.items():
        proposals.setdefault(collapse(name), set()).add(proposal(name, shape) or "...")
    wanted = {pattern: roles.pop() if len(roles) == 1 else "..." for pattern, roles in list(proposals.items())[:_SHOWN]}
    open_ones = [pattern for pattern, role in wanted.items() if role == "..."]
    python = ", ".join(f'"{pattern}": "{role}"' for pattern, role in wanted.items())
    toml = ", ".join(f'"{pattern}" = "{role}"' for pattern, role in wanted.items())
    meanings = "\n".join(f"  {role}: {blocks}" for role, blocks in _roles.ROLES.items())
    return (
        f"no rule knows {_count(parameters)}, and no role is assumed:\n{_list(parameters)}\n"
        f"Give them their roles, in Python:\n"
        f"  Partition.transformer(..., roles={{{python}}})\n"
        f"or in TOML:\n  [optimizer.adam_mini]\n  roles = {{{toml}}}\n"
        "The roles in these lines fit the shapes; check that they fit the model. Queries and keys, for example, have "
        "one block per head, and a matrix stored [in, out] takes .T after its role.\n"
        + (f"Name and shape leave the role of {', '.join(open_ones)} open.\n" if open_ones else "")
        + f"Roles and their blocks:\n{meanings}"
    )


def flattened(parameters: Mapping[str, tuple[int, ...]], role: str) -> str:
    """These have names of matrices and shapes of vectors; `role` is that of the first name."""
    name, shape = next(iter(parameters.items()))
    return (
        f"{_count(parameters)} with the name of a matrix (role {role} for {name}) and the shape of a vector, {shape}:\n"
        f"{_list(parameters)}\n"
        "These are not whole parameters but flattened slices, as FSDP1 and DeepSpeed ZeRO make them, and a slice does "
        "not show where its blocks begin and end. Shard the model with FSDP2 (torch.distributed.fsdp.fully_shard), "
        "which keeps the shape of every parameter"
    )


def unused(patterns: Sequence[str], names: Iterable[str]) -> str:
    """These patterns match none of the names."""
    known = list(dict.fromkeys(collapse(name) for name in names))
    sentences = []
    for pattern in patterns:
        near = get_close_matches(collapse(pattern), known, n=3, cutoff=0.4) or known[:3]
        sentences.append(f"pattern {pattern!r} matches no parameter; similar names are {', '.join(near)}")
    return "; ".join(sentences)


def _count(parameters: Mapping[str, tuple[int, ...]]) -> str:
    return f"{len(parameters)} parameter{'s' * (len(parameters) != 1)}"


def _list(parameters: Mapping[str, tuple[int, ...]]) -> str:
    lines = [f"  {name} {shape}" for name, shape in list(parameters.items())[:_SHOWN]]
    return "\n".join([*lines, f"  and {len(parameters) - _SHOWN} more"] if len(parameters) > _SHOWN else lines)
