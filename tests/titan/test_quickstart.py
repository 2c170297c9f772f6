"""The quickstart: its corpus, its reading of the trainer's log, its refusal to report a bad run; and all of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


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


def test_the_trainers_log_is_read(tmp_path: Path) -> None:
    from runs import Run

    run = Run(2, tmp_path / "log")
    tail = "grad_norm:  0.5255  memory:  0.64GiB(2.70%)  tps: 1,584  tflops: 0.01  mfu: 0.00%"
    lines = {
        f"[rank0]:[titan] - root - INFO - step:  1  loss:  8.11787  {tail}": 1,
        f"[rank0]:[titan] - root - INFO - \x1b[31mstep: 10  \x1b[32mloss:  7.5  \x1b[38;2;180;60;0m{tail}\x1b[39m": 10,
        "[rank0]:[titan] - root - INFO - validate step: 10  loss:  7.9000  memory:  0.64GiB(2.70%)  tps: 3,000": None,
        f"[rank0]:[titan] - root - INFO - step: 11  loss:      nan  {tail}": 11,
        "[rank0]:[titan] - root - INFO - Training starts at step 1": None,
    }
    assert [run.read(line + "\n") for line in lines] == list(lines.values())
    assert (run.losses[1], run.losses[10]) == (8.11787, 7.5)
    assert run.losses[11] != run.losses[11]
    assert run.validation == {10: 7.9}
    assert run.tokens_per_second == 2 * 1584
    assert not any("\x1b" in line for line in run.lines)


def run_with(losses: dict[int, float]) -> Any:
    from runs import Run

    return Run(2, Path("some.log"), losses, validation={max(losses): 4.0})


@pytest.mark.parametrize("last", [5.0, float("nan")])
def test_a_loss_that_does_not_fall_fails(last: float) -> None:
    import quickstart
    from runs import RunFailed

    good = run_with({1: 8.0, 2: 4.0})
    with pytest.raises(RunFailed, match="should have fallen"):
        quickstart.check_losses(good, run_with({1: 8.0, 2: last}), 2)
    with pytest.raises(RunFailed, match="stopped at step 1 of 2"):
        quickstart.check_losses(run_with({1: 8.0}), good, 2)


def test_the_summary_says_by_how_much_it_is_worse(capsys: pytest.CaptureFixture[str]) -> None:
    import quickstart

    quickstart.check_losses(run_with({1: 8.0, 2: 4.0}), run_with({1: 8.0, 2: 4.04}), 2)
    assert "1.0% above AdamW's: within 3%" in capsys.readouterr().out
    quickstart.check_losses(run_with({1: 8.0, 2: 4.0}), run_with({1: 8.0, 2: 4.4}), 2)
    assert "10.0% above AdamW's: MORE than" in capsys.readouterr().out


def test_a_failed_run_is_reported_with_its_reason(tmp_path: Path) -> None:
    from runs import RunFailed, train

    with pytest.raises(RunFailed, match=r"(?s)bad ended with status 2.*does not exist.*log: .*bad.log"):
        train("bad", {}, ranks=1, out=tmp_path, config=tmp_path / "nowhere.toml")


def test_switches_on_the_command_line() -> None:
    from runs import arguments

    words = arguments({"training.steps": 3, "checkpoint.enable": True, "checkpoint.last_save_model_only": False})
    assert words == ["--training.steps", "3", "--checkpoint.enable", "--checkpoint.no-last_save_model_only"]


SHOWN = ("optimizer state", "bytes per parameter", "AdamMini's last", "losses differ by at most", 'name = "AdamMini"')


@pytest.mark.slow
def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Shortened, its runs forked."""
    import forked
    import quickstart

    def train(name: str, settings: dict[str, Any], env: Any = None, on_step: Any = None, **more: Any) -> Any:
        run = forked.train(name, settings, **more)
        for step in run.losses if on_step else ():
            on_step(run, step)
        return run

    monkeypatch.setattr(quickstart, "train", train)
    monkeypatch.setattr(quickstart, "SEQ_LEN", forked.SEQ_LEN)
    monkeypatch.setattr(quickstart, "FELL_TO", 0.95)
    quickstart.quickstart(10, 2, tmp_path / "out", tmp_path / "cache")
    printed = capsys.readouterr().out
    assert all(words in printed for words in SHOWN), printed


@pytest.mark.nightly
def test_as_a_user_starts_it(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "launch" / "quickstart.py"
    command = [sys.executable, script, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0 and all(words in done.stdout for words in SHOWN), done.stdout + done.stderr
