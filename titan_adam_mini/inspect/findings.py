"""What the losses say: per parameter, per pattern of names, for the model as a whole, and what would lose less.

`Inspection.facts` are the keys of the JSON. Ratios that are infinite are null there, their noise is 0; noise, ratios
and `best` are null for parameters that never had a gradient; `rms_ratio` and `distance`, of the last update that AdamW
took, are null where nothing is known of updates.

    config, model, source   what the command was given, and its model
    candidates  names, the partition's own first
    parameters  [{name, pattern, shape, step, elements (with v > 0), candidates: {name: {role, layout, entries, noise,
                snr, block_snr, rms_ratio, distance}}}]
    patterns    the same for all parameters of a pattern together, with `parameters` (how many), `entries` and `budget`
                (see `estimates.budget`) of them all, `best` (the candidate with the highest snr within the budget) and
                `suggested` (a role, or null); most is lost in the first
    configured  the partition's second_moment
    settings    {name: {entries, below, snr, pattern, rms_ratio, distance}}: the whole model with each second_moment,
                and with the suggested "roles"; how many patterns are below the threshold, the lowest ratio, and whose
    refused     {second_moment: why it does not go with the partition}
    roles       the suggested table for [optimizer.adam_mini], those that the configuration has among it; empty if
                nothing is suggested
    second_moment           the one that amounts to the same as `roles`, or null
    threshold, factor       a role is suggested where the default's snr is below the one, and another's so many times it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

from ..layout import BlockLayout
from ..partition import Partition, clean_name, collapse, summarize
from .estimates import CANDIDATES, DEFAULT, Estimate, budget, estimates, options
from .measure import WINDOW, Loss, measure
from .moments import Moments
from .roles import roles_table

THRESHOLD = 1.0
"""SlimAdam's: below it the deviation of v within blocks is larger than its mean. SlimAdam asks it of `block_snr`, the
plain mean of the blocks' ratios; here it is asked of `snr`, which a few uneven blocks pull down: mostly stricter."""
FACTOR = 2.0
ROLES = "roles"
"""The setting that is suggested."""

Layouts = tuple[BlockLayout, ...]


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
    def best(self) -> str | None:
        """The candidate with the highest ratio within the budget (see `estimates.budget`); of equals the smallest, the
        default first. None if there never was a gradient."""
        if not self.default.known:
            return None
        allowed = budget(self.shape)
        within = [name for name, one in self.estimates.items() if name == DEFAULT or one.entries <= allowed]
        return max(within, key=lambda name: (self.losses[name].snr, -self.losses[name].entries))

    @property
    def chosen(self) -> str:
        """The best where it is clearly better than the default: see the head of this file; else the default."""
        best = self.best
        if best is None or self.default.snr >= THRESHOLD or self.losses[best].snr < FACTOR * self.default.snr:
            return DEFAULT
        return best

    @property
    def suggested(self) -> str | None:
        """The role of the chosen candidate, if that is not the default."""
        return None if self.chosen == DEFAULT else self.estimates[self.chosen].role


@dataclass(frozen=True)
class Setting:
    """A way to set [optimizer.adam_mini], for the whole model.

    Attributes:
        estimates: how it cuts each parameter.
        losses: what it loses on each pattern, in the order of `Inspection.patterns`.
    """

    estimates: Mapping[str, Estimate]
    losses: tuple[tuple[Pattern, Loss], ...]

    @property
    def total(self) -> Loss:
        """What it loses on all parameters together."""
        return sum((loss for _, loss in self.losses), Loss())

    @property
    def below(self) -> int:
        """The number of patterns with a ratio below the threshold."""
        return sum(loss.snr < THRESHOLD for _, loss in self.losses)

    @property
    def lowest(self) -> tuple[Pattern, Loss]:
        """Where the ratio is lowest."""
        return min(self.losses, key=lambda one: one[1].snr)

    @property
    def layouts(self) -> dict[str, Layouts]:
        """The blocks of every parameter."""
        return {name: one.layouts for name, one in self.estimates.items()}


@dataclass(frozen=True)
class Inspection:
    """The losses of a model's parameters under every candidate, and with every `second_moment`.

    Attributes:
        partition: the default.
        steps: parameter -> step of its optimizer.
        estimates: parameter -> candidate -> estimate.
        options: `second_moment` -> parameter -> estimate.
        refused: `second_moment` -> why it does not go with the partition.
        measured: parameter -> blocks -> loss.
    """

    partition: Partition
    steps: Mapping[str, float]
    estimates: Mapping[str, Mapping[str, Estimate]]
    options: Mapping[str, Mapping[str, Estimate]]
    refused: Mapping[str, str]
    measured: Mapping[str, Mapping[Layouts, Loss]]

    @cached_property
    def losses(self) -> dict[str, dict[str, Loss]]:
        """Parameter -> candidate -> loss."""
        return {
            name: {candidate: self.measured[name][one.layouts] for candidate, one in found.items()}
            for name, found in self.estimates.items()
        }

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: one[DEFAULT].layouts[0].shape for name, one in self.estimates.items()}

    @cached_property
    def patterns(self) -> list[Pattern]:
        """All patterns; the one that loses most under the default first."""
        found = []
        for row in summarize(self.partition.assign(self._shapes).values()):
            first = self.estimates[row.names[0]]
            losses = {name: sum((self.losses[one][name] for one in row.names), Loss()) for name in first}
            found.append(Pattern(row.pattern, row.shape, row.names, first, losses))
        return sorted(found, key=lambda one: one.default.snr)

    @property
    def without_gradient(self) -> dict[str, int]:
        """Pattern -> number of its parameters that never had a gradient, where there are any."""
        return dict(Counter(collapse(name) for name, one in self.losses.items() if not one[DEFAULT].known))

    @property
    def candidates(self) -> list[str]:
        """The default, and those that cut any parameter in another way."""
        other = {name for all in self.estimates.values() for name in all if all[name].layouts != all[DEFAULT].layouts}
        return [DEFAULT, *(name for name in CANDIDATES if name in other)]

    @cached_property
    def roles(self) -> dict[str, str]:
        """Pattern -> role for [optimizer.adam_mini]: what is suggested, then what the configuration has already; empty
        if nothing is suggested."""
        wanted = {name: one.suggested for one in self.patterns for name in one.names if one.suggested}
        new = roles_table(wanted, {name: one[DEFAULT].role for name, one in self.estimates.items()})
        given = {rule.pattern: rule.role for rule in self.partition.rules if rule.custom}
        return new | {pattern: role for pattern, role in given.items() if pattern not in new} if new else {}

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """Every `second_moment` that goes with the partition, and the suggested roles, if there are any."""
        found = {option: self._setting(cut) for option, cut in self.options.items()}
        if self.roles:
            cut = {name: self.estimates[name][one.chosen] for one in self.patterns for name in one.names}
            found[ROLES] = self._setting(cut)
        return found

    def _setting(self, cut: Mapping[str, Estimate]) -> Setting:
        def lost(one: Pattern) -> Loss:
            return sum((self.measured[name][cut[name].layouts] for name in one.names), Loss())

        return Setting(cut, tuple((one, lost(one)) for one in self.patterns))

    @property
    def second_moment(self) -> str | None:
        """The one with the same blocks as the suggested roles, if there is one."""
        if not self.roles:
            return None
        wanted = self.settings[ROLES].layouts
        return next((option for option in self.options if self.settings[option].layouts == wanted), None)

    @property
    def best_option(self) -> str:
        """The `second_moment` whose last update would have been nearest to AdamW's; where nothing is known of updates,
        the one with the least noise in all. To three digits; of equals the configured one, then the smallest."""

        def lost(option: str) -> tuple[float, bool, int]:
            total = self.settings[option].total
            much = total.noise if total.distance is None else total.distance
            return round(much, 3), option != self.partition.second_moment, total.entries

        return min(self.options, key=lost)

    @property
    def undecayed(self) -> list[str]:
        """Patterns of the parameters that the suggested roles would take weight decay from, as `undecayed` has it."""
        if not self.roles:
            return []
        then = self.partition.with_roles(self.roles).assign(self._shapes)
        now = self.partition.assign(self._shapes)
        return list(dict.fromkeys(collapse(name) for name in now if now[name].decay and not then[name].decay))

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
                | {"step": self.steps[name], "elements": self.losses[name][DEFAULT].elements}
                | {"candidates": _told(one, self.losses[name])}
                for name, one in self.estimates.items()
            ],
            "patterns": [
                {"pattern": one.pattern, "shape": list(one.shape), "parameters": len(one.names)}
                | {"elements": one.default.elements, "budget": len(one.names) * budget(one.shape)}
                | {"best": one.best, "suggested": one.suggested}
                | {"candidates": _told(one.estimates, one.losses)}
                for one in patterns
            ],
            "configured": self.partition.second_moment,
            "settings": {name: _summed(one) for name, one in self.settings.items()},
            "refused": dict(self.refused),
            "roles": self.roles,
            "second_moment": self.second_moment,
        }


def _told(estimates: Mapping[str, Estimate], losses: Mapping[str, Loss]) -> dict[str, Any]:
    return {
        name: {"role": one.role, "layout": " and ".join(map(str, one.layouts)), "entries": losses[name].entries}
        | {"noise": losses[name].noise if losses[name].known else None}
        | {"snr": _finite(losses[name].snr), "block_snr": _finite(losses[name].block_snr)}
        | {"rms_ratio": losses[name].rms_ratio, "distance": losses[name].distance}
        for name, one in estimates.items()
    }


def _summed(setting: Setting) -> dict[str, Any]:
    total, (pattern, lowest) = setting.total, setting.lowest
    told = {"entries": total.entries, "below": setting.below, "snr": _finite(lowest.snr), "pattern": pattern.pattern}
    return told | {"rms_ratio": total.rms_ratio, "distance": total.distance}


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
    shapes = {name: one.shape for name, one in given.items()}
    found = estimates(partition, shapes)
    ready, refused = options(partition, shapes)
    measured = {}
    for name, one in given.items():
        wanted = {**found[name], **{f"second_moment = {option}": cut[name] for option, cut in ready.items()}}
        losses = measure(one, wanted, window)
        measured[name] = {wanted[key].layouts: loss for key, loss in losses.items()}
        on_parameter(name)
    return Inspection(partition, {name: one.step for name, one in given.items()}, found, ready, refused, measured)
