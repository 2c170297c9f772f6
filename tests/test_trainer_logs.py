"""What is read from a log of torchtitan's trainer, with its colours and torchrun's prefixes."""

from pathlib import Path

import pytest

from titan_adam_mini.tools.trainer import Run, arguments, errors_in, plain, step_in


def test_steps() -> None:
    step = "\x1b[31m[titan] - root - INFO - \x1b[32mstep:  3  \x1b[1mloss:  7.125  grad_norm: 1.0  tps: 1,234"
    assert step_in(plain(step)) == (3, "7.125")
    assert step_in("step: 5 loss: inf") == (5, "inf"), "a line that is cut short"
    assert step_in("[rank0]:[titan] - root - INFO - validate step:  3  loss:  7.5") is None


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("[rank0]:[rank0]: ValueError: no", ["ValueError: no"]),
        ("  \x1b[31m[rank1]: torch.OutOfMemoryError: 3 GiB", ["torch.OutOfMemoryError: 3 GiB"]),
        ("AssertionError", ["AssertionError"]),
        ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ", []),
        ("Errors: none", []),
    ],
)
def test_errors(line: str, want: list[str]) -> None:
    assert errors_in(["step: 1", line]) == want


def test_a_whole_log(tmp_path: Path) -> None:
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


def test_switches_on_the_command_line() -> None:
    words = arguments({"training.steps": 3, "checkpoint.enable": True, "checkpoint.last_save_model_only": False})
    assert words == ["--training.steps", "3", "--checkpoint.enable", "--checkpoint.no-last_save_model_only"]
