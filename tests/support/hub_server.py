"""A Hub on this machine: as much of the HTTP API of huggingface.co as huggingface_hub calls to find, read and write models.

What the paths, headers and JSON objects are is taken from huggingface_hub (`hf_api`, `file_download`, `_commit_api`, `lfs`): it
is the client. As on the real Hub, weights are LFS objects, to which `resolve` redirects, at another address. There is no Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_secret"
LFS = (".safetensors", ".bin")


@dataclass
class Repository:
    """commits: hash -> path -> content. refs: branch or tag -> hash. gated: files are refused, the list of them is not."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Make `files` all that is in a branch. Returns the hash of the commit."""
        digest = hashlib.sha1(f"{len(self.commits)}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        self.commits[digest.hexdigest()] = dict(files)
        self.refs[branch] = digest.hexdigest()
        return digest.hexdigest()


@dataclass
class HubServer:
    """url: where it answers. cdn: where its large files are.

    served: path of a file -> bytes of it that were sent. ranges: path -> ranges that were asked for, "" for the whole file.
    cuts: path -> how many bytes of it to send before the connection is closed. short: path -> how many bytes to send, as if
    that were all. authorized: of requests to the CDN, those with a token, which it must not get. objects: LFS objects by their
    sha256. knows_ranges: if not, it sends whole files. is_down: whether it answers everything with HTTP 503.
    """

    url: str = ""
    cdn: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    served: Counter[str] = field(default_factory=Counter)
    ranges: dict[str, list[str]] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    short: dict[str, int] = field(default_factory=dict)
    authorized: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    knows_ranges: bool = True
    is_down: bool = False

    def add(self, name: str, folder: Path, *, branch: str = "main", below: str = "", **options: bool) -> str:
        """Serve the files of a folder. below: the folder of the repository in which they are. Returns the commit's hash."""
        repository = self.repositories.setdefault(name, Repository())
        vars(repository).update(options)
        return repository.commit(
            {below + str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}, branch
        )

    def forget(self) -> None:
        """Count from zero."""
        self.served.clear()
        self.ranges.clear()

    def weights_served(self) -> int:
        """Bytes of weights that were sent."""
        return sum(count for path, count in self.served.items() if path.endswith(LFS))


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # a client that has read what it wanted
            self.close_connection = True

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def _answer(self, how: Any) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunks()
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        try:
            if self.hub.is_down:
                raise _Refused(503)
            how([unquote(part) for part in split.path.strip("/").split("/")])
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, b"{}", {key: value for key, value in headers.items() if value})

    def _chunks(self) -> bytes:
        found = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return found

    def _send(
        self, status: int, content: bytes = b"", headers: Mapping[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut is None else content[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True

    def _json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        is_authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.private and not is_authorized):
            raise _Refused(404 if is_authorized else 401, "RepoNotFound", "Repository not found")
        return found

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(name)
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    # -- reading --

    def _get(self, path: list[str]) -> None:
        match path:
            case ["cdn", oid, *rest]:
                if "Authorization" in self.headers:
                    self.hub.authorized.append("/".join(rest))
                self._content("/".join(rest), self.hub.objects[oid], {"ETag": f'"{oid}"'})
            case ["api", "models", user, name]:
                self._info(f"{user}/{name}", "main")
            case ["api", "models", user, name, "revision", revision]:
                self._info(f"{user}/{name}", revision)
            case ["api", "models", user, name, "tree", revision, *below]:
                _, files = self._files(f"{user}/{name}", revision)
                start = "".join(f"{part}/" for part in below)
                self._json([self._entry(file, content) for file, content in files.items() if file.startswith(start)])
            case [user, name, "resolve", revision, *rest]:
                self._resolve(f"{user}/{name}", revision, "/".join(rest))
            case _:
                raise _Refused(404, "", f"no such page: {self.path}")

    def _info(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        commit, files = self._files(name, revision)
        with_sizes = "blobs" in self.query
        self._json(
            {
                "_id": name, "id": name, "modelId": name, "sha": commit, "private": repository.private, "tags": [],
                "gated": "manual" if repository.gated else False, "downloads": 0, "likes": 0,
                "siblings": [self._sibling(file, files[file]) if with_sizes else {"rfilename": file} for file in files],
            }
        )  # fmt: skip

    def _sibling(self, path: str, content: bytes) -> dict[str, Any]:
        entry = self._entry(path, content)
        found = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
        lfs = entry.get("lfs")
        return found | ({"lfs": {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}} if lfs else {})

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
        if path.endswith(LFS):
            found["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
        return found

    def _resolve(self, name: str, revision: str, path: str) -> None:
        commit, files = self._files(name, revision)
        if self._repository(name).gated:
            raise _Refused(403, "GatedRepo", f"Access to model {name} is restricted")
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        content = files[path]
        if not path.endswith(LFS):
            self._content(path, content, {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": commit})
            return
        oid = _sha256(content)
        self.hub.objects[oid] = content
        self._send(
            302, b"",
            {
                "Location": f"{self.hub.cdn}/cdn/{oid}/{path}", "X-Repo-Commit": commit,
                "X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{oid}"',
            },
        )  # fmt: skip

    def _content(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range") or ""
        status, part = 200, content
        if wanted and self.hub.knows_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(content) - 1), len(content) - 1) + 1
            if start >= len(content):
                raise _Refused(416)
            status, part = 206, content[start:end]
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        cut, part = self.hub.cuts.get(path), part[: self.hub.short.get(path)]
        if self.command == "GET":
            self.hub.served[path] += len(part) if cut is None else min(cut, len(part))
            self.hub.ranges.setdefault(path, []).append(wanted)
        self._send(status, part, headers, cut=None if cut is None or cut >= len(part) else cut)

    # -- writing --

    def _post(self, path: list[str]) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused(401, "", "Invalid username or password.")
        match path:
            case ["api", "repos", "create"]:
                given = json.loads(self.body)
                name = f"{given.get('organization') or 'user'}/{given['name']}"
                known = name in self.hub.repositories
                if not known:
                    private = given.get("visibility") == "private"
                    self.hub.repositories[name] = Repository(private=private)
                    self.hub.repositories[name].commit({})
                self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, 409 if known else 200)
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "models", user, name, "preupload", revision]:
                _, files = self._files(f"{user}/{name}", revision)
                self._json({"files": [self._preupload(file, files) for file in json.loads(self.body)["files"]]})
            case [user, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                wanted = json.loads(self.body)["objects"]
                self._json({"transfer": "basic", "objects": [self._upload(each) for each in wanted]})
            case ["api", "models", user, name, "branch", branch]:
                repository = self._repository(f"{user}/{name}")
                repository.refs.setdefault(branch, repository.refs["main"])
                self._json({})
            case ["api", "models", user, name, "commit", revision]:
                self._commit(f"{user}/{name}", revision)
            case _:
                raise _Refused(404, "", f"no such page: {self.path}")

    def _preupload(self, file: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        path = file["path"]
        oid = _blob(files[path]) if path in files else None
        return {"path": path, "uploadMode": "lfs" if path.endswith(LFS) else "regular", "shouldIgnore": False, "oid": oid}

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        found = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.hub.objects:
            return found
        return found | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}}

    def _put(self, path: list[str]) -> None:
        if path[0] != "lfs" or _sha256(self.body) != path[1]:
            raise _Refused(400, "", "the object does not have this hash")
        self.hub.objects[path[1]] = self.body
        self._send(200)

    def _commit(self, name: str, revision: str) -> None:
        _, files = self._files(name, revision)
        new = dict(files)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                new[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del new[value["path"]]
        oid = self._repository(name).commit(new, revision)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    """The hash that git has for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving() -> Iterator[HubServer]:
    """Start a Hub without repositories, on two free ports of 127.0.0.1."""
    hub = HubServer()
    answers = type("Answers", (_Answers,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), answers) for _ in range(2)]
    one, other = (server.server_address[1] for server in servers)
    hub.url, hub.cdn = f"http://127.0.0.1:{one}", f"http://localhost:{other}"  # another host for the client
    try:
        for server in servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def use(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path, *, offline: bool = False, token: str | None = None) -> None:
    """Let huggingface_hub in this process talk to `url`, with this cache: it reads its environment when it is imported."""
    import huggingface_hub
    import transformers.utils.hub as host
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    huggingface_hub.close_session()
    for name, value in {
        "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": offline, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(cache / "token"), "HF_STORED_TOKENS_PATH": str(cache / "tokens"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(host, "_hf_api", None, raising=False)
    monkeypatch.setattr(_http, "_HUB_ORIGINS", frozenset(), raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    assert file_download.constants is constants
