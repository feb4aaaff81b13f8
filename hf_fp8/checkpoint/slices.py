"""Where the values of a tensor that is to be written come from: a tensor of the files, or an expert's part of a stack."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """A tensor of the files called `key`, or what one expert has in it.

    expert: its number, None for the whole tensor. index, of: which of how many matrices that lie over each other along the
    outputs (gate, up), interleaved or one after the other. transposed: a stack of (E, K, N) instead of (E, N, K).
    """

    key: str
    expert: int | None = None
    index: int = 0
    of: int = 1
    transposed: bool = False
    interleaved: bool = False

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of `tensor`, which is the one called `key`: a view."""
        if self.expert is None:
            return tensor
        rows = tensor[self.expert]
        if self.transposed and rows.ndim == 2:
            rows = rows.t()
        if self.of == 1:
            return rows
        return rows[self.index :: self.of] if self.interleaved else rows.chunk(self.of)[self.index]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """That of the part of a tensor of shape `whole`."""
        if self.expert is None:
            return whole
        return tuple(self.take(torch.empty(whole, device="meta")).shape)
