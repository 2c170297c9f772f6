"""Flags that several commands have: the configuration, the number of ranks, output files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ..files import atomic_write

ConfigFile = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.toml")]
"""torchtitan's configuration, "" if none is given."""

STDOUT = "-"

JsonFile = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[FILE]",
        instance_from_str=lambda words: _json_target(words),
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [value] if value else [],
    ),
]
"""`--json [FILE]`: a file; STDOUT for the flag alone, which replaces the tables; None without the flag."""


def _json_target(words: list[str]) -> str:
    if len(words) > 1:
        raise ValueError(f"--json takes one file, not {' '.join(words)}")
    return words[0] if words else STDOUT


def check_config(config: str) -> None:
    """Raise ValueError if there is no such configuration."""
    if not config:
        raise ValueError("the model is not known: give CONFIG.toml or --job.config_file X, or set CONFIG_FILE=X")
    if not Path(config).is_file():
        raise ValueError(f"there is no configuration {config}")


def number_of_ranks(given: int | None) -> int:
    """`--ngpu`, or the environment's NGPU. Raises ValueError if there is neither, or if it is not a positive number."""
    word = str(given) if given is not None else os.environ.get("NGPU", "")
    if not word:
        raise ValueError("the number of ranks is not known: give --ngpu N, or set NGPU=N")
    if not word.isdecimal() or int(word) < 1:
        raise ValueError(f"the number of ranks must be a positive number, not {word}")
    return int(word)


def ranks_of_a_run(given: int | None) -> int:
    """`number_of_ranks` for commands that train: one rank if neither is given."""
    return number_of_ranks(given) if given is not None or os.environ.get("NGPU") else 1


def check_file(flag: str, file: str | Path | None) -> None:
    """Raise ValueError if a file could not be written there; None and STDOUT are always accepted."""
    if file and file != STDOUT:
        _check_parent(flag, Path(file))
        if Path(file).is_dir():
            raise ValueError(f"{flag} {file} is a folder: name a file in it")


def check_folder(flag: str, folder: Path | None) -> None:
    """Raise ValueError if a folder could not be created there; None is always accepted."""
    if folder:
        _check_parent(flag, folder)
        if folder.is_file():
            raise ValueError(f"{flag} {folder} is a file: name a folder")


def _check_parent(flag: str, path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: its folder does not exist")


def write_json(file: str, data: dict[str, Any]) -> None:
    """Write JSON to a file, or to standard output if `file` is STDOUT."""
    text = json.dumps(data, indent=1) + "\n"
    if file == STDOUT:
        sys.stdout.write(text)
    else:
        atomic_write(file, text)
