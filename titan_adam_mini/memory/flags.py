"""The flag `--json [FILE]`, alike in all commands about memory: alone it takes the place of the tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

STDOUT = "-"

JsonFile = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[FILE]",
        instance_from_str=lambda words: _one(words),
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [value] if value else [],
    ),
]
"""A file; STDOUT for the flag alone; None without the flag."""


def _one(words: list[str]) -> str:
    if len(words) > 1:
        raise ValueError(f"--json takes one file, not {' '.join(words)}")
    return words[0] if words else STDOUT


def check_folder(flag: str, file: str | Path | None) -> None:
    """Raise ValueError if a file could not be written for want of its folder."""
    if file and file != STDOUT and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"{flag} {file}: its folder does not exist")


def write_json(file: str, told: dict[str, Any]) -> None:
    """Write to a file, or to standard output."""
    written = json.dumps(told, indent=1) + "\n"
    if file == STDOUT:
        sys.stdout.write(written)
    else:
        Path(file).write_text(written)
