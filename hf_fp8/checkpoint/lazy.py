"""Tensors that are read in parts (`LazyTensor`): where each process needs only its share of a weight.

They have the interface of the slices of safetensors, which transformers' loader cuts as a parameter is sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from safetensors import safe_open

from .files import changed, regular
from .reader import TORCH_DTYPES, Checkpoint

# A part of a tensor: a range of indices for each dimension.
Ranges = tuple[range, ...]


class LazyTensor:
    """A tensor of `shape` and `dtype`; ``[...]`` reads it, and a slice for each dimension reads that part."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[Ranges], torch.Tensor]) -> None:
        self.shape, self.dtype, self._read = tuple(shape), dtype, read

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def read(self, ranges: Ranges) -> torch.Tensor:
        """The part of these ranges of indices, one for each dimension, each with step 1."""
        if not prod(map(len, ranges)):
            return torch.empty([len(one) for one in ranges], dtype=self.dtype)
        return self._read(ranges)

    def __getitem__(self, index: Any) -> torch.Tensor:
        given = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
        slices = [*given, *[slice(None)] * (len(self.shape) - len(given))]
        return self.read(tuple(range(*one.indices(size)) for one, size in zip(slices, self.shape, strict=True)))


class LazyCheckpoint:
    """The tensors of a checkpoint, to be read in parts. Files stay open until it is deleted.

    Raises CheckpointError if a file was changed since its header was read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._opened: dict[str, Any] = {}

    def tensor(self, key: str) -> LazyTensor:
        info = self.checkpoint.tensors[key]
        return LazyTensor(info.shape, TORCH_DTYPES[info.dtype], lambda ranges: self._part(key, ranges))

    def _part(self, key: str, ranges: Ranges) -> torch.Tensor:
        slices = tuple(slice(one.start, one.stop) for one in ranges)
        file = self.checkpoint.tensors[key].file
        pickled = self.checkpoint.pickled(file)
        if pickled is not None:
            return pickled[key][slices].clone()
        found: torch.Tensor = self._file(file).get_slice(key)[slices or ...]
        # Rows are a view of the whole tensor, which a copy or a pickle of them would contain, too.
        return found if found.untyped_storage().nbytes() == found.nbytes else found.clone()

    def _file(self, file: str) -> Any:
        if file not in self._opened:
            if regular(file) != self.checkpoint.stamp(file):
                raise changed(file)
            self._opened[file] = safe_open(file, framework="pt")
        return self._opened[file]


def reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """`tensor` with another shape of as many elements: it is read as a whole, as scales of an unusual shape are small."""

    def read(ranges: Ranges) -> torch.Tensor:
        return cut(tensor[...].reshape(shape), ranges)

    return tensor if tensor.shape == tuple(shape) else LazyTensor(shape, tensor.dtype, read)


def cut(tensor: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """A part of a tensor that was read: a copy, so that the rest is freed."""
    return tensor[tuple(slice(one.start, one.stop) for one in ranges)].clone()
