"""torchtitan's trainer through its own checkpoints: other settings, AdamW's state in and out, wrong inputs."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import CONFIG, HALF, WHOLE, Trainer, difference, said

pytestmark = pytest.mark.slow

KNOBS = {"job.custom_config_module": "titan_adam_mini.titan.job_config"}


@pytest.fixture(scope="module")
def adamw(trainer: Trainer) -> Any:
    """AdamW, FSDP2 over two ranks."""
    return trainer("adamw", ranks=2, data=2, **WHOLE, **{"optimizer.name": "AdamW"})


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
    by_default = resumed(trainer, "two", "hyper_checkpoint", **changed, **WHOLE)
    assert difference(by_default, two, first=HALF + 1) == 0
    line = said(by_default, r"checkpoint and configuration differ: (.*)")
    assert re.search(r"weight_decay \S+ there, 0.3 here", line) and re.search(r"lr \S+ there, 0.0005 here", line)
    assert "the checkpoint counts" in line and 'hyper_parameters = "config"' in line
    assert said(by_default, r"engine (for-loop)") == "for-loop", "the engine is never restored"

    of_config = resumed(
        trainer, "two", "hyper_config", **changed, **WHOLE, **{"optimizer.adam_mini.hyper_parameters": "config"}
    )
    assert difference(of_config, two, first=HALF + 1) > 0
    assert "the configuration counts" in said(of_config, r"checkpoint and configuration differ: (.*)")
    was, now = state(trainer, "two", 2 * HALF), state(trainer, "hyper_config", 2 * HALF)
    key = "optimizer.param_groups.output.weight."
    assert now["lr_scheduler.base_lrs"] == [5e-4] and now[key + "initial_lr"] == 5e-4
    assert now[key + "weight_decay"] == 0.3
    factor = was[key + "lr"] / was[key + "initial_lr"]
    assert now[key + "lr"] == pytest.approx(5e-4 * factor), "the schedule goes on where it was"


def test_the_schedule_counts_as_well_where_only_it_is_loaded(trainer: Trainer, two: Any) -> None:
    """The schedule has a learning rate of its own, and comes along when the optimizer's state does not."""
    alone = {"optimizer.lr": 5e-4, "checkpoint.exclude_from_loading": "optimizer", **WHOLE}
    by_default = resumed(trainer, "two", "schedule_checkpoint", **alone)
    assert "the checkpoint counts" in said(by_default, r"checkpoint and configuration differ: (lr .*)")
    assert state(trainer, "schedule_checkpoint", 2 * HALF)["lr_scheduler.base_lrs"] != [5e-4]
    resumed(trainer, "two", "schedule_config", **alone, **{"optimizer.adam_mini.hyper_parameters": "config"})
    assert state(trainer, "schedule_config", 2 * HALF)["lr_scheduler.base_lrs"] == [5e-4]


def test_adamw_goes_on_as_adam_mini_and_back(trainer: Trainer, adamw: Any, tmp_path: Path) -> None:
    convert(trainer.checkpoint("adamw", HALF), tmp_path / "mini" / "step-6", "--to", "adam_mini")
    offline = resumed(trainer, tmp_path / "mini" / "step-6", "offline", **WHOLE)
    inside = resumed(trainer, "adamw", "inside", **WHOLE, **{"optimizer.adam_mini.load_adamw_state": True})
    assert difference(offline, inside, first=HALF + 1) == 0
    one, other = state(trainer, "offline", 2 * HALF), state(trainer, "inside", 2 * HALF)
    assert all(torch.equal(one[key], other[key]) for key in one if key.startswith("optimizer.state."))
    assert 0 < difference(offline, adamw, first=HALF + 1) < 0.05 * adamw.losses[HALF]
    assert said(inside, r"(averaging AdamW's second moments)")

    convert(trainer.checkpoint("offline", 2 * HALF), tmp_path / "back" / "step-12", "--to", "adamw")
    back = state(trainer, "adamw", HALF)
    from titan_adam_mini.checkpoint.stored import Stored

    there = Stored(tmp_path / "back" / "step-12").metadata.state_dict_metadata
    assert set(there) == set(back), "exactly the keys that AdamW's own checkpoint has"
    more = {"training.steps": 2 * HALF + 3, "lr_scheduler.total_steps": 2 * HALF + 3, "optimizer.name": "AdamW"}
    again = resumed(trainer, tmp_path / "back" / "step-12", "again", **more)
    assert list(again.losses) == [2 * HALF + 1, 2 * HALF + 2, 2 * HALF + 3]


def test_adamw_goes_on_factored(trainer: Trainer, adamw: Any, two: Any, tmp_path: Path) -> None:
    """Converted beside the run or in it: the same to the bit; and what was blocks is refused, with the cure."""
    from runs import RunFailed

    knob = "optimizer.adam_mini.second_moment"
    words = ["--to", "adam_mini", f"--{knob}", "factored"]
    convert(trainer.checkpoint("adamw", HALF), tmp_path / "mini" / "step-6", *words)
    settings = {**WHOLE, knob: "factored"}
    offline = resumed(trainer, tmp_path / "mini" / "step-6", "offline_factored", **settings)
    inside = resumed(trainer, "adamw", "inside_factored", **settings, **{"optimizer.adam_mini.load_adamw_state": True})
    assert difference(offline, inside, first=HALF + 1) == 0
    one, other = state(trainer, "offline_factored", 2 * HALF), state(trainer, "inside_factored", 2 * HALF)
    assert set(one) == set(other) and any(key.endswith("wq.weight.exp_avg_sq_col") for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one if key.startswith("optimizer.state."))
    assert 0 < difference(offline, adamw, first=HALF + 1) < 0.05 * adamw.losses[HALF]
    with pytest.raises(RunFailed, match=r"is factored here and not there.*second_moment"):
        resumed(trainer, "two", "blocks_factored", **settings)


@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_mixtures_of_experts_go_on_too(even: Trainer, tmp_path: Path, name: str) -> None:
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


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_asynchronous_saving_changes_nothing(trainer: Trainer, two: Any, mode: str) -> None:
    if mode == "async_with_pinned_mem" and not torch.cuda.is_available():
        pytest.skip("torch pins memory for an accelerator only")
    run = trainer(f"saved_{mode}", ranks=2, data=2, **WHOLE, **{"checkpoint.async_mode": mode})
    assert difference(run, two) == 0
    one, other = state(trainer, "two", HALF), state(trainer, f"saved_{mode}", HALF)
    tensors = [key for key, value in one.items() if isinstance(value, torch.Tensor)]
    assert tensors and all(torch.equal(one[key], other[key]) for key in tensors)


def damaged(trainer: Trainer, tmp_path: Path, how: str) -> Path:
    path = tmp_path / "step-6"
    shutil.copytree(trainer.checkpoint("two", HALF), path)
    file = path / "__1_0.distcp"
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1000])
    return path


@pytest.mark.parametrize(
    ("source", "settings", "told"),
    [
        ("adamw", {}, "holds AdamW's optimizer state.*titan-adam-mini convert"),
        ("two", {"optimizer.adam_mini.value_blocks": "tensor"}, "saved with another partition.*wv"),
        ("missing", {}, "__1_0.distcp is missing"),
        ("cut", {}, r"__1_0.distcp has [\d,]+ of [\d,]+ bytes"),
        ("two", {"ranks": 1, "data": 1}, "exclude_from_loading dataloader"),
        ("seed", {}, "no optimizer state"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(
    trainer: Trainer, two: Any, adamw: Any, tmp_path: Path, source: str, settings: dict[str, Any], told: str
) -> None:
    from runs import RunFailed

    path: Any = damaged(trainer, tmp_path, source) if source in ("missing", "cut") else source
    path = trainer.checkpoint("seed", 0) if source == "seed" else path
    with pytest.raises(RunFailed, match=told):
        resumed(trainer, path, f"refused_{tmp_path.name}", **settings)


@pytest.mark.parametrize("enabled", [True, False])
def test_no_run_starts_from_random_weights_by_accident(trainer: Trainer, enabled: bool) -> None:
    from runs import RunFailed

    name = f"accident_{enabled}"
    (trainer.out / name / "checkpoint" / "step-6").mkdir(parents=True)
    told = "Remove .*/checkpoint to start from there again" if enabled else "no effect without checkpoint.enable"
    with pytest.raises(RunFailed, match=told):
        trainer(name, ranks=2, data=2, **{"checkpoint.enable": enabled})
