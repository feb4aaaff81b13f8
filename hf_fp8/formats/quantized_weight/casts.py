"""Detection of float values that were cast to the dtype of codes, for example by averaging state dicts.

Codes are the stored 8-bit values; such values without a scale would be read as codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ...errors import UnsupportedError
from .source import Part, Source

# New codes for unchanged scales that are this many times smaller than the old ones are values that were cast to the dtype of
# codes: a cast makes them smaller by 1 / scale, which is 448 (int8: 127) divided by the largest weight of a row or block.
SMALLER = 8
# Number of codes that are sampled for this check, in evenly spaced rows.
_SAMPLE = 2**18
# Threshold for the cosine of values and held weight: 0.97 and more for means of fine-tuned models, near 0 for other values.
ALIKE = 0.5
# True while the written tensors are known to be codes, so that the check is skipped.
_certain: ContextVar[bool] = ContextVar("hf_fp8_certain", default=False)


def refuse_own_values(new: torch.Tensor, codes: torch.Tensor, part: Part, source: Source) -> None:
    """Raise UnsupportedError if `new`, which replaces `codes`, is similar to their dequantized values, cast to their dtype."""
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
    except UnsupportedError:  # the values cannot have been read either
        return
    if float(held.norm()) * SMALLER > float(before.norm()):
        return  # with scales of about 1, values and codes cannot be told apart
    # Similar to the weight itself, or to a function of it. int8: values below 0.5 are cast to 0.
    if not size or float((given.to(held.device) * held).sum()) > ALIKE * size * float(held.norm()):
        _raise_cast(decoder.name, codes.dtype)


def _raise_cast(name: str, dtype: torch.dtype) -> None:
    raise UnsupportedError(
        f"{name} holds codes in {dtype}, but was given values that were cast to that dtype, without a scale. Call "
        "hf_fp8.dequantize_model(model) before computing with or loading weights, and hf_fp8.quantize_model(model) to quantize "
        "them again"
    )


def refuse_values(new: torch.Tensor, old: torch.Tensor, name: str, scale: float, scales: float = 1.0) -> None:
    """Raise UnsupportedError if the plain tensor `new`, which replaces `old`, holds values cast to the dtype of codes.

    scale: the largest of `old`. scales: ratio of the new scales to the old ones, 0 if the new ones are those of a zero weight.
    Values are smaller than their codes by a factor of the scale; codes of a small weight whose scale is too large for it (one
    for q, k and v) are smaller, too, but not as small as values.
    """
    if new.shape != old.shape or new.is_meta or old.is_meta or not new.numel():
        return
    largest, before = _largest(new), _largest(old)
    is_smaller = largest * SMALLER * max(scales, 1.0) <= before
    if is_smaller and before and largest <= SMALLER * before * scale and (largest or scales * SMALLER > 1):
        _raise_cast(name, old.dtype)


def _largest(codes: torch.Tensor) -> float:
    """The amax of evenly spaced rows, ignoring NaN."""
    return float(codes[:: _step(codes)].float().abs().nan_to_num(0.0).max())


def _step(codes: torch.Tensor) -> int:
    return max(1, codes.numel() // _SAMPLE) if codes.ndim > 1 else 1


def is_certain() -> bool:
    """Whether written tensors are known to be codes with the right scales (`codes_for_certain`)."""
    return _certain.get()


@contextmanager
def codes_for_certain() -> Iterator[None]:
    """Context manager for moving codes, or copying them together with their scales: checks for cast values are skipped."""
    token = _certain.set(True)
    try:
        yield
    finally:
        _certain.reset(token)
