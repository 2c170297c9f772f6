"""A `roles` table that gives some parameters of a model a role, and leaves all others as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..partition import Rule, collapse
from ..partition.rules import Index


def roles_table(wanted: Mapping[str, str], present: Mapping[str, str]) -> dict[str, str]:
    """Pattern -> role, to be tried in this order before all other rules.

    A pattern's `*` runs over dots, and a name is also the end of longer ones (`norm.weight`): so a pattern stands for
    many parameters only where it fits no other, and else they are written out.

    Args:
        wanted: parameter -> the role it is to have.
        present: parameter -> the role whose blocks it has now, for all of the model.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for name, role in wanted.items():
        alike.setdefault((collapse(name), role), []).append(name)
    table: dict[str, str] = {}
    written_out: dict[str, str] = {}
    for (_, role), names in alike.items():
        for patterns in _spellings(names):
            if set(_fitting(patterns, present)) == set(names):
                table |= dict.fromkeys(patterns, role)
                break
        else:
            written_out |= dict.fromkeys(names, role)
    # Longer names that end in one that is written out come before it, with the role that they have.
    placed = {*_fitting(list(table), present), *written_out}
    written_out |= {name: present[name] for name in _fitting(list(written_out), present) if name not in placed}
    return table | dict(sorted(written_out.items(), key=lambda one: -one[0].count(".")))


def _spellings(names: Sequence[str]) -> Iterator[list[str]]:
    """Patterns for names that differ in their numbers, the shortest first."""
    yield [collapse(names[0])]
    yield list(dict.fromkeys(_digits(name) for name in names))
    yield list(names)


def _digits(name: str) -> str:
    """The name with its numbers as any of so many digits."""
    return ".".join("[0-9]" * len(part) if part.isdecimal() else part for part in name.split("."))


def _fitting(patterns: Sequence[str], names: Mapping[str, str]) -> list[str]:
    index = Index([Rule(pattern, "tensor") for pattern in patterns])
    return [name for name in names if index.matching(name)]
