"""Repositories on the Hub: headers of their files are read over HTTP, without the weights; errors of the Hub in one sentence.

Ranges of files are requested as `HfApi.parse_safetensors_file_metadata` of huggingface_hub does it. That returns a parsed
header; here its bytes are needed, to be checked as those of a local file are.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's, in newer versions httpx2's
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

from ..errors import CheckpointError, ConfigError, FP8Error, MissingTensorError, UnsupportedError
from ..version import __version__
from .files import FileSystem, Stamp, changed, reading
from .weight_files import find_weight_files

# How many bytes of a file are read first: most headers are shorter. More are read if the header is longer.
_FIRST = 2**16
# Up to how many bytes a file is read as a whole from a server that sends no parts. The Hub's store of larger files sends parts.
_SMALL = 10_000_000
_THREADS, _ATTEMPTS = 8, 3
# A part of a file that has one of these names is read; the others are downloaded as a whole, and kept in the cache.
_IN_PARTS, _WHOLE = (".safetensors",), (".json", ".py")
_US: dict[str, Any] = {"library_name": "hf-fp8", "library_version": __version__}


class UnreachableError(ConfigError):
    """The Hub does not answer: no network, offline, or it is down."""


class HubFolder(FileSystem):
    """The files of a repository at one commit, or of a folder in it.

    root: what the folder is called in messages; a file is `root / name`. Nothing is here but the files of `here`.
    Raises ConfigError for a repository or revision that does not exist or cannot be read, UnreachableError.
    """

    def __init__(self, repository: str, revision: str | None = None, subfolder: str | None = None) -> None:
        self.repository, self.revision = repository, revision
        self._prefix = f"{subfolder.strip('/')}/" if subfolder and subfolder.strip("/") else ""
        self.root = Path(repository if revision is None else f"{repository}@{revision}", self._prefix)
        with asking(repository, revision):
            info = HfApi(**_US).model_info(
                repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        if info.sha is None:
            raise ConfigError(f"{repository} has no commit on the Hub: it is empty")
        self.commit: str = info.sha
        listed = {file.rfilename: file.size for file in info.siblings or ()}
        self._sizes = {name.removeprefix(self._prefix): size for name, size in listed.items() if name.startswith(self._prefix)}
        if not self._sizes:
            what = f"no folder {self._prefix.rstrip('/')!r}" if self._prefix else "no files"
            raise ConfigError(f"{repository} has {what} on the Hub")
        self._starts: dict[str, bytes] = {}

    def names(self, folder: Path) -> list[str]:
        return [name for name in self._sizes if "/" not in name]

    def is_there(self, path: str | Path) -> bool:
        return self._name(path) in self._sizes

    def regular(self, path: str | Path) -> Stamp:
        """Only the size can differ: the files of a commit never change."""
        if not self.is_there(path):
            raise MissingTensorError(f"{path} does not exist")
        return 0, 0, self._size(self._name(path)), 0

    @contextmanager
    def reading(self, path: str | Path, stamp: Stamp | None = None) -> Iterator[tuple[BinaryIO, Stamp]]:
        """As `files.reading`; for files that are not read in parts, raises as `here` does, too."""
        found, name = self.regular(path), self._name(path)
        if found != (stamp or found):
            raise changed(path)
        if name.endswith(_IN_PARTS):
            yield cast(BinaryIO, _RemoteFile(self, name, str(path), found[2])), found
        else:
            with reading(self.here(path)) as (file, _):
                yield file, found

    def expect(self, paths: Iterable[str]) -> None:
        """Read the beginnings of these files at the same time: one after the other, those of 100 files would take a minute."""
        names = [name for name in map(self._name, paths) if name.endswith(_IN_PARTS) and name not in self._starts]
        with ThreadPoolExecutor(_THREADS) as threads:
            starts = threads.map(lambda name: self.part(name, 0, min(_FIRST, self._size(name))), names)
            self._starts |= zip(names, starts, strict=True)

    def here(self, path: str | Path) -> Path:
        """Where a small file is on this machine, after it was downloaded into the cache of huggingface_hub.

        Raises UnsupportedError for files of weights, such as pickles, which have no header that could be read alone.
        """
        if not (name := self._name(path)).endswith(_WHOLE):
            raise UnsupportedError(
                f"{path} has no header, so that what it contains is known only after downloading it. {self._advice}"
            )
        with asking(self.repository, self.revision):
            return Path(hf_hub_download(self.repository, self._prefix + name, revision=self.commit, **_US))

    def downloaded(self, paths: Iterable[Path]) -> Path | None:
        """The folder of the cache that has the config and these files of this commit; None if it lacks one of them."""
        names = ["config.json", *map(self._name, paths)]
        found = [try_to_load_from_cache(self.repository, self._prefix + name, revision=self.commit) for name in names]
        return Path(str(found[0])).parent if all(isinstance(path, str) for path in found) else None

    def download_code(self) -> None:
        """Download the code of the repository, next to its config."""
        for name in self._sizes:
            if name.endswith(".py"):
                self.here(self.root / name)

    def start(self, name: str) -> bytes:
        """The first bytes of a file, as far as they have been read."""
        return self._starts.get(name, b"")

    def part(self, name: str, begin: int, end: int) -> bytes:
        """The bytes of a file from `begin` to `end`. Raises CheckpointError if the Hub sends something else."""
        if begin >= end:
            return b""
        url = hf_hub_url(self.repository, self._prefix + name, revision=self.commit)
        headers = build_hf_headers(**_US) | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with asking(self.repository, self.revision):
            for left in reversed(range(_ATTEMPTS)):
                try:
                    return self._sent(url, headers, begin, end, self._size(name))
                except HfHubHTTPError:
                    raise  # it answered
                except (HTTPError, OSError):
                    if not left:
                        raise
                    time.sleep(1)
        raise AssertionError

    def _sent(self, url: str, headers: dict[str, str], begin: int, end: int, size: int) -> bytes:
        data, first, count = bytearray(), 0, end - begin
        expected, timeout = f"bytes {begin}-{end - 1}/{size}", constants.HF_HUB_DOWNLOAD_TIMEOUT
        # No retries by huggingface_hub: if the body breaks off it would send the request again in the middle of this block.
        with http_stream_backoff("GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()) as response:
            hf_raise_for_status(response)
            if response.status_code == 200 and size <= _SMALL:
                first, count = begin, size
            elif response.status_code != 206:
                raise CheckpointError(
                    f"{url} is not sent in parts (HTTP {response.status_code}), so that reading its header would download all "
                    f"of it. {self._advice}"
                )
            elif (sent := response.headers.get("Content-Range")) != expected:
                raise CheckpointError(f"{url}: the Hub sent {sent} instead of {expected}, so that its header cannot be read")
            for piece in response.iter_bytes():
                data += piece
        if len(data) != count:
            raise CheckpointError(f"{url}: the Hub sent {len(data):,} bytes instead of {count:,}: try again")
        return bytes(data[first : first + end - begin])

    def _size(self, name: str) -> int:
        size = self._sizes[name]
        if size is None:
            raise CheckpointError(f"the Hub ({constants.ENDPOINT}) does not say how large {name} is. {self._advice}")
        return size

    @property
    def _advice(self) -> str:
        revision = "" if self.revision is None else f" --revision {self.revision}"
        return f"Download the repository (`hf download {self.repository}{revision}`), and try again"

    def _name(self, path: str | Path) -> str:
        try:
            return Path(path).relative_to(self.root).as_posix()
        except ValueError:
            return ""


class _RemoteFile(io.RawIOBase):
    """A file of a repository, to be read at any position. Only what is read is downloaded."""

    def __init__(self, folder: HubFolder, name: str, shown: str, size: int) -> None:
        self._folder, self._name, self.name, self._size, self._at = folder, name, shown, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self._at = position + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        begin, end = self._at, min(self._at + len(view), self._size)
        known = self._folder.start(self._name)[begin:end]
        data = known + self._folder.part(self._name, begin + len(known), end)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def download(repository: str, revision: str | None = None, ignore: Iterable[str] = ()) -> Path:
    """Download a repository into the cache of huggingface_hub, and return its folder there. ignore: patterns of file names.

    Raises ConfigError if it cannot be downloaded and is not in the cache.
    """
    with asking(repository, revision):
        return Path(snapshot_download(repository, revision=revision, ignore_patterns=list(ignore), **_US))


def cached(repository: str, revision: str | None = None, subfolder: str | None = None) -> Path | None:
    """The folder of a repository in the cache; None if its config or weights are not there. For use without the Hub: only it
    knows whether these are all weights."""
    name = f"{subfolder.strip('/')}/config.json" if subfolder and subfolder.strip("/") else "config.json"
    try:
        config = try_to_load_from_cache(repository, name, revision=revision)
    except HFValidationError:
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        return None if find_weight_files(folder) is None else folder
    except MissingTensorError:
        return None  # only a part was downloaded
    except FP8Error:
        return folder  # all is there, and wrong: who reads it says why


@contextmanager
def asking(repository: str, revision: str | None = None) -> Iterator[None]:
    """Context manager: turns errors of huggingface_hub into a ConfigError of one sentence, which says what to do."""
    hub = constants.ENDPOINT
    log_in = "log in (`hf auth login`) or set HF_TOKEN"
    try:
        yield
    except FP8Error:
        raise
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"{repository} has no revision {revision!r} on the Hub: pass a branch, a tag or the hash of a commit"
        ) from error
    except GatedRepoError as error:
        raise ConfigError(
            f"{repository} is gated: ask for access at {hub}/{repository}, then {log_in} with the account that has it"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{repository} is not a folder here, and was not found on the Hub ({hub}): correct the name, or, if it is private, "
            f"{log_in}"
        ) from error
    except HFValidationError as error:
        raise ConfigError(
            f"{repository} is neither a folder nor the name of a repository on the Hub ({_said(error)})"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ConfigError(f"the Hub ({hub}) refuses access to {repository} (HTTP {status}): {log_in}") from error
        kind = UnreachableError if status >= 500 else ConfigError
        raise kind(f"the Hub ({hub}) answered with HTTP {status} for {repository}: try again later") from error
    except OfflineModeIsEnabled as error:
        raise UnreachableError(
            f"{repository} is not in the cache as a whole, and HF_HUB_OFFLINE is set: unset it, or download the repository"
        ) from error
    except LocalEntryNotFoundError as error:  # the Hub was not reached, and the cache does not have all files
        why = error.__cause__
        offline = why is None or isinstance(why, OfflineModeIsEnabled)
        raise UnreachableError(
            f"{repository} is not in the cache as a whole, and "
            + ("HF_HUB_OFFLINE is set: unset it" if offline else f"the Hub ({hub}) cannot be reached ({_said(why)}): try again")
        ) from error
    except HTTPError as error:
        raise UnreachableError(
            f"the Hub ({hub}) cannot be reached, or the connection broke off, for {repository} ({_said(error)}): try again"
        ) from error
    except OSError as error:
        raise ConfigError(f"{repository} could not be downloaded from the Hub ({hub}): {_said(error)}") from error


def _said(error: BaseException | None) -> str:
    """The first line of a message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
