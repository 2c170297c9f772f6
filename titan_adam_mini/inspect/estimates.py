"""The ways to keep fewer second moments that are compared: for each parameter by itself, and one for all of them."""

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
    """The first of these roles that takes the parameter's number of dims."""
    return tuple(Rule("*", role) for role in roles)


CANDIDATES: Mapping[str, Rules] = {
    "heads": tuple(rule for rule in TRANSFORMER if rule.role in HEADED),
    "rows": _everywhere("neuron", "experts", "convolution"),
    "columns": _everywhere("neuron.T", "experts.T"),
    "factored": _everywhere(FACTORED),
    "tensor": _everywhere("tensor"),
    "elementwise": _everywhere("bias"),
}
"""What stands beside the default: name -> the rules that cut a parameter. One that no rule fits is without it."""

_REST = Rule("**", "bias")
"""Takes what no other rule fits."""


@dataclass(frozen=True)
class Estimate:
    """The second moments of one parameter from the means over blocks.

    Attributes:
        role: the one that has these blocks, by its name in `roles` of [optimizer.adam_mini].
        layouts: one, or three of a factored estimate: rows, columns, and the whole.
    """

    role: str
    layouts: tuple[BlockLayout, ...]

    @staticmethod
    def of(blocks: Blocks) -> Estimate:
        """The estimate that a parameter's blocks are."""
        return Estimate(FACTORED if blocks.factored else blocks.role, blocks.layouts)

    @property
    def blocks(self) -> BlockLayout:
        """The blocks in which the estimate has the right mean: those of the layout; factored, whole matrices."""
        return self.layouts[-1]

    @property
    def entries(self) -> int:
        """Number of second moments that are kept."""
        return sum(layout.num_blocks for layout in self.layouts)

    @property
    def elementwise(self) -> bool:
        """Every element has its own."""
        return all(tiles.is_unit for tiles in self.blocks.dims)


def budget(shape: Sequence[int]) -> int:
    """How many second moments the best alternative may have: rows + columns + 1 of every matrix, but fewer than it has
    elements; all of a vector, a matrix of one row or column among them."""
    if sum(size > 1 for size in shape) < 2:
        return prod(shape)
    return min(prod(shape[:-2]) * (shape[-2] + shape[-1] + 1), prod(shape) - 1)


def estimates(partition: Partition, shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Estimate]]:
    """Parameter -> candidate -> estimate; the partition's own is the first, `DEFAULT`.

    Raises ValueError where the partition cannot cut a parameter.
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
    """What every `second_moment` makes of the model: option -> parameter -> estimate, and option -> why not, for those
    that do not go with the partition."""
    found, refused = {}, {}
    for option in SECOND_MOMENTS:
        try:
            blocks = replace(partition, second_moment=option).assign(shapes)
        except ValueError as error:
            refused[option] = str(error)
        else:
            found[option] = {name: Estimate.of(one) for name, one in blocks.items()}
    return found, refused


def _cut(partition: Partition, rules: Rules, shapes: Mapping[str, Sequence[int]]) -> dict[str, Blocks]:
    """The blocks of the parameters that the rules fit."""
    try:
        blocks = replace(partition, rules=(*rules, _REST), second_moment="blocks").assign(shapes)
    except ValueError:  # heads that the model does not tell, where the user's roles do without them
        return {}
    return {name: one for name, one in blocks.items() if one.pattern != _REST.pattern}
