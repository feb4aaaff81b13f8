"""Reads and checks the headers of safetensors files before anything else reads the file.

The format is https://github.com/huggingface/safetensors#format. The library checks much of this too, but only after it has
mapped the file, with less precise errors; and of two tensors with the same name it takes the last.
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from safetensors import SafetensorError, deserialize

from ..errors import CorruptFileError
from .files import LOCAL, FileSystem, Stamp, check_names, parse_object, refuse_pointer

# Maximum bytes of a header: safetensors' own limit.
_MOST = 100_000_000
# The library counts values in 64 bits.
_MOST_VALUES = 2**64
# Maximum bits per value of a dtype that is not in the list below. The largest today has 64.
_MOST_BITS = 1024
# Bits per value, for every dtype of safetensors 0.8.
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a checkpoint, without its values.

    dtype: safetensors' name of it ("F8_E4M3", "BF16", ...). begin, end: offsets of its bytes in a safetensors file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int = 0
    end: int = 0

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Header(NamedTuple):
    """The header of a safetensors file: its tensors by name, its `__metadata__`, and the stamp of the file that was read."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    stamp: Stamp


def read_header(file: str, fs: FileSystem = LOCAL) -> Header:
    """Read the header of a safetensors file. fs: where it is.

    Raises CorruptFileError, naming the file, and the tensor if one is the cause, unless the header is well-formed and its
    tensors fill the file. A dtype that is not in `BITS` is accepted if the installed safetensors knows it.
    """
    with fs.reading(file) as (opened, stamp):
        start = opened.read(64)
        refuse_pointer(file, start)
        length, room = int.from_bytes(start[:8], "little"), stamp[2] - 8
        if room < 0:
            raise _corrupt(file, f"it has {stamp[2]} bytes")
        if length > min(_MOST, room):
            raise _corrupt(file, f"it has {stamp[2]:,} bytes, but claims a header of {length:,}")
        opened.seek(8)
        content = opened.read(length)
    header = parse_object(content, f"{file}: its header", unique=True)
    metadata = _metadata(file, header)
    found = _tensors(file, header, 8 + length)
    _check_places(file, found, 8 + length, stamp[2])
    for name, info in found.items():
        if info.dtype not in BITS:
            _ask_library(file, name, info)
    return Header(found, metadata, stamp)


def _ask_library(file: str, name: str, info: TensorInfo) -> None:
    """Raise CorruptFileError unless the installed safetensors, which may be newer, knows the dtype of a tensor, and gives each
    value as many bits as the tensor has: it is asked for eight values, since any number of bits makes bytes of those."""
    bits = 8 * (info.end - info.begin)
    try:
        count = _count(list(info.shape))
        size = bits // count if count else 0
        if (bits % count if count else bits) or size > _MOST_BITS:
            raise ValueError(f"{info} does not match its bytes")
        entry = {"dtype": info.dtype, "shape": [8] if count else [0], "data_offsets": [0, size]}
        header = json.dumps({"x": entry}).encode()
        deserialize(len(header).to_bytes(8, "little") + header + bytes(size))  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError) as error:
        raise CorruptFileError(
            f"{file} cannot be read as safetensors: {name} has dtype {reprlib.repr(info.dtype)}, which the installed version "
            "does not know. The file is damaged, or was written by a newer version"
        ) from error


def _metadata(file: str, header: dict[str, Any]) -> dict[str, str]:
    """Take `__metadata__` out of a header."""
    metadata: dict[str, str] | None = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _corrupt(file, "__metadata__ is not a map of strings to strings")
    return metadata or {}


def _tensors(file: str, header: dict[str, Any], base: int) -> dict[str, TensorInfo]:
    check_names(file, header)
    found = {}
    for name, entry in header.items():
        try:
            found[name] = _info(file, entry, base)
        except ValueError as error:
            raise _corrupt(file, f"{name} {error}") from error
    return found


def _info(file: str, entry: Any, base: int) -> TensorInfo:
    """Parse the entry of one tensor. Raises ValueError that says what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError(f"is {reprlib.repr(entry)}, not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise ValueError(f"has dtype {reprlib.repr(dtype)}")
    if not _are_counts(shape):
        raise ValueError(f"has shape {reprlib.repr(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"has data_offsets {reprlib.repr(offsets)}")
    begin, end = offsets
    bits = BITS.get(dtype)
    if bits is not None and _count(shape) * bits != 8 * (end - begin):
        raise ValueError(f"is {dtype} {reprlib.repr(shape)}, which does not match its {end - begin:,} bytes")
    return TensorInfo(dtype, tuple(shape), file, base + begin, base + end)


def _are_counts(found: Any) -> TypeGuard[list[int]]:
    return isinstance(found, list) and {*map(type, found)} <= {int} and min(found, default=0) >= 0


def _count(shape: list[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
        if count >= _MOST_VALUES:  # stop here: a product of millions of extents would take hours
            raise ValueError(f"has shape {reprlib.repr(shape)}")
    return count


def _check_places(file: str, found: dict[str, TensorInfo], start: int, size: int) -> None:
    """Raise unless the tensors fill the bytes from `start` to `size` without gaps or overlaps."""
    position = start
    for name, info in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise _corrupt(file, f"{name} {'overlaps the tensor' if info.begin < position else 'has a gap'} before it")
        position = info.end
    if position != size:
        raise _corrupt(file, f"its header describes {position:,} bytes, but the file has {size:,}")


def _corrupt(file: str, why: str) -> CorruptFileError:
    return CorruptFileError(
        f"{file} cannot be read as safetensors: {why}. It is truncated or damaged: download or write it again."
    )
