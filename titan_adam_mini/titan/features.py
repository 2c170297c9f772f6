"""Optional changes to torchtitan besides the optimizer; each is off until it is switched on by name.

docs/torchtitan.md lists what each of them replaces.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from titan_adam_mini.titan import curve, device, exit_after_save, snapshots, validation


class Feature(NamedTuple):
    """One change.

    Attributes:
        meaning: its purpose, to complete the sentence "1 for ...".
        install: applies it to torchtitan; a second call changes nothing.
    """

    meaning: str
    install: Callable[[], None]

    @staticmethod
    def variable(name: str) -> str:
        """The environment variable of the feature `name`."""
        return f"TITAN_ADAM_MINI_{name.upper()}"


FEATURES = {
    "cpu": Feature("training on the CPU where there is no accelerator", device.install),
    "signals": Feature("saving and exiting on SIGTERM and SIGUSR1", exit_after_save.install),
    "one_curve": Feature("one TensorBoard curve over all starts of a run", curve.install),
    "same_validation": Feature("validation on the same documents each time", validation.install),
    "named_snapshots": Feature("names of tensors in memory snapshots", snapshots.install),
}
"""Name -> feature."""


_installed: set[str] = set()


def install(*names: str) -> None:
    """Switch features on for this process.

    Raises:
        ValueError: unknown feature.
        ImportError: this torchtitan lacks a function that a feature replaces.
    """
    for name in names:
        if name not in FEATURES:
            raise ValueError(f"titan_adam_mini.titan has no feature {name!r}: valid names are {', '.join(FEATURES)}")
    for name in names:
        FEATURES[name].install()
        _installed.add(name)


def is_installed(name: str) -> bool:
    """Whether the feature `name` was switched on in this process."""
    return name in _installed


def from_environment() -> list[str]:
    """The features whose environment variable is 1. Raises ValueError if one is neither 1 nor 0 nor empty."""
    found = []
    for name, feature in FEATURES.items():
        variable = Feature.variable(name)
        value = os.environ.get(variable, "")
        if value not in ("", "0", "1"):
            raise ValueError(
                f"{variable} = {value!r} is not valid: set it to 1 for {feature.meaning}, to 0, or unset it"
            )
        if value == "1":
            found.append(name)
    return found
