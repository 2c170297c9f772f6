"""The variants of a comparison: optimizers with their own settings, and torchtitan's command line for each."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

OPTIMIZERS = ("AdamW", "AdamMini", "Adam")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
"""Valid names of variants: a variant's runs are in a folder of that name."""
_SHARED = (
    *("model.", "validation.", "training.steps", "training.seq_len", "training.local_batch_size"),
    *("training.global_batch_size", "training.dataset", "data_ranks"),
)
"""Prefixes of the settings that must be equal for all variants."""
_IGNORED = (
    *("job.config_file", "job.description", "job.dump_folder", "optimizer.lr", "debug.seed"),
    *("comm.", "metrics.", "profiling.", "checkpoint.interval", "checkpoint.keep_latest_k", "checkpoint.async_mode"),
)
"""Prefixes of the settings that do not affect a run's results, or that differ from run to run."""

Settings = Mapping[str, Any]
"""A variant's `section.key` -> value, as in JSON, and `data_ranks`: the number of ranks that read different data."""


@dataclass(frozen=True)
class Variant:
    """An optimizer with its own settings.

    Attributes:
        name: in reports, and of its folder.
        optimizer: torchtitan's `optimizer.name`.
        flags: more of torchtitan's command line, such as `("--optimizer.weight_decay", "0")`.
    """

    name: str
    optimizer: str
    flags: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The part of torchtitan's command line that is specific to this variant."""
        return ["--optimizer.name", self.optimizer, *self.flags]


def parse(optimizers: str, variants: Sequence[str]) -> list[Variant]:
    """The variants of `--optimizers A,B` and of every `--variant "NAME=OPTIMIZER --section.key value"`, in this order.

    Raises:
        ValueError: an unknown optimizer, a duplicate or invalid name, or nothing to compare.
    """
    found = [Variant(name, _known(name)) for name in (word.strip() for word in optimizers.split(",")) if name]
    for given in variants:
        try:
            words = shlex.split(given)
        except ValueError as error:
            raise ValueError(f"--variant {given!r} cannot be read: {error}") from None
        name, equals, optimizer = (words or [""])[0].partition("=")
        if not equals or not NAME.fullmatch(name):
            raise ValueError(
                f"--variant {given!r} is not of the form 'NAME=OPTIMIZER --section.key value ...', where NAME has "
                "letters, digits and . _ + -"
            )
        found.append(Variant(name, _known(optimizer), tuple(words[1:])))
    names = [variant.name for variant in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two variants are called {name!r}: give one of them another name with --variant NAME=...")
    if not found:
        raise ValueError("there is nothing to compare: name optimizers with --optimizers AdamW,AdamMini")
    return found


def _known(optimizer: str) -> str:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"the optimizer {optimizer!r} is unknown: there are {', '.join(OPTIMIZERS)}")
    return optimizer


def trainer_arguments(config: str, given: Sequence[str]) -> list[str]:
    """The part of torchtitan's command line that all runs share, the user's arguments last.

    Adds the settings that register AdamMini and its options with torchtitan, unless file or command line has them.

    Args:
        config: the TOML file.
        given: the user's arguments, `--job.config_file X` first.
    """
    text = Path(config).read_text(encoding="utf-8")
    if "{seed}" in text:
        raise ValueError(
            f"{config} contains {{seed}}, which is replaced on the command line only: give that setting there"
        )
    try:
        toml = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{config} is not a valid TOML file: {error}") from None
    added = []
    for section, key, module in (
        ("experimental", "custom_import", "titan_adam_mini.titan"),
        ("job", "custom_config_module", "titan_adam_mini.titan.job_config"),
    ):
        flag = f"--{section}.{key}"
        is_given = any(word.partition("=")[0].replace("-", "_") == flag.replace("-", "_") for word in given)
        if not is_given and not toml.get(section, {}).get(key):
            added += [flag, module]
    return [*given[:2], *added, "--debug.deterministic", *given[2:]]


def settings_of(config: Mapping[str, Any], data_ranks: int) -> Settings:
    """The settings of torchtitan's job configuration, a dictionary of sections, that affect a run's results."""
    flat = json.loads(json.dumps(_flat(config), default=str))
    return {name: value for name, value in flat.items() if affects_results(name)} | {"data_ranks": data_ranks}


def affects_results(name: str) -> bool:
    """Whether a setting may change a run's results."""
    return not name.startswith(_IGNORED)


def conflicts(settings: Mapping[str, Settings]) -> list[str]:
    """Why variants cannot be compared, a clause each: they differ in model, data, batch, length or validation."""
    (first, mine), *others = settings.items()
    return [
        f"{key} is {mine.get(key)!r} for {first} and {theirs.get(key)!r} for {name}"
        for name, theirs in others
        for key in sorted(mine.keys() | theirs.keys())
        if key.startswith(_SHARED) and mine.get(key) != theirs.get(key)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
