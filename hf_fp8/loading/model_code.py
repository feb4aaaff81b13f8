"""Finds layers whose weight a model's forward reads directly; such layers stay dense.

T5 casts its hidden states to ``self.wo.weight.dtype``, Mamba passes ``self.x_proj.weight`` to a kernel: neither calls the
layer. Such code is found by searching the source, not by a list of model names. Reads in other methods only (diffusers'
``fuse_projections``) do not matter: those get the dequantized weight (`quantized_weight`).
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from typing import Any

from torch import nn

_READ = re.compile(r"\bself\.((?:\w+(?:\[\d+\])?\.)*\w+(?:\[\d+\])?)\.weight\b(?!\s*=[^=])")

_DTYPE = re.compile(_READ.pattern + r"\.dtype\b")
# The dtype of the first parameter of a module, to which inputs are cast.
_FIRST = re.compile(r"\bnext\((?:iter\()?self\.((?:\w+(?:\[\d+\])?\.)*)parameters\(\)\)?\)\.dtype\b")
_OF_SELF = re.compile(r"\b(?:self|super\(\))\.(\w+)")


@cache
def _file_has(module: str, pattern: re.Pattern[str]) -> bool:
    """Whether a source file has such code at all: checked first, as extracting the source of one class takes far longer."""
    if module.partition(".")[0] == "torch" or re.match(r"transformers\.(?!models\.)", module):
        return False
    try:
        return pattern.search(inspect.getsource(sys.modules[module])) is not None
    except (OSError, TypeError, KeyError):  # made at run time: no source
        return False


@cache
def _reads(cls: type[nn.Module]) -> frozenset[str]:
    """Paths below `cls` whose weight its forward reads, directly or through ``self.``, or whose weight's dtype is read."""
    if not any(_file_has(base.__module__, _READ) for base in cls.__mro__):
        return frozenset()
    # A dtype is read to cast inputs to it, so it counts in any method.
    found = {
        path for base in cls.__mro__ if _file_has(base.__module__, _READ) for path in _DTYPE.findall(inspect.getsource(base))
    }
    for name in _run_by_forward(cls):  # type: ignore[arg-type]
        for member in _members(cls, name).values():
            found.update(_READ.findall(_source(member)))
    return frozenset(map(_as_path, found))


@cache
def read_by_methods(cls: type[nn.Module]) -> dict[tuple[type, str], frozenset[str]]:
    """Methods of `cls` that its forward does not use: (class that defines it, name) -> paths below it whose weight it reads."""
    found = {}
    if any(_file_has(base.__module__, _READ) for base in cls.__mro__):
        forward = _run_by_forward(cls)  # type: ignore[arg-type]
        for base in cls.__mro__:
            for name, member in vars(base).items():
                if name in forward or name.startswith("__") or base is nn.Module or not inspect.isfunction(member):
                    continue
                if paths := frozenset(map(_as_path, _READ.findall(_source(member)))):
                    found[base, name] = paths
    return found


@cache
def _run_by_forward(cls: type[nn.Module]) -> frozenset[str]:
    """Names of the methods and properties that forward reaches through ``self.``, including ``forward``."""
    seen, waiting = set[str](), ["forward"]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [of for member in _members(cls, name).values() for of in _OF_SELF.findall(_source(member))]
    return frozenset(seen)


def _members(cls: type[nn.Module], name: str) -> dict[type, Any]:
    return {
        base: vars(base)[name] for base in cls.__mro__ if name in vars(base) and base.__module__.partition(".")[0] != "torch"
    }


def _as_path(found: str) -> str:
    return re.sub(r"\[(\d+)\]", r".\1", found)


def _source(member: Any) -> str:
    """Source of a method or property; "" for other objects and for those made at run time."""
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    if not inspect.isfunction(function := inspect.unwrap(function) if callable(function) else None):
        return ""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def weights_read_directly(model: nn.Module) -> dict[str, str]:
    """Name of a module of `model` -> name of the class whose code reads its weight, or the dtype of it."""
    found = {}
    for name, module in model.named_modules():
        firsts = (_first_below(module, path) for path in _firsts(type(module)))  # type: ignore[arg-type]
        for path in (*_reads(type(module)), *firsts):  # type: ignore[arg-type]  # typeshed thinks that classes cannot be hashed
            if path is not None:
                found[f"{name}.{path}" if name else path] = type(module).__name__
    return found


@cache
def _firsts(cls: type[nn.Module]) -> frozenset[str]:
    """Paths below `cls` ("" for itself) of whose parameters its forward reads the dtype of the first."""
    if not any(_file_has(base.__module__, _FIRST) for base in cls.__mro__):
        return frozenset()
    sources = (_source(m) for name in _run_by_forward(cls) for m in _members(cls, name).values())  # type: ignore[arg-type]
    return frozenset(_as_path(path.removesuffix(".")) for source in sources for path in _FIRST.findall(source))


def _first_below(module: nn.Module, path: str) -> str | None:
    """The name, from `module`, of the module with the first parameter of the one at `path`; None if there is none."""
    below: Any = module
    for part in filter(None, path.split(".")):
        below = getattr(below, part, None)
    held = next(below.named_parameters(), None) if isinstance(below, nn.Module) else None
    return None if held is None else ".".join(filter(None, (path, held[0].rpartition(".")[0])))


def weights_read_by_kernels(model: nn.Module) -> dict[str, str]:
    """The same for modules that ``use_kernels=True`` may replace by a kernel from the Hub, which reads all parameters below.

    The `kernels` package marks such classes. One is the MLP of gpt-oss, whose kernel expects dense experts.
    """
    found = {}
    for name, module in model.named_modules():
        if hasattr(type(module), "kernel_layer_name"):
            below = (f"{name}.{child}" for child, _ in module.named_modules() if child)
            found.update(dict.fromkeys(below, f"a kernel from the Hub for {type(module).__name__}"))
    return found
