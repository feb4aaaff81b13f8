"""Values that somebody cast to the dtype of codes, told from codes: averages of state dicts, for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ...errors import UnsupportedError
from .source import Part, Source

# Codes that replace others with scales as they were, and are this many times smaller, are values that somebody cast to the
# dtype of codes: that makes them smaller by 1 / scale, which is 448 (int8: 127) by the largest weight of a row or block.
SMALLER = 8
# How many codes are looked at for that, in rows that are evenly spread.
_SAMPLE = 2**18
# Cosine of values and the weight that they are made of: 0.97 and more for means of fine-tuned models, near 0 for any others.
ALIKE = 0.5
# Whether what is written are codes for certain, so that nobody has to guess.
_certain: ContextVar[bool] = ContextVar("hf_fp8_certain", default=False)


def refuse_own_values(new: torch.Tensor, codes: torch.Tensor, part: Part, source: Source) -> None:
    """Raise UnsupportedError if `new`, which is to replace `codes`, is near the values that these stand for, cast to
    their dtype."""
    if _certain.get():
        return
    if new.shape != codes.shape or new.is_meta or codes.is_meta or not codes.numel() or part.whole is not codes:
        return
    step = _step(codes)
    given, before = new[::step].float(), codes[::step].float()
    size = float(given.norm())
    if size * SMALLER > float(before.norm()):
        return
    try:
        decoder = source.decoder(codes)
        held = decoder.decode(codes, decoder.scale, slice(0, len(codes)), torch.float32)[::step]
    except UnsupportedError:  # values that nobody can have read
        return
    if float(held.norm()) * SMALLER > float(before.norm()):
        return  # scales of 1 or so are what there is no telling by
    # Like the weight itself, or some function of it. int8: values below 0.5 are 0.
    if not size or float((given.to(held.device) * held).sum()) > ALIKE * size * float(held.norm()):
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
    """The largest magnitude among rows that are evenly spread, NaN left out."""
    return float(codes[:: _step(codes)].float().abs().nan_to_num(0.0).max())


def _step(codes: torch.Tensor) -> int:
    return max(1, codes.numel() // _SAMPLE) if codes.ndim > 1 else 1


def is_certain() -> bool:
    """Whether what is written are codes for certain, and scales are seen to."""
    return _certain.get()


@contextmanager
def codes_for_certain() -> Iterator[None]:
    """A block in which codes are moved, or copied together with their scales."""
    token = _certain.set(True)
    try:
        yield
    finally:
        _certain.reset(token)
