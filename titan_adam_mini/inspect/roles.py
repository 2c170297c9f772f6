"""A `roles` table that changes the roles of some parameters of a model and of no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..partition import Rule, collapse
from ..partition.rules import Index


def roles_table(wanted: Mapping[str, str], present: Mapping[str, str]) -> dict[str, str]:
    """Pattern -> role, to be tried in this order before all other rules.

    A pattern's `*` matches dots too, and a pattern also matches longer names that end in it (`norm.weight`). So one
    pattern is used for several parameters only if it matches no others; else the names are written out.

    Args:
        wanted: parameter -> its new role.
        present: parameter -> its present role, for the whole model.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, role in wanted.items():
        groups.setdefault((collapse(name), role), []).append(name)
    table: dict[str, str] = {}
    written_out: dict[str, str] = {}
    for (_, role), names in groups.items():
        for patterns in _spellings(names):
            if set(_matches(patterns, present)) == set(names):
                table |= dict.fromkeys(patterns, role)
                break
        else:
            written_out |= dict.fromkeys(names, role)
    # Longer names that end in a written-out name come before it, with their present role.
    placed = {*_matches(list(table), present), *written_out}
    written_out |= {name: present[name] for name in _matches(list(written_out), present) if name not in placed}
    return table | dict(sorted(written_out.items(), key=lambda item: -item[0].count(".")))


def _spellings(names: Sequence[str]) -> Iterator[list[str]]:
    """Patterns for names that differ in their numbers, the shortest first."""
    yield [collapse(names[0])]
    yield list(dict.fromkeys(_digits(name) for name in names))
    yield list(names)


def _digits(name: str) -> str:
    """The name with every digit of its numbers as `[0-9]`."""
    return ".".join("[0-9]" * len(part) if part.isdecimal() else part for part in name.split("."))


def _matches(patterns: Sequence[str], names: Mapping[str, str]) -> list[str]:
    index = Index([Rule(pattern, "tensor") for pattern in patterns])
    return [name for name in names if index.matching(name)]
