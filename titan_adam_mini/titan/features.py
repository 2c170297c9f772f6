"""Changes to torchtitan that a run may have beside the optimizer: each is off until it is asked for by its name.

docs/torchtitan.md says what each of them replaces.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from titan_adam_mini.titan import curve, device, exit_after_save, snapshots, validation


class Feature(NamedTuple):
    """One change.

    Attributes:
        meaning: what it is for, to be read after "1 for".
        install: puts it into torchtitan; a second call changes nothing.
    """

    meaning: str
    install: Callable[[], None]

    @staticmethod
    def variable(name: str) -> str:
        """The environment variable of the feature `name`."""
        return f"TITAN_ADAM_MINI_{name.upper()}"


FEATURES = {
    "cpu": Feature("training on the CPU where there is no accelerator", device.install),
    "signals": Feature("saving and leaving on SIGTERM and SIGUSR1", exit_after_save.install),
    "one_curve": Feature("one TensorBoard curve over all starts of a run", curve.install),
    "same_validation": Feature("validation on the same documents each time", validation.install),
    "named_snapshots": Feature("names of tensors in memory snapshots", snapshots.install),
}
"""Name -> feature."""


_installed: set[str] = set()


def install(*names: str) -> None:
    """Switch features on for this process.

    Raises:
        ValueError: there is no such feature.
        ImportError: this torchtitan lacks what a feature replaces.
    """
    for name in names:
        if name not in FEATURES:
            raise ValueError(f"there is no feature {name!r} of titan_adam_mini.titan: there are {', '.join(FEATURES)}")
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
            raise ValueError(f"{variable} = {value!r} is not valid: it is 1 for {feature.meaning}, 0, or unset")
        if value == "1":
            found.append(name)
    return found
