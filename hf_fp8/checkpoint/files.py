"""Files opened with care: only regular ones, JSON that may hold anything, and whether a file is still the one that was read."""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, CorruptFileError, MissingTensorError

# Device, inode, size, time of the last change of the content in ns: another file under the same name has another one.
Stamp = tuple[int, int, int, int]
# Bytes of a JSON file. The index of a mixture with 100,000 tensors has 10 MB.
_MOST_JSON = 100_000_000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LFS = b"version https://git-lfs"
_KINDS = (
    (stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"),
)  # fmt: skip


def is_there(path: str | Path) -> bool:
    """Whether the folder has an entry of that name, be it a link to nothing. Raises CheckpointError if that cannot be told."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return True


def regular(path: str | Path) -> Stamp:
    """The stamp of a regular file, or of the one that a link leads to. Nothing is opened: opening a FIFO waits for a writer.

    Raises MissingTensorError if nothing is there, CorruptFileError for a folder, FIFO, socket or device, CheckpointError if
    it cannot be looked at.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        broken = " (a link is, which leads to nothing)" if os.path.islink(path) else ""
        raise MissingTensorError(f"{path} is not there{broken}") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "special file")
        raise CorruptFileError(f"{path} is a {kind}, where a file should be")
    return _stamp(found)


@contextmanager
def reading(path: str | Path, stamp: Stamp | None = None) -> Iterator[tuple[BinaryIO, Stamp]]:
    """A regular file that is open, and its stamp. stamp: the one that it must have.

    Raises as `regular` does, and CheckpointError, naming the file, if it has another stamp, or when reading fails.
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
        f"{path} was changed or replaced while it was read: what was read before and what is there now would be mixed. "
        "Start again when nothing writes to it any more"
    )


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """The object in a JSON file. unique: whether a key that is there twice is an error; else the last one counts, as usual.

    Raises CorruptFileError for whatever else it holds, CheckpointError if it cannot be read.
    """
    with reading(path) as (file, stamp):
        if stamp[2] > _MOST_JSON:
            raise CorruptFileError(f"{path} has {stamp[2]:,} bytes: it is no JSON file of a checkpoint")
        content = file.read(stamp[2])
    return parse_object(content, str(path), unique=unique)


def parse_object(content: bytes, where: str, *, unique: bool) -> dict[str, Any]:
    """The object that `content` is as JSON. Raises CorruptFileError, which begins with `where`, if it is not one."""
    try:
        found = json.loads(content.decode(), object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CorruptFileError(f"{where} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise CorruptFileError(f"{where} holds a {type(found).__name__}, not an object")
    return found


def refuse_pointer(where: str, start: bytes) -> None:
    """Raise CorruptFileError for what Git leaves in the place of a file that it has not fetched."""
    if start.startswith(_LFS):
        raise CorruptFileError(f"{where} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download the file")


def check_names(where: str, names: Iterable[str]) -> None:
    """Raise CorruptFileError for a name of a tensor or a file that no message could show: with control characters, or half a
    character."""
    together = "".join(names)
    try:
        together.encode()
        plain = _CONTROL.search(together) is None
    except UnicodeEncodeError:
        plain = False
    if not plain:
        name = next(name for name in names if _CONTROL.search(name) or name.encode(errors="ignore").decode() != name)
        raise CorruptFileError(f"{where} has the name {reprlib.repr(name)} in it, which no tensor and no file is given")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{reprlib.repr(twice)} is there twice")
    return found


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _unreadable(path: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})")
