"""What is read from a log of torchtitan's trainer, with its colours and torchrun's prefixes."""

import pytest

from titan_adam_mini.tools.trainer import errors_in, plain, step_in


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
