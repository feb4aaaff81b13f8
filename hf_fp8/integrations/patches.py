"""Replaces attributes of other libraries: for the whole process (`patch`, undone by `restore`), or of one object (`bind`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

_patched: list[tuple[Any, str, Any]] = []  # (owner, name, original value)


def patch(owner: Any, name: str, new: Any) -> None:
    """Replace the attribute `name` that a module or class defines itself. Does nothing if it is replaced already.

    Raises KeyError if `owner` does not define it.
    """
    before = vars(owner)[name]
    if not is_patched(owner, name):
        _patched.append((owner, name, before))
        setattr(owner, name, new)


def is_patched(owner: Any, name: str) -> bool:
    return any(owner is known and name == leaf for known, leaf, _ in _patched)


def restore() -> None:
    """Restore all that `patch` replaced."""
    while _patched:
        owner, name, before = _patched.pop()
        setattr(owner, name, before)


def bind(instance: Any, name: str, function: Callable[..., Any]) -> None:
    """Make ``instance.name(...)`` call ``function(instance, ...)``; its class and other instances are unchanged.

    Uses a `partial`, as accelerate's hooks do: in copies and pickles of the instance it is bound to the copy, which a
    pickled bound method would not be. function: defined at module level, so that it can be pickled.
    """
    vars(instance)[name] = partial(function, instance)


def original(instance: Any, name: str) -> Any:
    """The class's method that `bind` replaced on `instance`; a partial, which torch.compile can trace."""
    return partial(getattr(type(instance), name), instance)
