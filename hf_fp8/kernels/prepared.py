"""Calls of the native weight-only kernel with everything but the input prepared, found again by the memory of their operands.

A call holds addresses and sizes, nothing derived from values, so it cannot be stale: other operands in the same memory, of the
same shape and dtype, are what it reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..formats import native
from ..formats.code_types import INT4
from . import native as native_kernels
from . import selection
from .base import Problem, Weight
from .thresholds import native_limit, packed_limit

# Address, shape, strides, dtype, and whether the numbers are the negatives of what is stored.
Memory = tuple[int, torch.Size, tuple[int, ...], torch.dtype, bool]
# Calls that are kept: a model has up to a thousand linears, but weights that are offloaded are elsewhere at each call.
_MOST = 8192


class Call(NamedTuple):
    """A prepared product, for inputs of `run.dtype` with up to `limit` rows."""

    run: native.Prepared
    limit: int

    def takes(self, x: torch.Tensor) -> bool:
        """Whether it can compute with this input, a tensor with memory: its dtype, shape and layout."""
        run = self.run
        return (
            x.is_cpu
            and x.dtype == run.dtype
            and not x.is_neg()
            and x.is_contiguous()
            and x.ndim > 0
            and 0 < x.numel() <= self.limit * run.k
            and x.shape[-1] == run.k
        )


_calls: dict[tuple[object, ...], Call | None] = {}
native.on_change(_calls.clear)


def prepared(x: torch.Tensor, w: Weight, scheme: str, backend: str) -> Call | None:
    """For inputs like x (..., K); None if another kernel is selected for them, or operands would be converted first.

    Takes 4 us on an AMD EPYC 7003, where selecting a kernel and describing its operands takes 22.
    """
    used = (w.codes, w.scale, w.bias, w.zero_point)
    if not x.is_cpu or w.column_groups is not None or not all(t is None or t.is_cpu for t in used):
        return None
    operands = tuple(None if t is None else _memory(t) for t in used)
    key = (x.dtype, x.shape[-1], scheme, backend, selection.forced(), native.state(), *operands)
    try:
        return _calls[key]
    except KeyError:
        if len(_calls) >= _MOST:
            _calls.clear()
        found = _calls[key] = _prepare(x.dtype, x.shape[-1], w, backend)
        return found


def _memory(tensor: torch.Tensor) -> Memory:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg()


def _prepare(dtype: torch.dtype, k: int, w: Weight, backend: str) -> Call | None:
    # Fake tensors, and such whose memory was freed, have the address 0.
    if dtype not in native.DTYPES or not all(t is None or t.data_ptr() for t in (w.codes, w.scale, w.bias, w.zero_point)):
        return None
    choice = selection.select(Problem(w.codes.device, w.scheme, w.codes.shape[0], k, dtype), backend)
    if native_kernels.WEIGHT_ONLY not in (choice.kernel, choice.small):
        return None
    limit = native_limit(dtype) if choice.kernel is native_kernels.WEIGHT_ONLY else min(choice.limit, native_limit(dtype))
    granularity, columns = w.scheme.weight.granularity, None
    if w.scheme.weight.packed:
        if w.scheme.weight.dtype != INT4:
            return None
        limit, columns = min(limit, packed_limit()), k
    try:
        return Call(native.Prepared(w.codes, w.scale, granularity, w.bias, dtype, k=columns, zero_points=w.zero_point), limit)
    except ValueError:
        return None
