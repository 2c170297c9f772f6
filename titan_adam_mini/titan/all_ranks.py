"""Raises a failure of one rank between two collectives on every rank, so that no rank hangs waiting for it.

torch.distributed.checkpoint does the same for its own code (`_DistWrapper`), but sends the exception itself, which may
not be picklable, and raises a BaseException with all stack traces. Here only a message is sent.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")

_KNOWN = "titan_adam_mini_known_on_all_ranks"
"""Set on an exception that every rank raises."""


class _Failure(NamedTuple):
    rank: int
    sentence: str
    refused: bool
    """Whether it is a ValueError: a setting or an input that the user can correct."""


@contextmanager
def failing_together(what: str) -> Iterator[None]:
    """A block of local code; if it raises on any rank, every rank raises, with the message of the first failed rank.

    The end of the block is a collective over the default process group, which every rank must reach. Blocks may be
    nested: a rank that fails goes directly to the end of the outermost block, and the others learn of it at the next
    end of a block. So the outer block may contain other collectives only directly after the end of an inner one.
    KeyboardInterrupt and SystemExit pass through: that rank ends, and its launcher ends the others.

    Args:
        what: what the block does, to complete the sentence "rank 1 could not ...".

    Raises:
        ValueError: the first failed rank raised a ValueError; with its message.
        RuntimeError: it failed in another way, or a rank has ended.
    """
    mine: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as error:
        if getattr(error, _KNOWN, False):
            raise
        mine = error
    try:
        _exchange(None if mine is None else _failure(what, mine), None)
    except Exception as error:
        raise error from mine


def gathered(value: T) -> list[T]:
    """The values of all ranks, by rank; collective, and raises like the end of `failing_together`."""
    return _exchange(None, value)


def _exchange(failure: _Failure | None, value: T) -> list[T]:
    """The only collective of this module, so that any two calls match."""
    answers: list[Any] = [(failure, value)] * _ranks()
    if len(answers) > 1:
        try:
            dist.all_gather_object(answers, (failure, value))
        except Exception as error:
            raise _known(RuntimeError(f"another rank has ended or does not respond: {_line(error)}")) from error
    if failures := [failure for failure, _ in answers if failure is not None]:
        raise _known(_error(failures))
    return [value for _, value in answers]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _failure(what: str, error: BaseException) -> _Failure:
    rank = dist.get_rank() if _ranks() > 1 else 0
    if isinstance(error, CheckpointException) and error.failures:  # it has the failed rank, on every rank
        rank, (error, _) = min(error.failures.items(), key=lambda one: one[0])
    if isinstance(error, ValueError):
        return _Failure(rank, str(error), refused=True)
    return _Failure(rank, f"could not {what}: {_line(error)}", refused=False)


def _error(failures: list[_Failure]) -> Exception:
    first = min(failures)
    ranks = {failure.rank for failure in failures}
    if len({failure.sentence for failure in failures}) == 1 and len(ranks) == _ranks():  # the same failure on all ranks
        subject = "" if first.refused else "the run " if _ranks() == 1 else f"all {_ranks()} ranks "
        sentence = subject + first.sentence
    else:
        more = f" (and {len(ranks) - 1} more of {_ranks()} ranks failed)" if len(ranks) > 1 else ""
        sentence = f"rank {first.rank}{':' if first.refused else ''} {first.sentence}{more}"
    return ValueError(sentence) if first.refused else RuntimeError(sentence)


def _known(error: Exception) -> Exception:
    setattr(error, _KNOWN, True)
    return error


def _line(error: BaseException) -> str:
    """The type of an exception, and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
