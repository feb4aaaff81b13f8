"""Parts of a quantized matrix (tensor parallelism): which rows and columns a process holds, and the scales of that part.

The scales of a part are exact: where a cut goes through blocks of scales, each block is divided into smaller ones, which all
have its scale (docs/distributed.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch

from .scheme import Granularity, Scheme


@dataclass(frozen=True)
class Cut:
    """The part of one dimension that process `index` of `of` holds, as torch's `Shard` cuts it: equal chunks, rounded up.

    size: of the whole dimension. pieces: matrices that lie one after the other along it (gate and up), each of which is cut.
    """

    size: int
    index: int = 0
    of: int = 1
    pieces: int = 1

    @property
    def chunk(self) -> int:
        """The size of each process's part of a piece; the last ones may have less."""
        return -(-self.size // self.pieces // self.of)

    @property
    def is_even(self) -> bool:
        """Whether all processes have as much."""
        return self.size % (self.pieces * self.of) == 0

    @property
    def ranges(self) -> list[range]:
        """The indices of the part, one range for each piece."""
        if self.of == 1:
            return [range(self.size)]
        piece = self.size // self.pieces
        first, last = (min(place * self.chunk, piece) for place in (self.index, self.index + 1))
        return [range(base + first, base + last) for base in range(0, self.size, piece)]

    @property
    def length(self) -> int:
        return sum(map(len, self.ranges))

    def unit(self, extent: int) -> int:
        """The largest extent of blocks that divides the part where blocks of `extent` do not: -1 and 1 stay."""
        if extent <= 1 or self.of == 1:
            return extent
        return gcd(extent, self.chunk, *([self.size // self.pieces] if self.pieces > 1 else []))

    def fits(self, extent: int) -> bool:
        """Whether scales of blocks of `extent` are cut as the dimension is; False also for one scale for the whole of it."""
        return extent != -1 and self.unit(extent) == extent

    def blocks(self, extent: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """For each block of `unit(extent)` in the part: the index of the block of `extent` that it lies in."""
        if extent == -1:
            return torch.zeros(1, dtype=torch.int64, device=device)
        return blocks_of(self.ranges, extent, self.unit(extent), device)


def blocks_of(ranges: Sequence[range], extent: int, unit: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """For each block of `unit` in `ranges` of indices: the index of the block of `extent` that it lies in. unit: divides
    `extent` and the first index of each range."""
    found = [torch.arange(one.start, one.stop, unit, device=device) // extent for one in ranges]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class MatrixPart:
    """The rows and columns that a process holds of a matrix (N, K)."""

    rows: Cut
    cols: Cut

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.length, self.cols.length

    def granularity(self, whole: Granularity) -> Granularity:
        """The granularity of the part's scales."""
        return Granularity(self.rows.unit(whole.rows), self.cols.unit(whole.cols))

    def scheme(self, whole: Scheme) -> Scheme:
        """The scheme of the part. Its inputs are the columns of the part."""
        weight = replace(whole.weight, granularity=self.granularity(whole.weight.granularity))
        if whole.input is None:
            return Scheme(weight)
        given = whole.input.granularity
        return Scheme(weight, replace(whole.input, granularity=Granularity(given.rows, self.cols.unit(given.cols))))

    def scale(self, grid: torch.Tensor, whole: Granularity) -> torch.Tensor:
        """The scales of the part, from those of the whole matrix (..., `whole.grid`): a copy.

        Leading dimensions (experts) are kept.
        """
        rows = self.rows.blocks(whole.rows, grid.device)
        return grid.index_select(-2, rows).index_select(-1, self.cols.blocks(whole.cols, grid.device))
