"""Values that somebody cast to the dtype of codes, told from codes: averages of state dicts, for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .errors import UnsupportedError
from .weight_source import Part, Source

# Codes that replace others with scales as they were, and are this many times smaller, are values that somebody cast to the
# dtype of codes: that makes them smaller by 1 / scale, which is 448 (int8: 127) by the largest weight of a row or block.
SMALLER = 8
# How many codes are looked at for that, the first rows.
_SAMPLE = 2**18
# Whether what is written are codes for certain, so that nobody has to guess.
_certain: ContextVar[bool] = ContextVar("hf_fp8_certain", default=False)


def refuse_own_values(new: torch.Tensor, codes: torch.Tensor, part: Part, source: Source) -> None:
    """Raise UnsupportedError if `new`, which is to replace `codes`, is near the values that these stand for, cast to
    their dtype."""
    if _certain.get():
        return
    if new.shape != codes.shape or new.is_meta or codes.is_meta or not codes.numel() or part.whole is not codes:
        return
    rows = slice(0, min(len(codes), max(1, _SAMPLE // max(1, codes[0].numel()))))
    try:
        decoder = source.decoder(codes)
        held = decoder.decode(codes, decoder.scale, rows, torch.float32)
    except UnsupportedError:  # values that nobody can have read
        return
    given, before = new[rows].float().to(held.device), codes[rows].float()
    size = float(held.norm())
    # int8: values below 0.5 are 0. Scales of 1 are what there is no telling by.
    if size * SMALLER <= float(before.norm()) and (float((given - held).norm()) < size * 0.7 or not bool(given.any())):
        _raise_cast(decoder.name, codes.dtype)


def _raise_cast(name: str, dtype: torch.dtype) -> None:
    raise UnsupportedError(
        f"{name} holds codes in {dtype}, and is to get values that were cast to that dtype, without a scale. "
        "hf_fp8.dequantize_model(model) gives a model with weights that can be computed with and loaded; "
        "hf_fp8.quantize_model(model) makes codes of them again"
    )


def refuse_values(new: torch.Tensor, old: torch.Tensor, name: str, scales: float = 1.0) -> None:
    """Raise UnsupportedError if plain codes `new` that are to replace `old` are values cast to the dtype of codes.

    scales: by how much the scales that come with them are larger. Such values are smaller than codes by their scale.
    """
    if new.shape != old.shape or new.is_meta or old.is_meta or not new.numel():
        return
    largest, before = _largest(new), _largest(old)
    is_smaller = largest * SMALLER * max(scales, 1.0) <= before
    if is_smaller and before and (largest or scales * SMALLER > 1):  # a weight of zeros comes with a scale of next to nothing
        _raise_cast(name, old.dtype)


def _largest(codes: torch.Tensor) -> float:
    """The largest magnitude among the first rows, NaN left out."""
    rows = max(1, _SAMPLE // max(1, codes[0].numel())) if codes.ndim else 1
    return float(codes[:rows].float().abs().nan_to_num(0.0).max())


@contextmanager
def codes_for_certain() -> Iterator[None]:
    """A block in which codes are moved, or copied together with their scales."""
    token = _certain.set(True)
    try:
        yield
    finally:
        _certain.reset(token)
