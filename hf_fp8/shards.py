"""Safetensors files written tensor by tensor, and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .checkpoint import TORCH_DTYPES, TensorInfo
from .errors import ConfigError

INDEX = "model.safetensors.index.json"


def nbytes(info: TensorInfo) -> int:
    """Bytes of a tensor's values."""
    size = TORCH_DTYPES[info.dtype].itemsize
    for extent in info.shape:
        size *= extent
    return size


class ShardWriter:
    """Writes one safetensors file whose header is known beforehand: `write` puts each tensor where it belongs, in any order.

    The format is https://github.com/huggingface/safetensors#format: the length of the header as a little-endian uint64, the
    header as JSON, padded with spaces to a multiple of 8, and the values without gaps. Larger dtypes come first, as the
    library writes them, so that every tensor is aligned.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> None:
        self.path, self.tensors = path, tensors
        self._missing = set(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._starts: dict[str, int] = {}
        position = 0
        for name in sorted(tensors, key=lambda name: (-TORCH_DTYPES[tensors[name].dtype].itemsize, name)):
            info = tensors[name]
            end = position + nbytes(info)
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
            self._starts[name], position = position, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._file: BinaryIO = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._base + position)

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Write one tensor; returns its bytes."""
        info = self.tensors[name]
        assert tensor.shape == info.shape and tensor.dtype == TORCH_DTYPES[info.dtype], (name, tensor.shape, tensor.dtype, info)
        self._file.seek(self._base + self._starts[name])
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(memoryview(flat.numpy()))  # type: ignore[arg-type]
        self._missing.discard(name)
        return flat.numel()

    def copy(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Write one tensor from its bytes, uint8, piece by piece."""
        self._file.seek(self._base + self._starts[name])
        count = 0
        for piece in pieces:
            count += self._file.write(memoryview(piece.numpy()))  # type: ignore[arg-type]
        assert count == nbytes(self.tensors[name]), (name, count)
        self._missing.discard(name)

    def close(self) -> None:
        """Make sure that it is all there, on the disk."""
        assert not self._missing, f"{sorted(self._missing)[:3]} were never written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        self._file.close()


def write_index(folder: Path, files: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """The index that the host reads, if there is more than one file. files: name of a file -> its tensors."""
    if len(files) < 2:
        return
    weights = {name: file for file, tensors in files.items() for name in tensors}
    total = sum(nbytes(info) for tensors in files.values() for info in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(path: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well and vanishes when it does not.

    What is at `path` stays until then. A process that is killed leaves a hidden folder beside it, which the next one that
    writes there removes. replaces: a folder that is there is replaced if it holds a file of this name. Raises ConfigError if
    `path` is there, is no empty folder, and is not to be replaced.
    """
    path = Path(os.path.abspath(path))
    _clear_up(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file, not a folder")
    if path.exists() and any(path.iterdir()):
        if replaces is None:
            raise ConfigError(f"{path} is there already: choose another place, or ask for it to be overwritten")
        if not (path / replaces).exists():
            raise ConfigError(f"{path} is there already, and has no {replaces}: it is something else, and is not overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = _beside(path, "part", os.getpid()), _beside(path, "old", os.getpid())
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            _sync(file)
        if path.exists() and any(path.iterdir()):
            path.rename(old)
        part.rename(path)  # over an empty folder, too
        _sync(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, kind: str, process: int) -> Path:
    return path.with_name(f".{path.name}.{kind}-{process}")


def _clear_up(path: Path) -> None:
    """Remove what killed processes left; and put back what one of them had moved away when it was killed."""
    for kind in ("old", "part"):
        for left in path.parent.glob(f".{path.name}.{kind}-*"):
            process = left.name.rpartition("-")[2]
            if not process.isdigit() or _is_running(int(process)):
                continue
            if kind == "old" and not path.exists():
                left.rename(path)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # an earlier one had the same number
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    """See to it that a file, or the names in a folder, survive a crash of the machine."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
