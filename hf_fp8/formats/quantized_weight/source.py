"""Where codes belong, and which part of a weight a tensor of codes is: what is needed to multiply it out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...errors import UnsupportedError


class Decoder(NamedTuple):
    """How codes become values. decode: (codes, scale, rows, dtype) -> values of these rows of the first dimension, or raises.

    dtype: what the values are in where nobody asks for another one. name: the parameter's in its model, for errors.
    """

    decode: Callable[[torch.Tensor, torch.Tensor, slice, torch.dtype], torch.Tensor]
    scale: torch.Tensor
    dtype: torch.dtype
    name: str


@dataclass(frozen=True)
class Part:
    """Which part of a weight a tensor is: rows of the first dimension, and what was done to those since."""

    whole: torch.Tensor  # the codes of all of it, a plain tensor
    rows: slice
    steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()

    @staticmethod
    def all_of(codes: torch.Tensor) -> Part:
        return Part(codes, slice(0, len(codes)))


@dataclass
class Source:
    """Where codes belong. owners: modules that hold them as a parameter, and its name there; kept: what it was when they were
    copied, for a copy, which outlives changes of the module."""

    owners: list[tuple[weakref.ref[Any], str]] = field(default_factory=list)
    kept: Decoder | None = None
    exported: bool = False  # an entry of a state dict, of which numpy gets the codes

    def owner(self, whole: torch.Tensor) -> tuple[Any, str] | None:
        """A module whose parameter lies in the memory of `whole`, and its name there."""
        for reference, leaf in self.owners:
            module = reference()
            held = None if module is None else module._parameters.get(leaf)
            if held is not None and getattr(held, "codes", held).data_ptr() == whole.data_ptr():
                return module, leaf
        return None

    def decoder(self, whole: torch.Tensor) -> Decoder:
        """Raises UnsupportedError if no module says any more what these codes mean."""
        if self.kept is not None:
            return self.kept
        found = self.owner(whole)
        if found is None:
            raise UnsupportedError(
                f"{[*whole.shape]} codes in {whole.dtype} are read as values, and the layer that held them is gone, or holds "
                "others now: read them from the layer (`layer.dequantized_weight()`), or keep it"
            )
        decoder: Decoder = found[0].decoder(found[1])
        return decoder


def rows_of(codes: torch.Tensor, whole: torch.Tensor) -> slice | None:
    """Which rows of the first dimension `codes` are, or which one; None if they are something else."""
    if whole.ndim < 2 or not whole.numel() or codes.ndim not in (whole.ndim, whole.ndim - 1):
        return None
    count = len(codes) if codes.ndim == whole.ndim else 1
    trailing = codes.ndim - whole.ndim + 1
    if codes.shape[trailing:] != whole.shape[1:] or codes.stride()[trailing:] != whole.stride()[1:]:
        return None
    if trailing and count > 1 and codes.stride(0) != whole.stride(0):
        return None
    start, rest = divmod(int(codes.storage_offset() - whole.storage_offset()), whole.stride(0))
    return None if rest or start < 0 or start + count > len(whole) else slice(start, start + count)
