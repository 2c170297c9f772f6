"""`titan-adam-mini inspect` on torchtitan's own AdamW runs, and its sentences."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from forked import CONFIG, HALF, SEQ_LEN, STEPS, Trainer

from titan_adam_mini.cli import main

SMALL = ["--model.flavor", "adam_mini_debug"]


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *words])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "titan-adam-mini: " in error and "Traceback" not in error
    return error.partition("titan-adam-mini: ")[2]


def test_flags_that_cannot_be_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONFIG_FILE", raising=False)
    config = str(CONFIG)
    for words, told in (
        (["--steps", "3"], "the model is not known"),
        (["no.toml", "--steps", "3"], "there is no configuration no.toml"),
        ([config], "give one source: --checkpoint outputs/checkpoint/step-N, or --steps N"),
        ([config, "--steps", "3", "--checkpoint", "x"], "give one source"),
        ([config, "--steps", "0"], "--steps must be 1 or more, not 0"),
        ([config, "--steps", "1", "--ngpu", "0"], "must be a positive number, not 0"),
        ([config, "--checkpoint", str(tmp_path / "step-9")], "is not a folder: a checkpoint is a folder such as"),
        ([config, "--checkpoint", str(tmp_path)], "is not a complete checkpoint"),
        ([config, "--steps", "1", "--out", str(tmp_path / "a" / "b")], "its folder does not exist"),
        ([config, "--steps", "1", "--json", str(tmp_path / "a" / "b.json")], "its folder does not exist"),
    ):
        assert told in refused(capsys, words)
    (tmp_path / "run").mkdir()
    assert "torchtitan would resume" in refused(capsys, [config, "--steps", "1", "--out", str(tmp_path)])


@pytest.mark.slow
def test_a_checkpoint_of_a_run(
    trainer: Trainer, adamw: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trainer.checkpoint("adamw", STEPS)
    out, file = tmp_path / "out", tmp_path / "told.json"
    main(["inspect", "--checkpoint", str(path), str(CONFIG), "--out", str(out), "--json", str(file), *SMALL])
    printed, told = capsys.readouterr().out, json.loads(file.read_text())
    assert told["model"] == "llama3 adam_mini_debug" and told["source"] == str(path)
    assert len(told["parameters"]) == 4 * 9 + 3 and len(told["patterns"]) == 9 + 3
    assert all(one["step"] == STEPS for one in told["parameters"])
    for one in told["patterns"]:
        assert one["pattern"] in printed
        assert 0 < one["candidates"]["default"]["noise"] < 100 and one["candidates"]["default"]["distance"] > 0
        if len(one["shape"]) == 2:
            assert one["candidates"]["factored"]["noise"] < one["candidates"]["tensor"]["noise"]
    assert (out / "heat_map.png").is_file()
    assert refused(capsys, ["--checkpoint", str(path), str(CONFIG), "--model.flavor", "debugmodel"]).count("\n") == 1
    seed = trainer.checkpoint("seed", 0)
    assert "contains the model only" in refused(capsys, ["--checkpoint", str(seed), str(CONFIG), *SMALL])
    half = ["--checkpoint", str(trainer.checkpoint("adamw", HALF)), str(CONFIG), *SMALL, "--json"]
    main(["inspect", *half])
    assert json.loads(capsys.readouterr().out)["parameters"][0]["step"] == HALF


@pytest.mark.nightly
def test_a_short_run(
    corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("NGPU", "2")
    data = ["--model.hf_assets_path", str(corpus_dir / "tokenizer")]
    data += ["--training.dataset_path", str(corpus_dir / "train-2"), "--training.seq_len", str(SEQ_LEN)]
    words = ["--steps", "3", str(CONFIG), "--json", *SMALL, *data, "--training.local_batch_size", "2"]
    main(["inspect", *words])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert all(one["step"] == 3 for one in told["parameters"])
    assert os.listdir(tmp_path / "temporary") == [], "the run is gone"


@pytest.mark.nightly
def test_a_short_run_that_fails(
    corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGPU", "1")
    data = ["--model.hf_assets_path", str(corpus_dir / "tokenizer"), "--training.seq_len", str(SEQ_LEN)]
    error = refused(capsys, ["--steps", "3", str(CONFIG), *SMALL, *data, "--training.dataset", "none"])
    assert "the AdamW run ended with status 1: " in error and "Dataset none is not supported" in error
    log = Path(error.rpartition("its log is ")[2].strip().rstrip(")"))
    assert "Dataset none" in log.read_text()
