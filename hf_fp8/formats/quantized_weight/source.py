"""The data needed to dequantize a QuantizedWeight: the owner of its codes, and which part of the weight it is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...errors import UnsupportedError


class Decoder(NamedTuple):
    """How to dequantize codes. decode: (codes, scale, rows, dtype) -> values of these rows of the first dimension, or raises.

    dtype: default dtype of the values. name: name of the parameter in its model, for error messages.
    """

    decode: Callable[[torch.Tensor, torch.Tensor, slice, torch.dtype], torch.Tensor]
    scale: torch.Tensor
    dtype: torch.dtype
    name: str


@dataclass(frozen=True)
class Part:
    """Which part of a weight a tensor is: rows of the first dimension, and the operations applied to them (`steps`)."""

    whole: torch.Tensor  # all codes of the weight, a plain tensor
    rows: slice
    steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()

    @staticmethod
    def all_of(codes: torch.Tensor) -> Part:
        return Part(codes, slice(0, len(codes)))


@dataclass
class Source:
    """Where codes belong. owners: modules that hold them as a parameter, and its name there. kept: for a copy, the Decoder
    at the time of copying, so that later changes of the module do not affect it."""

    owners: list[tuple[weakref.ref[Any], str]] = field(default_factory=list)
    kept: Decoder | None = None
    exported: bool = False  # an entry of a state dict: numpy() returns codes

    def owner(self, whole: torch.Tensor) -> tuple[Any, str] | None:
        """A module whose parameter shares the memory of `whole`, and the parameter's name; None if there is none."""
        for reference, leaf in self.owners:
            module = reference()
            held = None if module is None else module._parameters.get(leaf)
            if held is not None and getattr(held, "codes", held).data_ptr() == whole.data_ptr():
                return module, leaf
        return None

    def decoder(self, whole: torch.Tensor) -> Decoder:
        """The Decoder of the codes. Raises UnsupportedError if no module holds them any more."""
        if self.kept is not None:
            return self.kept
        found = self.owner(whole)
        if found is None:
            raise UnsupportedError(
                f"{[*whole.shape]} codes in {whole.dtype} are read as values, but the layer that held them was deleted or "
                "holds other codes now: keep the layer, and read the weight from it (`layer.dequantized_weight()`)"
            )
        decoder: Decoder = found[0].decoder(found[1])
        return decoder


def rows_of(codes: torch.Tensor, whole: torch.Tensor) -> slice | None:
    """The rows of `whole` (first dimension) that `codes`, a view, consists of; None if it is another kind of view."""
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
