"""Reads files safely: regular files only, checked JSON, and stamps that detect whether a file was replaced."""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, CorruptFileError, MissingTensorError

# Device, inode, size, modification time in ns: differs if a file was changed or replaced.
Stamp = tuple[int, int, int, int]
# Maximum bytes of a JSON file. The index of an MoE model with 100,000 tensors has 10 MB.
_MOST_JSON = 100_000_000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LFS = b"version https://git-lfs"
_KINDS = (
    (stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"),
)  # fmt: skip


def is_there(path: str | Path) -> bool:
    """Whether `path` exists, including broken links. Raises CheckpointError if this cannot be determined."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return True


def regular(path: str | Path) -> Stamp:
    """The stamp of a regular file, or of the target of a link. Nothing is opened: opening a FIFO waits for a writer.

    Raises MissingTensorError if it does not exist, CorruptFileError for a folder, FIFO, socket or device, CheckpointError if
    it cannot be inspected.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        broken = " (it is a broken link)" if os.path.islink(path) else ""
        raise MissingTensorError(f"{path} does not exist{broken}") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "special file")
        raise CorruptFileError(f"{path} is a {kind}, not a regular file")
    return _stamp(found)


@contextmanager
def reading(path: str | Path, stamp: Stamp | None = None) -> Iterator[tuple[BinaryIO, Stamp]]:
    """Context manager: open a regular file; gives the file and its stamp. stamp: the one that it must have.

    Raises as `regular` does, and CheckpointError, naming the file, if its stamp differs or reading fails.
    """
    found = regular(path)
    try:
        with open(path, "rb") as file:
            if _stamp(os.fstat(file.fileno())) != (stamp or found):
                raise changed(path)
            yield file, found
    except OSError as error:
        raise _unreadable(path, error) from error


def changed(path: str | Path) -> CheckpointError:
    return CheckpointError(
        f"{path} was changed or replaced while it was read: old and new contents would be mixed. Start again when no process "
        "writes to it"
    )


class FileSystem:
    """Finds and reads the files of this machine. A subclass does it elsewhere (`checkpoint.hub`)."""

    def names(self, folder: Path) -> list[str]:
        """The names of what is in a folder. Raises CheckpointError if it cannot be read."""
        try:
            return os.listdir(folder)
        except OSError as error:
            raise _unreadable(folder, error) from error

    def is_there(self, path: str | Path) -> bool:
        return is_there(path)

    def regular(self, path: str | Path) -> Stamp:
        return regular(path)

    def reading(self, path: str | Path, stamp: Stamp | None = None) -> AbstractContextManager[tuple[BinaryIO, Stamp]]:
        return reading(path, stamp)

    def here(self, path: str | Path) -> Path:
        """The path under which other libraries can open a file on this machine."""
        return Path(path)

    def expect(self, paths: Iterable[str]) -> None:
        """Called before the headers of these files are read one after the other."""


LOCAL = FileSystem()


def read_json(path: Path, *, unique: bool = False, fs: FileSystem = LOCAL) -> dict[str, Any]:
    """Return the object in a JSON file. unique: whether a duplicate key is an error; otherwise the last one counts, as usual.

    Raises CorruptFileError if it does not contain a JSON object, CheckpointError if it cannot be read.
    """
    stamp = fs.regular(path)
    if stamp[2] > _MOST_JSON:
        raise CorruptFileError(f"{path} has {stamp[2]:,} bytes: too many for a JSON file of a checkpoint")
    with fs.reading(path, stamp) as (file, _):
        content = file.read(stamp[2])
    return parse_object(content, str(path), unique=unique)


def parse_object(content: bytes, where: str, *, unique: bool) -> dict[str, Any]:
    """Parse `content` as a JSON object. Raises CorruptFileError, with a message that begins with `where`, if it is not one."""
    try:
        found = json.loads(content.decode(), object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CorruptFileError(f"{where} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise CorruptFileError(f"{where} contains a {type(found).__name__}, not an object")
    return found


def refuse_pointer(where: str, start: bytes) -> None:
    """Raise CorruptFileError for a Git LFS pointer, which stands for a file that was not downloaded."""
    if start.startswith(_LFS):
        raise CorruptFileError(f"{where} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download the file")


def check_names(where: str, names: Iterable[str]) -> None:
    """Raise CorruptFileError for a tensor or file name that cannot be printed: with control characters or lone surrogates."""
    together = "".join(names)
    try:
        together.encode()
        plain = _CONTROL.search(together) is None
    except UnicodeEncodeError:
        plain = False
    if not plain:
        name = next(name for name in names if _CONTROL.search(name) or name.encode(errors="ignore").decode() != name)
        raise CorruptFileError(f"{where} contains {reprlib.repr(name)}, which is not a valid name of a tensor or file")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{reprlib.repr(twice)} appears twice")
    return found


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _unreadable(path: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})")
