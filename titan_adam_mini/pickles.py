"""Pickles from files that anybody may have written: nothing is made but what is on a list, and nothing is run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from io import BytesIO
from typing import Any

HELD = "titan_adam_mini"
"""The key that a run with our torchtitan import adds to a memory snapshot: `optimizer`, its name, and `tensors`, a list
of (address, bytes, category) of what it holds."""


class NotAllowed(ValueError):
    """A pickle asks for a class or function that is not on the list; its text is the name, such as "os.system"."""


def unpickle(content: bytes, allowed: Mapping[str, Any] | None = None) -> Any:
    """What a pickle holds: containers, numbers and text, and what `allowed` names.

    Args:
        content: the pickle.
        allowed: "module.name" -> a class or function that may be called with any arguments.

    Raises:
        NotAllowed: it asks for something else, of which nothing was made.
        pickle.UnpicklingError: it is damaged, or no pickle.
    """
    try:
        return _Unpickler(content, allowed or {}).load()
    except NotAllowed:
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, allowed: Mapping[str, Any]) -> None:
        super().__init__(BytesIO(content))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self._allowed:
            raise NotAllowed(full)
        return self._allowed[full]
