"""Replaces functions of torchtitan once, with access to the original."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from titan_adam_mini.titan.private import attribute

_MARK = "titan_adam_mini_replacement"


def replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Make ``owner.name`` call `replacement`, with the previous function as its first argument.

    A second call changes nothing, even after `replacement`'s module was reloaded.

    Args:
        owner: a module or a class of torchtitan.
        name: a function or a method of it.
        replacement: a module-level function.

    Raises:
        ImportError: this torchtitan has no such name.
    """
    found = attribute(owner, name)
    key = f"{replacement.__module__}.{replacement.__qualname__}"
    if any(getattr(layer, _MARK, None) == key for layer in _layers(found)):
        return

    @functools.wraps(found)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(found, *args, **kwargs)

    setattr(replaced, _MARK, key)
    setattr(owner, name, replaced)


def original_of(owner: Any, name: str) -> Any:
    """``owner.name`` before any replacement of ours."""
    found = attribute(owner, name)
    for layer in list(_layers(found)):
        if hasattr(layer, _MARK):
            found = layer.__wrapped__
    return found


def _layers(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)
