"""[optimizer.adam_mini]: merged into torchtitan's job config, read from TOML and command line, refused in words."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchtitan.config import ConfigManager

from titan_adam_mini.titan import job_config
from titan_adam_mini.titan.knobs import Knobs, read_knobs

MODULE = "titan_adam_mini.titan.job_config"


def parse(tmp_path: Path, toml: str, *arguments: str) -> Any:
    file = tmp_path / "run.toml"
    file.write_text(f'[job]\ncustom_config_module = "{MODULE}"\n{toml}')
    return ConfigManager().parse_args(["--job.config_file", str(file), *arguments])


def test_merged_section_has_defaults_and_keeps_torchtitans_fields(tmp_path: Path) -> None:
    config = parse(tmp_path, "")
    assert config.optimizer.name == "AdamW"
    assert config.optimizer.adam_mini == job_config.AdamMini()
    assert read_knobs(config.optimizer) == Knobs()


def test_toml(tmp_path: Path) -> None:
    config = parse(
        tmp_path,
        '[optimizer]\nname = "AdamMini"\n[optimizer.adam_mini]\nroles = {"*.adapter.weight" = "neuron"}\n'
        'undecayed = ["norm", "*.bias"]\nvalue_blocks = "tensor"\nmomentum_dtype = "bfloat16"\n'
        'second_moment = "factored"\n',
    )
    assert read_knobs(config.optimizer) == Knobs(
        {"*.adapter.weight": "neuron"}, ["norm", "*.bias"], "tensor", "factored", torch.bfloat16
    )


def test_command_line(tmp_path: Path) -> None:
    config = parse(
        tmp_path,
        '[optimizer.adam_mini]\nroles = {"a" = "norm"}\nundecayed = ["b"]\n',
        *("--optimizer.adam_mini.roles", "*.adapter.weight=neuron,*.scale=norm"),
        *("--optimizer.adam_mini.undecayed", "norm,*.bias"),
        *("--optimizer.adam_mini.value_blocks", "tensor", "--optimizer.adam_mini.momentum_dtype", "float32"),
        *("--optimizer.adam_mini.second_moment", "factored"),
    )
    assert read_knobs(config.optimizer) == Knobs(
        {"*.adapter.weight": "neuron", "*.scale": "norm"}, ["norm", "*.bias"], "tensor", "factored", torch.float32
    )


@pytest.mark.parametrize("name", ["", "float32", "bfloat16", "int8"])
def test_types_of_momentum(tmp_path: Path, name: str) -> None:
    section = f'[optimizer.adam_mini]\nmomentum_dtype = "{name}"\nstochastic_rounding = true\n'
    for config in (
        parse(tmp_path, section),
        parse(
            tmp_path,
            "",
            *("--optimizer.adam_mini.momentum_dtype", name, "--optimizer.adam_mini.stochastic_rounding"),
        ),
    ):
        knobs = read_knobs(config.optimizer)
        assert knobs == Knobs(momentum_dtype=getattr(torch, name) if name else None, stochastic_rounding=True)


def test_command_line_without_toml() -> None:
    config = ConfigManager().parse_args(
        ["--job.custom_config_module", MODULE, "--optimizer.adam_mini.undecayed", "", "--optimizer.name", "AdamMini"]
    )
    assert read_knobs(config.optimizer) == Knobs()


def test_command_line_refuses_a_wrong_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(tmp_path, "", "--optimizer.adam_mini.value_blocks", "head")
    assert "neuron" in capsys.readouterr().err


def test_merges_with_another_module_that_extends_ours() -> None:
    from dataclasses import dataclass, field

    @dataclass
    class Mine:
        depth: int = 3

    @dataclass
    class MyJobConfig(job_config.JobConfig):
        mine: Mine = field(default_factory=Mine)

    from torchtitan.config import JobConfig

    merged = ConfigManager._merge_configs(JobConfig, MyJobConfig)()
    assert merged.mine.depth == 3
    assert merged.optimizer.adam_mini.value_blocks == "neuron"
    assert merged.training.steps == JobConfig().training.steps


def test_can_be_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = parse(tmp_path, '[optimizer.adam_mini]\nroles = {"a" = "norm"}\n', "--job.print_config")
    with caplog.at_level(logging.INFO):
        config.maybe_log()
    text = caplog.text
    logged = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert logged["optimizer"]["adam_mini"]["roles"] == {"a": "norm"}


def test_without_the_config_module_defaults_are_used() -> None:
    assert read_knobs(ConfigManager().parse_args([]).optimizer) == Knobs()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"roles": ["a"]}, ["roles = ['a']", "a table of name patterns and roles"]),
        ({"roles": {"a": 3}}, ["roles", "{'a': 3}"]),
        ({"undecayed": "*norm*"}, ["undecayed = '*norm*'", "a list"]),
        ({"undecayed": [1]}, ["undecayed = [1]", "a list"]),
        ({"value_blocks": "head"}, ["value_blocks = 'head'", '"neuron" or "tensor"']),
        ({"value_blocks": ["neuron"]}, ["value_blocks", '"neuron" or "tensor"']),
        ({"second_moment": "rows"}, ["second_moment = 'rows'", '"blocks", "channels" or "factored"']),
        ({"momentum_dtype": "int4"}, ["momentum_dtype = 'int4'", "bfloat16"]),
        ({"momentum_dtype": 16}, ["momentum_dtype = 16", "bfloat16"]),
        ({"momentum_dtype": "int8 "}, ["momentum_dtype = 'int8 '", '"int8"']),
        ({"momentum": "float32"}, ["'momentum'", "momentum_dtype"]),
        ({"stochastic_rounding": "yes"}, ["stochastic_rounding = 'yes'", "true or false"]),
        ({"log_memory": 1}, ["log_memory = 1", "true or false"]),
    ],
)
def test_wrong_values_are_refused_in_words(section: dict[str, Any], said: list[str]) -> None:
    for shape in (section, SimpleNamespace(**section)):
        with pytest.raises(ValueError) as error:
            read_knobs(SimpleNamespace(adam_mini=shape))
        for words in ["[optimizer.adam_mini]", *said]:
            assert words in str(error.value)


def test_toml_values_of_the_wrong_type_reach_the_refusal(tmp_path: Path) -> None:
    # torchtitan passes TOML values on as they are, and its command line parser takes them for defaults.
    try:
        config = parse(tmp_path, "[optimizer.adam_mini]\nvalue_blocks = 7\n")
    except SystemExit:
        return
    with pytest.raises(ValueError, match="value_blocks = 7"):
        read_knobs(config.optimizer)
