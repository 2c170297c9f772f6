"""The command on the debug model, whose heads two ranks cut: what is in its JSON, and a sentence for bad input."""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchtitan", reason="the command needs the extra: pip install -e '.[titan]'")

import torch
from titan_worker import Forks, call
from torchtitan.models.llama3 import Transformer

from titan_adam_mini.bench import command, measure, tables
from titan_adam_mini.cli import _config_in_place, main
from titan_adam_mini.titan.flavor import model_args
from titan_adam_mini.tools import isolated_process

CONFIG = Path(__file__).resolve().parents[2] / "train_configs" / "debug_model.toml"
PEERS = ("torchao.optim", "bitsandbytes.optim", "flashoptim")


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", autouse=True)
def bare(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small copy, no GPU, no variables of torchtitan's, and none of the peers that some machine may have; the
    command's own process is forked from a server that has torchtitan loaded."""
    patch.setattr(isolated_process, "ProcessPoolExecutor", Forks)
    patch.setitem(measure.COPY_BYTES, "cpu", 2**16)
    patch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CONFIG_FILE", "NGPU"):
        patch.delenv(name, raising=False)
    for module in PEERS:
        patch.setitem(sys.modules, module, None)
    gc.freeze()  # garbage is collected between optimizers
    yield
    gc.unfreeze()


def bench(folder: Path, *words: str) -> dict[str, Any]:
    """The JSON of a run of the command, its rows by name."""
    file = folder / "bench.json"
    main(["bench", *words, "--repeats", "2", "--threads", "1", "--json", str(file)])
    seen = json.loads(file.read_text())
    return {**seen, "rows": {row["name"]: row for row in seen["rows"]}}


def held(ranks: int, rank: int) -> int:
    """Elements that FSDP gives to a rank, straight from the model's shapes."""
    with torch.device("meta"):
        shapes = [param.shape for param in Transformer(model_args("adam_mini_debug")).parameters()]
    pieces = (torch.empty(shape, device="meta").chunk(ranks) for shape in shapes)
    return sum(piece[rank].numel() for piece in pieces if rank < len(piece))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole table for the second of two ranks."""
    return bench(tmp_path_factory.mktemp("bench"), str(CONFIG), "--ngpu", "2", "--rank", "1")


def test_the_ranks_parts_add_up_to_the_model(whole: dict[str, Any]) -> None:
    first = call(command._read_rank_params, ["--job.config_file", str(CONFIG)], 2, 0, None)
    assert [first.numel, whole["parameters"]] == [held(2, 0), held(2, 1)]
    assert first.numel + whole["parameters"] == held(1, 0) == 1_435_040


def test_the_caption_names_everything(whole: dict[str, Any]) -> None:
    seen = whole
    assert (seen["ngpu"], seen["rank"], seen["layers"], seen["dtypes"]) == (2, 1, [4, 4], ["float32"])
    assert (seen["torch"], seen["model"], seen["tensors"]) == (torch.__version__, "llama3 adam_mini_debug", 39)
    assert seen["command"].startswith(f"titan-adam-mini bench {CONFIG} --ngpu 2 --rank 1 --repeats 2 --threads 1")
    assert seen["copy_bytes_per_second"] > 0 and len(seen["copy_ms"]) == 2
    said = "\n".join(tables.caption(seen))
    for words in (
        "rank 1 of 2",
        f"{seen['parameters']:,} parameters in 39 tensors",
        seen["device"],
        "not timed",
        "own DTensors",
    ):
        assert words in said


def test_state_bytes(whole: dict[str, Any]) -> None:
    per_parameter = {name: row["state_bytes_per_parameter"] for name, row in whole["rows"].items()}
    for name, bytes_ in (
        ("AdamW fused", 8),
        ("AdamW foreach", 8),
        ("AdamW fused on DTensors", 8),
        ("AdamMini fused, float32", 4),
        ("AdamMini foreach", 4),
        ("AdamMini fused, bfloat16", 2),
    ):
        assert bytes_ < per_parameter[name] < bytes_ + 0.03, "and the second moments of blocks, and counters"


def test_every_row_says_what_was_seen(whole: dict[str, Any]) -> None:
    seen = whole
    rows = seen["rows"]
    for name in ("torchao AdamW8bit", "bitsandbytes AdamW8bit", "flashoptim FlashAdamW"):
        assert rows[name]["status"] == "not installed" and rows[name]["median_ms"] is None
    authors = rows["adam-mini, the authors'"]
    assert authors["status"] == "failed", "two ranks cut five heads"
    assert authors["note"].startswith("RuntimeError: shape '[-1, 5120]' is invalid")
    int8 = rows["AdamMini fused, int8"]
    assert int8["status"] == "measured" or int8["note"].startswith("ValueError: momentum_dtype")
    for name, row in rows.items():
        if row["status"] == "measured":
            assert len(row["ms"]) == 2 and row["p10_ms"] <= row["median_ms"] <= row["p90_ms"], name
            assert row["ns_per_parameter"] == pytest.approx(row["median_ms"] * 1e6 / seen["parameters"])
            moved = 12 * seen["parameters"] + 2 * row["state_bytes"]
            share = moved / (row["median_ms"] / 1e3) / seen["copy_bytes_per_second"]
            assert row["share_of_copy"] == pytest.approx(share) and row["launches"] is None
    assert rows["AdamW fused"]["ratio"] == 1


def test_the_exchange_is_the_real_one(whole: dict[str, Any]) -> None:
    """Four layers of two norms, queries and keys, and the last norm: a row sum per row, a slot each for presence."""
    rows_cut = 4 * (2 * 160 + 2 * 160) + 160
    # Parameters that nothing cuts have no slot: every other one's blocks are whole rows.
    seen = whole
    for name in ("AdamMini fused, float32", "AdamMini foreach"):
        row = seen["rows"][name]
        assert row["collectives"] == 1
        assert 4 * rows_cut <= row["collective_bytes"] <= 4 * (rows_cut + 39), row["collective_bytes"]
    for name in ("AdamW fused", "AdamW fused on DTensors"):
        assert seen["rows"][name]["collectives"] == 0


def test_the_last_of_three_ranks_holds_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = bench(tmp_path, str(CONFIG), "--ngpu", "3", "--rank", "2", "--only", "adammini foreach")
    assert seen["parameters"] == held(3, 2) < held(3, 0)
    assert list(seen["rows"]) == ["AdamW fused", "AdamMini foreach"]
    assert seen["rows"]["AdamMini foreach"]["collectives"] == 1
    printed = capsys.readouterr().out
    assert "rank 2 of 3" in printed and "AdamMini foreach" in printed and "layers kept" not in printed


def test_four_ranks_and_a_shorter_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.flavor", "debugmodel", "--ngpu", "4", "--layers", "2", "--only", "foreach"]
    even = bench(tmp_path, *words, "--job.config_file", str(CONFIG), "--parallelism.tensor_parallel_degree", "2")
    assert (even["layers"], even["model"]) == ([2, 6], "llama3 debugmodel")
    assert "2 of its 6 layers kept" in capsys.readouterr().out
    assert even["rows"]["AdamMini foreach"]["collectives"] == 2, "one per axis: 16 heads fit both, norms neither"


def test_one_rank_has_plain_tensors(tmp_path: Path) -> None:
    seen = bench(tmp_path, str(CONFIG), "--ngpu", "1", "--dtype", "bfloat16", "--only", "AdamW,float32,authors")
    assert seen["parameters"] == held(1, 0) and seen["dtypes"] == ["bfloat16"]
    assert "AdamW fused on DTensors" not in seen["rows"]
    assert "all step plain tensors" in "\n".join(tables.caption(seen))
    assert 4 <= seen["rows"]["AdamW fused"]["state_bytes_per_parameter"] < 4.01, (
        "AdamW's state has the parameter's type"
    )
    assert seen["rows"]["AdamMini fused, float32"]["state_bytes_per_parameter"] > 4
    assert seen["rows"]["adam-mini, the authors'"]["status"] == "measured"
    assert all(row["collectives"] == 0 for row in seen["rows"].values())


def test_the_configuration_is_not_mistaken_for_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ["--job.config_file", "x.toml"]
    for words, rest in (
        (["x.toml", "--ngpu", "2"], ["--ngpu", "2"]),
        (["x", "--ngpu", "2"], ["--ngpu", "2"]),
        (["--ngpu", "2", "x.toml"], ["--ngpu", "2"]),
        (["--model.flavor", "8B", *config], ["--model.flavor", "8B"]),
    ):
        config[1] = next(word for word in words if word[0] == "x")
        assert _config_in_place(words) == (config, [config[1], *rest])
    assert _config_in_place(["--model.flavor", "8B"]) == ([], ["", "--model.flavor", "8B"])
    monkeypatch.setenv("CONFIG_FILE", "env.toml")
    assert _config_in_place(["--model.flavor", "8B"])[1] == ["env.toml", "--model.flavor", "8B"]
    assert _config_in_place(["x.toml"])[1] == ["x.toml"], "what is on the command line counts"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ngpu", "2"], "give CONFIG.toml or --job.config_file X, or set CONFIG_FILE=X"),
        (["none.toml", "--ngpu", "2"], "there is no configuration none.toml"),
        ([str(CONFIG)], "give --ngpu N, or set NGPU=N"),
        ([str(CONFIG), "--ngpu", "0"], "must be a positive number, not 0"),
        ([str(CONFIG), "--ngpu", "4", "--rank", "4"], "--rank 4 is not one of 4 ranks: they are 0 to 3"),
        ([str(CONFIG), "--ngpu", "2", "--repeats", "1"], "--repeats must be 2 or more"),
        ([str(CONFIG), "--ngpu", "2", "--threads", "0"], "--threads must be 1 or more"),
        ([str(CONFIG), "--ngpu", "2", "--device", "cuda"], "torch finds no GPU here"),
        ([str(CONFIG), "--ngpu", "2", "--json", "no/such/folder/x.json"], "its folder does not exist"),
        ([str(CONFIG), "--ngpu", "2", "--model.flavor", "huge"], "no flavor 'huge': it has"),
        ([str(CONFIG), "--ngpu", "2", "--layers", "5"], "the model has 4 layers"),
        ([str(CONFIG), "--ngpu", "3", "--parallelism.tensor_parallel_degree", "2"], "cannot build this configuration"),
        ([str(CONFIG), "--ngpu", "2", "--no.such.flag", "2"], "torchtitan does not take these arguments"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_sentence(words: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words])
    assert ended.value.code == 1
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("titan-adam-mini: ")]
    assert len(error) == 1 and told in error[0], error


def test_a_part_that_does_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "bytes_free", lambda _: 2**20)
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(CONFIG), "--ngpu", "2"])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert f"rank 0's {held(2, 0):,} parameters need 0.0 GiB" in error and "0.0 GiB are free on cpu" in error
    assert "--layers" in error and "--ngpu" in error
