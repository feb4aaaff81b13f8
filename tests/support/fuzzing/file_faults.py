"""Mutations of what the files are made of: headers of safetensors, the index of shards, the files themselves."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch

from .bases import INDEX, PICKLE, SINGLE, split
from .config_faults import ODD, Fault, nested
from .drafts import Change, Draft, header_of, packed, some, unpacked

Header = dict[str, Any]


def _bytes(path: Path) -> bytes:
    """Of a file that another mutation has not made larger than memory."""
    with open(path, "rb") as opened:
        return opened.read(2**26)


def _edit(draft: Draft, file: str, change: Callable[[Header], Any]) -> None:
    """Change the parsed header of a file that was written; what `change` returns, if anything, takes its place."""

    def step(folder: Path) -> None:
        path = folder / file
        with suppress(ValueError, LookupError, TypeError, AttributeError, OSError, struct.error):  # another one was here before
            header, data = unpacked(_bytes(path))
            changed = change(header)
            path.write_bytes(packed(header if changed is None else changed, data))

    draft.late.append(step)


def _shard(draft: Draft, rng: Random) -> str | None:
    return some(rng, [file for file, state in draft.shards.items() if file.endswith(".safetensors") and state])


def header_entry(draft: Draft, rng: Random) -> Change | None:
    """One entry of a header says something else than the bytes are."""
    file = _shard(draft, rng)
    if file is None:
        return None
    name = rng.choice(sorted(draft.shards[file]))
    what = rng.choice(["dtype", "shape", "offsets", "keys", "whole"])
    choices: dict[str, list[Any]] = {
        "dtype": [
            "BF16",
            "F16",
            "F32",
            "F8_E4M3",
            "F8_E5M2",
            "F8_E8M0",
            "F8_E4M3FNUZ",
            "I8",
            "U8",
            "F4",
            "C64",
            "F64",
            "x",
            "",
            3,
        ],
        "shape": [
            [],
            [0],
            [1],
            [-1, 4],
            [2**40, 2**40],
            [2**63],
            [64.0, 64],
            "64",
            None,
            [64, 64],
            [32, 128],
            [4096],
            [1, 64, 64],
        ],
        "offsets": ["shifted", "shorter", "longer", "beyond", "reversed", "negative", "overlap", "one", "huge", "none"],
        "keys": ["dtype", "shape", "data_offsets", "more"],
        "whole": [None, [], "x", 3, {}],
    }
    value = rng.choice(choices[what])

    def change(header: Header) -> None:
        entry = header.get(name)
        if not isinstance(entry, dict):
            return
        if what in ("dtype", "shape"):
            entry[what] = value
        elif what == "whole":
            header[name] = value
        elif what == "keys":
            if value == "more":
                entry["scale"] = 2.0
            else:
                entry.pop(value, None)
        else:
            start, end = entry.get("data_offsets", (0, 0))
            first = next((e["data_offsets"] for n, e in header.items() if n not in (name, "__metadata__")), [0, 1])
            entry["data_offsets"] = {
                "shifted": [start + 2, end + 2], "shorter": [start, end - 1], "longer": [start, end + 1],
                "beyond": [2**40, 2**40 + end - start], "reversed": [end, start], "negative": [-2, end - start - 2],
                "overlap": first, "one": [start], "huge": [0, 2**64], "none": None,
            }[value]  # fmt: skip

    _edit(draft, file, change)
    return Change(f"header of {file}: {what} of {name} is {value!r}")


def header_names(draft: Draft, rng: Random) -> Change | None:
    """Names twice, exchanged, renamed; metadata that is none."""
    file = _shard(draft, rng)
    if file is None:
        return None
    names = sorted(draft.shards[file])
    name, other = rng.choice(names), rng.choice(names)
    what = rng.choice(["twice", "exchanged", "metadata", "no metadata", "surrogate", "deep", "not UTF-8", "list"])
    odd = rng.choice(
        [None, 3, {"format": 3}, {"format": "tf"}, {"format": "nonsense"}, {"a": {"b": 1}}, [], {"format": "pt", "x": "y"}]
    )

    def change(header: Header) -> Any:
        if what == "twice":
            entry = header.get(other)
            return (json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}").encode()
        if what == "exchanged" and name in header and other in header:
            header[name], header[other] = header[other], header[name]
        elif what == "metadata":
            header["__metadata__"] = odd
        elif what == "no metadata":
            header.pop("__metadata__", None)
        elif what == "surrogate" and name in header:
            header[name + "\ud800"] = header.pop(name)
        elif what == "deep":
            header["__metadata__"] = {"format": "pt", "x": nested(500)}
        elif what == "not UTF-8":
            return json.dumps(header).encode().replace(b"weight", b"w\xff\xfeght", 1)
        elif what == "list":
            return [header]
        return None

    _edit(draft, file, change)
    return Change(f"header of {file}: {what}" + (f" {odd}" if what == "metadata" else f" {name}, {other}"))


def raw_bytes(draft: Draft, rng: Random) -> Change | None:
    """The length field, the end of the file, bytes anywhere."""
    file = some(rng, draft.shards)
    if file is None:
        return None
    what = rng.choice(["length", "cut", "tail", "flip", "garbage", "head", "zeros", "pickle"])
    length = rng.choice([0, 1, 7, 8, 100_000_000, 100_000_001, 2**31, 2**62, 2**64 - 1])
    part, place = rng.random(), rng.random()

    def step(folder: Path) -> None:
        path = folder / file
        if not path.is_file():
            return
        raw = _bytes(path)
        flipped = int(len(raw) * place)
        path.write_bytes({
            "length": struct.pack("<Q", length) + raw[8:], "cut": raw[: int(len(raw) * part)], "tail": raw + b"\0" * 13,
            "flip": raw[:flipped] + bytes([255 - b for b in raw[flipped : flipped + 1]]) + raw[flipped + 1 :],
            "garbage": bytes(range(256)) * 9, "head": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "zeros": b"\0" * len(raw), "pickle": b"\x80\x04cos\nsystem\n.",
        }[what])  # fmt: skip

    draft.late.append(step)
    return Change(f"bytes of {file}: {what}" + (f" {length}" if what == "length" else ""))


def index(draft: Draft, rng: Random) -> Change | None:
    """The index says something else than the files hold."""
    if not draft.has_map:
        return None
    places = draft.index["weight_map"]
    names, files = sorted(places), sorted(draft.shards)
    if not names:
        return None
    name, file = rng.choice(names), rng.choice(files)
    what = rng.choice([
        "another shard", "gone", "ghost", "null", "list", "number", "absolute", "above", "no map", "map null", "map list",
        "odd", "deep", "no metadata", "shuffled", "moved", "missing shard", "unlisted shard", "in two", "itself",
    ])  # fmt: skip
    harmless = False
    if what == "another shard":
        places[name] = file
    elif what == "gone":
        del places[name]
    elif what == "ghost":
        places["model.ghost.weight"] = rng.choice([file, "model-9.safetensors"])
    elif what in ("null", "list", "number"):
        places[name] = {"null": None, "list": [file], "number": 3}[what]
    elif what == "absolute":
        places[name] = rng.choice(["/etc/passwd", "/dev/zero", "/nowhere/model.safetensors"])
    elif what == "above":
        places[name] = rng.choice(["../model.safetensors", "./" + file, "x/../" + file, "config.json", ".", ""])
    elif what in ("no map", "map null", "map list"):
        draft.index["weight_map"] = None if what == "map null" else names
        if what == "no map":
            del draft.index["weight_map"]
    elif what == "odd":
        draft.index = rng.choice(ODD)()
    elif what == "deep":
        draft.index["metadata"] = {"x": nested(400)}
    elif what == "no metadata":
        del draft.index["metadata"]
    elif what == "shuffled":
        draft.index["weight_map"] = dict(sorted(places.items(), reverse=True))
        harmless = True
    elif what == "moved":
        draft.shards[file][name] = draft.shards[draft.file_of(name)].pop(name)
        places[name] = file
        harmless = True
    elif what == "missing shard":
        del draft.shards[file]
    elif what == "unlisted shard":
        draft.index["weight_map"] = {n: f for n, f in places.items() if f != file}
    elif what == "in two":
        other = rng.choice(files)
        tensor = draft[name]
        same = rng.random() < 0.5 or not tensor.is_floating_point()
        draft.shards[other].setdefault(name, tensor if same else torch.zeros_like(tensor))
    else:
        places[name] = INDEX
    return Change(f"index: {what} ({name} / {file})", harmless)


def index_of_one(draft: Draft, rng: Random) -> Change | None:
    """An index where there is a single file, shards beside it, or no such thing."""
    if draft.index is not None or SINGLE not in draft.shards:
        return None
    what = rng.choice(["empty", "right", "wrong", "split", "split wrong"])
    names = list(draft.shards[SINGLE])
    if what == "split":  # another layout of the same
        draft.shards, draft.index = split(draft.shards[SINGLE], 2)
        return Change("in two shards", harmless=True)
    if what == "split wrong":  # the single file counts
        others, draft.index = split({n: torch.zeros_like(t) for n, t in draft.shards[SINGLE].items()}, 2)
        draft.shards |= others
        return Change("an index and shards of zeros beside the single file")
    where = {"empty": {}, "right": dict.fromkeys(names, SINGLE), "wrong": dict.fromkeys(names, "elsewhere.safetensors")}[what]
    draft.index = {"metadata": {}, "weight_map": where}
    return Change(f"an index beside the single file: {what}", harmless=what == "right")


def files(draft: Draft, rng: Random) -> Change | None:
    """Something else in the place of a file."""
    file = rng.choice([*draft.shards, *draft.shards, *([INDEX] if draft.index is not None else []), "config.json"])
    kinds = ["empty", "missing", "folder", "sparse", "loop", "dangling", "copy", "beside"]
    what = "fifo" if rng.random() < 0.02 else rng.choice(kinds)

    def step(folder: Path) -> None:
        path = folder / file
        if what == "beside":  # what is not asked for, unless the weights are a pickle
            (folder / "pytorch_model.bin.index.json").write_text("{")
            (folder / "adapter_config.json.bak").write_text("{")
            return
        if not path.is_file():
            return
        if what == "copy":  # a link, as in the cache of the Hub
            path.rename(folder / "blob")
            path.symlink_to(folder / "blob")
            return
        path.unlink()
        if what == "empty":
            path.write_bytes(b"")
        elif what == "folder":
            path.mkdir()
        elif what == "sparse":
            with open(path, "wb") as opened:
                opened.truncate(2**37)
        elif what == "loop":
            path.symlink_to(path)
        elif what == "dangling":
            path.symlink_to(folder / "nowhere")
        elif what == "fifo":
            os.mkfifo(path)

    draft.late.append(step)
    return Change(f"{file}: {what}", harmless=what == "copy" or (what == "beside" and PICKLE not in draft.shards))


def huge(draft: Draft, rng: Random) -> Change | None:
    """A header of a hundred thousand tensors, or one that says a tensor of terabytes in a file that is as long."""
    file = _shard(draft, rng)
    if file is None:
        return None
    many = rng.random() < 0.5

    def step(folder: Path) -> None:
        path = folder / file
        if file not in draft.shards:
            return  # another mutation was here before
        header, data = header_of(draft.shards[file])
        if many:
            header |= {f"extra.{n}.bias": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(5000)}
            path.write_bytes(packed(header, data))
            return
        size = 2**36
        header["model.ghost"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(data), len(data) + size]}
        raw = packed(header, data)
        path.write_bytes(raw)
        with open(path, "r+b") as opened:
            opened.truncate(len(raw) + size)

    draft.late.append(step)
    return Change(f"{file}: {'five thousand more names' if many else 'a tensor of 64 GiB that nothing asks for'}")


FILES: dict[Fault, float] = {
    header_entry: 5, header_names: 3, raw_bytes: 3, index: 6, index_of_one: 2, files: 3, huge: 0.5,
}  # fmt: skip
