"""What one more sequence takes: against a count by hand and against models simulated whole."""

from __future__ import annotations

from typing import Any

import pytest
from real_memory import CONFIG

from titan_adam_mini.child import in_child

TOKENS, DIM = 512, 160


def words(*more: str) -> list[str]:
    return ["--job.config_file", str(CONFIG), "--training.seq_len", str(TOKENS), *more]


def _estimated(arguments: list[str], ngpu: int) -> int | str:
    from titan_adam_mini.memory.activations import sequence_bytes
    from titan_adam_mini.titan.build import configured

    return sequence_bytes(configured(arguments, ngpu), ngpu)


def estimated(arguments: list[str], ngpu: int = 1) -> Any:
    return in_child(_estimated, arguments, ngpu)


def at_depth(arguments: list[str], depths: list[int]) -> list[int]:
    """What a sequence takes in models of several depths, each simulated whole."""
    from titan_adam_mini.memory.activations import grown
    from titan_adam_mini.titan.build import configured

    return [grown(configured(arguments, 1), 1, depth) for depth in depths]


def test_the_checkpointed_inputs_of_layers() -> None:
    """With full activation checkpointing a layer keeps its input and nothing else: four bytes per token and dim."""
    depths = in_child(at_depth, words("--activation_checkpoint.mode", "full"), [1, 2, 4])
    assert depths[1] - depths[0] == 4 * TOKENS * DIM and depths[2] - depths[1] == 2 * 4 * TOKENS * DIM


def test_extrapolation_is_the_whole_model() -> None:
    for mode in ("full", "selective", "none"):
        arguments = words("--activation_checkpoint.mode", mode)
        assert [estimated(arguments)] == in_child(at_depth, arguments, [4]), mode


@pytest.mark.slow
def test_what_cuts_activations_and_what_adds_to_them() -> None:
    even = words("--model.flavor", "debugmodel")  # no activation checkpointing
    none, selective, full = (
        estimated([*even, "--activation_checkpoint.mode", mode], 2) for mode in ("none", "selective", "full")
    )
    assert none > selective > full
    tp = estimated([*even, "--parallelism.tensor_parallel_degree", "2"], 2)
    cp = estimated([*even, "--parallelism.context_parallel_degree", "2"], 2)
    assert none / 2 <= tp < 0.7 * none, "what is gathered for the matrices is not cut"
    assert none / 2 <= cp < 0.7 * none, "the ring's keys and values are not cut"
    option = ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option")
    by_operation, by_layer = (estimated([*even, *option, value], 2) for value in ("op", "3"))
    assert full < by_operation < none and full < by_layer < none and by_operation != by_layer


@pytest.mark.slow
def test_what_cannot_be_known_is_said() -> None:
    piped = estimated(words("--parallelism.pipeline_parallel_degree", "2"), 2)
    assert isinstance(piped, str) and "schedule" in piped
    experts = estimated(words("--model.name", "deepseek_v3", "--model.flavor", "debugmodel"))
    assert experts == "the layers of deepseek_v3 debugmodel are not alike"
    biased = estimated(words("--model.name", "gpt_oss", "--model.flavor", "debugmodel"))
    assert isinstance(biased, str) and "does not simulate gpt_oss" in biased
