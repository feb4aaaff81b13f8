"""Scales in the layout that a matmul wants, made once and kept beside the scale that they were made from."""

from __future__ import annotations

import torch

_NAME = "_hf_fp8_row_scale"


def row_scale(weight_scale: torch.Tensor, n: int) -> torch.Tensor:
    """A weight's scale, one element or one per row, as float32 (1, n), contiguous.

    A float32 scale per row is such a row already. Another one is converted once: what was made is kept on the tensor
    that it was made from, and made anew when that tensor has been written to, moved or replaced.
    """
    if weight_scale.dtype == torch.float32 and weight_scale.numel() == n:
        return weight_scale.reshape(1, n)
    if torch.compiler.is_compiling() or weight_scale.is_inference():
        return _make(weight_scale, n)
    state = (weight_scale.data_ptr(), weight_scale._version, weight_scale.device, n)
    kept = getattr(weight_scale, _NAME, None)
    if kept is not None and kept[0] == state:
        made: torch.Tensor = kept[1]
        return made
    made = _make(weight_scale, n)
    # What is made while a CUDA graph records exists only when it replays.
    if not (weight_scale.is_cuda and torch.cuda.is_current_stream_capturing()):
        setattr(weight_scale, _NAME, (state, made))
    return made


@torch.no_grad()
def _make(weight_scale: torch.Tensor, n: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return weight_scale.detach().float().reshape(1, -1).expand(1, n).contiguous()
