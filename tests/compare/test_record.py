"""What a run said: from TensorBoard's files, over several starts, to the bit."""

import math
from pathlib import Path

import pytest
import torch
from made_up_runs import record
from torch.utils.tensorboard import SummaryWriter

from titan_adam_mini.compare.plan import Run
from titan_adam_mini.compare.record import COLUMNS, VALIDATION, WINDOW, Record, read, spikes

RUN = Run("AdamW", 1e-3, 0)


def start(board: Path, first: int, losses: list[float], validation: dict[int, float], number: int = 0) -> None:
    """What one start of a run writes from step `first` on."""
    writer = SummaryWriter(str(board), purge_step=first, filename_suffix=f".{number}")
    for step, loss in enumerate(losses, first):
        for name, tag in COLUMNS.items():
            writer.add_scalar(tag, loss if name == "loss" else step / 4, step)
        if step in validation:
            writer.add_scalar(VALIDATION, validation[step], step)
    writer.close()


def test_losses_to_the_bit(tmp_path: Path) -> None:
    losses = torch.rand(8).tolist()
    start(tmp_path, 1, losses, {1: losses[0], 4: losses[1], 8: losses[2]})
    seen = read(tmp_path, RUN, 2)
    assert seen.losses == losses
    assert seen.validation == {1: losses[0], 4: losses[1], 8: losses[2]} and seen.final == losses[2]
    assert seen.columns["lr"] == [step / 4 for step in range(1, 9)]
    assert seen.tokens_per_second == 2 * 1.75, "of both ranks, the median of steps 6 to 8"
    assert seen.diverged is None
    seen.write(tmp_path / "a.json")
    assert Record.load(tmp_path / "a.json") == seen


def test_a_step_that_was_done_again_counts_once(tmp_path: Path) -> None:
    start(tmp_path, 1, [8.0, 7.0, 6.0, 5.5], {1: 8.5, 4: 5.0})
    start(tmp_path, 3, [6.25, 5.25, 5.125], {4: 5.0625}, number=1)
    seen = read(tmp_path, RUN, 1)
    assert seen.losses == [8.0, 7.0, 6.25, 5.25, 5.125]
    assert seen.validation == {1: 8.5, 4: 5.0625}


def test_what_is_known_ends_at_a_hole(tmp_path: Path) -> None:
    assert read(tmp_path / "none", RUN, 1).complete_steps(4) == 0
    start(tmp_path, 1, [1.0] * 9, {1: 1.0, 4: 1.0})
    assert read(tmp_path, RUN, 1).complete_steps(4) == 7, "the validation of step 8 is missing"
    assert read(tmp_path, RUN, 1).complete_steps(20) == 9
    start(tmp_path, 12, [1.0] * 3, {}, number=1)
    assert read(tmp_path, RUN, 1).complete_steps(20) == 9, "steps 10 and 11 are missing"


def test_a_run_that_diverged_ends_there(tmp_path: Path) -> None:
    start(tmp_path, 1, [3.0, 2.0, math.nan, 1.0], {1: 3.0, 4: 1.0})
    seen = read(tmp_path, RUN, 1)
    assert seen.diverged == 3 and seen.steps == 3 and seen.validation == {1: 3.0} and seen.final == math.inf
    seen.write(tmp_path / "a.json")
    assert math.isnan(Record.load(tmp_path / "a.json").losses[2])
    start(tmp_path / "b", 1, [3.0, 2.0, 2.0], {1: 3.0, 2: math.inf})
    assert read(tmp_path / "b", RUN, 1).diverged == 2, "a validation loss counts too"


def test_spikes() -> None:
    noise = [2.0 + 0.01 * (-1) ** step for step in range(WINDOW)]
    deviation = torch.tensor(noise, dtype=torch.float64).std().item()
    for above, count in ((4.9, 0), (5.1, 1)):
        assert spikes([*noise, 2.0 + above * deviation]) == count
    assert spikes([*noise, 9.0, 2.0, 6.0]) == 1, "a spike in the window widens it"
    assert spikes([*noise[:-1], 9.0]) == 0, "a window must be full"
    assert spikes([*noise, math.nan]) == 0


def test_speed_without_the_first_steps() -> None:
    one = record(RUN, [1.0] * 8, {8: 1.0})
    one.columns["seconds"] = [9.0] * 5 + [1.0, 2.0, 4.0]
    assert one.seconds_per_step == 2.0
    assert one.grad_norm == pytest.approx((4.5, 8.0))
