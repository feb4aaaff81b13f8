"""Finds layers whose weight the model's code reads itself, which then cannot be FP8 codes.

T5 casts its hidden states to ``self.wo.weight.dtype``, Mamba multiplies by ``self.x_proj.weight``:
neither asks the layer. Such code is found by looking at it, not by a list of model names.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache

from torch import nn

_READ = re.compile(r"\bself\.((?:\w+(?:\[\d+\])?\.)*\w+(?:\[\d+\])?)\.weight\b(?!\s*=[^=])")


@cache
def _file_reads(module: str) -> bool:
    """Whether a source file has such code at all: cutting one class out of it takes far longer."""
    if module.partition(".")[0] == "torch" or re.match(r"transformers\.(?!models\.)", module):
        return False
    try:
        return _READ.search(inspect.getsource(sys.modules[module])) is not None
    except (OSError, TypeError, KeyError):  # made at run time: nothing to look at
        return False


@cache
def _reads(cls: type[nn.Module]) -> frozenset[str]:
    """Paths below `cls` whose weight its own methods, or those of its bases, use."""
    found: set[str] = set()
    for base in cls.__mro__:
        if _file_reads(base.__module__):
            found.update(re.sub(r"\[(\d+)\]", r".\1", path) for path in _READ.findall(inspect.getsource(base)))
    return frozenset(found)


def weights_read_directly(model: nn.Module) -> dict[str, str]:
    """Name of a module of `model` -> name of the class whose code reads its weight."""
    found = {}
    for name, module in model.named_modules():
        for path in _reads(type(module)):  # type: ignore[arg-type]  # typeshed thinks that classes cannot be hashed
            found[f"{name}.{path}" if name else path] = type(module).__name__
    return found


def weights_read_by_kernels(model: nn.Module) -> dict[str, str]:
    """The same of what ``use_kernels=True`` may replace by a kernel from the Hub, which reads the parameters of all below.

    The `kernels` package marks such classes; gpt-oss's MLP is one, whose kernel takes its experts for dense.
    """
    found = {}
    for name, module in model.named_modules():
        if hasattr(type(module), "kernel_layer_name"):
            below = (f"{name}.{child}" for child, _ in module.named_modules() if child)
            found.update(dict.fromkeys(below, f"a kernel from the Hub for {type(module).__name__}"))
    return found
