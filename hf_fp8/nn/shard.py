"""What a process holds of codes that several processes share (`Shard`), and the tensors of a sharded parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..formats.cuts import Cut, MatrixPart
from ..formats.scheme import Scheme
from .across import across


@dataclass(frozen=True)
class Shard:
    """What this process holds of codes (N, K), or of a stack of experts (E, N, K).

    part: of the matrix; in a stack, of each of the matrices that are concatenated along N. whole: the scheme of the whole
    weight. experts: of a stack. group: the name of the process group that holds the whole.
    """

    part: MatrixPart
    whole: Scheme
    group: str
    experts: Cut | None = None

    @property
    def scheme(self) -> Scheme:
        """The scheme of what this process holds."""
        return self.part.scheme(self.whole)

    @property
    def _cut(self) -> tuple[Cut, int]:
        """The cut of the matrix, and the extent of the scales there."""
        granularity = self.whole.weight.granularity
        if self.part.rows.of > 1:
            return self.part.rows, granularity.rows
        return self.part.cols, granularity.cols

    @property
    def cuts_scale(self) -> bool:
        """Whether scales are cut as the matrix is; otherwise each process holds all of them."""
        cut, extent = self._cut
        return cut.of > 1 and cut.fits(extent)

    @property
    def selects_scale(self) -> bool:
        """Whether the scales of the part are selected from all of them."""
        cut, extent = self._cut
        return cut.of > 1 and extent != -1 and not cut.fits(extent)

    def selected(self, scale: torch.Tensor) -> torch.Tensor:
        """The scales of the part, from all of them: of one matrix, or of a stack, whose matrices have a grid each."""
        granularity = self.whole.weight.granularity
        grids = scale.reshape(-1, *granularity.grid(self.part.rows.size, self.part.cols.size))
        found = self.part.scale(grids, granularity)
        return found.reshape(*scale.shape[:-2], -1, found.shape[-1])

    @property
    def across(self) -> str:
        """The `Across.text` for inputs whose scales are computed from them; "" if each process has all columns they need."""
        given = self.whole.input
        return across(self.part.cols, given.granularity, self.group) if given is not None and given.dynamic else ""


def local(tensor: Any) -> Any:
    """What this process holds of a parameter: the local tensor of a DTensor; others unchanged."""
    return tensor._local_tensor if type(tensor).__name__ == "DTensor" else tensor


def gathered(tensor: Any) -> Any:
    """The whole of a parameter, on every process: all of them must call it. Others than DTensors unchanged."""
    return tensor.full_tensor() if type(tensor).__name__ == "DTensor" else tensor


def sharded_like(tensor: torch.Tensor, other: Any) -> Any:
    """`tensor`, which every process has as a whole, sharded as `other` is; unchanged if that is no DTensor."""
    if type(other).__name__ != "DTensor":
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
