"""What is compared: optimizers with settings of their own, and the words that torchtitan's trainer gets for each."""

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
"""What a variant may be called: its runs lie in a folder of that name."""
_ALIKE = (
    *("model.", "validation.", "training.steps", "training.seq_len", "training.local_batch_size"),
    *("training.global_batch_size", "training.dataset", "data_ranks"),
)
"""How the names of settings begin that all variants have in common."""
_IDLE = (
    *("job.config_file", "job.description", "job.dump_folder", "optimizer.lr", "debug.seed"),
    *("comm.", "metrics.", "profiling.", "checkpoint.interval", "checkpoint.keep_latest_k", "checkpoint.async_mode"),
)
"""How the names of settings begin that say nothing of a run's numbers, or that every run has its own of."""

Settings = Mapping[str, Any]
"""A variant's `section.key` -> value, as JSON has it, and `data_ranks`: how many ranks read data of their own."""


@dataclass(frozen=True)
class Variant:
    """An optimizer with settings of its own.

    Attributes:
        name: in reports, and of its folder.
        optimizer: torchtitan's `optimizer.name`.
        words: more of torchtitan's command line, such as `("--optimizer.weight_decay", "0")`.
    """

    name: str
    optimizer: str
    words: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The words that make a run one of this variant."""
        return ["--optimizer.name", self.optimizer, *self.words]


def parse(optimizers: str, variants: Sequence[str]) -> list[Variant]:
    """The variants of `--optimizers A,B` and of every `--variant "NAME=OPTIMIZER --section.key value"`, in this order.

    Raises:
        ValueError: an unknown optimizer, a name that stands twice or cannot be a folder's, nothing to compare.
    """
    found = [Variant(name, _known(name)) for name in (one.strip() for one in optimizers.split(",")) if name]
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
    names = [one.name for one in found]
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


def trainer_words(config: str, given: Sequence[str]) -> list[str]:
    """The words that all runs have in common, the user's last.

    AdamMini and its knobs are made known to torchtitan where neither file nor command line does.

    Args:
        config: the TOML file.
        given: the user's words, `--job.config_file X` first.
    """
    text = Path(config).read_text(encoding="utf-8")
    if "{seed}" in text:
        raise ValueError(
            f"{config} says {{seed}}, which is filled in on the command line only: give that setting there"
        )
    try:
        toml = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{config} is no TOML file: {error}") from None
    words = list(given[:2])
    for section, key, module in (
        ("experimental", "custom_import", "titan_adam_mini.titan"),
        ("job", "custom_config_module", "titan_adam_mini.titan.job_config"),
    ):
        flag = f"--{section}.{key}"
        told = any(word.partition("=")[0].replace("-", "_") == flag.replace("-", "_") for word in given)
        if not told and not toml.get(section, {}).get(key):
            words += [flag, module]
    return [*words, "--debug.deterministic", *given[2:]]


def settings_of(config: Mapping[str, Any], data_ranks: int) -> Settings:
    """What counts of torchtitan's job configuration, a dictionary of sections."""
    flat = json.loads(json.dumps(_flat(config), default=str))
    return {name: value for name, value in flat.items() if counts(name)} | {"data_ranks": data_ranks}


def counts(name: str) -> bool:
    """Whether a setting may change a run's numbers."""
    return not name.startswith(_IDLE)


def unlike(settings: Mapping[str, Settings]) -> list[str]:
    """What keeps variants from being compared, a clause each: another model, data, batch, length or validation."""
    (first, mine), *others = settings.items()
    return [
        f"{key} is {mine.get(key)!r} for {first} and {theirs.get(key)!r} for {name}"
        for name, theirs in others
        for key in sorted(mine.keys() | theirs.keys())
        if key.startswith(_ALIKE) and mine.get(key) != theirs.get(key)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
