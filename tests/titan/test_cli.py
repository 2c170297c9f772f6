"""The command line: what it takes, and a sentence where it cannot."""

from pathlib import Path

import pytest
from forked import CONFIG
from stored_runs import saved

from titan_adam_mini.cli import _config_first, main

SMALL = ["--model.flavor", "adam_mini_debug"]


def test_the_configuration_may_stand_anywhere_or_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONFIG_FILE", raising=False)
    config = ["--job.config_file", "x.toml"]
    assert _config_first(["a", *config, "b"]) == (config, ["a", "b"])
    assert _config_first(["a", "b", "--job.config-file=x.toml"]) == (config, ["a", "b"])
    assert _config_first(["a"]) == ([], ["a"])
    monkeypatch.setenv("CONFIG_FILE", "x.toml")
    assert _config_first(["a"]) == (config, ["a"])


def test_errors_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONFIG_FILE", raising=False)
    source = saved(tmp_path, "AdamW", "FSDP2 2")
    target = tmp_path / "new" / "step-4"
    convert = ["convert", str(source), str(target), "--to", "adam_mini"]
    for words, told in (
        (convert, "give --job.config_file X, or set CONFIG_FILE=X"),
        (
            ["convert", str(tmp_path), str(target), "--to", "adamw", "--job.config_file", str(CONFIG)],
            "is not a complete checkpoint",
        ),
        (["convert", str(source), str(source), "--to", "adamw"], "nothing is overwritten"),
        ([*convert, "--job.config_file", str(CONFIG), "--model.flavor", "huge"], "no flavor 'huge': it has"),
        ([*convert, "--job.config_file", str(CONFIG), *SMALL], "is this the configuration of that run?"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("titan-adam-mini: ") and told in error and "Traceback" not in error, error
        assert not target.exists()


def test_a_conversion_goes_by_the_configurations_type_of_momentum() -> None:
    """In a process of its own, as the command asks for it."""
    import torch

    from titan_adam_mini.convert.command import _target
    from titan_adam_mini.tools.isolated_process import in_isolated_process

    words = ["--job.config_file", str(CONFIG), *SMALL, "--optimizer.adam_mini.momentum_dtype", "int8"]
    blocks, group, momentum_dtype = in_isolated_process(_target, words, "adam_mini")
    assert momentum_dtype == torch.int8 and "tok_embeddings.weight" in blocks and "betas" in group
