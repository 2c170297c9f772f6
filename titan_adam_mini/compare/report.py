"""The report of a comparison: findings in sentences, tables, pictures."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_write
from .picture import draw
from .plan import EXTENSIONS, Plan, Run, at_edge
from .record import DEVIATIONS, WINDOW, Record
from .statistics import difference, mean, median
from .tables import perplexity, write_runs, write_steps
from .variants import Variant

if TYPE_CHECKING:
    from .configurations import Compared


@dataclass(frozen=True)
class Report:
    """Writes the report of a comparison.

    Attributes:
        out: the folder.
        command: the command line.
        config: the TOML file.
        plan: the runs of the comparison.
        variants: the variants; the others are compared with the first.
        compared: name -> its configuration.
        ranks: processes of a run.
    """

    out: Path
    command: str
    config: str
    plan: Plan
    variants: Sequence[Variant]
    compared: Mapping[str, Compared]
    ranks: int

    def write(self, records: Mapping[Run, Record], *, pictures: bool = True) -> list[str]:
        """Write all files from the finished runs; returns the findings, a sentence each.

        Raises ValueError, after writing everything but the pictures, if matplotlib is not installed.
        """
        losses = {run: record.final for run, record in records.items()}
        best = {name: self.plan.sweep(name, losses)[1] for name in self.plan.variants}
        chosen = {name: _records_at(records, name, lr, self.plan.seeds) for name, lr in best.items()}
        optimizers = {variant.name: variant.optimizer for variant in self.variants}
        state = {name: compared.state_bytes / compared.parameters for name, compared in self.compared.items()}
        write_runs(self.out / "runs.csv", records, optimizers, state)
        write_steps(self.out / "steps.csv", records)
        findings = [*self._starts(records), *self._verdicts(chosen), *self._edges(losses)]
        missing = self.plan.remaining(losses)
        if missing:
            findings.append(f"Not all runs are finished; missing: {'; '.join(map(str, missing))}.")
        *others, last = self.plan.variants
        title = f"{', '.join(others)}{' and ' if others else ''}{last} on {self._first.model}"
        lines = [
            f"# {title}",
            "",
            *(f"- {finding}" for finding in findings),
            "",
            *self._about(records),
            "",
            "## Variants, at their best learning rates" if self.plan.lrs else "## Variants",
            "",
            *self._table(chosen, best),
            "",
            *self._notes(),
            "",
            "## Runs",
            "",
            *self._runs(records, best),
        ]
        file = self.out / "report.md"
        atomic_write(file, "\n".join(lines) + "\n")
        if pictures:
            drawn = draw(self.out, title, chosen, {name: self._swept(name, losses) for name in best if self.plan.lrs})
            links = [f"![{Path(name).stem}]({name})" for name in drawn]
            atomic_write(file, "\n".join([*lines, "", "## Pictures", "", *links]) + "\n")
        return findings

    @property
    def _first(self) -> Compared:
        return next(iter(self.compared.values()))

    def _swept(self, name: str, losses: Mapping[Run, float]) -> dict[float, float]:
        """Learning rate -> last validation loss of a variant's sweep, as far as it has been run."""
        runs = [Run(name, lr, 0) for lr in self.plan.sweep(name, losses)[0]]
        return {run.lr: losses[run] for run in runs if run in losses}

    # Findings

    def _starts(self, records: Mapping[Run, Record]) -> Iterator[str]:
        """Whether all runs with the same seed had the same loss before any update, to the bit."""
        first: dict[int, dict[float, list[Run]]] = {}
        for run, record in records.items():
            if record.losses:
                first.setdefault(run.seed, {}).setdefault(record.losses[0], []).append(run)
        unequal = {seed: found for seed, found in first.items() if len(found) > 1}
        if first and not unequal:
            losses = ", ".join(f"{next(iter(found))!r} with seed {seed}" for seed, found in sorted(first.items()))
            yield f"Equal starts: the loss of step 1, before any update, is the same to the bit in all runs ({losses})."
        for seed, found in sorted(unequal.items()):
            losses = "; ".join(f"{loss!r} for {', '.join(map(str, runs))}" for loss, runs in found.items())
            yield f"UNEQUAL STARTS with seed {seed}: the loss of step 1, before any update, is {losses}."

    def _verdicts(self, chosen: Mapping[str, Mapping[int, Record]]) -> Iterator[str]:
        first, *others = chosen
        diverged = {name: note for name, records in chosen.items() if (note := _diverged(name, records))}
        mentioned = []
        for name in others:
            found = difference(_finals(chosen[name]), _finals(chosen[first]))
            if found is not None:
                names = [variant for variant in (name, first) if variant in diverged]
                note = f" ({' and '.join(diverged[variant] for variant in names)}, which is left out.)" if names else ""
                yield found.sentence(name, first) + note
                mentioned += names
        yield from (
            f"{note}, which is left out of the means." for name, note in diverged.items() if name not in mentioned
        )

    def _edges(self, losses: Mapping[Run, float]) -> Iterator[str]:
        for name in self.plan.variants:
            swept, best = self.plan.sweep(name, losses)
            if best is None or not self.plan.lrs:
                continue
            if losses[Run(name, best, 0)] == math.inf:
                yield f"{name} diverged at every learning rate from {swept[0]:g} to {swept[-1]:g}."
            elif at_edge(swept, best):
                yield (
                    f"{name} is best at {best:g}, the edge of its learning rates after {EXTENSIONS} extensions: a "
                    "better one may lie beyond."
                )

    # Sections

    def _about(self, records: Mapping[Run, Record]) -> Iterator[str]:
        config = self._first.config
        training, validation = config["training"], config["validation"]
        batch = training["global_batch_size"]
        size = f"{batch} sequences" if batch > 0 else f"{training['local_batch_size']} sequences per data-parallel rank"
        times = f"{validation['steps']} batches" if validation["steps"] > 0 else "all"
        yield f"- model: {self._first.model}, {self._first.parameters:,} parameters"
        yield f"- training: {training['steps']} steps of {size} of {training['seq_len']} tokens, {_data(training)}"
        yield (
            f"- validation: every {validation['freq']} steps on {times} of {validation['local_batch_size']} x "
            f"{validation['seq_len']} tokens of {_data(validation)}, each time on the same documents"
        )
        yield f"- settings, unless a variant overrides them: {_settings(config)}"
        yield f"- ranks: {self.ranks}"
        for key in ("device", "versions", "commit"):
            found: dict[str, list[Run]] = {}
            for run, record in sorted(records.items()):
                found.setdefault(record.made.get(key, "not known"), []).append(run)
            values = [value if len(found) == 1 else f"{value} ({len(runs)} runs)" for value, runs in found.items()]
            if values:
                yield f"- {key}: {'; '.join(values)}"
        yield f"- configuration: {self.config}"
        yield f"- command: `{self.command}`"
        for variant in self.variants:
            if variant.flags or variant.name != variant.optimizer:
                yield f"- {variant.name}: {variant.optimizer}" + (
                    f" with `{shlex.join(variant.flags)}`" if variant.flags else ""
                )

    def _table(self, chosen: Mapping[str, Mapping[int, Record]], best: Mapping[str, float | None]) -> Iterator[str]:
        headings = [
            *("variant", "lr", "seeds", "validation loss", "perplexity", "difference", "standard error", "spikes"),
            *("grad norm, median", "max", "peak GiB, active", "reserved", "tokens/s", "s/step", "state B/param"),
        ]
        rows = []
        first = next(iter(chosen))
        for name, records in chosen.items():
            finals = _finals(records)
            converged = [record for record in records.values() if record.diverged is None]
            loss = mean(finals.values())
            found = None if name == first else difference(finals, _finals(chosen[first]))
            norms = [norm for record in converged for norm in record.columns["grad_norm"]]
            rate = best[name]
            rows.append(
                (
                    name,
                    "" if rate is None else f"{rate:g}",
                    str(len(converged)),
                    _number(loss),
                    _number(perplexity(loss), 3),
                    "" if found is None else f"{found.mean:+.4f}",
                    "" if found is None or found.standard_error is None else f"{found.standard_error:.4f}",
                    str(sum(record.spikes for record in converged)),
                    _number(median(norms), 3),
                    _number(max(norms, default=math.nan), 3),
                    _number(max((record.peak("active_gib") for record in converged), default=math.nan), 3),
                    _number(max((record.peak("reserved_gib") for record in converged), default=math.nan), 3),
                    _number(mean(record.tokens_per_second for record in converged), 0),
                    _number(mean(record.seconds_per_step for record in converged)),
                    f"{self.compared[name].state_bytes / self.compared[name].parameters:.4f}",
                )
            )
        yield from _markdown(headings, rows)

    def _notes(self) -> Iterator[str]:
        yield (
            "Validation losses are those of the last step, means over the seeds; perplexity is exp of that mean; "
            f"differences are to {next(iter(self.plan.variants))}, seed by seed. A spike is a training loss more than "
            f"{DEVIATIONS:g} standard deviations above the mean of the {WINDOW} before it. Gradient norms are those "
            "before clipping. Memory is that of the rank that reports (on a CPU, of its process since its start); "
            "state is the optimizer's, every element counted once. Speeds are medians over the steps, and depend on "
            "whatever else the machine did at the time, such as other runs of the comparison."
        )
        yield ""
        yield (
            "A seed gives the initial weights, one checkpoint per seed that every variant starts from, and torch's "
            "generators. torchtitan reads data in one order; seeds differ in it only if {seed} is in the path of the "
            "data set. Runs use deterministic algorithms (--debug.deterministic), which may be slower than others. The "
            "best learning rate is chosen with the first seed, which is also one of the seeds of the means."
        )

    def _runs(self, records: Mapping[Run, Record], best: Mapping[str, float | None]) -> Iterator[str]:
        headings = ("variant", "lr", "seed", "steps", "validation loss", "spikes", "grad norm, max", "")
        rows = []
        for run, record in sorted(records.items()):
            note = f"diverged at step {record.diverged}" if record.diverged else ""
            if self.plan.lrs and run.lr == best.get(run.variant):
                note = note or "best"
            loss = "" if record.diverged else _number(record.final)
            norm = _number(record.grad_norm[1], 3)
            row = (run.variant, f"{run.lr:g}", str(run.seed), str(record.steps), loss, str(record.spikes), norm, note)
            rows.append(row)
        yield from _markdown(headings, rows)


def _records_at(records: Mapping[Run, Record], name: str, lr: float | None, seeds: int) -> dict[int, Record]:
    """seed -> record of a variant at one learning rate."""
    found = {} if lr is None else {seed: records.get(Run(name, lr, seed)) for seed in range(seeds)}
    return {seed: record for seed, record in found.items() if record is not None}


def _finals(records: Mapping[int, Record]) -> dict[int, float]:
    return {seed: record.final for seed, record in records.items() if record.diverged is None}


def _diverged(name: str, records: Mapping[int, Record]) -> str:
    seeds = [str(seed) for seed, record in records.items() if record.diverged is not None]
    return f"{name} diverged with seed {', '.join(seeds)}" if seeds else ""


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _number(value: float, digits: int = 4) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else ""


def _data(section: Mapping[str, Any]) -> str:
    return f"{section['dataset']}{' at ' if section['dataset_path'] else ''}{section['dataset_path'] or ''}"


def _settings(config: Mapping[str, Any]) -> str:
    """The most important settings, for readers without the configuration."""
    optimizer, schedule, training = config["optimizer"], config["lr_scheduler"], config["training"]
    degrees = {name: value for name, value in config["parallelism"].items() if name.endswith("_degree") and value > 1}
    return ", ".join(
        [
            *(f"{name} {optimizer[name]:g}" for name in ("beta1", "beta2", "eps", "weight_decay")),
            f"warm-up {schedule['warmup_steps']} steps, then {schedule['decay_type']} to {schedule['min_lr_factor']:g}"
            + (f" over the last {share:g} of the steps" if (share := schedule["decay_ratio"]) is not None else "")
            + (f", as if of {total} steps" if (total := schedule["total_steps"]) else ""),
            f"gradients clipped at {training['max_norm']:g}",
            f"parameters {training['dtype']}, matrix products {training['mixed_precision_param']}",
            *(f"{name} {value}" for name, value in degrees.items()),
        ]
    )
