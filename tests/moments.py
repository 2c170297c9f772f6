"""Moments in a run of torchtitan's trainer at which a test does something to a rank: the n-th call of a function."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Place = tuple[str, str, str]
"""(module, class or "", function)"""

FILES = "torch.distributed.checkpoint.filesystem"
SAVE = (FILES, "_FileSystemWriter", "prepare_local_plan")
ITEM = (FILES, "", "_write_item")
METADATA = (FILES, "_FileSystemWriter", "finish")
RENAME = (FILES, "FileSystem", "rename")
READ = (FILES, "FileSystemReader", "read_data")
SCHEDULE = ("torch.optim.lr_scheduler", "LambdaLR", "get_lr")
"""Called when the schedule is built, and after every step's update: call 6 is in step 5 of a run that starts anew."""


@dataclass(frozen=True)
class Moment:
    """A call of a function on one rank.

    Attributes:
        rank: which one.
        at: the function.
        call: in which call of it, counted from 1, after `since` was called `times` times.
        after: once the function has done its work, not before.
    """

    rank: int
    at: Place
    call: int = 1
    since: Place | None = None
    times: int = 0
    after: bool = False


def when(moment: Moment, act: Callable[[], Any]) -> None:
    """Call `act` in this process at that moment."""

    def watch(place: Place, seen: Callable[[], None], after: bool) -> None:
        module, owner, name = place
        home: Any = importlib.import_module(module)
        home = getattr(home, owner) if owner else home
        original = getattr(home, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not after:
                seen()
            done = original(*args, **kwargs)
            if after:
                seen()
            return done

        setattr(home, name, watched)

    counts = {"since": 0, "at": 0}

    def one_more() -> None:
        if counts["since"] >= moment.times:
            counts["at"] += 1
            if counts["at"] == moment.call:
                act()

    watch(moment.at, one_more, moment.after)
    if moment.since is not None:
        watch(moment.since, lambda: counts.update(since=counts["since"] + 1), False)
