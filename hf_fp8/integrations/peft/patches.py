"""Functions put in the place of PEFT's, and taken out again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

_patched: list[tuple[Any, str, Any]] = []  # (owner, name, what was there before)


def patch(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Put ``wrapper(what is there)`` in the place of `name` of a module or class that defines it. Raises KeyError."""
    before = vars(owner)[name]
    if (owner, name) in [(known, leaf) for known, leaf, _ in _patched]:
        return
    _patched.append((owner, name, before))
    setattr(owner, name, wraps(before)(wrapper(before)))


def is_patched() -> bool:
    return bool(_patched)


def restore() -> None:
    while _patched:
        owner, name, before = _patched.pop()
        setattr(owner, name, before)
