"""Partition: parameter names and shapes -> roles -> blocks and decay. Ordered rules; the first match wins.

Knows nothing of devices, processes or sharding: shapes are global, everything is strings and integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import groupby
from typing import Any

from titan_adam_mini.layout import BlockLayout
from titan_adam_mini.partition import roles as _roles
from titan_adam_mini.partition.geometry import Geometry
from titan_adam_mini.partition.orientation import Orientation
from titan_adam_mini.partition.roles import ROLES, SECOND_MOMENTS, VALUE_BLOCKS
from titan_adam_mini.partition.rules import TRANSFORMER, Index, Rule, clean_name, fits

__all__ = [
    "ROLES",
    "SECOND_MOMENTS",
    "VALUE_BLOCKS",
    "Blocks",
    "Geometry",
    "Partition",
    "Row",
    "Rule",
    "clean_name",
    "collapse",
    "summarize",
]

_SHOWN = 5
_INSTEAD = {
    _roles.CHANNELS: "queries and keys, whatever their role below, by rows; outputs of attention and MLPs by columns",
    _roles.FACTORED: "every matrix, whatever its role below, by its rows and columns",
}
"""What is said of a `second_moment` that is not that of the rules."""


@dataclass(frozen=True)
class Blocks:
    """How one parameter is cut.

    Attributes:
        name: the cleaned one.
        shape: the global one.
        role: what the parameter is.
        layout: its blocks, one second moment each.
        decay: does weight decay apply?
        pattern: the rule that said so.
        factors: the columns and the whole, where the second moment of an element is that of its block (a row) times
            that of its column over that of the whole; else nothing.
        factored: it is cut as the role "factored", whatever its own.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    layout: BlockLayout
    decay: bool
    pattern: str
    factors: tuple[BlockLayout, ...] = ()
    factored: bool = False

    @property
    def layouts(self) -> tuple[BlockLayout, ...]:
        """All grids of second moments."""
        return (self.layout, *self.factors)

    @property
    def second_moments(self) -> int:
        """How many there are."""
        return sum(layout.num_blocks for layout in self.layouts)


@dataclass(frozen=True)
class Row:
    """Parameters that are alike but for the numbers in their names, such as one weight of every layer."""

    pattern: str
    shape: tuple[int, ...]
    role: str
    layout: BlockLayout
    factors: tuple[BlockLayout, ...]
    decay: bool
    names: tuple[str, ...]

    @property
    def second_moments(self) -> int:
        """How many each of them has."""
        return sum(layout.num_blocks for layout in (self.layout, *self.factors))

    @property
    def cuts(self) -> str:
        """The blocks in a few words: the tiles of every dim, or rows and columns where factored."""
        if not self.factors:
            return str(self.layout)
        *stack, rows, columns = self.shape
        return f"{''.join(f'{size} x ' for size in stack)}{rows} rows times {columns} columns"


@dataclass(frozen=True)
class Partition:
    """Ordered rules from a parameter's name to its role, and what the roles need to know of the model.

    Build one with `transformer`, `from_config` or `per_tensor`. Immutable; print it to read the rules.
    """

    rules: tuple[Rule, ...]
    geometry: Geometry = field(default_factory=Geometry)
    value_blocks: str = "neuron"
    undecayed: Sequence[str] = ()
    second_moment: str = "blocks"

    def __post_init__(self) -> None:
        if self.value_blocks not in VALUE_BLOCKS:
            raise ValueError(f"value_blocks must be one of {', '.join(VALUE_BLOCKS)}, not {self.value_blocks!r}")
        if self.second_moment not in SECOND_MOMENTS:
            raise ValueError(f"second_moment must be one of {', '.join(SECOND_MOMENTS)}, not {self.second_moment!r}")
        if self.second_moment == _roles.CHANNELS and self.value_blocks != "neuron":
            raise ValueError(
                f"second_moment='channels' keeps one per row of values, and value_blocks={self.value_blocks!r} asks "
                "for other blocks: leave one of them out"
            )
        for rule in self.rules:
            _roles.find(rule.role)
        if isinstance(self.undecayed, str):
            raise ValueError(f"undecayed is a list of patterns and roles: write [{self.undecayed!r}]")
        object.__setattr__(self, "undecayed", tuple(self.undecayed))

    @staticmethod
    def transformer(
        geometry: Geometry | None = None,
        *,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_blocks: str = "neuron",
        roles: Mapping[str, str] | None = None,
        undecayed: Sequence[str] = (),
        second_moment: str = "blocks",
    ) -> Partition:
        """The blocks of arXiv 2406.16793, Algorithm 3, for the transformers in `rules.py`.

        Args:
            geometry: the model's heads; `n_heads`, `n_kv_heads`, `head_dim` replace its fields.
            value_blocks: "neuron", one block per row of a value projection, or "tensor", one for all its rows.
            roles: pattern -> role (see ROLES), tried in order before the built-in rules.
            undecayed: patterns, or names of roles, of the parameters without weight decay: the role that `roles` gives
                them, or the one that they would have without.
            second_moment: "blocks"; "channels": rows of matrices that read the residual stream, columns of those that
                write to it, in place of heads and of the latter's rows (see `roles.by_channel`); or "factored": every
                matrix as the role "factored". Parameters that `roles` names keep the blocks of the role given there.

        Raises ValueError for a number that is not positive and for an unknown role, value_blocks or second_moment.
        """
        said = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
        geometry = replace(geometry or Geometry(), **{k: v for k, v in said.items() if v is not None})
        return Partition(TRANSFORMER, geometry, value_blocks, undecayed, second_moment).with_roles(roles or {})

    @staticmethod
    def from_config(
        config: Any,
        *,
        value_blocks: str = "neuron",
        roles: Mapping[str, str] | None = None,
        undecayed: Sequence[str] = (),
        second_moment: str = "blocks",
    ) -> Partition:
        """`transformer`, with the heads read from torchtitan model args or a Hugging Face config (or a dict)."""
        return Partition.transformer(
            Geometry.of(config),
            value_blocks=value_blocks,
            roles=roles,
            undecayed=undecayed,
            second_moment=second_moment,
        )

    @staticmethod
    def per_tensor(undecayed: Sequence[str] = ()) -> Partition:
        """One block per tensor (Algorithm 2 of the paper), for models that are not transformers."""
        return Partition((Rule("*", "tensor"),), undecayed=undecayed)

    def with_roles(self, roles: Mapping[str, str]) -> Partition:
        """The same with these roles, pattern -> role, in place of those that the user gave before."""
        given = tuple(Rule(pattern, role, given=True) for pattern, role in roles.items())
        return replace(self, rules=given + tuple(rule for rule in self.rules if not rule.given))

    def assign(self, shapes: Mapping[str, Sequence[int]], *, partial: bool = False) -> dict[str, Blocks]:
        """The blocks of every parameter, under its name as given and in the order given.

        Args:
            shapes: parameter name -> global shape. Wrappers in names are looked through.
            partial: `shapes` are only some of the model's parameters (one pipeline stage, one group), so a
                pattern of the user's that matches none of them is no error; `unused` then serves to check it.

        Raises ValueError, in words, for parameters without a role, a shape that its role cannot cut, heads that
        do not divide the rows or disagree between parameters, and a user's pattern that matches nothing.
        """
        cleaned = {given: clean_name(given) for given in shapes}
        sizes = {given: tuple(shape) for given, shape in shapes.items()}
        if not partial and (unused := self.unused(sizes)):
            raise ValueError(_unused_message(unused, cleaned.values()))
        index = Index(self.rules)
        found = {given: self._rules(index, name, len(sizes[given])) for given, name in cleaned.items()}
        if unknown := {cleaned[given]: sizes[given] for given, rules in found.items() if not rules}:
            raise ValueError(_unknown_message(unknown))
        model = _roles.Model(self.geometry, self.value_blocks)
        orientation = Orientation({name: sizes[given] for given, name in cleaned.items()})
        assigned = {}
        for given, name in cleaned.items():
            rule, shape = found[given][0], sizes[given]
            try:
                role = rule.role + _roles.TRANSPOSED * orientation.transposed(rule.orientation, name)
                if self.second_moment == _roles.CHANNELS and not rule.given:
                    role = _roles.by_channel(role, rule.writes)
                factored = role == _roles.FACTORED
                if self.second_moment == _roles.FACTORED and not rule.given:
                    factored |= _roles.find(role)[0].matrix and len(shape) in (2, 3)
                layout = _layout(_roles.FACTORED if factored else role, shape, model)
                factors = _roles.factors(shape) if factored else ()
            except ValueError as error:
                raise ValueError(f"parameter {name} of shape {shape}, role {rule.role}: {error}") from None
            decays = self._decays(name, found[given])
            assigned[given] = Blocks(name, shape, role, layout, decays, rule.pattern, factors, factored)
        if self.geometry.qk_head_dim is None:
            _check_heads(assigned.values())
        return assigned

    def unused(self, names: Iterable[str]) -> list[str]:
        """The user's patterns (of `roles` and `undecayed`) that match none of these names."""
        cleaned = [clean_name(name) for name in names]
        patterns = [rule.pattern for rule in self.rules if rule.given]
        patterns += [entry for entry in self.undecayed if not _roles.known(entry)]
        return [pattern for pattern in patterns if not any(fits(pattern, name) for name in cleaned)]

    @staticmethod
    def _rules(index: Index, name: str, dims: int) -> list[Rule]:
        """The first rule that applies, and the first built-in one, which also has to fit the number of dims."""
        rules = [rule for rule in index.matching(name) if rule.given or dims in _roles.find(rule.role)[0].dims]
        return [*rules[:1], *[rule for rule in rules if not rule.given][:1]]

    def _decays(self, name: str, rules: Iterable[Rule]) -> bool:
        roles = {rule.role.removesuffix(_roles.TRANSPOSED) for rule in rules}
        return not any(entry in roles if _roles.known(entry) else fits(entry, name) for entry in self.undecayed)

    def __str__(self) -> str:
        lines = [f"Partition: {self.geometry}; values by {self.value_blocks}; the first rule that matches wins"]
        if told := _INSTEAD.get(self.second_moment):
            lines.append(f"  {told}; roles of yours stay")
        for (role, given), rules in groupby(self.rules, key=lambda rule: (rule.role, rule.given)):
            patterns = "  ".join(rule.pattern for rule in rules)
            lines.append(f"  {role}{' (yours)' if given else ''}: {_roles.find(role)[0].blocks}\n      {patterns}")
        lines.append(f"  without decay: {'  '.join(self.undecayed) or 'none'}")
        return "\n".join(lines)


def summarize(blocks: Iterable[Blocks]) -> list[Row]:
    """Blocks with the numbers in their names collapsed to `*`, alike ones in one row, in order of appearance."""
    rows: dict[tuple[str, tuple[int, ...], str, BlockLayout, tuple[BlockLayout, ...], bool], list[str]] = {}
    for b in blocks:
        rows.setdefault((collapse(b.name), b.shape, b.role, b.layout, b.factors, b.decay), []).append(b.name)
    return [Row(*key, tuple(names)) for key, names in rows.items()]


def _layout(role: str, shape: tuple[int, ...], model: _roles.Model) -> BlockLayout:
    row, turned = _roles.find(role)
    if len(shape) not in row.dims:
        bound = "exactly" if len(row.dims) == 1 else "at least" if len(shape) < row.dims.start else "at most"
        limit = row.dims.start if len(shape) < row.dims.start else row.dims.stop - 1
        raise ValueError(f"this role takes tensors of {bound} {limit} dims, and this one has {len(shape)}")
    return row.layout(shape, model, turned)


def _check_heads(assigned: Iterable[Blocks]) -> None:
    """Head sizes derived from head counts must agree: a query and its key are multiplied with one another."""
    seen: dict[int, Blocks] = {}
    for blocks in assigned:
        role = blocks.role.removesuffix(_roles.TRANSPOSED)
        if role in _roles.HEADED and not blocks.factored:
            outputs = blocks.layout.dims[0 if role == blocks.role else -1]
            for _, length in outputs.runs[:1]:
                seen.setdefault(length, blocks)
    if len(seen) > 1:
        told = ", ".join(f"{size} rows in {blocks.name} {blocks.shape}" for size, blocks in seen.items())
        raise ValueError(
            f"the number of heads makes heads of different sizes: {told}. Pass n_kv_heads if keys have fewer heads "
            "than queries, or head_dim; parameters that really differ take a role such as 'rows:64'"
        )


def collapse(name: str) -> str:
    """The name with its numbers as `*`: what the parameters of all layers share."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _suggestion(dims: int) -> str:
    return {0: "bias", 1: "norm", 2: "neuron", 3: "experts"}.get(dims, "convolution")


def _unknown_message(unknown: Mapping[str, tuple[int, ...]]) -> str:
    shown = [f"  {name} {shape}" for name, shape in list(unknown.items())[:_SHOWN]]
    if len(unknown) > _SHOWN:
        shown.append(f"  and {len(unknown) - _SHOWN} more")
    wanted = dict(list({collapse(name): _suggestion(len(shape)) for name, shape in unknown.items()}.items())[:_SHOWN])
    python = ", ".join(f'"{pattern}": "{role}"' for pattern, role in wanted.items())
    toml = ", ".join(f'"{pattern}" = "{role}"' for pattern, role in wanted.items())
    meanings = "\n".join(f"  {role}: {blocks}" for role, blocks in ROLES.items())
    return (
        f"{len(unknown)} parameter(s) have no role, and none is given one silently:\n"
        + "\n".join(shown)
        + f"\nSay what they are (the roles below are only examples), in Python:\n"
        f"  Partition.transformer(..., roles={{{python}}})\n"
        f"or in TOML:\n  [optimizer.adam_mini]\n  roles = {{{toml}}}\n"
        f"The roles and their blocks (.T after a matrix's role: stored [in, out]):\n{meanings}"
    )


def _unused_message(unused: Sequence[str], names: Iterable[str]) -> str:
    known = list(dict.fromkeys(collapse(name) for name in names))
    told = []
    for pattern in unused:
        near = get_close_matches(collapse(pattern), known, n=3, cutoff=0.4) or known[:3]
        told.append(f"pattern {pattern!r} matches no parameter; names near it are {', '.join(near)}")
    return "; ".join(told)
