"""A failure of one rank between two collectives is raised on every rank, so that none waits for it for ever.

torch.distributed.checkpoint does the same for its own work (`_DistWrapper`), but sends the exception itself, which may
not be picklable, and raises every rank's stack trace, which no `except Exception` catches. Here a sentence is sent.
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
    """Whether it is a ValueError: a setting or an input that the user can mend."""


@contextmanager
def failing_together(what: str) -> Iterator[None]:
    """A block of local work; if it raises on any rank, every rank raises, with the words of the first rank that did.

    Collective over the default process group, as the block ends, and every rank must come to it. Blocks may be nested:
    a rank that fails goes to the end of the outermost one at once, the others hear of it at the next end of a block
    that they come to. So the outer block may hold other collectives only directly after the end of an inner one.
    KeyboardInterrupt and SystemExit are not held up: that rank ends, and its launcher ends the others.

    Args:
        what: what the block does, to be read after "rank 1 could not".

    Raises:
        ValueError: the first rank that failed did so with a ValueError; its own words.
        RuntimeError: it failed in another way, or a rank is gone.
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
    """The values of all ranks, in the order of ranks; collective, and raises, as the end of `failing_together` does."""
    return _exchange(None, value)


def _exchange(failure: _Failure | None, value: T) -> list[T]:
    """The one collective of this module, so that any two calls of it can meet."""
    answers: list[Any] = [(failure, value)] * _ranks()
    if len(answers) > 1:
        try:
            dist.all_gather_object(answers, (failure, value))
        except Exception as error:
            raise _known(RuntimeError(f"another rank has ended or does not answer: {_line(error)}")) from error
    if failures := [failure for failure, _ in answers if failure is not None]:
        raise _known(_error(failures))
    return [value for _, value in answers]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _failure(what: str, error: BaseException) -> _Failure:
    rank = dist.get_rank() if _ranks() > 1 else 0
    if isinstance(error, CheckpointException) and error.failures:  # it knows the rank that failed, on every rank
        rank, (error, _) = min(error.failures.items(), key=lambda one: one[0])
    if isinstance(error, ValueError):
        return _Failure(rank, str(error), refused=True)
    return _Failure(rank, f"could not {what}: {_line(error)}", refused=False)


def _error(failures: list[_Failure]) -> Exception:
    first = min(failures)
    ranks = {one.rank for one in failures}
    if len({one.sentence for one in failures}) == 1 and len(ranks) == _ranks():  # what is wrong is so everywhere
        whole = "" if first.refused else "the run " if _ranks() == 1 else f"all {_ranks()} ranks "
        sentence = whole + first.sentence
    else:
        more = f" (and {len(ranks) - 1} more of {_ranks()} ranks failed)" if len(ranks) > 1 else ""
        sentence = f"rank {first.rank}{':' if first.refused else ''} {first.sentence}{more}"
    return ValueError(sentence) if first.refused else RuntimeError(sentence)


def _known(error: Exception) -> Exception:
    setattr(error, _KNOWN, True)
    return error


def _line(error: BaseException) -> str:
    """The kind of an exception, and the first line of what it says."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
