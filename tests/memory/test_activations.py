"""What one more sequence takes: the storages alive in a step, against a count by hand and against deeper models."""

from __future__ import annotations

from typing import Any

import pytest
from real_memory import CONFIG

from titan_adam_mini.tools.isolated_process import in_isolated_process

TOKENS, DIM = 512, 160


def words(*more: str) -> list[str]:
    return ["--job.config_file", str(CONFIG), "--training.seq_len", str(TOKENS), *more]


def estimated(arguments: list[str]) -> int | str:
    from titan_adam_mini.memory.activations import sequence_bytes
    from titan_adam_mini.offline.build import configured

    return sequence_bytes(configured(arguments, 1), mixed=True)


def estimated_and_whole(arguments: list[str], depths: list[int]) -> tuple[int | str, list[int]]:
    """The estimate, and what a sequence takes in models of several depths, each run whole."""
    from titan_adam_mini.memory.activations import _growth, sequence_bytes
    from titan_adam_mini.offline.build import configured, fake_rank

    config = configured(arguments, 1)
    with fake_rank(0, config.parallelism.tensor_parallel_degree):
        whole = [_growth(config, config.training.mixed_precision_param, depth) for depth in depths]
    return sequence_bytes(config, mixed=True), whole


@pytest.mark.slow
def test_the_checkpointed_inputs_of_layers() -> None:
    """With full activation checkpointing a layer keeps its input and nothing else: four bytes per token and dim."""
    full = words("--activation_checkpoint.mode", "full")
    estimate, depths = in_isolated_process(estimated_and_whole, full, [1, 2, 4])
    assert depths[1] - depths[0] == 4 * TOKENS * DIM and depths[2] - depths[1] == 2 * 4 * TOKENS * DIM
    assert estimate == depths[2], "the extrapolation is the whole model of 4 layers"


@pytest.mark.parametrize("mode", ["selective", pytest.param("none", marks=pytest.mark.slow)])
def test_extrapolation_is_the_whole_model(mode: str) -> None:
    estimate, depths = in_isolated_process(estimated_and_whole, words("--activation_checkpoint.mode", mode), [4])
    assert [estimate] == depths


def estimated_in_process(arguments: list[str]) -> Any:
    return in_isolated_process(estimated, arguments)


@pytest.mark.slow
def test_what_cuts_activations_and_what_adds_to_them() -> None:
    even = words("--model.flavor", "debugmodel")  # no activation checkpointing
    none, selective, full = (
        estimated_in_process([*even, "--activation_checkpoint.mode", mode]) for mode in ("none", "selective", "full")
    )
    assert none > selective > full
    tp = estimated_in_process([*even, "--parallelism.tensor_parallel_degree", "2"])
    cp = estimated_in_process([*even, "--parallelism.context_parallel_degree", "2"])
    assert none / 2 <= tp < 0.7 * none, "what is gathered for the matrices is not cut"
    assert cp == none // 2
    option = ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option")
    by_operation, by_layer = (estimated_in_process([*even, *option, value]) for value in ("op", "3"))
    assert full < by_operation < none and full < by_layer < none and by_operation != by_layer


@pytest.mark.slow
def test_what_cannot_be_known_is_said() -> None:
    piped = estimated_in_process(words("--parallelism.pipeline_parallel_degree", "2"))
    assert isinstance(piped, str) and "schedule" in piped
    experts = estimated_in_process(words("--model.name", "deepseek_v3", "--model.flavor", "debugmodel"))
    assert experts == "the layers of deepseek_v3 debugmodel differ"
    flex = estimated_in_process(words("--model.name", "gpt_oss", "--model.flavor", "debugmodel"))
    assert isinstance(flex, str) and flex.startswith("gpt_oss does not run on tensors without values")
