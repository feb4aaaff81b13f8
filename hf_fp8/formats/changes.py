"""What becomes of a change to a weight, such as a merged adapter, when the result is rounded to codes again."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Change:
    """Sums over a layer's weights, in float64: W before, M as it should be, Q as it is stored.

    Codes of a weight that hardly changed are the codes it had: rounding does not blur a small change, it drops it. So `kept`
    says more than the error does.
    """

    delta: float = 0.0  # |M - W|^2
    found: float = 0.0  # (Q - W) . (M - W)
    missed: float = 0.0  # |Q - M|^2
    norm: float = 0.0  # |M|^2

    def add(self, before: torch.Tensor, wanted: torch.Tensor, after: torch.Tensor) -> None:
        """Count in a piece: W, M and Q, float32 of one shape."""
        delta, missed = wanted - before, after - wanted
        self.delta += float(delta.square().sum(dtype=torch.float64))
        self.found += float(((after - before) * delta).sum(dtype=torch.float64))
        self.missed += float(missed.square().sum(dtype=torch.float64))
        self.norm += float(wanted.square().sum(dtype=torch.float64))

    @property
    def kept(self) -> float:
        """The share of the change that is there, along its own direction: 1 is all, 0 none."""
        return self.found / self.delta if self.delta else 1.0

    @property
    def size(self) -> float:
        """||M - W|| / ||M||: how much was to change."""
        return (self.delta / self.norm) ** 0.5 if self.norm else 0.0

    @property
    def noise(self) -> float:
        """||Q - M|| / ||M - W||: how large what rounding adds is beside the change. It points nowhere in particular."""
        return (self.missed / self.delta) ** 0.5 if self.delta else 0.0

    @property
    def error(self) -> float:
        """||Q - M|| / ||M||: how far what is stored is from what it should be."""
        return (self.missed / self.norm) ** 0.5 if self.norm else 0.0
