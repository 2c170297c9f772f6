"""The quickstart: its corpus, its refusal to report a bad run, and all of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def documents(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "documents.jsonl").read_text().splitlines()]


def test_every_document_is_one_sequence(corpus_dir: Path) -> None:
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    wanted = json.loads((corpus_dir / "corpus.json").read_text())["wanted"]
    tokenizer = HuggingFaceTokenizer(str(corpus_dir / "tokenizer"))
    texts = documents(corpus_dir / "train-1")
    assert len(texts) == wanted["steps"] * wanted["global_batch"]
    for text in texts[::37]:
        assert len(tokenizer.encode(text, add_bos=True, add_eos=True)) == wanted["seq_len"] + 1


def test_every_number_of_ranks_sees_the_same_steps(corpus_dir: Path) -> None:
    steps = []
    for ranks in (1, 2, 4):
        texts = documents(corpus_dir / f"train-{ranks}")
        batch, share = 4 // ranks, len(texts) // ranks
        steps.append(
            [
                {texts[rank * share + step * batch + item] for rank in range(ranks) for item in range(batch)}
                for step in range(share // batch)
            ]
        )
    assert steps[0] == steps[1] == steps[2]


def test_held_out_documents_come_from_other_files(corpus_dir: Path) -> None:
    assert not set(documents(corpus_dir / "validation")) & set(documents(corpus_dir / "train-1"))


def test_a_corpus_is_built_once(corpus_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import corpus

    copy = tmp_path / "corpus"
    shutil.copytree(corpus_dir, copy)
    wanted = json.loads((copy / "corpus.json").read_text())["wanted"]
    arguments = {name: wanted[name] for name in ("seq_len", "global_batch", "steps", "ranks", "validation")}
    monkeypatch.setattr(corpus, "train_tokenizer", lambda *_: pytest.fail("it was built again"))
    assert "already built" in corpus.build(copy, **arguments)
    with pytest.raises(pytest.fail.Exception, match="built again"):
        corpus.build(copy, **{**arguments, "steps": wanted["steps"] - 1})


def record(losses: list[float], ranks: int = 2) -> Any:
    from titan_adam_mini.compare.plan import Run
    from titan_adam_mini.compare.record import Record

    return Record(Run("AdamMini", 4e-3, 0), ranks, {"loss": losses}, validation={len(losses): 4.0})


@pytest.mark.parametrize("last", [5.0, float("nan")])
def test_a_loss_that_does_not_fall_fails(last: float) -> None:
    import quickstart

    with pytest.raises(quickstart.Failed, match="should have fallen"):
        quickstart.show_losses(record([8.0, 4.0]), record([8.0, last]), 2)


def test_the_summary_says_by_how_much_it_is_worse(capsys: pytest.CaptureFixture[str]) -> None:
    import quickstart

    quickstart.show_losses(record([8.0, 4.0]), record([8.0, 4.04]), 2)
    assert "1.0% above AdamW's: within 3%" in capsys.readouterr().out
    quickstart.show_losses(record([8.0, 4.0]), record([8.0, 4.4]), 2)
    assert "10.0% above AdamW's: MORE than" in capsys.readouterr().out


def test_one_rank_beside_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import quickstart

    many = record([8.0, 4.0 + 2**-10, 3.0])
    (tmp_path / many.run.folder).mkdir(parents=True)
    (tmp_path / many.run.folder / "train.log").write_text("AdamMini: 39 parameters, 40 heads cut")
    quickstart.show_ranks(record([8.0, 4.0], 1), many, 2, tmp_path)
    assert "1 and 2 ranks       losses differ by at most 9.8e-04 in 2 steps, 40 heads cut" in capsys.readouterr().out


def test_a_comparison_that_fails_ends_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import quickstart

    with pytest.raises(quickstart.Failed, match="the comparison ended with status 1"):
        quickstart.compare("Lion", 1, tmp_path, {})
    assert "the optimizer 'Lion' is unknown" in capfd.readouterr().err


SHOWN = (
    *("Equal starts", "bytes per parameter", "AdamMini's last", "losses differ by at most", "8 heads cut"),
    *("tokens/s", 'name = "AdamMini"'),
)


@pytest.mark.slow
def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Shortened, its runs forked."""
    import forked
    import quickstart
    from comparisons import RUNS, check_comparison

    from titan_adam_mini.cli import main
    from titan_adam_mini.compare import runner

    def run(words: list[str], environment: dict[str, str]) -> int:
        with monkeypatch.context() as patch:
            patch.chdir(quickstart.ROOT)
            patch.setattr(runner, "Training", forked.ForkedTraining)
            main(words)
        return 0

    monkeypatch.setattr(quickstart, "run", run)
    monkeypatch.setattr(quickstart, "SEQ_LEN", forked.SEQ_LEN)
    monkeypatch.setattr(quickstart, "FELL_TO", 0.95)
    quickstart.quickstart(10, 2, tmp_path / "out", tmp_path / "cache")
    printed = capsys.readouterr().out
    assert all(words in printed for words in SHOWN), printed
    out = tmp_path / "out" / "optimizers"
    check_comparison(out, [1, 10], falls_to=1.0)
    assert not any((out / run.folder / "checkpoint").exists() for run in RUNS), "nobody asked for checkpoints"


@pytest.mark.nightly
def test_as_a_user_starts_it_twice(tmp_path: Path) -> None:
    """The second time nothing is trained."""
    command = [sys.executable, LAUNCH / "quickstart.py", "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0 and all(words in done.stdout for words in SHOWN), done.stdout + done.stderr
    assert ": started" not in done.stdout
