"""The estimates of second moments that are compared: several for each parameter, and one per `second_moment`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ..layout import BlockLayout
from ..partition import SECOND_MOMENTS, Blocks, Partition, Rule
from ..partition.roles import FACTORED, HEADED
from ..partition.rules import TRANSFORMER

Rules = tuple[Rule, ...]
DEFAULT = "default"


def _everywhere(*roles: str) -> Rules:
    """Rules that give any parameter the first of these roles that fits its number of dims."""
    return tuple(Rule("*", role) for role in roles)


CANDIDATES: Mapping[str, Rules] = {
    "heads": tuple(rule for rule in TRANSFORMER if rule.role in HEADED),
    "rows": _everywhere("neuron", "experts", "convolution"),
    "columns": _everywhere("neuron.T", "experts.T"),
    "factored": _everywhere(FACTORED),
    "tensor": _everywhere("tensor"),
    "elementwise": _everywhere("bias"),
}
"""Alternatives to the default: name -> the rules that cut a parameter. They do not apply if no rule fits."""

_REST = Rule("**", "bias")
"""Matches parameters that no other rule fits."""


@dataclass(frozen=True)
class Estimate:
    """The second moments of one parameter from means over blocks.

    Attributes:
        role: the role with these blocks, as named in `roles` of [optimizer.adam_mini].
        layouts: one, or three for a factored estimate: rows, columns, and the whole matrix.
    """

    role: str
    layouts: tuple[BlockLayout, ...]

    @staticmethod
    def of(blocks: Blocks) -> Estimate:
        """The estimate with a parameter's blocks."""
        return Estimate(FACTORED if blocks.factored else blocks.role, blocks.layouts)

    @property
    def blocks(self) -> BlockLayout:
        """The blocks in which the estimate has the exact mean: those of the layout; if factored, whole matrices."""
        return self.layouts[-1]

    @property
    def entries(self) -> int:
        """Number of second moments."""
        return sum(layout.num_blocks for layout in self.layouts)

    @property
    def elementwise(self) -> bool:
        """Whether every element has its own second moment."""
        return all(tiles.is_unit for tiles in self.blocks.dims)


def budget(shape: Sequence[int]) -> int:
    """How many second moments the best alternative may have: rows + columns + 1 per matrix, but fewer than elements;
    for a vector (or a matrix of one row or column) as many as elements."""
    if sum(size > 1 for size in shape) < 2:
        return prod(shape)
    return min(prod(shape[:-2]) * (shape[-2] + shape[-1] + 1), prod(shape) - 1)


def estimates(partition: Partition, shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Estimate]]:
    """Parameter -> candidate -> estimate; the first is that of the partition, `DEFAULT`.

    Raises ValueError if the partition cannot cut a parameter.
    """
    own = partition.assign(shapes)
    found = {name: {DEFAULT: Estimate.of(one)} for name, one in own.items()}
    for candidate, rules in CANDIDATES.items():
        for name, one in _cut(partition, rules, shapes).items():
            found[name][candidate] = Estimate.of(one)
    return found


def options(
    partition: Partition, shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, dict[str, Estimate]], dict[str, str]]:
    """The estimates of every `second_moment`: option -> parameter -> estimate, and option -> reason, for those that are
    incompatible with the partition."""
    found, refused = {}, {}
    for option in SECOND_MOMENTS:
        try:
            blocks = replace(partition, second_moment=option).assign(shapes)
        except ValueError as error:
            refused[option] = str(error)
        else:
            found[option] = {name: Estimate.of(cut) for name, cut in blocks.items()}
    return found, refused


def _cut(partition: Partition, rules: Rules, shapes: Mapping[str, Sequence[int]]) -> dict[str, Blocks]:
    """The blocks of the parameters that the rules fit."""
    try:
        blocks = replace(partition, rules=(*rules, _REST), second_moment="blocks").assign(shapes)
    except ValueError:  # the number of heads is unknown, and the user's roles do not need it
        return {}
    return {name: cut for name, cut in blocks.items() if cut.pattern != _REST.pattern}
