"""The command: pure JSON, integers under documented keys; tables that say the same; a verdict right at both ends."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from real_memory import CONFIG

from titan_adam_mini.cli import main
from titan_adam_mini.memory import facts as facts_file
from titan_adam_mini.memory.facts import facts
from titan_adam_mini.memory.plan import _read_run
from titan_adam_mini.offline.rank_memory import Run
from titan_adam_mini.tools.isolated_process import in_isolated_process

LARGE = Path(__file__).resolve().parents[2] / "train_configs" / "llama3_8b.toml"
KINDS = {"adamw", "adam_mini_float32", "adam_mini_bfloat16", "adam_mini_int8"}


def planned(capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    main(["plan", *words, "--json"])
    told: dict[str, Any] = json.loads(capfd.readouterr().out)  # nothing else is on standard output
    return told


def keys(told: Any) -> set[str]:
    """All keys of nested dictionaries and lists."""
    if isinstance(told, dict):
        return set(told) | {key for value in told.values() for key in keys(value)}
    return {key for one in told for key in keys(one)} if isinstance(told, list) else set()


def numbers(told: Any) -> list[Any]:
    if isinstance(told, dict | list):
        return [number for one in (told.values() if isinstance(told, dict) else told) for number in numbers(one)]
    return [] if isinstance(told, str | bool) or told is None else [told]


def test_json_alone(capfd: pytest.CaptureFixture[str]) -> None:
    told = planned(capfd, str(CONFIG), "--ngpu", "3", "--training.seq_len", "64")
    assert all(type(number) is int for number in numbers(told)) and len(numbers(told)) > 100
    documented = set(re.findall(r"\w+", facts_file.__doc__ or ""))
    mesh = {axis for axes in told["mesh"].values() for axis in axes}
    assert keys(told) - mesh - {"bytes", "padding", "rounding", "config", "state"} <= documented
    assert set(told["optimizers"]) == KINDS and told["configured"] == "adam_mini_float32"
    assert told["second_moments"] == 4 * (5 + 5 + 160 + 160 + 2 * 448 + 160 + 2) + 2 * 512 + 1
    assert told["second_moments_adamw"] == told["parameters"] == 1_435_040 and told["frozen"] == 0
    assert sum(row["parameters"] for row in told["patterns"]) == 39
    assert sum(row["local_bytes"] for row in told["patterns"]) == told["ranks"]["first"]["parameters"]["bytes"]
    assert sum(row["parameters"] * row["blocks"] for row in told["patterns"]) == told["second_moments"]
    assert told["all_ranks"]["parameters"] == 4 * told["parameters"] == told["checkpoint"]["model"]


def test_tables_and_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPU", "2")
    main(["plan", "--json", str(tmp_path / "plan.json"), str(CONFIG)])
    printed, told = capfd.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert told["ngpu"] == 2 and told["verdict"]["sentence"] in printed
    first = told["ranks"]["first"]
    for number in (
        *(first[name]["bytes"] for name in ("parameters", "gradients", "buffers")),
        *(one["bytes"] for one in first["state"].values()),
        *told["checkpoint"]["total"].values(),
        told["second_moments"],
        sum(row["exchanged_bytes"] for row in told["patterns"]),
    ):
        assert f"{number:,}" in printed, number
    # What the log of a run says of the exchange: 4 layers of two norms, queries and keys, and the last norm, by rows,
    # and a slot per parameter.
    assert sum(row["exchanged_bytes"] for row in told["patterns"]) == 4 * (4 * (2 * 160 + 2 * 160) + 160 + 39)
    assert sum(row["straddling"] for row in told["patterns"]) == 4 * 4 + 1
    assert "layers.*.attention.wq.weight" in printed and "fsdp 2" in printed and "query" in printed


@pytest.mark.slow
def test_an_adamw_configuration_is_planned_for_adam_mini(capfd: pytest.CaptureFixture[str]) -> None:
    words = (str(CONFIG), "--ngpu", "2")
    mine = planned(capfd, *words)
    other = planned(capfd, *words, "--optimizer.name", "AdamW")
    assert other.pop("notes") == ["The configuration uses AdamW; this plan compares AdamMini with AdamW."]
    assert mine.pop("notes") == [] and other == mine
    half = planned(capfd, *words, "--training.dtype", "bfloat16")
    assert half["configured"] == "adam_mini_bfloat16", "the parameters' own type"
    assert half["verdict"]["saved_bytes"] < mine["verdict"]["saved_bytes"] / 1.9
    foreach = planned(capfd, *words, "--optimizer.implementation", "foreach")
    assert not foreach["step_on_device"]
    state, other = (one["ranks"]["first"]["state"]["adamw"] for one in (mine, foreach))
    assert (state["bytes"], state["rounding"] - 39 * 508) == (other["bytes"], other["rounding"])


def large(ngpu: int, *words: str) -> Run:
    run: Run = in_isolated_process(_read_run, ["--job.config_file", str(LARGE), *words], ngpu)
    return run


@pytest.mark.slow
def test_the_verdict_at_both_ends() -> None:
    few, many = (facts(large(ngpu))["verdict"] for ngpu in (8, 512))
    assert few["worth_it"] and few["saved_bytes"] == 4_014_395_260 and few["further_sequences"] == 0
    assert (
        "saves 7.5 -> 3.7 GiB of optimizer state per GPU: worth it for memory, but not enough for local batch 2"
        in (few["sentence"])
    )
    assert not many["worth_it"]
    assert "saves 60 MiB per GPU at this sharding: not worth it for memory" in many["sentence"]
    for one in (few, many):
        assert one["sentence"].endswith("checkpoints shrink 96 -> 64 GB.")


@pytest.mark.slow
def test_further_sequences_where_the_savings_are_enough() -> None:
    run = large(8, "--training.seq_len", "1024")
    told = facts(run)["verdict"]
    assert told["further_sequences"] == told["saved_bytes"] // told["sequence_bytes"] >= 1
    assert f"enough for local batch {1 + told['further_sequences']} instead of 1 (an estimate)" in told["sentence"]
    # What is not known is not said; host memory frees nothing on a GPU.
    silent = facts(replace(run, sequence="it is not known"))["verdict"]
    assert silent["sequence_bytes"] is silent["further_sequences"] is None
    assert silent["sequence_unknown"] == "it is not known" and silent["worth_it"]
    assert "per GPU: worth it for memory; checkpoints" in silent["sentence"] and "enough" not in silent["sentence"]
    host = facts(replace(run, offloaded=True))["verdict"]
    assert host["further_sequences"] is None and "of host memory per rank: worth it" in host["sentence"]


@pytest.mark.slow
def test_pipeline_stages_and_experts_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    small = ("--experimental.custom_import", "small_flavors", "--model.name", "qwen3", "--model.flavor", "nasty_moe")
    told = planned(capfd, str(CONFIG), "--ngpu", "4", *small, "--parallelism.expert_parallel_degree", "2")
    assert told["mesh"]["experts"] == {"pp": 1, "dp_replicate": 1, "efsdp": 2, "ep": 2, "etp": 1}
    placements = {row["placements"] for row in told["patterns"] if row["role"] == "experts"}
    assert placements == {"efsdp _S(0, 2), ep S(0)"} and told["verdict"]["sequence_unknown"]
    piped = planned(capfd, str(CONFIG), "--ngpu", "2", "--parallelism.pipeline_parallel_degree", "2")
    assert {one["stage"] for one in piped["ranks"].values()} == {0, 1}
    assert "schedule" in piped["verdict"]["sequence_unknown"]
