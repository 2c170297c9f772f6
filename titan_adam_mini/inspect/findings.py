"""The results of an inspection: losses per parameter, per pattern of names and of the whole model, and suggestions.

`Inspection.facts` has the keys of the JSON. Ratios that are infinite are null there, with noise 0; noise, ratios and
`best` are null for parameters that never had a gradient; `rms_ratio` and `distance`, about AdamW's last update, are
null if the update is unknown.

    config, model, source   the command's configuration, its model, and where the second moments come from
    candidates  names, the partition's own first
    parameters  [{name, pattern, shape, step, elements (with v > 0), candidates: {name: {role, layout, entries, noise,
                snr, block_snr, rms_ratio, distance}}}]
    patterns    the same for all parameters of a pattern together, with `parameters` (how many), `entries` and `budget`
                (see `estimates.budget`) of them all, `best` (the candidate with the highest snr within the budget) and
                `suggested` (a role, or null); the pattern that loses most comes first
    configured  the partition's second_moment
    settings    {name: {entries, below, snr, pattern, rms_ratio, distance}}: the whole model with each second_moment,
                and with the suggested "roles"; how many patterns are below the threshold, the lowest ratio and its
                pattern
    refused     {second_moment: why it is incompatible with the partition}
    roles       the suggested table for [optimizer.adam_mini], with the configured roles; empty without suggestions
    second_moment           the one equivalent to `roles`, or null
    threshold, factor       a role is suggested if the default's snr is below `threshold` and another role's is at least
                            `factor` times the default's
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
"""SlimAdam's threshold: below it the deviation of v within blocks is larger than its mean. SlimAdam applies it to
`block_snr`, the plain mean of the blocks' ratios; here it applies to `snr`, which a few uneven blocks pull down, and so
is mostly stricter."""
FACTOR = 2.0
ROLES = "roles"
"""The name of the suggested setting."""

Layouts = tuple[BlockLayout, ...]


@dataclass(frozen=True)
class Pattern:
    """Parameters whose names differ only in their numbers.

    Attributes:
        pattern, shape: their name with `*` for numbers, and their shape.
        names: of the parameters.
        estimates: candidate -> its estimate for each of them.
        losses: candidate -> its loss on all of them together.
    """

    pattern: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    estimates: Mapping[str, Estimate]
    losses: Mapping[str, Loss]

    @property
    def default(self) -> Loss:
        """The loss of the partition's own blocks."""
        return self.losses[DEFAULT]

    @property
    def best(self) -> str | None:
        """The candidate with the highest ratio within the budget (see `estimates.budget`); of equals the smallest, the
        default first. None if there never was a gradient."""
        if not self.default.known:
            return None
        most = budget(self.shape)
        allowed = [name for name, estimate in self.estimates.items() if name == DEFAULT or estimate.entries <= most]
        return max(allowed, key=lambda name: (self.losses[name].snr, -self.losses[name].entries))

    @property
    def chosen(self) -> str:
        """The best candidate if it is clearly better than the default (see the head of this file), else the default."""
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
    """A setting of [optimizer.adam_mini], for the whole model.

    Attributes:
        estimates: parameter -> estimate.
        losses: its loss on each pattern, in the order of `Inspection.patterns`.
    """

    estimates: Mapping[str, Estimate]
    losses: tuple[tuple[Pattern, Loss], ...]

    @property
    def total(self) -> Loss:
        """Its loss on all parameters together."""
        return sum((loss for _, loss in self.losses), Loss())

    @property
    def below(self) -> int:
        """The number of patterns with a ratio below the threshold."""
        return sum(loss.snr < THRESHOLD for _, loss in self.losses)

    @property
    def lowest(self) -> tuple[Pattern, Loss]:
        """The pattern with the lowest ratio, and its loss."""
        return min(self.losses, key=lambda pair: pair[1].snr)

    @property
    def layouts(self) -> dict[str, Layouts]:
        """The blocks of every parameter."""
        return {name: estimate.layouts for name, estimate in self.estimates.items()}


@dataclass(frozen=True)
class Inspection:
    """The losses of a model's parameters under every candidate, and with every `second_moment`.

    Attributes:
        partition: the default.
        steps: parameter -> step of its optimizer.
        estimates: parameter -> candidate -> estimate.
        options: `second_moment` -> parameter -> estimate.
        refused: `second_moment` -> why it is incompatible with the partition.
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
            name: {candidate: self.measured[name][estimate.layouts] for candidate, estimate in found.items()}
            for name, found in self.estimates.items()
        }

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: candidates[DEFAULT].layouts[0].shape for name, candidates in self.estimates.items()}

    @cached_property
    def patterns(self) -> list[Pattern]:
        """All patterns; the one that loses most with the default first."""
        found = []
        for row in summarize(self.partition.assign(self._shapes).values()):
            first = self.estimates[row.names[0]]
            losses = {name: sum((self.losses[param][name] for param in row.names), Loss()) for name in first}
            found.append(Pattern(row.pattern, row.shape, row.names, first, losses))
        return sorted(found, key=lambda pattern: pattern.default.snr)

    @property
    def without_gradient(self) -> dict[str, int]:
        """Pattern -> number of its parameters that never had a gradient, if there are any."""
        return dict(Counter(collapse(name) for name, losses in self.losses.items() if not losses[DEFAULT].known))

    @property
    def candidates(self) -> list[str]:
        """The default, and the candidates that cut any parameter differently."""
        other = {name for all in self.estimates.values() for name in all if all[name].layouts != all[DEFAULT].layouts}
        return [DEFAULT, *(name for name in CANDIDATES if name in other)]

    @cached_property
    def roles(self) -> dict[str, str]:
        """Pattern -> role for [optimizer.adam_mini]: the suggested roles, then the configured ones; empty without
        suggestions."""
        suggested = {
            name: pattern.suggested for pattern in self.patterns for name in pattern.names if pattern.suggested
        }
        new = roles_table(suggested, {name: candidates[DEFAULT].role for name, candidates in self.estimates.items()})
        configured = {rule.pattern: rule.role for rule in self.partition.rules if rule.custom}
        return new | {pattern: role for pattern, role in configured.items() if pattern not in new} if new else {}

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """Every `second_moment` that is compatible with the partition, and the suggested roles, if there are any."""
        found = {option: self._setting(chosen) for option, chosen in self.options.items()}
        if self.roles:
            chosen = {name: self.estimates[name][pattern.chosen] for pattern in self.patterns for name in pattern.names}
            found[ROLES] = self._setting(chosen)
        return found

    def _setting(self, chosen: Mapping[str, Estimate]) -> Setting:
        def loss(pattern: Pattern) -> Loss:
            return sum((self.measured[name][chosen[name].layouts] for name in pattern.names), Loss())

        return Setting(chosen, tuple((pattern, loss(pattern)) for pattern in self.patterns))

    @property
    def second_moment(self) -> str | None:
        """The `second_moment` with the same blocks as the suggested roles, if there is one."""
        if not self.roles:
            return None
        suggested = self.settings[ROLES].layouts
        return next((option for option in self.options if self.settings[option].layouts == suggested), None)

    @property
    def best_option(self) -> str:
        """The `second_moment` whose last update would have been nearest to AdamW's; if the update is unknown, the one
        with the least total noise. To three digits; of equals the configured one, then the smallest."""

        def rank(option: str) -> tuple[float, bool, int]:
            total = self.settings[option].total
            loss = total.noise if total.distance is None else total.distance
            return round(loss, 3), option != self.partition.second_moment, total.entries

        return min(self.options, key=rank)

    @property
    def undecayed(self) -> list[str]:
        """Patterns of the parameters that would lose weight decay by the suggested roles, because of `undecayed`."""
        if not self.roles:
            return []
        after = self.partition.with_roles(self.roles).assign(self._shapes)
        before = self.partition.assign(self._shapes)
        return list(dict.fromkeys(collapse(name) for name in before if before[name].decay and not after[name].decay))

    def facts(self) -> dict[str, Any]:
        """All results for JSON; see the head of this file."""
        patterns = self.patterns
        pattern_of = {name: pattern.pattern for pattern in patterns for name in pattern.names}
        return {
            "candidates": self.candidates,
            "threshold": THRESHOLD,
            "factor": FACTOR,
            "parameters": [
                {"name": name, "pattern": pattern_of[name], "shape": list(candidates[DEFAULT].layouts[0].shape)}
                | {"step": self.steps[name], "elements": self.losses[name][DEFAULT].elements}
                | {"candidates": _candidates(candidates, self.losses[name])}
                for name, candidates in self.estimates.items()
            ],
            "patterns": [
                {"pattern": pattern.pattern, "shape": list(pattern.shape), "parameters": len(pattern.names)}
                | {"elements": pattern.default.elements, "budget": len(pattern.names) * budget(pattern.shape)}
                | {"best": pattern.best, "suggested": pattern.suggested}
                | {"candidates": _candidates(pattern.estimates, pattern.losses)}
                for pattern in patterns
            ],
            "configured": self.partition.second_moment,
            "settings": {name: _summary(one) for name, one in self.settings.items()},
            "refused": dict(self.refused),
            "roles": self.roles,
            "second_moment": self.second_moment,
        }


def _candidates(estimates: Mapping[str, Estimate], losses: Mapping[str, Loss]) -> dict[str, Any]:
    return {
        name: {
            "role": estimate.role,
            "layout": " and ".join(map(str, estimate.layouts)),
            "entries": losses[name].entries,
        }
        | {"noise": losses[name].noise if losses[name].known else None}
        | {"snr": _finite(losses[name].snr), "block_snr": _finite(losses[name].block_snr)}
        | {"rms_ratio": losses[name].rms_ratio, "distance": losses[name].distance}
        for name, estimate in estimates.items()
    }


def _summary(setting: Setting) -> dict[str, Any]:
    total, (pattern, lowest) = setting.total, setting.lowest
    return {
        "entries": total.entries,
        "below": setting.below,
        "snr": _finite(lowest.snr),
        "pattern": pattern.pattern,
        "rms_ratio": total.rms_ratio,
        "distance": total.distance,
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
    """Measure the loss of every candidate on each parameter, one after the other and `window` elements at a time.

    Args:
        moments: AdamW's state of all parameters of the model, such as `moments_of(model, optimizer)`.
        partition: the default, such as `Partition.from_config(config)`.
        on_parameter: called with the name of each finished parameter.

    Raises:
        ValueError: the partition cannot cut a parameter, or second moments are not finite.
    """
    by_name = {clean_name(one.name): one for one in moments}
    shapes = {name: one.shape for name, one in by_name.items()}
    candidates = estimates(partition, shapes)
    compatible, refused = options(partition, shapes)
    measured = {}
    for name, one in by_name.items():
        compared = dict(candidates[name])
        compared |= {f"second_moment = {option}": chosen[name] for option, chosen in compatible.items()}
        losses = measure(one, compared, window)
        measured[name] = {compared[key].layouts: loss for key, loss in losses.items()}
        on_parameter(name)
    steps = {name: one.step for name, one in by_name.items()}
    return Inspection(partition, steps, candidates, compatible, refused, measured)
