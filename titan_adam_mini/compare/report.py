"""The report of a comparison: report.md for reading, runs.csv and steps.csv for other tools."""

from __future__ import annotations

import csv
import math
import platform
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .plan import EXTENSIONS, Run, at_edge, sweep, wanted
from .record import COLUMNS, DEVIATIONS, WINDOW, Record
from .statistics import difference, mean
from .variants import Variant

if TYPE_CHECKING:
    from ..titan.compared import Compared

_PACKAGES = ("titan-adam-mini", "torchtitan", "torch")


@dataclass(frozen=True)
class Report:
    """What is known of a comparison besides its runs.

    Attributes:
        out: the folder.
        command: as it was given.
        config: the TOML file.
        variants: what is compared; the first is what the others are held against.
        compared: name -> its configuration.
        lrs: the learning rates that were asked for; empty without a sweep.
        own: name -> the learning rate of its configuration.
        seeds: how many.
        ranks: processes of a run.
        threads: of a process on a CPU.
    """

    out: Path
    command: str
    config: str
    variants: Sequence[Variant]
    compared: Mapping[str, Compared]
    lrs: Sequence[float]
    own: Mapping[str, float]
    seeds: int
    ranks: int
    threads: int

    def write(self, records: Mapping[Run, Record]) -> list[str]:
        """Write everything anew from the runs there are; returns the findings, a sentence each."""
        losses = {run: record.final for run, record in records.items()}
        best = {name: sweep(name, self.lrs, losses)[1] if self.lrs else lr for name, lr in self.own.items()}
        chosen = {name: _at(records, name, lr, self.seeds) for name, lr in best.items()}
        self._write_runs(records)
        self._write_steps(records)
        findings = [*self._starts(records), *self._verdicts(chosen), *self._edges(losses)]
        missing = wanted(self.own, self.lrs, self.seeds, losses)
        if missing:
            findings.append(f"Not all runs are there yet; missing: {'; '.join(map(str, missing))}.")
        lines = [
            f"# {' and '.join(self.own)} on {self._first.model}",
            "",
            *(f"- {one}" for one in findings),
            "",
            *self._about(),
            "",
            "## Variants, at their best learning rates" if self.lrs else "## Variants",
            "",
            *self._table(chosen, best),
            "",
            *self._notes(),
            "",
            "## Runs",
            "",
            *self._runs(records, best),
        ]
        (self.out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return findings

    @property
    def _first(self) -> Compared:
        return next(iter(self.compared.values()))

    # Findings

    def _starts(self, records: Mapping[Run, Record]) -> Iterator[str]:
        """Whether all runs with a seed had the same loss before any update, to the bit."""
        first: dict[int, dict[float, list[Run]]] = {}
        for run, record in records.items():
            if record.losses:
                first.setdefault(run.seed, {}).setdefault(record.losses[0], []).append(run)
        unequal = {seed: found for seed, found in first.items() if len(found) > 1}
        if first and not unequal:
            told = ", ".join(f"{next(iter(found))!r} with seed {seed}" for seed, found in sorted(first.items()))
            yield f"Equal starts: the loss of step 1, before any update, is the same to the bit in all runs ({told})."
        for seed, found in sorted(unequal.items()):
            told = "; ".join(f"{loss!r} for {', '.join(map(str, runs))}" for loss, runs in found.items())
            yield f"UNEQUAL STARTS with seed {seed}: the loss of step 1, before any update, is {told}."

    def _verdicts(self, chosen: Mapping[str, Mapping[int, Record]]) -> Iterator[str]:
        first, *others = chosen
        for name in others:
            found = difference(_finals(chosen[name]), _finals(chosen[first]))
            if found is not None:
                yield found.sentence(name, first)
        for name, records in chosen.items():
            bad = [str(seed) for seed, record in records.items() if record.diverged is not None]
            if bad:
                yield f"{name} diverged with seed {', '.join(bad)}, which is left out of means and differences."

    def _edges(self, losses: Mapping[Run, float]) -> Iterator[str]:
        for name in self.own if self.lrs else ():
            swept, best = sweep(name, self.lrs, losses)
            if best is None:
                continue
            if losses[Run(name, best, 0)] == math.inf:
                yield f"{name} diverged at every learning rate from {swept[0]:g} to {swept[-1]:g}."
            elif at_edge(swept, best):
                yield (
                    f"{name} is best at {best:g}, the edge of its learning rates after {EXTENSIONS} extensions: a "
                    "better one may lie beyond."
                )

    # Sections

    def _about(self) -> Iterator[str]:
        config = self._first.config
        training, validation = config["training"], config["validation"]
        batch = training["global_batch_size"]
        size = f"{batch} sequences" if batch > 0 else f"{training['local_batch_size']} sequences per data-parallel rank"
        times = f"{validation['steps']} batches" if validation["steps"] > 0 else "all"
        yield f"- model: {self._first.model}, {self._first.parameters:,} parameters"
        yield f"- training: {training['steps']} steps of {size} of {training['seq_len']} tokens, {_data(training)}"
        yield (
            f"- validation: every {validation['freq']} steps on {times} of {_data(validation)}, each time on the same"
            " documents"
        )
        yield f"- device: {self.ranks} x {_device(self.threads)}"
        yield "- versions: " + ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
        if commit := _commit():
            yield f"- commit: {commit}"
        yield f"- configuration: {self.config}"
        yield f"- command: `{self.command}`"
        for one in self.variants:
            if one.words or one.name != one.optimizer:
                yield f"- {one.name}: {one.optimizer}" + (f" with `{shlex.join(one.words)}`" if one.words else "")

    def _table(self, chosen: Mapping[str, Mapping[int, Record]], best: Mapping[str, float | None]) -> Iterator[str]:
        headings = [
            *("variant", "lr", "seeds", "validation loss", "perplexity", "difference", "standard error", "spikes"),
            *("grad norm, median", "max", "peak GiB, active", "reserved", "tokens/s", "s/step", "state B/param"),
        ]
        rows = []
        first = next(iter(chosen))
        for name, records in chosen.items():
            finals = _finals(records)
            there = [one for one in records.values() if one.diverged is None]
            loss = mean(finals.values())
            found = None if name == first else difference(finals, _finals(chosen[first]))
            norms = [norm for one in there for norm in one.columns["grad_norm"]]
            rate = best[name]
            rows.append(
                (
                    name,
                    "" if rate is None else f"{rate:g}",
                    str(len(there)),
                    _number(loss),
                    _number(math.exp(min(loss, 700)), 3),
                    "" if found is None else f"{found.mean:+.4f}",
                    "" if found is None or found.error is None else f"{found.error:.4f}",
                    str(sum(one.spikes for one in there)),
                    _number(sorted(norms)[len(norms) // 2] if norms else math.nan, 3),
                    _number(max(norms, default=math.nan), 3),
                    _number(max((max(one.columns["active_gib"]) for one in there), default=math.nan), 3),
                    _number(max((max(one.columns["reserved_gib"]) for one in there), default=math.nan), 3),
                    _number(mean(one.tokens_per_second for one in there), 0),
                    _number(mean(one.seconds_per_step for one in there)),
                    f"{self.compared[name].state_bytes / self.compared[name].parameters:.4f}",
                )
            )
        yield from _markdown(headings, rows)

    def _notes(self) -> Iterator[str]:
        yield (
            "Validation losses are those of the last step, means over the seeds; perplexity is exp of that mean; "
            f"differences are to {next(iter(self.own))}, seed by seed. A spike is a training loss more than "
            f"{DEVIATIONS:g} standard deviations above the mean of the {WINDOW} before it. Gradient norms are those "
            "before clipping. Memory is that of the rank that reports (on a CPU its process's, since it began); "
            "state is the optimizer's, every element counted once."
        )
        yield ""
        yield (
            "A seed gives the initial weights, one checkpoint per seed that every variant starts from, and torch's "
            "generators. torchtitan reads data in one order; a seed has another where {seed} stands in the path of the "
            "data set, and only there. Runs use deterministic algorithms (--debug.deterministic), which may be slower "
            "than others."
        )

    def _runs(self, records: Mapping[Run, Record], best: Mapping[str, float | None]) -> Iterator[str]:
        headings = ("variant", "lr", "seed", "steps", "validation loss", "spikes", "grad norm, max", "")
        rows = []
        for run, record in sorted(records.items()):
            told = f"diverged at step {record.diverged}" if record.diverged else ""
            if self.lrs and run.lr == best.get(run.variant):
                told = told or "best"
            loss = "" if record.diverged else _number(record.final)
            norm = _number(record.grad_norm[1], 3)
            row = (run.variant, f"{run.lr:g}", str(run.seed), str(record.steps), loss, str(record.spikes), norm, told)
            rows.append(row)
        yield from _markdown(headings, rows)

    # Tables for other tools

    def _write_runs(self, records: Mapping[Run, Record]) -> None:
        rows: list[dict[str, Any]] = []
        for run, one in sorted(records.items()):
            compared = self.compared[run.variant]
            norm, highest = one.grad_norm
            rows.append(
                {
                    "variant": run.variant,
                    "optimizer": compared.config["optimizer"]["name"],
                    "lr": run.lr,
                    "seed": run.seed,
                    "status": "finished" if one.diverged is None else "diverged",
                    "steps": one.steps,
                    "validation_loss": one.final,
                    "perplexity": math.exp(min(one.final, 700)) if one.diverged is None else math.inf,
                    "first_loss": one.losses[0] if one.losses else math.nan,
                    "last_loss": one.losses[-1] if one.losses else math.nan,
                    "spikes": one.spikes,
                    "grad_norm_median": norm,
                    "grad_norm_max": highest,
                    "peak_active_gib": max(one.columns["active_gib"], default=math.nan),
                    "peak_reserved_gib": max(one.columns["reserved_gib"], default=math.nan),
                    "tokens_per_second": one.tokens_per_second,
                    "seconds_per_step": one.seconds_per_step,
                    "seconds": sum(one.columns["seconds"]),
                    "state_bytes_per_parameter": compared.state_bytes / compared.parameters,
                    "folder": run.folder,
                }
            )
        _write_csv(self.out / "runs.csv", rows)

    def _write_steps(self, records: Mapping[Run, Record]) -> None:
        rows: list[dict[str, Any]] = []
        for run, one in sorted(records.items()):
            for place in range(one.steps):
                columns = {"lr_now" if name == "lr" else name: one.columns[name][place] for name in COLUMNS}
                validation = one.validation.get(place + 1, "")
                about = {"variant": run.variant, "lr": run.lr, "seed": run.seed, "step": place + 1}
                rows.append({**about, **columns, "validation_loss": validation})
        _write_csv(self.out / "steps.csv", rows)


def _at(records: Mapping[Run, Record], name: str, lr: float | None, seeds: int) -> dict[int, Record]:
    """seed -> record of a variant at one learning rate."""
    there = {} if lr is None else {seed: records.get(Run(name, lr, seed)) for seed in range(seeds)}
    return {seed: record for seed, record in there.items() if record is not None}


def _finals(records: Mapping[int, Record]) -> dict[int, float]:
    return {seed: record.final for seed, record in records.items() if record.diverged is None}


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as written:
        writer = csv.DictWriter(written, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _number(value: float, digits: int = 4) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else ""


def _data(section: Mapping[str, Any]) -> str:
    return f"{section['dataset']}{' at ' if section['dataset_path'] else ''}{section['dataset_path'] or ''}"


def _device(threads: int) -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' if threads > 1 else ''} per rank"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of the repository the command was given in; "" without one."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
