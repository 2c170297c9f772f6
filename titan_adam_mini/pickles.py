"""Safe unpickling of untrusted files: only types on a list are created, and no code is run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from io import BytesIO
from typing import Any


class NotAllowed(ValueError):
    """A pickle refers to a class or function that is not on the list; the message is its name, such as "os.system"."""


def unpickle(content: bytes, allowed: Mapping[str, Any] | None = None) -> Any:
    """The content of a pickle: containers, numbers, text, and objects of the types in `allowed`.

    Args:
        content: the pickle.
        allowed: "module.name" -> a class or function that may be called with any arguments.

    Raises:
        NotAllowed: it refers to anything else; no object of it was created.
        pickle.UnpicklingError: it is damaged, or not a pickle.
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
