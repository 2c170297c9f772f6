"""From the command line to variants and to the trainer's words."""

import re
from pathlib import Path

import pytest

from titan_adam_mini.compare.folder import check_settings, locked
from titan_adam_mini.compare.variants import Settings, Variant, conflicts, parse, settings_of, trainer_arguments

ROLES = "*.wv.weight=neuron.T,*.wo.weight=token"


def test_variants_in_the_order_they_were_given() -> None:
    given = f"rows=AdamMini --optimizer.adam_mini.roles '{ROLES}' --lr_scheduler.warmup_steps 5"
    found = parse("AdamW, AdamMini", [given, "again=AdamW"])
    words = ("--optimizer.adam_mini.roles", ROLES, "--lr_scheduler.warmup_steps", "5")
    assert found == [
        Variant("AdamW", "AdamW"),
        Variant("AdamMini", "AdamMini"),
        Variant("rows", "AdamMini", words),
        Variant("again", "AdamW"),
    ]
    assert found[2].arguments == ["--optimizer.name", "AdamMini", *words]


@pytest.mark.parametrize(
    ("optimizers", "variants", "told"),
    [
        ("AdamW,Lion", [], "the optimizer 'Lion' is unknown: there are AdamW, AdamMini, Adam"),
        ("", [], "nothing to compare"),
        ("AdamW,AdamW", [], "two variants are called 'AdamW'"),
        ("AdamW", ["AdamW=AdamMini"], "two variants are called 'AdamW'"),
        ("AdamW", ["AdamMini"], "is not of the form 'NAME=OPTIMIZER --section.key value ...'"),
        ("AdamW", ["a/b=AdamMini"], "is not of the form"),
        ("AdamW", ["a=adamw"], "the optimizer 'adamw' is unknown"),
        ("AdamW", ["a=AdamW --optimizer.adam_mini.roles '*"], "No closing quotation"),
    ],
)
def test_what_cannot_be_a_variant(optimizers: str, variants: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        parse(optimizers, variants)


def test_adam_mini_is_made_known_where_it_is_not(tmp_path: Path) -> None:
    config = str(tmp_path / "a.toml")
    ours = ["--experimental.custom_import", "titan_adam_mini.titan"]
    knobs = ["--job.custom_config_module", "titan_adam_mini.titan.job_config"]
    given = ["--job.config_file", config, "--training.steps", "3"]
    Path(config).write_text("")
    expected = [*given[:2], *ours, *knobs, "--debug.deterministic", *given[2:]]
    assert trainer_arguments(config, given) == expected, "the user's words come last, and count"
    Path(config).write_text('[experimental]\ncustom_import = "mine"\n[job]\ncustom_config_module = "mine.config"\n')
    assert trainer_arguments(config, given) == [*given[:2], "--debug.deterministic", *given[2:]]
    Path(config).write_text("")
    # Of two of these torchtitan takes the first.
    mine = [*given, "--job.custom-config-module=mine.config"]
    assert trainer_arguments(config, mine) == [*given[:2], *ours, "--debug.deterministic", *mine[2:]]
    Path(config).write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"a\.toml is not a valid TOML file"):
        trainer_arguments(config, given)


def config(data_ranks: int = 1, comm: int = 300, model: str = "m", freq: int = 1, **training: object) -> Settings:
    told = {"steps": 1, "seq_len": 2, "local_batch_size": 3, "global_batch_size": 4, "dataset": "a"}
    sections = {
        "model": {"name": model},
        "training": {**told, "dataset_path": "b", **training},
        "validation": {"freq": freq},
        "comm": {"init_timeout_seconds": comm},
        "checkpoint": {"interval": comm, "enable": True},
    }
    return settings_of(sections, data_ranks)


def test_a_seed_stands_on_the_command_line_only(tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text('[training]\ndataset_path = "data/order-{seed}"\n')
    with pytest.raises(ValueError, match=r"x.toml contains \{seed\}, which is replaced on the command line only"):
        trainer_arguments(str(config), ["--job.config_file", str(config)])


def test_variants_share_model_and_data() -> None:
    assert conflicts({"a": config(), "b": config(max_norm=2.0)}) == []
    assert conflicts({"a": config(), "b": config(seq_len=5)}) == ["training.seq_len is 2 for a and 5 for b"]
    assert conflicts({"a": config(), "b": config(freq=2)}) == ["validation.freq is 1 for a and 2 for b"]
    # Another mesh is no other experiment, other documents are.
    assert conflicts({"a": config(), "b": config(data_ranks=2)}) == ["data_ranks is 1 for a and 2 for b"]


def test_a_folder_keeps_what_it_was_made_with(tmp_path: Path) -> None:
    common = {"ranks": 2, "threads": 1, "slurm": False}
    assert check_settings(tmp_path, {"a": config()}, common) == common
    (tmp_path / "seeds" / "seed-0").mkdir(parents=True)
    assert check_settings(tmp_path, {"a": config(steps=5)}, common) == common, "nothing has been run"
    assert not (tmp_path / "seeds" / "seed-0").exists(), "it may be of another model"
    (tmp_path / "sweep-1.txt").touch()
    with pytest.raises(ValueError, match=r"training.steps 5 there, 6 here"):
        check_settings(tmp_path, {"a": config(steps=6)}, common)  # jobs that wait would train for it
    (tmp_path / "sweep-1.txt").unlink()
    (tmp_path / "runs").mkdir()
    assert check_settings(tmp_path, {"a": config(steps=5)}, {**common, "threads": 8}) == common, "threads change sums"
    assert check_settings(tmp_path, {"a": config(steps=5, comm=600)}, common) == common, "no number depends on that"
    assert check_settings(tmp_path, {"b": config(steps=5, max_norm=2.0)}, common) == common, "a variant more"
    with pytest.raises(ValueError, match=r"another configuration \(b: training.max_norm 2.0 there, 3.0 here\): name"):
        check_settings(tmp_path, {"a": config(steps=5), "b": config(steps=5, max_norm=3.0)}, common)
    with pytest.raises(ValueError, match="2 ranks there, 4 here"):
        check_settings(tmp_path, {"a": config(steps=5)}, {**common, "ranks": 4})
    with pytest.raises(ValueError, match="they do not run on Slurm: omit --slurm"):
        check_settings(tmp_path, {"a": config(steps=5)}, {**common, "slurm": True})
    with pytest.raises(ValueError, match=r"model\.name is 'm' for a and 'n' for c"):
        check_settings(tmp_path, {"c": config(steps=5, model="n")}, common)


def test_one_command_in_a_folder(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "a"),
        pytest.raises(ValueError, match="another compare is running in"),
        locked(tmp_path / "a"),
    ):
        pass
    with locked(tmp_path / "a"):
        pass


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out .*/file cannot be written: File exists"), locked(tmp_path / "file"):
        pass
