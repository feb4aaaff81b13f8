"""Integers of 4 or 8 bits packed into int32, as compressed-tensors' `pack-quantized` stores them (compressors/pack_quantized).

An integer is stored as an unsigned number, half of the range more than it is. Consecutive integers of a row (of a column, for
zero points) follow each other from the lowest bits of an int32 to its highest. The last int32 is filled up with zero bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import native
from .numerics import in_library
from .scheme import Granularity


def words(count: int, bits: int) -> int:
    """The number of int32 that hold `count` integers."""
    return -(-count * bits // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 (rows, cols), integers of `bits` bits -> int32 (rows, words(cols, bits))."""
    per_word = 32 // bits
    stored = codes.bitwise_xor(-128).view(torch.uint8) if bits == 8 else (codes + 8).view(torch.uint8)
    stored = F.pad(stored, (0, -codes.shape[1] % per_word))
    if bits == 4:
        stored = stored[:, ::2] | stored[:, 1::2] << 4
    # Flat, as a matrix of one row may have any stride.
    return stored.reshape(-1).view(torch.int32).view(len(codes), words(codes.shape[1], bits))


def unpack(packed: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """The reverse of `pack`: int8 (rows, cols)."""
    stored = packed.reshape(-1).view(torch.uint8).view(len(packed), 4 * packed.shape[1])
    if bits == 8:
        return stored[:, :cols].bitwise_xor(128).view(torch.int8)
    halves = torch.stack((stored & 15, stored >> 4), -1).view(torch.int8).flatten(1)
    return halves[:, :cols] - 8


def pack_rows(zero_points: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points (rows, groups), int8, packed along rows: int32 (words(rows, bits), groups)."""
    return pack(zero_points.t().contiguous(), bits).t().contiguous()


def unpack_rows(packed: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """The reverse of `pack_rows`: int8 (rows, groups)."""
    return unpack(packed.t().contiguous(), bits, rows).t()


def differences(
    packed: torch.Tensor, zero_points: torch.Tensor | None, bits: int, cols: int, group: int, rows: slice
) -> torch.Tensor:
    """Codes minus their zero points, of some rows of a weight, by which its scales are multiplied: int8 (rows, cols).

    int16 for 8 bits with zero points. zero_points: as they are stored, those of the whole weight. group: columns of a scale, -1
    for all.
    """
    height, of_rows = packed.shape[0], packed[rows]
    per_word = 32 // bits
    first, last = rows.start // per_word, words(min(rows.stop, height), bits)
    points = None if zero_points is None else zero_points[first:last]  # words that have those of the rows
    aligned = points is None or rows.start % per_word == 0
    if bits == 4 and aligned and (group == -1 or group % 8 == 0) and in_library(of_rows, *([] if points is None else [points])):
        return native.unpack(of_rows, cols, zero_points=points, granularity=Granularity(1, group))
    codes = unpack(of_rows, bits, cols)
    if points is None:
        return codes
    skipped = rows.start - first * per_word
    of_groups = unpack_rows(points, bits, skipped + len(codes))[skipped:].to(torch.int16 if bits == 8 else torch.int8)
    return codes.to(of_groups) - (of_groups if group == -1 else of_groups.repeat_interleave(group, 1)[:, :cols])
