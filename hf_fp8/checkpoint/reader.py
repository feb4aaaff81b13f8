"""Reads the tensors of a checkpoint without a model: names, dtypes, shapes and values.

Nothing here executes code from a checkpoint: safetensors contains none, and pickles are read with ``weights_only=True``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError, CorruptFileError, UnsupportedError
from .files import LOCAL, FileSystem, Stamp
from .headers import TensorInfo as TensorInfo
from .headers import read_header
from .pickles import read_pickled

# safetensors' dtype names; values of other dtypes are copied unchanged, but not read
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
DENSE_DTYPES = ("F64", "F32", "F16", "BF16")
INTEGER_DTYPES = ("I64", "I32", "I16", "I8", "U8")
SCALE_DTYPES = ("F32", "F16", "BF16")


def weight_scale_dtypes(mx: bool) -> tuple[str, ...]:
    """The dtypes of a weight's scales. mx: of a scheme with MX scales, whose exponents may be stored as plain bytes."""
    return (*SCALE_DTYPES, "F8_E8M0", *(["U8"] if mx else []))


class Checkpoint:
    """The tensors in the files of a checkpoint. fs: where the files are; elsewhere than here only safetensors can be read.

    Raises, naming the file: MissingTensorError if it does not exist; CorruptFileError if it is truncated or not a checkpoint;
    UnsupportedError for another file type; CheckpointError for a tensor that two files have with different values. Methods that
    read tensors raise CheckpointError if the file has changed since its header was read.
    """

    def __init__(self, files: Sequence[str], fs: FileSystem = LOCAL) -> None:
        self._fs = fs
        self.tensors: dict[str, TensorInfo] = {}
        self._pickled: dict[str, dict[str, torch.Tensor]] = {}
        self._found: dict[str, dict[str, TensorInfo]] = {}
        self._stamps: dict[str, Stamp] = {}
        self._metadata: dict[str, dict[str, str]] = {}
        fs.expect(files)
        for file in dict.fromkeys(files):
            self._found[file] = self._read_safetensors(file) if file.endswith(".safetensors") else self._read_pickle(file)
            for name, info in self._found[file].items():
                if self.tensors.setdefault(name, info) is not info:
                    self._check_same(name, self.tensors[name], info)

    @property
    def files(self) -> list[str]:
        return list(self._found)

    def become(self, other: Checkpoint) -> None:
        """Read what `other` reads, from now on."""
        vars(self).update(vars(other))

    def files_with(self, name: str) -> list[str]:
        """The files that contain a tensor: more than one only if all have the same values."""
        return [file for file, found in self._found.items() if name in found]

    def metadata(self, file: str) -> dict[str, str]:
        """The `__metadata__` of a safetensors file; empty for other files."""
        return self._metadata.get(file, {})

    def stamp(self, file: str) -> Stamp:
        """The stamp of a file when its header was read."""
        return self._stamps[file]

    def pickled(self, file: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a pickle, which are in memory; None for other files."""
        return self._pickled.get(file)

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The named tensors, copied to CPU memory; each file is opened once."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        found: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            with self._fs.reading(file, self._stamps[file]) as (opened, _):
                found.update({name: self._tensor(opened, name) for name in wanted})
        return found

    def load(self, name: str) -> torch.Tensor:
        """One tensor, copied to CPU memory: the file is not mapped, so that deleting the tensor frees everything.

        Raises UnsupportedError for a dtype that is not in `TORCH_DTYPES`.
        """
        return self.read([name])[name]

    def pieces(self, name: str, size: int = 2**24, file: str | None = None) -> Iterator[torch.Tensor]:
        """The bytes of a tensor, uint8, `size` at a time. file: the one to read if several have the tensor."""
        file = file or self.tensors[name].file
        with self._fs.reading(file, self._stamps[file]) as (opened, _):
            if file in self._pickled:
                data = self._pickled[file][name].contiguous().reshape(-1).view(torch.uint8)
                yield from (data[start : start + size] for start in range(0, len(data), size))
                return
            info = self._found[file][name]
            opened.seek(info.begin)
            for position in range(info.begin, info.end, size):
                yield _bytes(opened, min(size, info.end - position), name)

    def _read_safetensors(self, file: str) -> dict[str, TensorInfo]:
        with _without_collecting():
            header = read_header(file, self._fs)
            self._stamps[file], self._metadata[file] = header.stamp, header.metadata
            return dict(sorted(header.tensors.items()))

    def _read_pickle(self, file: str) -> dict[str, TensorInfo]:
        self._pickled[file], self._stamps[file] = read_pickled(str(self._fs.here(file)))
        return {
            name: TensorInfo(DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), file)
            for name, tensor in self._pickled[file].items()
        }

    def _check_same(self, name: str, one: TensorInfo, other: TensorInfo) -> None:
        """Raise CheckpointError unless two files have the same tensor under a name: a loader may take either."""
        if (one.dtype, one.shape) == (other.dtype, other.shape):
            pairs = zip(self.pieces(name), self.pieces(name, file=other.file), strict=True)
            if all(torch.equal(a, b) for a, b in pairs):
                return
        raise CheckpointError(
            f"{name} is in {one.file} ({one}) and in {other.file} ({other}), and differs between them: delete the file that "
            "does not belong to the checkpoint"
        )

    def _tensor(self, opened: BinaryIO, name: str) -> torch.Tensor:
        info = self.tensors[name]
        if info.file in self._pickled:
            return self._pickled[info.file][name].clone()
        if info.dtype not in TORCH_DTYPES:
            raise UnsupportedError(f"{name} in {info.file} is {info}: hf_fp8 reads no values of that dtype")
        opened.seek(info.begin)
        return _bytes(opened, info.end - info.begin, name).view(TORCH_DTYPES[info.dtype]).view(info.shape)


def _bytes(file: Any, count: int, name: str) -> torch.Tensor:
    data = torch.empty(count, dtype=torch.uint8)
    if file.readinto(memoryview(data.numpy())) != count:  # type: ignore[arg-type]
        raise CorruptFileError(f"{file.name} ends before {name} does: it is truncated")
    return data


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Disable Python's garbage collector: with 100,000 tensors it would scan the lists repeatedly, which takes three times as
    long as everything else."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
