"""What a finished comparison of AdamW and AdamMini must have written."""

import csv
from pathlib import Path

from titan_adam_mini.compare.plan import Run
from titan_adam_mini.compare.record import Record

RUNS = [Run(name, 4e-3, 0) for name in ("AdamW", "AdamMini")]


def check_comparison(out: Path, validated: list[int], falls_to: float) -> None:
    """Assert that both runs are complete, validated at these steps, and learn: down to this share of the first loss."""
    adamw, mini = (Record.load(out / run.folder / "record.json") for run in RUNS)
    for record in (adamw, mini):
        assert record.steps == validated[-1] and list(record.validation) == validated
        assert record.diverged is None and record.final < falls_to * record.losses[0], "it learns"
    assert adamw.losses[0] == mini.losses[0] and adamw.losses[2:] != mini.losses[2:]
    text = (out / "report.md").read_text()
    assert "Equal starts: the loss of step 1, before any update, is the same to the bit in all runs" in text
    assert f"AdamMini ends {abs(mini.final - adamw.final):.4f}" in text
    with open(out / "runs.csv") as file:
        rows = {row["variant"]: float(row["state_bytes_per_parameter"]) for row in csv.DictReader(file)}
    assert 8 < rows["AdamW"] < 8.001 and 4 < rows["AdamMini"] < 4.05
