"""Error messages for parameters without a role, and for patterns that match nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from titan_adam_mini.partition import roles as _roles
from titan_adam_mini.partition.rules import collapse

_SHOWN = 5
_ATTENTION = re.compile(r"(?:^|[._])(?:q\w*|k|kv\w*|keys?|c?attn|in_proj\w*|to_k)(?=[._]|$)")
"""Names of possible query or key projections, which have one block per head."""


def proposal(name: str, shape: Sequence[int]) -> str:
    """A role that fits the shape and does not contradict the name; "" if several roles are likely.

    A vector gets elementwise blocks, as in AdamW: correct for every vector, even for a slice of another parameter.
    """
    dims = len(shape)
    role = {0: "bias", 1: "bias", 2: "neuron", 4: "convolution", 5: "convolution"}.get(dims, "")
    return "" if dims > 1 and _ATTENTION.search(name) else role


def unknown(parameters: Mapping[str, tuple[int, ...]]) -> str:
    """The error for parameters that no rule matches: name -> shape."""
    proposals: dict[str, set[str]] = {}
    for name, shape in parameters.items():
        proposals.setdefault(collapse(name), set()).add(proposal(name, shape) or "...")
    wanted = {pattern: roles.pop() if len(roles) == 1 else "..." for pattern, roles in list(proposals.items())[:_SHOWN]}
    undecided = [pattern for pattern, role in wanted.items() if role == "..."]
    python = ", ".join(f'"{pattern}": "{role}"' for pattern, role in wanted.items())
    toml = ", ".join(f'"{pattern}" = "{role}"' for pattern, role in wanted.items())
    meanings = "\n".join(f"  {role}: {blocks}" for role, blocks in _roles.ROLES.items())
    return (
        f"no rule matches {_count(parameters)}, and there is no default role:\n{_list(parameters)}\n"
        f"Give them roles, in Python:\n"
        f"  Partition.transformer(..., roles={{{python}}})\n"
        f"or in TOML:\n  [optimizer.adam_mini]\n  roles = {{{toml}}}\n"
        "These roles fit the shapes; check that they fit the model. Queries and keys, for example, have one block per "
        "head, and a matrix stored [in, out] needs .T after its role.\n"
        + (f"The role of {', '.join(undecided)} cannot be inferred from name and shape.\n" if undecided else "")
        + f"Roles and their blocks:\n{meanings}"
    )


def flattened(parameters: Mapping[str, tuple[int, ...]], role: str) -> str:
    """The error for parameters with matrix names but vector shapes; `role` is that of the first one."""
    name, shape = next(iter(parameters.items()))
    return (
        f"{_count(parameters)} with the name of a matrix (role {role} for {name}) but the shape of a vector, {shape}:\n"
        f"{_list(parameters)}\n"
        "These are not full parameters but flattened slices, as made by FSDP1 and DeepSpeed ZeRO, and the blocks of a "
        "slice are unknown. Shard the model with FSDP2 (torch.distributed.fsdp.fully_shard), "
        "which keeps the shape of every parameter"
    )


def unused(patterns: Sequence[str], names: Iterable[str]) -> str:
    """The error for patterns that match none of the names."""
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
