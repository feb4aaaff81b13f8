"""Reference maths in plain torch, on any device: the definition that every kernel is held against.

Rounding is that of compressed-tensors (quantization/lifecycle/forward.py and
quantization/utils/helpers.py): ``scale = amax / 448``, ``q = e4m3(clamp(x / scale, -448, 448))``.
Everything is computed in float32 and rounded once at the end.
"""

from __future__ import annotations

import torch

from .scheme import FP8, FP8_MAX, Granularity

# amax = 0, or so small that amax / 448 underflows: the smallest normal number keeps x / scale finite.
MIN_SCALE = torch.finfo(torch.float32).tiny


def _blocks(x: torch.Tensor, granularity: Granularity) -> tuple[int, int]:
    rows, cols = x.shape
    return (
        rows if granularity.rows == -1 else granularity.rows,
        cols if granularity.cols == -1 else granularity.cols,
    )


def compute_scale(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """Scales (float32, `granularity.grid`) that map the largest magnitude of each block to 448.

    x: (rows, cols), any float dtype. A zero block gives the smallest normal float32, so its
    values quantize to zero; a block with NaN or inf gives a NaN or inf scale, so that it stays visible.
    """
    rows, cols = x.shape
    grid_rows, grid_cols = granularity.grid(rows, cols)
    if x.numel() == 0:
        return torch.full((grid_rows, grid_cols), MIN_SCALE, device=x.device)
    magnitude = x.abs().float()
    if granularity.is_row:
        amax = magnitude.amax(dim=1, keepdim=True)
    elif granularity.is_tensor:
        amax = magnitude.amax().reshape(1, 1)
    else:
        block_rows, block_cols = _blocks(x, granularity)
        pad = (0, grid_cols * block_cols - cols, 0, grid_rows * block_rows - rows)
        tiles = torch.nn.functional.pad(magnitude, pad).view(grid_rows, block_rows, grid_cols, block_cols)
        amax = tiles.amax(dim=(1, 3))
    return (amax / FP8_MAX).clamp(min=MIN_SCALE)


def expand_scale(scale: torch.Tensor, granularity: Granularity, rows: int, cols: int) -> torch.Tensor:
    """`scale`, in any shape that holds `granularity.grid` elements, as float32 broadcastable to (rows, cols)."""
    grid_rows, grid_cols = granularity.grid(rows, cols)
    scale = scale.float().reshape(grid_rows, grid_cols)
    if granularity.cols > 1:
        scale = scale.repeat_interleave(granularity.cols, dim=1)[:, :cols]
    if granularity.rows > 1:
        scale = scale.repeat_interleave(granularity.rows, dim=0)[:rows]
    return scale


def quantize(x: torch.Tensor, scale: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """x (rows, cols) in float -> E4M3 of the same shape, contiguous.

    Finite values saturate at +-448. NaN and infinite values become NaN: with a static scale an
    overflow upstream would otherwise come out as a plausible finite number.
    """
    expanded = expand_scale(scale, granularity, *x.shape)
    scaled = x.float() / expanded
    # Clamp before the cast: eager casts did not saturate before torch 2.12.
    clamped = scaled.clamp(-FP8_MAX, FP8_MAX)
    return torch.where(x.isinf(), torch.nan, clamped).to(FP8)


def dequantize(
    q: torch.Tensor, scale: torch.Tensor, granularity: Granularity, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """q (rows, cols) in E4M3 times its scales, multiplied in float32 and rounded once to `dtype`."""
    return q.float().mul_(expand_scale(scale, granularity, *q.shape)).to(dtype)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """quantize, then dequantize to the dtype of x."""
    return dequantize(quantize(x, scale, granularity), scale, granularity, x.dtype)


def input_scale_for(x: torch.Tensor, granularity: Granularity, static: torch.Tensor | None) -> torch.Tensor:
    """The scale of an input x (M, K): the checkpoint's `input_scale` if there is one, else from x itself."""
    return compute_scale(x, granularity) if static is None else static.float()
