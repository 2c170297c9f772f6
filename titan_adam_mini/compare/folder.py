"""The folder of a comparison: its lock, and its settings, so that only the same comparison resumes there."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import atomic_write
from .variants import Settings, affects_results, conflicts

FILE, LOCK = "compare.json", "lock"
_SHOWN = 4


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create the folder and lock it against other commands. Raises ValueError if that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / LOCK, "a")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another compare is running in {out}") from None
        except OSError as error:
            raise ValueError(f"files in {out} cannot be locked ({error.strerror}): choose another --out") from None
        yield


def check_settings(out: Path, settings: Mapping[str, Settings], common: Mapping[str, Any]) -> dict[str, Any]:
    """Check the settings against those in the folder, and store those of new variants.

    Args:
        out: the folder.
        settings: variant -> its settings, from `settings_of`.
        common: settings of all runs: `ranks` and `slurm` must be equal to the stored ones; of `threads` the stored
            number is used.

    Returns:
        `common` as stored by the first command.

    Raises:
        ValueError: the folder has runs of another configuration; the differences are listed.
    """
    file = out / FILE
    stored: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {**common, "variants": {}}
    differences = []
    if stored["ranks"] != common["ranks"]:
        differences.append(f"{stored['ranks']} ranks there, {common['ranks']} here")
    if stored["slurm"] != common["slurm"]:
        differences.append(
            "they run on Slurm: add --slurm" if stored["slurm"] else "they do not run on Slurm: omit --slurm"
        )
    stored["variants"] = {
        name: {key: values[key] for key in values if affects_results(key)}
        for name, values in stored["variants"].items()
    }
    for name in settings.keys() & stored["variants"].keys():
        there, here = stored["variants"][name], settings[name]
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                differences.append(f"{name}: {key} {there.get(key)!r} there, {here.get(key)!r} here")
    if not differences:
        differences += conflicts({**stored["variants"], **settings})
    nothing_run = not (out / "runs").exists() and not any(out.glob("sweep-*.txt"))
    if differences and nothing_run:
        for seed in (out / "seeds").glob("seed-*") if file.is_file() else ():  # a folder that compare made
            shutil.rmtree(seed, ignore_errors=True)
        stored, differences = {**common, "variants": {}}, []
    if differences:
        more = f", and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ValueError(
            f"{out} has runs of another configuration ({'; '.join(differences[:_SHOWN])}{more}): name another folder "
            "with --out, or give the settings it was made with"
        )
    stored["variants"] |= settings
    atomic_write(file, json.dumps(stored, indent=1) + "\n")
    return {name: stored[name] for name in common}
