"""What a process holds of codes that several processes share."""

from __future__ import annotations

from dataclasses import dataclass

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
