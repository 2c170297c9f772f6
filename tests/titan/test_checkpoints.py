"""torchtitan's trainer through its own checkpoints: other settings, AdamW's state in and out, wrong inputs."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import CONFIG, HALF, WHOLE, Trainer, difference, said

pytestmark = pytest.mark.slow

KNOBS = {"job.custom_config_module": "titan_adam_mini.titan.job_config"}


MORE = HALF + 2
"""The last step of a run that goes on from the middle; its schedule is that of the whole run."""
SHORT = {**WHOLE, "training.steps": MORE}


def resumed(trainer: Trainer, source: str | Path, name: str, **settings: Any) -> Any:
    """The run `name`, on two ranks, from the middle of the run `source` or from a checkpoint, with other settings."""
    path = trainer.checkpoint(source, HALF) if isinstance(source, str) else source
    start = {"checkpoint.initial_load_path": path, "checkpoint.initial_load_model_only": False}
    return trainer(name, **{"ranks": 2, "data": 2, "start": start, **settings})


def state(trainer: Trainer, name: str, step: int) -> dict[str, Any]:
    """Every entry of a checkpoint."""
    from titan_adam_mini.checkpoint.stored import Stored

    stored = Stored(trainer.checkpoint(name, step))
    return {key: stored.value(key) for key in stored.metadata.state_dict_metadata}


def convert(*words: Any, model: Sequence[str] = ("--model.flavor", "adam_mini_debug")) -> None:
    from titan_adam_mini.cli import main

    main(["convert", *map(str, words), "--job.config_file", str(CONFIG), *model])


def test_the_checkpoint_counts_unless_the_configuration_is_to(trainer: Trainer, two: Any) -> None:
    changed = {"optimizer.lr": 5e-4, "optimizer.weight_decay": 0.3, "optimizer.implementation": "for-loop"}
    by_default = resumed(trainer, "two", "hyper_checkpoint", **changed, **SHORT)
    assert difference(by_default, two, first=HALF + 1, last=MORE) == 0
    line = said(by_default, r"checkpoint and configuration differ: (.*)")
    assert re.search(r"weight_decay \S+ and 0.3", line) and re.search(r"lr \S+ and 0.0005", line)
    assert "the checkpoint's are used" in line and 'hyper_parameters = "config"' in line
    assert said(by_default, r"engine (for-loop)") == "for-loop", "the engine is never restored"

    of_config = resumed(
        trainer, "two", "hyper_config", **changed, **SHORT, **{"optimizer.adam_mini.hyper_parameters": "config"}
    )
    assert difference(of_config, two, first=HALF + 1, last=MORE) > 0
    assert "the configuration's are used" in said(of_config, r"checkpoint and configuration differ: (.*)")
    was, now = state(trainer, "hyper_checkpoint", MORE), state(trainer, "hyper_config", MORE)
    key = "optimizer.param_groups.output.weight."
    assert now["lr_scheduler.base_lrs"] == [5e-4] and now[key + "initial_lr"] == 5e-4
    assert now[key + "weight_decay"] == 0.3
    factor = was[key + "lr"] / was[key + "initial_lr"]
    assert now[key + "lr"] == pytest.approx(5e-4 * factor), "the schedule goes on where it was"


def test_the_schedule_counts_as_well_where_only_it_is_loaded(trainer: Trainer, two: Any) -> None:
    """The schedule has a learning rate of its own, and comes along when the optimizer's state does not."""
    alone = {"optimizer.lr": 5e-4, "checkpoint.exclude_from_loading": "optimizer", **SHORT}
    by_default = resumed(trainer, "two", "schedule_checkpoint", **alone)
    assert "the checkpoint's are used" in said(by_default, r"checkpoint and configuration differ: (lr .*)")
    assert state(trainer, "schedule_checkpoint", MORE)["lr_scheduler.base_lrs"] != [5e-4]
    resumed(trainer, "two", "schedule_config", **alone, **{"optimizer.adam_mini.hyper_parameters": "config"})
    assert state(trainer, "schedule_config", MORE)["lr_scheduler.base_lrs"] == [5e-4]


@pytest.mark.parametrize("second_moment", ["blocks", pytest.param("factored", marks=pytest.mark.nightly)])
def test_adamw_goes_on_as_adam_mini_and_back(trainer: Trainer, adamw: Any, tmp_path: Path, second_moment: str) -> None:
    """Converted beside the run or in it: the same to the bit."""
    kind = {"optimizer.adam_mini.second_moment": second_moment}
    names = [f"{name}_{second_moment}" for name in ("offline", "inside")]
    words = [word for name, value in kind.items() for word in (f"--{name}", value)]
    convert(trainer.checkpoint("adamw", HALF), tmp_path / "mini" / "step-6", "--to", "adam_mini", *words)
    offline = resumed(trainer, tmp_path / "mini" / "step-6", names[0], **SHORT, **kind)
    inside = resumed(trainer, "adamw", names[1], **SHORT, **kind, **{"optimizer.adam_mini.load_adamw_state": True})
    assert difference(offline, inside, first=HALF + 1, last=MORE) == 0
    one, other = (state(trainer, name, MORE) for name in names)
    assert set(one) == set(other)
    assert any(key.endswith("wq.weight.exp_avg_sq_col") for key in one) == (second_moment == "factored")
    assert all(torch.equal(one[key], other[key]) for key in one if key.startswith("optimizer.state."))
    assert 0 < difference(offline, adamw, first=HALF + 1, last=MORE) < 0.05 * adamw.losses[HALF]
    if second_moment == "factored":
        return
    assert said(inside, r"(averaging AdamW's second moments)")

    convert(trainer.checkpoint(names[0], MORE), tmp_path / "back" / f"step-{MORE}", "--to", "adamw")
    back = state(trainer, "adamw", HALF)
    from titan_adam_mini.checkpoint.stored import Stored

    there = Stored(tmp_path / "back" / f"step-{MORE}").metadata.state_dict_metadata
    assert set(there) == set(back), "exactly the keys that AdamW's own checkpoint has"
    more = {"training.steps": MORE + 2, "optimizer.name": "AdamW"}
    again = resumed(trainer, tmp_path / "back" / f"step-{MORE}", "again", **more)
    assert list(again.losses) == [MORE + 1, MORE + 2]


@pytest.mark.nightly
def test_mixtures_of_experts_go_on_too(even: Trainer, tmp_path: Path) -> None:
    name = "deepseek_v3"
    short = {
        "model.name": name,
        "training.steps": 4,
        "checkpoint.interval": 2,
        "checkpoint.last_save_model_only": False,
    }
    even(f"{name}_adamw", ranks=2, data=2, start={}, **short, **{"optimizer.name": "AdamW"})
    source = even.checkpoint(f"{name}_adamw", 2)
    model = ["--model.name", name, "--model.flavor", "debugmodel"]
    convert(source, tmp_path / "step-2", "--to", "adam_mini", model=model)
    offline = resumed(even, tmp_path / "step-2", f"{name}_offline", **short)
    inside = resumed(even, source, f"{name}_inside", **short, **{"optimizer.adam_mini.load_adamw_state": True})
    assert list(offline.losses) == [3, 4] and offline.losses == inside.losses


@pytest.mark.parametrize(
    ("source", "settings", "told"),
    [
        ("adamw", {}, "contains AdamW's optimizer state.*titan-adam-mini convert"),
        ("two", {"optimizer.adam_mini.second_moment": "factored"}, r"is factored here but not there.*second_moment"),
        ("two", {"ranks": 1, "data": 1}, "exclude_from_loading dataloader"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(
    trainer: Trainer, two: Any, adamw: Any, tmp_path: Path, source: str, settings: dict[str, Any], told: str
) -> None:
    """What else is refused, and damaged checkpoints: tests/checkpoint/test_check.py, without a trainer."""
    from titan_adam_mini.tools.trainer import RunFailed

    with pytest.raises(RunFailed, match=told):
        resumed(trainer, source, f"refused_{tmp_path.name}", **settings)


def test_on_another_number_of_ranks_the_data_start_anew(trainer: Trainer, two: Any) -> None:
    run = resumed(
        trainer, "two", "moved", ranks=1, data=1, **SHORT, **{"checkpoint.exclude_from_loading": "dataloader"}
    )
    assert list(run.losses) == [HALF + 1, HALF + 2]


@pytest.mark.parametrize("enabled", [True, False])
def test_no_run_starts_from_random_weights_by_accident(trainer: Trainer, enabled: bool) -> None:
    from titan_adam_mini.tools.trainer import RunFailed

    name = f"accident_{enabled}"
    (trainer.out / name / "checkpoint" / "step-6").mkdir(parents=True)
    told = "Remove .*/checkpoint to use that setting" if enabled else "no effect without checkpoint.enable"
    with pytest.raises(RunFailed, match=told):
        trainer(name, ranks=1, **{"checkpoint.enable": enabled})
