"""Replaces attributes of other libraries: for the whole process (`patch`, `wrap`, `restore`), or of one object (`bind`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from typing import Any

_patched: list[tuple[Any, str, Any]] = []  # (owner, name, original value)
_lasting: list[tuple[Any, str, Callable[..., Any]]] = []  # arguments of `wrap`, for `wrap_again`


def patch(owner: Any, name: str, new: Any) -> None:
    """Replace the attribute `name` that a module or class defines itself. Does nothing if it is replaced already.

    Raises KeyError if `owner` does not define it.
    """
    before = vars(owner)[name]
    if not is_patched(owner, name):
        _patched.append((owner, name, before))
        setattr(owner, name, new)


def wrap(owner: Any, name: str, function: Callable[..., Any], *, lasting: bool = False) -> None:
    """Replace the method or function `name` by one that calls ``function(replaced, *args, **kwargs)``.

    A method gets its instance, and a class method its class, after `replaced`. Signature and source still look like those of
    what was replaced. Does nothing if it is replaced already. lasting: `wrap_again` wraps it again after `restore`.
    """
    if is_patched(owner, name):
        return
    before = vars(owner)[name]
    replaced = getattr(before, "__func__", before)
    new = calling(function, replaced)
    patch(owner, name, new if replaced is before else type(before)(new))
    if lasting and (owner, name, function) not in _lasting:
        _lasting.append((owner, name, function))


def wrap_everywhere(module: str, name: str, function: Callable[..., Any]) -> None:
    """`wrap` a function of a module, and in every module that has imported it, users' modules included, by any name."""
    owner = import_module(module)
    if is_patched(owner, name):
        return
    replaced = vars(owner)[name]
    wrapper = calling(function, replaced)
    for known in list(sys.modules.values()):
        for leaf in [leaf for leaf, held in list(getattr(known, "__dict__", {}).items()) if held is replaced]:
            patch(known, leaf, wrapper)


def calling(function: Callable[..., Any], replaced: Callable[..., Any]) -> Callable[..., Any]:
    """``function(replaced, ...)`` as a function that looks like `replaced`."""

    @wraps(replaced)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(replaced, *args, **kwargs)

    return wrapper


def wrap_again() -> None:
    """Repeat each `wrap` that is `lasting`."""
    for owner, name, function in _lasting:
        wrap(owner, name, function)


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


def bind_once(instance: Any, name: str, function: Callable[..., Any]) -> None:
    """`bind`, unless it was done before: others may have replaced the method since (hooks of accelerate)."""
    bound = vars(instance).setdefault("_hf_fp8_bound", [])
    if name not in bound:
        bound.append(name)
        bind(instance, name, function)


def original(instance: Any, name: str) -> Any:
    """The class's method that `bind` replaced on `instance`; a partial, which torch.compile can trace."""
    return partial(getattr(type(instance), name), instance)
