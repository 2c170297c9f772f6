"""Partition: parameter names and shapes -> roles -> blocks and decay. Ordered rules; the first match wins.

Independent of devices, processes and sharding: shapes are global, everything is strings and integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from titan_adam_mini.layout import BlockLayout
from titan_adam_mini.partition import messages as _messages
from titan_adam_mini.partition import roles as _roles
from titan_adam_mini.partition.geometry import Geometry
from titan_adam_mini.partition.orientation import Orientation
from titan_adam_mini.partition.roles import ROLES, SECOND_MOMENTS, VALUE_BLOCKS
from titan_adam_mini.partition.rules import TRANSFORMER, Index, Rule, clean_name, collapse, matches

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

_OVERRIDES = {
    _roles.CHANNELS: "queries and keys, whatever their role below, by rows; outputs of attention and MLPs by columns",
    _roles.FACTORED: "every matrix, whatever its role below, by its rows and columns",
}
"""How a `second_moment` changes the blocks of the rules."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of one parameter.

    Attributes:
        name: its name without wrapper prefixes.
        shape: its global shape.
        role: its role in the model (see ROLES).
        layout: its blocks, one second moment each.
        decay: whether weight decay applies.
        pattern: the pattern of the rule that assigned its role.
        factors: for a factored second moment, the layouts of the columns and of the full matrix: an element's second
            moment is its row's times its column's, divided by the full matrix's. Else empty.
        factored: whether it has the blocks of the role "factored", regardless of its own role.
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
        """The layouts of all grids of second moments."""
        return (self.layout, *self.factors)

    @property
    def second_moments(self) -> int:
        """Number of second moments."""
        return sum(layout.num_blocks for layout in self.layouts)


@dataclass(frozen=True)
class Row:
    """Parameters that differ only in the numbers in their names, such as one weight of every layer."""

    pattern: str
    shape: tuple[int, ...]
    role: str
    layout: BlockLayout
    factors: tuple[BlockLayout, ...]
    decay: bool
    names: tuple[str, ...]

    @property
    def second_moments(self) -> int:
        """Number of second moments of each parameter."""
        return sum(layout.num_blocks for layout in (self.layout, *self.factors))

    @property
    def cuts(self) -> str:
        """The blocks as text: the tiles of every dim, or rows and columns if factored."""
        if not self.factors:
            return str(self.layout)
        *stack, rows, columns = self.shape
        return f"{''.join(f'{size} x ' for size in stack)}{rows} rows times {columns} columns"


@dataclass(frozen=True)
class Partition:
    """Ordered rules from a parameter's name to its role, and the model's attention heads.

    Build one with `transformer`, `from_config` or `per_tensor`. Immutable; print it to see the rules.
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
                f"second_moment='channels' cannot be combined with value_blocks={self.value_blocks!r}, since it has "
                "one second moment per row of values: leave one of them out"
            )
        for rule in self.rules:
            _roles.find(rule.role)
        if isinstance(self.undecayed, str):
            raise ValueError(f"undecayed must be a list of patterns and roles: write [{self.undecayed!r}]")
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
        """The blocks of arXiv 2406.16793, Algorithm 3, for transformers whose parameter names are in `rules.py`.

        Args:
            geometry: the heads of the model and of models inside it; `n_heads`, `n_kv_heads`, `head_dim` override its
                fields.
            value_blocks: "neuron", one block per row of a value projection, or "tensor", one for the entire projection.
            roles: pattern -> role (see ROLES), tried in order before the built-in rules.
            undecayed: patterns and names of roles; parameters that match one are not decayed. A role matches if
                `roles` or the built-in rules assign it.
            second_moment: "blocks"; "channels": rows of matrices that read the residual stream, columns of those that
                write to it, instead of heads and rows (see `roles.by_channel`); or "factored": every matrix as the role
                "factored". Parameters matched by `roles` keep the blocks of that role.

        Raises ValueError for a number that is not positive and for an unknown role, value_blocks or second_moment.
        """
        numbers: dict[str, Any] = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
        geometry = replace(geometry or Geometry(), **{k: v for k, v in numbers.items() if v is not None})
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
        """`transformer`, with the heads read from torchtitan model args or a Hugging Face config (or a dict).

        In a config of several models (`text_config`, `vision_config`, ...) each has its own heads; see `Geometry.of`.
        """
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
        """A copy whose custom roles are replaced by these, pattern -> role."""
        custom = tuple(Rule(pattern, role, custom=True) for pattern, role in roles.items())
        return replace(self, rules=custom + tuple(rule for rule in self.rules if not rule.custom))

    def assign(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        partial: bool = False,
        others: Mapping[str, Sequence[int]] | None = None,
    ) -> dict[str, Blocks]:
        """The blocks of every parameter, by name and in the order of `shapes`.

        Args:
            shapes: parameter name -> global shape. Wrapper prefixes (`_orig_mod.`, ...) in names are ignored.
            partial: whether `shapes` and `others` are only some of the model's parameters (one pipeline stage, one
                group), so that a custom pattern that matches none of them is no error; check with `unused` instead.
            others: parameters of the same model that need no blocks, such as frozen ones. They need no role, but
                patterns may match them, and they help to decide between [out, in] and [in, out].

        Raises ValueError, with the reason and a fix, for parameters without a role, a shape that does not fit its role,
        head counts that do not divide the rows or give heads of different sizes, and a custom pattern that matches
        nothing.
        """
        sizes = {given: tuple(shape) for given, shape in shapes.items()}
        context = {clean_name(given): tuple(shape) for given, shape in {**(others or {}), **sizes}.items()}
        if not partial and (unused := self.unused(context)):
            raise ValueError(_messages.unused(unused, context))
        index = Index(self.rules)
        cleaned = {given: clean_name(given) for given in shapes}
        rules = {given: self._rules(index, name, len(sizes[given])) for given, name in cleaned.items()}
        if unknown := {cleaned[given]: sizes[given] for given, fitting in rules.items() if not fitting}:
            raise ValueError(_unknown_message(index, unknown))
        orientation = Orientation(context)
        assigned = {
            given: self._blocks(name, sizes[given], rules[given], orientation) for given, name in cleaned.items()
        }
        self._check_heads(assigned.values())
        return assigned

    def unused(self, names: Iterable[str]) -> list[str]:
        """The custom patterns (of `roles` and `undecayed`) that match none of these names."""
        cleaned = [clean_name(name) for name in names]
        patterns = [rule.pattern for rule in self.rules if rule.custom]
        patterns += [entry for entry in self.undecayed if not _roles.known(entry)]
        return [pattern for pattern in patterns if not any(matches(pattern, name) for name in cleaned)]

    @staticmethod
    def _rules(index: Index, name: str, dims: int) -> list[Rule]:
        """The first matching rule, and the first built-in one; built-in rules must also fit the number of dims."""
        rules = [rule for rule in index.matching(name) if rule.custom or dims in _roles.find(rule.role)[0].dims]
        return [*rules[:1], *[rule for rule in rules if not rule.custom][:1]]

    def _blocks(self, name: str, shape: tuple[int, ...], rules: Sequence[Rule], orientation: Orientation) -> Blocks:
        rule, (part, geometry) = rules[0], self.geometry.part_of(name)
        try:
            role = rule.role + _roles.TRANSPOSED * orientation.transposed(rule, name)
            if self.second_moment == _roles.CHANNELS and not rule.custom:
                role = _roles.by_channel(role, rule.writes)
            factored = role == _roles.FACTORED
            if self.second_moment == _roles.FACTORED and not rule.custom:
                factored |= _roles.find(role)[0].matrix and len(shape) in (2, 3)
            layout = _roles.layout(
                _roles.FACTORED if factored else role, shape, _roles.Model(geometry, self.value_blocks)
            )
            factors = _roles.factors(shape) if factored else ()
        except ValueError as error:
            where = f" of part {part!r} (see Geometry.parts)" if part else ""
            if self.geometry.parts and not part:
                where = f" in none of the model's parts ({', '.join(self.geometry.parts)}; see Geometry.parts)"
            raise ValueError(f"parameter {name} of shape {shape}, role {rule.role}{where}: {error}") from None
        return Blocks(name, shape, role, layout, self._decays(name, rules), rule.pattern, factors, factored)

    def _decays(self, name: str, rules: Iterable[Rule]) -> bool:
        roles = {rule.role.removesuffix(_roles.TRANSPOSED) for rule in rules}
        return not any(entry in roles if _roles.known(entry) else matches(entry, name) for entry in self.undecayed)

    def _check_heads(self, assigned: Iterable[Blocks]) -> None:
        """Check that head sizes derived from head counts agree within a part: queries and keys are multiplied."""
        seen: dict[str, dict[int, Blocks]] = {}
        for blocks in assigned:
            role = blocks.role.removesuffix(_roles.TRANSPOSED)
            part, geometry = self.geometry.part_of(blocks.name)
            if role in _roles.HEADED and not blocks.factored and geometry.qk_head_dim is None:
                outputs = blocks.layout.dims[0 if role == blocks.role else -1]
                for _, length in outputs.runs[:1]:
                    seen.setdefault(part, {}).setdefault(length, blocks)
        for sizes in seen.values():
            if len(sizes) > 1:
                found = ", ".join(f"{size} rows in {blocks.name} {blocks.shape}" for size, blocks in sizes.items())
                raise ValueError(
                    f"the number of heads gives heads of different sizes: {found}. Pass n_kv_heads if keys have fewer "
                    "heads than queries, or head_dim; parameters whose heads do differ need a role 'rows:N' with N "
                    "rows per head, and models inside the model are given as Geometry(parts={...})"
                )

    def __str__(self) -> str:
        lines = [f"Partition: {self.geometry}; values by {self.value_blocks}; the first rule that matches wins"]
        if overrides := _OVERRIDES.get(self.second_moment):
            lines.append(f"  {overrides}; custom roles keep their blocks")
        for (role, custom), rules in groupby(self.rules, key=lambda rule: (rule.role, rule.custom)):
            patterns = "  ".join(rule.pattern for rule in rules)
            lines.append(f"  {role}{' (custom)' if custom else ''}: {_roles.find(role)[0].blocks}\n      {patterns}")
        lines.append(f"  without decay: {'  '.join(self.undecayed) or 'none'}")
        return "\n".join(lines)


def summarize(blocks: Iterable[Blocks]) -> list[Row]:
    """One row for all blocks that differ only in the numbers in their names, in order of appearance."""
    rows: dict[tuple[str, tuple[int, ...], str, BlockLayout, tuple[BlockLayout, ...], bool], list[str]] = {}
    for b in blocks:
        rows.setdefault((collapse(b.name), b.shape, b.role, b.layout, b.factors, b.decay), []).append(b.name)
    return [Row(*key, tuple(names)) for key, names in rows.items()]


def _unknown_message(index: Index, unknown: Mapping[str, tuple[int, ...]]) -> str:
    """The error for unmatched parameters: matrix names with vector shapes are flattened slices; others need a role."""
    matrices = {
        name: [rule.role for rule in index.matching(name) if _roles.find(rule.role)[0].dims.start > 1]
        for name, shape in unknown.items()
        if len(shape) < 2
    }
    if slices := {name: unknown[name] for name, roles in matrices.items() if roles}:
        return _messages.flattened(slices, matrices[next(iter(slices))][0])
    return _messages.unknown(unknown)
