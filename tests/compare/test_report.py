"""What a report says of made-up runs: differences by hand, honest sentences, what is missing, pictures."""

import csv
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up_runs import record

from titan_adam_mini.compare.picture import _validated
from titan_adam_mini.compare.plan import Plan, Run
from titan_adam_mini.compare.record import Record
from titan_adam_mini.compare.report import Report
from titan_adam_mini.compare.statistics import Difference, difference
from titan_adam_mini.compare.variants import Variant

CONFIG: dict[str, Any] = {
    "training": {
        "steps": 4,
        "seq_len": 64,
        "local_batch_size": 2,
        "global_batch_size": -1,
        "dataset": "c4_test",
        "dataset_path": "/data",
        "max_norm": 1.0,
        "dtype": "float32",
        "mixed_precision_param": "bfloat16",
    },
    "validation": {
        "freq": 2,
        "steps": -1,
        "dataset": "c4_test",
        "dataset_path": None,
        "local_batch_size": 8,
        "seq_len": 32,
    },
    "optimizer": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
    "lr_scheduler": {
        "warmup_steps": 50,
        "decay_type": "linear",
        "min_lr_factor": 0.0,
        "decay_ratio": 0.5,
        "total_steps": None,
    },
    "parallelism": {"tensor_parallel_degree": 2, "data_parallel_shard_degree": -1, "enable_async": True},
}
MINI = Variant("mini", "AdamMini", ("--optimizer.adam_mini.value_blocks", "tensor"))


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """Of two variants, three seeds, no sweep."""
    compared: Any = {
        name: SimpleNamespace(config=CONFIG, model="llama3 tiny", parameters=100, state_bytes=size)
        for name, size in (("AdamW", 800), ("mini", 402))
    }
    plan = Plan({"AdamW": 1e-3, "mini": 1e-3}, [], 3)
    variants = [Variant("AdamW", "AdamW"), MINI]
    return Report(tmp_path, "the command", "a.toml", plan, variants, compared, ranks=2)


def runs(finals: dict[str, list[float]], first: float = 6.5) -> dict[Run, Record]:
    """Two steps of every variant and seed at 1e-3, each seed with a first loss of its own."""
    made = {}
    for name, losses in finals.items():
        for seed, loss in enumerate(losses):
            run = Run(name, 1e-3, seed)
            made[run] = record(run, [first + seed, 5.0], {1: first, 2: loss})
    return made


def rows(text: str, heading: str) -> dict[str, dict[str, str]]:
    """The table below a heading: first cell -> column -> cell."""
    lines = [
        line for line in text.partition(f"## {heading}\n")[2].partition("##")[0].splitlines() if line.startswith("|")
    ]
    names, _, *table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(names, row, strict=True)) for row in table}


def test_paired_differences_by_hand() -> None:
    found = difference({0: 2.1, 1: 2.3, 2: 2.2, 5: 9.0}, {0: 2.0, 1: 2.1, 2: 2.1})
    assert found is not None and found.seeds == 3
    assert found.mean == pytest.approx(0.4 / 3)
    assert found.standard_error == pytest.approx(math.sqrt(((0.1 - 0.4 / 3) ** 2 * 2 + (0.2 - 0.4 / 3) ** 2) / 2 / 3))
    assert found.t_statistic == pytest.approx(4.0) and found.critical_value == 4.303 and not found.distinguishable
    assert difference({0: math.inf}, {0: 2.0}) is None and difference({0: 1.0}, {1: 1.0}) is None


def test_sentences_are_honest() -> None:
    near = Difference(0.0123, 0.01, 3)
    assert near.sentence("mini", "AdamW") == (
        "mini ends 0.0123 above AdamW in validation loss, 1.2 standard errors over 3 seeds (95 %: -0.0307 to +0.0553): "
        "not distinguishable."
    )
    assert (
        replace(near, standard_error=0.001)
        .sentence("mini", "AdamW")
        .endswith("(95 %: +0.0080 to +0.0166): AdamW is better.")
    )
    assert replace(near, mean=-0.1).sentence("mini", "AdamW") == (
        "mini ends 0.1000 below AdamW in validation loss, 10.0 standard errors over 3 seeds (95 %: -0.1430 to "
        "-0.0570): mini is better."
    )
    assert "it may be chance" in Difference(0.0123, None, 1).sentence("mini", "AdamW")
    assert Difference(0.1, 0.0, 2).distinguishable, "the same with every seed"
    assert not Difference(0.0, 0.0, 2).distinguishable, "no difference at all"
    assert Difference(0.1, 0.02, 40).critical_value == Difference(0.1, 0.02, 11).critical_value


def test_what_stands_in_the_report(report: Report) -> None:
    findings = report.write(runs({"AdamW": [2.0, 2.1, 2.1], "mini": [2.1, 2.3, 2.2]}))
    assert findings == [
        "Equal starts: the loss of step 1, before any update, is the same to the bit in all runs (6.5 with seed 0, 7.5 "
        "with seed 1, 8.5 with seed 2).",
        "mini ends 0.1333 above AdamW in validation loss, 4.0 standard errors over 3 seeds (95 %: -0.0101 to +0.2768): "
        "not distinguishable.",
    ]
    text = (report.out / "report.md").read_text()
    for words in (
        "# AdamW and mini on llama3 tiny",
        *findings,
        "4 steps of 2 sequences per data-parallel rank of 64 tokens, c4_test at /data",
        "every 2 steps on all of 8 x 32 tokens of c4_test, each time on the same documents",
        "beta1 0.9, beta2 0.95, eps 1e-08, weight_decay 0.1, warm-up 50 steps, then linear to 0 over the last 0.5 of "
        "the steps, gradients clipped at 1, parameters float32, matrix products bfloat16, tensor_parallel_degree 2\n"
        "- ranks: 2\n- device: not known",
        "`the command`",
        "mini: AdamMini with `--optimizer.adam_mini.value_blocks tensor`",
        "seeds differ in it only if {seed} is in the path",
    ):
        assert words in text, words
    mini = rows(text, "Variants")["mini"]
    assert (mini["lr"], mini["seeds"], mini["validation loss"]) == ("0.001", "3", "2.2000")
    assert mini["perplexity"] == f"{math.exp(2.2):.3f}"
    assert (mini["difference"], mini["standard error"]) == ("+0.1333", "0.0333")
    assert (mini["grad norm, median"], mini["max"]) == ("1.500", "2.000")
    assert (mini["tokens/s"], mini["s/step"], mini["state B/param"]) == ("200", "0.1000", "4.0200")
    assert rows(text, "Variants")["AdamW"]["difference"] == ""
    for name in ("loss.png", "validation.png", "grad_norm.png"):
        assert f"({name})" in text and (report.out / name).read_bytes().startswith(b"\x89PNG")
    assert not (report.out / "lr.png").exists(), "there was no sweep"


def test_tables_for_other_tools(report: Report) -> None:
    made = runs({"AdamW": [2.0], "mini": [2.5]})
    made[Run("mini", 1e-3, 0)].columns["loss"][1] = 1 / 3
    report.write(made, pictures=False)
    with open(report.out / "runs.csv") as file:
        seen = {row["variant"]: row for row in csv.DictReader(file)}
    assert seen["mini"]["optimizer"] == "AdamMini" and seen["mini"]["status"] == "finished"
    assert float(seen["mini"]["perplexity"]) == math.exp(2.5) and seen["mini"]["folder"] == "runs/mini/lr-0.001/seed-0"
    with open(report.out / "steps.csv") as file:
        steps = [row for row in csv.DictReader(file) if row["variant"] == "mini"]
    assert [(row["step"], float(row["loss"]), row["validation_loss"]) for row in steps] == [
        ("1", 6.5, "6.5"),
        ("2", 1 / 3, "2.5"),
    ]


def test_runs_of_several_commits_are_told_apart(report: Report) -> None:
    made = runs({"AdamW": [2.0, 2.1], "mini": [2.1]})
    for number, one in enumerate(made.values()):
        one.made = {"device": "a CPU", "commit": "old" if number < 2 else "new"}
    report.write(made, pictures=False)
    text = (report.out / "report.md").read_text()
    assert "- device: a CPU\n- versions: not known\n- commit: old (2 runs); new (1 runs)\n" in text


def test_validations_that_only_some_runs_have_are_not_drawn() -> None:
    whole, hole = (Record(Run("a", 1.0, seed), 1, {}, told) for seed, told in enumerate(({1: 9.0, 2: 3.0, 4: 2.0}, {})))
    hole.validation = {1: 9.0, 4: 1.0, 6: 0.5}
    assert _validated({"a": [whole]})(whole) == ([2.0, 4.0], [3.0, 2.0])
    assert _validated({"a": [whole, hole]})(whole) == ([1.0, 4.0], [9.0, 2.0])


def test_unequal_starts_are_said_loudly(report: Report) -> None:
    made = runs({"AdamW": [2.0, 2.0], "mini": [2.0, 2.0]})
    made[Run("mini", 1e-3, 1)].columns["loss"][0] = math.nextafter(7.5, 8)
    first, *_ = report.write(made, pictures=False)
    assert first.startswith("UNEQUAL STARTS with seed 1") and "7.500000000000001 for mini, lr 0.001, seed 1" in first


def test_what_is_missing_is_named(report: Report) -> None:
    findings = report.write(runs({"AdamW": [2.0, 2.1, 2.1], "mini": [2.1]}), pictures=False)
    assert findings[-1] == "Not all runs are finished; missing: mini, lr 0.001, seed 1; mini, lr 0.001, seed 2."
    assert "with one seed: it may be chance" in findings[1]
    assert report.write({}, pictures=False)[-1].count("seed") == 6


def test_runs_that_diverged_are_no_errors(report: Report) -> None:
    made = runs({"AdamW": [2.0, 2.1, 2.1], "mini": [2.1, 2.3, 2.2]})
    run = Run("mini", 1e-3, 1)
    made[run] = record(run, [7.5, math.nan], {1: 7.0}, diverged=2)
    findings = report.write(made, pictures=False)
    assert "over 2 seeds" in findings[1] and findings[1].endswith(" (mini diverged with seed 1, which is left out.)")
    assert len(findings) == 2, "it is said once"
    text = (report.out / "report.md").read_text()
    assert "diverged at step 2" in text and rows(text, "Variants")["mini"]["seeds"] == "2"
    with open(report.out / "runs.csv") as file:
        assert [row["status"] for row in csv.DictReader(file)].count("diverged") == 1


def test_a_sweep_has_a_picture_and_a_word_on_its_edges(report: Report) -> None:
    report = replace(report, plan=Plan({"AdamW": 1e-3, "mini": 1e-3}, [1e-3, 2e-3, 4e-3], 1))
    made = {}
    for name in ("AdamW", "mini"):
        lrs = [1e-3, 2e-3, 4e-3] if name == "AdamW" else [1e-3 * 2**power for power in range(7)]
        for lr in lrs:
            run = Run(name, lr, 0)
            loss = abs(lr - 2e-3) if name == "AdamW" else -lr
            made[run] = record(run, [6.5, 5.0], {1: 6.0, 2: 2.0 + loss})
    findings = report.write(made)
    assert findings[-1].startswith("mini is best at 0.064, the edge of its learning rates after 4 extensions")
    assert len(findings) == 3
    text = (report.out / "report.md").read_text()
    assert rows(text, "Variants, at their best learning rates")["AdamW"]["lr"] == "0.002"
    assert re.search(r"\| AdamW \| 0.002 \| 0 \| 2 \| 2.0000 \| 0 \| 2.000 \| best \|", text)
    assert "(lr.png)" in text and (report.out / "lr.png").is_file()
    lost = {run: record(run, [6.5, math.nan], {1: 6.0}, diverged=2) for run in made}
    assert "diverged at every learning rate" in " ".join(report.write({**made, **_all_lost(report, lost)}))


def _all_lost(report: Report, lost: dict[Run, Record]) -> dict[Run, Record]:
    """Every run that AdamW's sweep comes to want, if all diverge."""
    while wanted := report.plan.remaining({run: one.final for run, one in lost.items()}):
        lost |= {run: record(run, [6.5, math.nan], {1: 6.0}, diverged=2) for run in wanted}
    return lost
