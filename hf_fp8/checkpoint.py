"""The tensors of a checkpoint, read without a model: names, dtypes and shapes, and single small tensors.

Nothing here executes code from a checkpoint: safetensors holds none, and pickles are read with
``weights_only=True``.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import CorruptFileError, MissingTensorError, UnsupportedError

# safetensors' dtype names; those it has and torch lacks stay without a torch dtype
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
SCALE_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """dtype is safetensors' name of it ("F8_E4M3", "BF16", ...)."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Checkpoint:
    """What the files of a checkpoint hold.

    Raises CorruptFileError, naming the file, for one that is truncated or no checkpoint.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._pickled: dict[str, dict[str, torch.Tensor]] = {}
        self._places: dict[str, dict[str, tuple[int, int]]] = {}
        for file in files:
            self.tensors.update(self._read_safetensors(file) if file.endswith(".safetensors") else self._read_pickle(file))

    @property
    def has_fp8(self) -> bool:
        return any(info.dtype == "F8_E4M3" for info in self.tensors.values())

    @staticmethod
    def _read_safetensors(file: str) -> dict[str, TensorInfo]:
        found = {}
        if not os.path.exists(file):
            raise MissingTensorError(f"{file} is not there, though the checkpoint's index lists it: a shard is missing")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    part = opened.get_slice(name)
                    found[name] = TensorInfo(str(part.get_dtype()), tuple(part.get_shape()), file)
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(
                f"{file} cannot be read as safetensors ({error}). It is truncated or damaged: download or write it again."
            ) from error
        return found

    def _read_pickle(self, file: str) -> dict[str, TensorInfo]:
        if not file.endswith((".bin", ".pt", ".pth")):
            raise UnsupportedError(f"{file}: hf_fp8 reads .safetensors and .bin checkpoints")
        try:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files from before torch 1.6 cannot be mapped
                state = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise CorruptFileError(f"{file} cannot be read as a torch checkpoint ({error})") from error
        if not isinstance(state, dict):
            raise CorruptFileError(f"{file} holds a {type(state).__name__}, not tensors by name")
        state = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        self._pickled[file] = state
        return {
            name: TensorInfo(DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), file)
            for name, tensor in state.items()
        }

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on CPU; each file is opened once."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        found: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            if file in self._pickled:
                found.update({name: self._pickled[file][name].clone() for name in wanted})
                continue
            with safe_open(file, framework="pt") as opened:
                found.update({name: opened.get_tensor(name).clone() for name in wanted})
        return found

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in memory of its own: the file is not mapped, so that nothing stays when it is dropped."""
        info = self.tensors[name]
        if info.file in self._pickled:
            return self._pickled[info.file][name].clone()
        start, end = self._offsets(info.file)[name]
        with open(info.file, "rb") as file:
            file.seek(start)
            data = self._from(file, end - start, info, name)
        return data.view(TORCH_DTYPES[info.dtype]).view(info.shape)

    def pieces(self, name: str, size: int = 2**24) -> Iterator[torch.Tensor]:
        """The bytes of a tensor, uint8, `size` at a time."""
        info = self.tensors[name]
        if info.file in self._pickled:
            data = self._pickled[info.file][name].contiguous().reshape(-1).view(torch.uint8)
            yield from (data[start : start + size] for start in range(0, len(data), size))
            return
        start, end = self._offsets(info.file)[name]
        with open(info.file, "rb") as file:
            file.seek(start)
            for position in range(start, end, size):
                yield self._from(file, min(size, end - position), info, name)

    @staticmethod
    def _from(file: Any, count: int, info: TensorInfo, name: str) -> torch.Tensor:
        data = torch.empty(count, dtype=torch.uint8)
        if file.readinto(memoryview(data.numpy())) != count:  # type: ignore[arg-type]
            raise CorruptFileError(f"{info.file} ends before {name} does: it is truncated")
        return data

    def _offsets(self, file: str) -> dict[str, tuple[int, int]]:
        """Where each tensor's bytes lie in a safetensors file (https://github.com/huggingface/safetensors#format)."""
        if file not in self._places:
            with open(file, "rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            base = 8 + length
            self._places[file] = {
                name: (base + entry["data_offsets"][0], base + entry["data_offsets"][1]) for name, entry in header.items()
            }
        return self._places[file]
