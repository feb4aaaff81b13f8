"""A checkpoint while it is being mutated, and how it is written. The writer lets through what safetensors would not."""

from __future__ import annotations

import copy
import json
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from support.build import State

from .bases import INDEX, Base

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What a mutation did. harmless: by docs/formats.md the checkpoint still is a good one, and means the same."""

    text: str
    harmless: bool = False


@dataclass
class Draft:
    """base: what it was made of. text: what is done to the text of config.json, late: to the written folder, in order."""

    base: Base
    config: Any
    shards: dict[str, State]
    index: Any
    text: list[Callable[[str], str]] = field(default_factory=list)
    late: list[Callable[[Path], None]] = field(default_factory=list)

    @staticmethod
    def of(base: Base) -> Draft:
        shards = {file: dict(state) for file, state in base.shards.items()}
        return Draft(base, copy.deepcopy(base.config), shards, copy.deepcopy(base.index))

    @property
    def names(self) -> list[str]:
        return sorted(name for state in self.shards.values() for name in state)

    def file_of(self, name: str) -> str:
        for file, state in self.shards.items():
            if name in state:
                return file
        raise KeyError(name)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.shards[self.file_of(name)][name]

    def put(self, name: str, tensor: torch.Tensor, beside: str | None = None) -> None:
        """Set a tensor; a new one goes into the file (and the index) that holds `beside`."""
        if name in self.names:
            self.shards[self.file_of(name)][name] = tensor
            return
        file = next(iter(self.shards)) if beside is None else self.file_of(beside)
        self.shards[file][name] = tensor
        if self.has_map:
            self.index["weight_map"][name] = file

    def drop(self, name: str) -> torch.Tensor:
        if self.has_map:
            self.index["weight_map"].pop(name, None)
        return self.shards[self.file_of(name)].pop(name)

    def rename(self, name: str, new: str) -> None:
        file = self.file_of(name)
        tensor = self.drop(name)
        self.shards[file][new] = tensor
        if self.has_map:
            self.index["weight_map"][new] = file

    @property
    def has_map(self) -> bool:
        return isinstance(self.index, dict) and isinstance(self.index.get("weight_map"), dict)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config`, unless a mutation has made something else of it."""
        found = self.config.get("quantization_config") if isinstance(self.config, dict) else None
        return found if isinstance(found, dict) else None

    def groups(self) -> list[dict[str, Any]]:
        groups = (self.quantization or {}).get("config_groups")
        return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = deep_json(self.config)
        for change in self.text:
            text = change(text)
        (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        for file, state in self.shards.items():
            if file.endswith(".safetensors"):
                (folder / file).write_bytes(packed(*header_of(state)))
            else:
                torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / file)
        if self.index is not None:
            (folder / INDEX).write_text(deep_json(self.index))
        for step in self.late:
            with suppress(OSError):  # what one mutation has made a folder, or a loop of links, another cannot write to
                step(folder)


def deep_json(value: Any) -> str:
    """JSON of a value that is nested more deeply than Python likes."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        return json.dumps(value)
    finally:
        sys.setrecursionlimit(limit)


def header_of(state: State) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and the bytes behind it, laid out as the library does."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0])):
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        data += raw
    return header, bytes(data)


def packed(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def unpacked(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def some(rng: Random, values: Any) -> Any:
    """One of `values`, None if there are none."""
    values = list(values)
    return rng.choice(values) if values else None
