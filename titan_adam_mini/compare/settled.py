"""What a comparison's folder was made with, so that the same command goes on there and another one does not."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE, LOCK = "compare.json", "lock"
_LEFT_OUT = ("job.config_file", "job.description", "job.dump_folder", "optimizer.lr", "debug.seed")
"""Settings that say nothing of a run's numbers, or that every run has its own of."""
_SHOWN = 4


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Make the folder, and be the only command at work in it. Raises ValueError if there is another."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another compare is at work in {out}") from None
        yield


def settle(out: Path, configs: Mapping[str, Mapping[str, Any]], common: Mapping[str, int]) -> dict[str, int]:
    """Keep what all runs in a folder have in common; what was kept before counts.

    More variants may join those that are there.

    Args:
        out: the folder.
        configs: variant -> torchtitan's job configuration.
        common: figures that are the same for all runs: `ranks` must be what it was, `threads` is kept.

    Returns:
        `common` as it was at the first start.

    Raises:
        ValueError: the folder was made with another configuration; what differs is named.
    """
    file = out / FILE
    mine = {name: json.loads(json.dumps(_flat(config), default=str)) for name, config in configs.items()}
    kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {**common, "variants": {}}
    told = [] if kept["ranks"] == common["ranks"] else [f"{kept['ranks']} ranks there, {common['ranks']} here"]
    for name in mine.keys() & kept["variants"].keys():
        there, here = kept["variants"][name], mine[name]
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                told.append(f"{name}: {key} {there.get(key)!r} there, {here.get(key)!r} here")
    if told and not (out / "runs").exists():  # nothing has been run with what was there
        shutil.rmtree(out / "seeds", ignore_errors=True)
        kept, told = {**common, "variants": {}}, []
    if told:
        more = f", and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
        raise ValueError(
            f"{out} has runs of another configuration ({'; '.join(told[:_SHOWN])}{more}): name another folder with "
            "--out, or give the settings it was made with"
        )
    kept["variants"] |= mine
    new = file.with_name(f"{FILE}.new")
    new.write_text(json.dumps(kept, indent=1) + "\n")
    os.replace(new, file)
    return {name: kept[name] for name in common}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """section.key -> value, without those that differ from run to run."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        elif name not in _LEFT_OUT:
            flat[name] = value
    return flat
