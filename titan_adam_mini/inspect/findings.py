"""What the losses say: per parameter, per pattern of names, and which roles would lose less.

`Inspection.facts` are the keys of the JSON. Ratios that are infinite are null there, their noise is 0; `rms_ratio` and
`distance` are null where nothing is known of updates.

    config, model, source   what the command was given, and its model
    candidates  names, the partition's own first
    parameters  [{name, pattern, shape, step, candidates: {name: {role, layout, entries, noise, snr, block_snr,
                rms_ratio, distance}}}]
    patterns    the same for all parameters of a pattern together, with `parameters` (how many), `entries` and `budget`
                (rows + columns + 1) of them all, `best` (the candidate with the highest snr within the budget) and
                `suggested` (a role, or null); most is lost in the first
    roles       the suggested table for [optimizer.adam_mini], those that the configuration has among it
    threshold, factor   a role is suggested where the default's snr is below the one, and another's so many times it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

from ..partition import Partition, clean_name, summarize
from ..partition.roles import TRANSPOSED, known
from .estimates import CANDIDATES, DEFAULT, Estimate, budget, estimates
from .measure import WINDOW, Loss, measure
from .moments import Moments

THRESHOLD = 1.0
"""SlimAdam's: below it the deviation of v within blocks is larger than its mean."""
FACTOR = 2.0


@dataclass(frozen=True)
class Pattern:
    """Parameters that are alike but for the numbers in their names.

    Attributes:
        pattern, shape: their name with `*` for numbers, and their shape.
        names: of the parameters.
        estimates: candidate -> how it cuts each of them.
        losses: candidate -> what it loses on all of them together.
    """

    pattern: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    estimates: Mapping[str, Estimate]
    losses: Mapping[str, Loss]

    @property
    def default(self) -> Loss:
        """What the partition's own blocks lose."""
        return self.losses[DEFAULT]

    @property
    def best(self) -> str:
        """The candidate with the highest ratio at no more second moments than rows + columns + 1; of equals the
        smallest, the default first."""
        allowed = budget(self.shape)
        within = [name for name, one in self.estimates.items() if name == DEFAULT or one.entries <= allowed]
        return max(within, key=lambda name: (self.losses[name].snr, -self.losses[name].entries))

    @property
    def suggested(self) -> str | None:
        """The role that is clearly better than the default, if there is one: see the head of this file."""
        default, allowed = self.default, budget(self.shape)
        better = {
            one.role: self.losses[name]
            for name, one in self.estimates.items()
            if known(one.role.removesuffix(TRANSPOSED)) and one.entries <= allowed
        }
        role = max(better, key=lambda role: (better[role].snr, -better[role].entries), default=None)
        if role is None or default.snr >= THRESHOLD or better[role].snr < FACTOR * default.snr:
            return None
        return role


@dataclass(frozen=True)
class Inspection:
    """The losses of a model's parameters under every candidate.

    Attributes:
        partition: the default.
        steps: parameter -> step of its optimizer.
        estimates, losses: parameter -> candidate -> estimate, loss.
    """

    partition: Partition
    steps: Mapping[str, float]
    estimates: Mapping[str, Mapping[str, Estimate]]
    losses: Mapping[str, Mapping[str, Loss]]

    @cached_property
    def patterns(self) -> list[Pattern]:
        """All patterns; the one that loses most under the default first."""
        shapes = {name: one[DEFAULT].layouts[0].shape for name, one in self.estimates.items()}
        rows = summarize(self.partition.assign(shapes).values())
        found = []
        for row in rows:
            first = self.estimates[row.names[0]]
            losses = {name: sum((self.losses[one][name] for one in row.names), Loss()) for name in first}
            found.append(Pattern(row.pattern, row.shape, row.names, first, losses))
        return sorted(found, key=lambda one: one.default.snr)

    @property
    def candidates(self) -> list[str]:
        """The default, and those that cut any parameter in another way."""
        other = {name for all in self.estimates.values() for name in all if all[name].layouts != all[DEFAULT].layouts}
        return [DEFAULT, *(name for name in CANDIDATES if name in other)]

    @property
    def roles(self) -> dict[str, str]:
        """Pattern -> role for [optimizer.adam_mini]: what is suggested, then what the configuration has already; empty
        if nothing is suggested."""
        wanted: dict[str, set[str | None]] = {}
        for one in self.patterns:
            wanted.setdefault(one.pattern, set()).add(one.suggested)
        # A pattern may stand for several shapes, which then have to agree.
        new = {pattern: role for pattern, (role, *others) in wanted.items() if role is not None and not others}
        given = {rule.pattern: rule.role for rule in self.partition.rules if rule.given}
        return {**new, **{pattern: role for pattern, role in given.items() if pattern not in new}} if new else {}

    def facts(self) -> dict[str, Any]:
        """Everything, as JSON takes it; see the head of this file."""
        patterns = self.patterns
        pattern_of = {name: one.pattern for one in patterns for name in one.names}
        return {
            "candidates": self.candidates,
            "threshold": THRESHOLD,
            "factor": FACTOR,
            "parameters": [
                {"name": name, "pattern": pattern_of[name], "shape": list(one[DEFAULT].layouts[0].shape)}
                | {"step": self.steps[name], "candidates": _told(one, self.losses[name])}
                for name, one in self.estimates.items()
            ],
            "patterns": [
                {"pattern": one.pattern, "shape": list(one.shape), "parameters": len(one.names)}
                | {"budget": len(one.names) * budget(one.shape), "best": one.best, "suggested": one.suggested}
                | {"candidates": _told(one.estimates, one.losses)}
                for one in patterns
            ],
            "roles": self.roles,
        }


def _told(estimates: Mapping[str, Estimate], losses: Mapping[str, Loss]) -> dict[str, Any]:
    return {
        name: {"role": one.role, "layout": " and ".join(map(str, one.layouts)), "entries": losses[name].entries}
        | {"noise": losses[name].noise, "snr": _finite(losses[name].snr), "block_snr": _finite(losses[name].block_snr)}
        | {"rms_ratio": losses[name].rms_ratio, "distance": losses[name].distance}
        for name, one in estimates.items()
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def inspect(
    moments: Iterable[Moments],
    partition: Partition,
    *,
    window: int = WINDOW,
    on_parameter: Callable[[str], None] = lambda name: None,
) -> Inspection:
    """Measure what every candidate loses on each parameter, one after the other and `window` elements at a time.

    Args:
        moments: AdamW's state of all parameters of the model, such as `moments_of(model, optimizer)`.
        partition: the default, such as `Partition.from_config(config)`.
        on_parameter: called with the name of each parameter that is done.

    Raises:
        ValueError: the partition cannot cut a parameter, or second moments are not finite.
    """
    given = {clean_name(one.name): one for one in moments}
    found = estimates(partition, {name: one.shape for name, one in given.items()})
    losses = {}
    for name, one in given.items():
        losses[name] = measure(one, found[name], window)
        on_parameter(name)
    return Inspection(partition, {name: one.step for name, one in given.items()}, found, losses)
