"""An environment variable that switches one thing on: it belongs to the launch, not to the configuration."""

import os


def switched_on(variable: str, meaning: str) -> bool:
    """Is the variable 1? Raises ValueError, with what 1 means, if it is neither 1 nor 0 nor empty."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable} = {value!r} is not valid: it is 1 for {meaning}, 0, or unset")
    return value == "1"
