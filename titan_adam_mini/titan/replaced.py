"""A function of ours in the place of one of torchtitan's, put there once, with torchtitan's own at hand."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from titan_adam_mini.titan.private import attribute

_MARK = "titan_adam_mini_replacement"


def replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Make ``owner.name`` call `replacement`, with what was there before as its first argument.

    A second call changes nothing, also after `replacement`'s module was loaded again.

    Args:
        owner: a module or a class of torchtitan.
        name: a function or a method of it.
        replacement: a function of a module; its name and docstring say what it does.

    Raises:
        ImportError: this torchtitan has no such name.
    """
    found = attribute(owner, name)
    key = f"{replacement.__module__}.{replacement.__qualname__}"
    if any(getattr(one, _MARK, None) == key for one in _layers(found)):
        return

    @functools.wraps(found)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(found, *args, **kwargs)

    setattr(replaced, _MARK, key)
    setattr(owner, name, replaced)


def original_of(owner: Any, name: str) -> Any:
    """What ``owner.name`` was before anything of ours came there."""
    found = attribute(owner, name)
    for one in list(_layers(found)):
        if hasattr(one, _MARK):
            found = one.__wrapped__
    return found


def _layers(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)
