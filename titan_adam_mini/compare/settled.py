"""What a comparison's folder was made with, so that the same command goes on there and another one does not."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import atomic_write
from .variants import Settings, counts, unlike

FILE, LOCK = "compare.json", "lock"
_SHOWN = 4


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Make the folder, and be the only command at work in it. Raises ValueError if that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / LOCK, "a")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another compare is at work in {out}") from None
        except OSError as error:
            raise ValueError(f"files in {out} cannot be locked ({error.strerror}): choose another --out") from None
        yield


def settle(out: Path, settings: Mapping[str, Settings], common: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what all runs in a folder have in common; what was kept before counts.

    More variants may join those that are there.

    Args:
        out: the folder.
        settings: variant -> its settings, as `settings_of` has them.
        common: what is the same for all runs: `ranks` and `slurm` must be what they were, `threads` is kept.

    Returns:
        `common` as it was at the first start.

    Raises:
        ValueError: the folder was made with another configuration; what differs is named.
    """
    file = out / FILE
    kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {**common, "variants": {}}
    told = [] if kept["ranks"] == common["ranks"] else [f"{kept['ranks']} ranks there, {common['ranks']} here"]
    if kept["slurm"] != common["slurm"]:
        told.append("they are Slurm's: add --slurm" if kept["slurm"] else "they are not Slurm's: leave out --slurm")
    kept["variants"] = {name: {key: one[key] for key in one if counts(key)} for name, one in kept["variants"].items()}
    for name in settings.keys() & kept["variants"].keys():
        there, here = kept["variants"][name], settings[name]
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                told.append(f"{name}: {key} {there.get(key)!r} there, {here.get(key)!r} here")
    if not told:
        told += unlike({**kept["variants"], **settings})
    if told and not (out / "runs").exists() and not any(out.glob("sweep-*.txt")):  # nothing has been run, or will be
        for seed in (out / "seeds").glob("seed-*") if file.is_file() else ():  # a folder that compare made
            shutil.rmtree(seed, ignore_errors=True)
        kept, told = {**common, "variants": {}}, []
    if told:
        more = f", and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
        raise ValueError(
            f"{out} has runs of another configuration ({'; '.join(told[:_SHOWN])}{more}): name another folder with "
            "--out, or give the settings it was made with"
        )
    kept["variants"] |= settings
    atomic_write(file, json.dumps(kept, indent=1) + "\n")
    return {name: kept[name] for name in common}
