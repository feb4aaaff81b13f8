"""Writes safetensors files tensor by tensor, and files and folders atomically: complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import ConfigError, UnsupportedError
from .headers import BITS
from .reader import TORCH_DTYPES, TensorInfo
from .weight_files import INDEX

# Suffixes of files with weights, in any format.
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".index.json", ".ckpt")


def nbytes(info: TensorInfo) -> int:
    """Bytes of a tensor's values. Raises UnsupportedError for a dtype that safetensors does not have."""
    if info.dtype not in BITS:
        raise UnsupportedError(f"a tensor in {info.file} is {info}: safetensors has no such dtype")
    return math.prod(info.shape) * BITS[info.dtype] // 8


class ShardWriter:
    """Writes one safetensors file whose header is known in advance; `write` accepts the tensors in any order.

    The format is https://github.com/huggingface/safetensors#format: the length of the header as a little-endian uint64, the
    header as JSON, padded with spaces to a multiple of 8, and the values without gaps. Larger dtypes come first, as the
    library writes them, so that every tensor is aligned.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> None:
        self.tensors = tensors
        self._missing = set(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._starts: dict[str, int] = {}
        position = 0
        for name in sorted(tensors, key=lambda name: (-BITS[tensors[name].dtype], name)):
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

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Check that all tensors were written and flush them to disk; after an exception, only close the file."""
        with self._file:
            if kind is None:
                assert not self._missing, f"{sorted(self._missing)[:3]} were never written"
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor."""
        info = self.tensors[name]
        assert tensor.shape == info.shape and tensor.dtype == TORCH_DTYPES[info.dtype], (name, tensor.shape, tensor.dtype, info)
        self.copy(name, [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)])

    def copy(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Write one tensor from its bytes, in uint8 pieces."""
        self._file.seek(self._base + self._starts[name])
        count = 0
        for piece in pieces:
            count += self._file.write(memoryview(piece.numpy()))  # type: ignore[arg-type]
        assert count == nbytes(self.tensors[name]), (name, count)
        self._missing.discard(name)


def shard_names(count: int) -> list[str]:
    """The names of `count` files with weights, as transformers names them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, files: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Write the index that transformers reads, if there is more than one file. files: name of a file -> its tensors."""
    if len(files) < 2:
        return
    weights = {name: file for file, tensors in files.items() for name in tensors}
    total = sum(nbytes(info) for tensors in files.values() for info in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def check_place(path: Path, replaces: str | None) -> None:
    """Raise ConfigError unless a folder can be written to `path`: it does not exist, is an empty folder, or may be replaced.

    path: with links resolved. replaces: the name of a file that a folder must contain to be replaced. Folders with weights in
    subfolders are not replaced; nor are mount points, or folders that contain one, as no folder can be renamed to their path.
    """
    if mounted := _mount_in(path):
        raise ConfigError(f"{mounted} is a mount point, which cannot be replaced by a new folder: choose a folder inside it")
    _check_parent(path)
    try:
        _check_what_is_there(path, replaces)
    except FileNotFoundError as error:  # moved aside after it was found
        raise _written_meanwhile(path) from error


def _check_what_is_there(path: Path, replaces: str | None) -> None:
    """What `check_place` says of `path` itself. Raises FileNotFoundError if it vanishes meanwhile."""
    if path.is_symlink():
        raise ConfigError(f"{path} is a circular link")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file, not a folder")
    if not path.exists() or not any(path.iterdir()):
        return
    if replaces is None:
        raise ConfigError(f"{path} exists already: choose another path, or pass --overwrite (overwrite=True)")
    if not (path / replaces).exists():
        raise ConfigError(f"{path} exists already, but has no {replaces}, so it is not overwritten: choose another path")
    if (path / ".git").exists():
        raise ConfigError(f"{path} is not overwritten, since it is a git repository ({path / '.git'}). Choose another path")
    if _is_of_something_else(path / replaces):
        raise ConfigError(f"{path} is not overwritten, since its {replaces} is not that of a checkpoint. Choose another path")
    inside = (file for file in path.rglob("*") if file.parent != path and file.name.endswith(WEIGHT_FILES))
    if (found := next(inside, None)) is not None:
        raise ConfigError(f"{path} is not overwritten, since a subfolder has weights: {found}. Choose another path")


def _is_of_something_else(file: Path) -> bool:
    """Whether a JSON file has a table with none of the keys that a model's config, or `quantization.json`, has."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and not found.keys() & {"model_type", "architectures", "transformers_version", "modules"}


def _mount_in(path: Path) -> Path | None:
    """`path` if it is a mount point, else a mount point in it; None if there is none."""
    if os.path.ismount(path):
        return path
    try:  # on Linux: `ismount` does not detect bind mounts from the same file system
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    points = [Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4])) for line in lines]
    return next((point for point in points if path in (point, *point.parents)), None)


def _check_parent(path: Path) -> None:
    """Raise ConfigError if no folder can be created next to `path`."""
    place = path.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{path} cannot be written: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{path} cannot be written: no permission to write to {place}")
    if len(os.fsencode(_new_beside(path).name)) > 255:
        raise ConfigError(f"{path} cannot be written: its name is too long for the temporary folder, which has a suffix")


@contextlib.contextmanager
def whole_folder(path: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """Context manager: gives a temporary folder to fill, which is renamed to `path` on success and deleted on an exception.

    An existing folder at `path` stays until then: it is moved aside, the new folder is renamed to `path`, and only then the old
    one is deleted. If the process is killed in between, the next process that writes to `path` moves it back. A process killed
    while it fills the folder leaves it next to `path`, as `.<name>.part-<random>`; the user must delete it, since another
    process may be writing to it. Raises ConfigError as `check_place` does, before and after the block.
    """
    path = Path(os.path.realpath(path))
    old = path.with_name(f".{path.name}.hf-fp8-old")
    _put_back(old, path)
    check_place(path, replaces)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _new_beside(path)
    try:
        part.mkdir()
        yield part
        for file in [part, *part.rglob("*")]:
            _sync(file)
        check_place(path, replaces)  # another thread or process may have written there meanwhile
        _move_in(part, path, old if replaces is not None else None)
        _sync(path.parent)
    except BaseException:
        _put_back(old, path)
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Context manager: gives the path of a temporary file to write, which is renamed to `path` on success, over a file that is
    there, and deleted on an exception. Raises ConfigError if no file can be written to `path`."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a file")
    _check_parent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _new_beside(path)
    try:
        yield part
        _sync(part)
        part.replace(path)
        _sync(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _move_in(part: Path, path: Path, old: Path | None) -> None:
    """Rename `part` to `path`. old: where to move what is there, None if nothing may be there but an empty folder.

    Raises ConfigError if another thread or process writes there at the same time.
    """
    try:
        if old is not None and path.exists() and any(path.iterdir()):
            shutil.rmtree(old, ignore_errors=True)  # of a process that was killed while it deleted it
            path.rename(old)
        part.rename(path)  # over an empty folder, too
    except OSError as error:
        vanished = isinstance(error, FileNotFoundError) and part.exists()
        if vanished or error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise _written_meanwhile(path) from error
        raise


def _written_meanwhile(path: Path) -> ConfigError:
    return ConfigError(f"{path} was written by another thread or process at the same time, and stays as it is")


def _new_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part-{secrets.token_hex(8)}")


def _put_back(old: Path, path: Path) -> None:
    if old.exists() and not path.exists():
        with contextlib.suppress(OSError):  # somebody else does it at the same time; else `old` stays for the next one
            old.rename(path)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk, so that they survive a crash of the machine."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
