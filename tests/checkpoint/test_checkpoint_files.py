"""Files of weights that are broken or hostile: an error of ours that names the file, before anything of it is believed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.special_files import SPECIAL, no_waiting

from hf_fp8.checkpoint import headers
from hf_fp8.checkpoint.reader import Checkpoint
from hf_fp8.errors import CheckpointError, CorruptFileError, FP8Error, UnsupportedError

Header = dict[str, Any]
BF16 = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}


def written(path: Path, header: Header | bytes, size: int, length: int | None = None) -> str:
    """A safetensors file of `size` bytes of values, with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(size))
    return str(path)


def entry(**changes: Any) -> Header:
    return {"layer.weight": {**BF16, **changes}}


HEADERS: dict[str, tuple[Header | bytes, int]] = {
    "no JSON": (b"{", 0),
    "nothing": (b"", 0),
    "no UTF-8": (b'{"layer.weight\xff": {}}', 0),
    "UTF-16": ("{}".encode("utf-16"), 0),
    "null": (b"null", 0),
    "a list": (b"[]", 0),
    "deep": (b'{"layer.weight": ' + b"[" * 200_000, 0),
    "deep objects": (b'{"a":' * 200_000, 0),
    "entry null": ({"layer.weight": None}, 12),
    "entry list": ({"layer.weight": []}, 12),
    "no dtype": ({"layer.weight": {"shape": [2, 3], "data_offsets": [0, 12]}}, 12),
    "no shape": ({"layer.weight": {"dtype": "BF16", "data_offsets": [0, 12]}}, 12),
    "no offsets": ({"layer.weight": {"dtype": "BF16", "shape": [2, 3]}}, 12),
    "dtype number": (entry(dtype=1), 12),
    "dtype list": (entry(dtype=["BF16"]), 12),
    "dtype unknown": (entry(dtype="BF17"), 12),
    "shape number": (entry(shape=6), 12),
    "shape negative": (entry(shape=[-2, -3]), 12),
    "shape float": (entry(shape=[2.0, 3.0]), 12),
    "shape bool": (entry(shape=[True, 6]), 12),
    "shape nested": (entry(shape=[[2], [3]]), 12),
    "shape too large": (entry(shape=[2, 4]), 12),
    "shape huge": (entry(shape=[10**30]), 12),
    "shape huge, but none": (entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), 0),
    "shape long": (entry(shape=[3] * 1_000_000), 12),
    "offsets three": (entry(data_offsets=[0, 6, 12]), 12),
    "offsets object": (entry(data_offsets={"0": 0}), 12),
    "offsets reversed": (entry(data_offsets=[12, 0]), 12),
    "offsets negative": (entry(data_offsets=[-12, 0]), 12),
    "offsets of a text": (entry(data_offsets=["0", "12"]), 12),
    "a hole before it": (entry(data_offsets=[4, 16]), 16),
    "a hole": ({**entry(), "next": {**BF16, "data_offsets": [16, 28]}}, 28),
    "an overlap": ({**entry(), "next": {**BF16, "data_offsets": [6, 18]}}, 18),
    "two in one place": ({**entry(), "next": BF16}, 12),
    "values missing": (entry(), 11),
    "values left over": (entry(), 13),
    "metadata list": ({"__metadata__": ["pt"], **entry()}, 12),
    "metadata numbers": ({"__metadata__": {"format": 1}, **entry()}, 12),
    "half of F4": (entry(dtype="F4", shape=[3], data_offsets=[0, 2]), 2),
    "one name twice": (
        json.dumps(entry()).encode()[:-1] + b', "layer.weight": {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]}}', 24,
    ),
    "one key twice": (b'{"layer.weight": {"dtype": "F32", "dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}', 12),
    "newline in a name": ({"layer.weight\nok: nothing wrong found": BF16}, 12),
    "half a character in a name": ({"layer.weight\ud800": BF16}, 12),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers(tmp_path: Path, name: str) -> None:
    header, size = HEADERS[name]
    with no_waiting(), pytest.raises(CorruptFileError, match=r"bad\.safetensors") as caught:
        Checkpoint([written(tmp_path / "bad.safetensors", header, size)])
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)
    if isinstance(header, dict) and "two" not in name and "metadata" not in name:
        assert "layer.weight" in str(caught.value) or "next" in str(caught.value) or "bytes" in str(caught.value)


@pytest.mark.parametrize("size", range(8))
def test_files_without_room_for_a_header(tmp_path: Path, size: int) -> None:
    (tmp_path / "bad.safetensors").write_bytes(bytes(size))
    with pytest.raises(CorruptFileError, match=r"bad\.safetensors"):
        Checkpoint([str(tmp_path / "bad.safetensors")])


@pytest.mark.parametrize("length", [14, 100_000_001, 2**63, 2**64 - 1])
def test_lengths_that_are_not_there(tmp_path: Path, length: int) -> None:
    with pytest.raises(CorruptFileError, match=r"bad\.safetensors"):
        Checkpoint([written(tmp_path / "bad.safetensors", entry(), 0, length)])


@pytest.mark.parametrize("text", [b"", struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 10**11) + b"{}"])
@pytest.mark.parametrize("name", ["bad.safetensors", "bad.bin"])
def test_giant_files_are_not_read(tmp_path: Path, text: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(text)
    os.truncate(tmp_path / name, 10**12)
    with no_waiting(), pytest.raises(CorruptFileError, match=name):
        Checkpoint([str(tmp_path / name)])


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["bad.safetensors", "bad.bin"])
def test_what_is_no_file(tmp_path: Path, kind: str, name: str) -> None:
    SPECIAL[kind](tmp_path / name)
    with no_waiting(), pytest.raises(CorruptFileError, match=f"{name} is a {kind}"):
        Checkpoint([str(tmp_path / name)])


@pytest.mark.parametrize("name", ["bad.safetensors", "bad.bin"])
def test_what_git_left_in_the_place_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(CorruptFileError, match=f"{name} is a Git LFS pointer"):
        Checkpoint([str(tmp_path / name)])


@pytest.mark.parametrize("name", ["bad.safetensors", "bad.bin"])
def test_files_that_may_not_be_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / name)
    real = open

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read .Permission denied") as caught:
        Checkpoint([str(tmp_path / name)])
    assert "damaged" not in str(caught.value)  # nothing is known of that


def test_dtypes_of_less_than_a_byte(tmp_path: Path) -> None:
    """Are let through, counted and copied, though torch has none of them, or packs them otherwise. So are complex numbers."""
    from hf_fp8.checkpoint.writer import nbytes

    header = {
        "a": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]},
        "b": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [3, 6]},
        "c": {"dtype": "F6_E3M2", "shape": [8], "data_offsets": [6, 12]},
        "d": {"dtype": "C64", "shape": [2], "data_offsets": [12, 28]},
    }
    checkpoint = Checkpoint([written(tmp_path / "a.safetensors", header, 28)])
    assert {name: nbytes(info) for name, info in checkpoint.tensors.items()} == {"a": 3, "b": 3, "c": 6, "d": 16}
    assert sum(len(piece) for piece in checkpoint.pieces("c", 4)) == 6
    for name in "abcd":
        with pytest.raises(UnsupportedError, match=rf"{name} in .* is .*reads no values of that dtype"):
            checkpoint.load(name)


def test_reads_what_is_there(tmp_path: Path) -> None:
    state = {
        "z": torch.randn(3, 5), "a": torch.zeros(0, 4), "m": torch.tensor(7), "b": torch.randn(300).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    torch.save(state, tmp_path / "a.bin")
    for name in ("a.safetensors", "a.bin"):
        checkpoint = Checkpoint([str(tmp_path / name)] * 2)
        found = checkpoint.read(list(state))
        for key, tensor in state.items():
            assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape
            assert torch.equal(found[key].float(), tensor.float()) and torch.equal(checkpoint.load(key).float(), tensor.float())
            data = torch.cat([*checkpoint.pieces(key, 7), torch.empty(0, dtype=torch.uint8)])
            assert torch.equal(data, tensor.reshape(-1).view(torch.uint8))


SECOND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "values": lambda tensor: torch.cat([tensor[:-1], tensor[-1:] + 1]),
    "shape": lambda tensor: tensor.view(-1, 2),
    "dtype": lambda tensor: tensor.view(torch.int32),
    "sign of zero": lambda tensor: torch.cat([-tensor[:1], tensor[1:]]),
}


@pytest.mark.parametrize("how", SECOND)
@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_tensor_in_two_files(tmp_path: Path, how: str, save: Callable[..., None]) -> None:
    tensor = torch.arange(2**23, dtype=torch.float32)  # more than one piece
    suffix = "safetensors" if save is save_file else "bin"
    one, two = str(tmp_path / f"one.{suffix}"), str(tmp_path / f"two.{suffix}")
    save({"a": torch.ones(1), "twice": tensor}, one)
    save({"b": torch.ones(1), "twice": tensor}, two)
    assert list(Checkpoint([one, two]).tensors) == ["a", "twice", "b"]  # the same in both: no matter which is read
    save({"b": torch.ones(1), "twice": SECOND[how](tensor)}, two)
    with pytest.raises(CheckpointError, match=rf"twice is in .*one\.{suffix}.* and in .*two\.{suffix}"):
        Checkpoint([one, two])


class Raises:
    """A pickle whose reading raises, or makes, what it is told to."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.made = call, args

    def __reduce__(self) -> Any:
        return self.made


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        torch.save({"a": torch.ones(3)}, path)
        path.write_bytes(change(path.read_bytes()))

    return write


def zipped(*entries: tuple[str, bytes]) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries:
                archive.writestr(name, content)

    return write


def other_disks(path: Path) -> None:
    """An archive that claims to be one of several: zipfile itself raises when it is asked whether it is an archive."""
    zipped(("a/data.pkl", b"."))(path)
    data = path.read_bytes()
    end = data.rindex(b"PK\5\6")
    path.write_bytes(data[:end] + b"PK\6\7" + struct.pack("<LQL", 1, 0, 3) + data[end:])


PICKLES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello, this is no checkpoint"),
    "html": lambda path: path.write_text("<!DOCTYPE html><html>404</html>"),
    "truncated": damaged(lambda data: data[: len(data) // 2]),
    "truncated by a byte": damaged(lambda data: data[:-1]),
    "an empty archive": zipped(),
    "an archive of others": zipped(("word/document.xml", b"<xml/>")),
    "an archive of many disks": other_disks,
    "a broken pickle in an archive": zipped(("a/data.pkl", b"\x80\x02]q\x00."), ("a/version", b"3\n")),
    "a pickle that ends early": zipped(("a/data.pkl", b"\x80\x02}"), ("a/version", b"3\n")),
    "a memo that is not there": lambda path: path.write_bytes(b"\x80\x02h\x05."),
    "a frame of exabytes": lambda path: path.write_bytes(b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f."),
    "a string of exabytes": lambda path: path.write_bytes(b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f."),
    "a list of lists": lambda path: torch.save(deep(), path),
    "code": lambda path: torch.save({"a": Raises(os.system, "true")}, path),
    "a list": lambda path: torch.save([torch.ones(2)], path),
    "no tensors": lambda path: torch.save({"model": {"a": torch.ones(2)}}, path),
    "numbers for names": lambda path: torch.save({1: torch.ones(2)}, path),
    "a newline in a name": lambda path: torch.save({"a\nb": torch.ones(2)}, path),
    "the name of the metadata": lambda path: torch.save({"__metadata__": torch.ones(2)}, path),
    "one value for a trillion": lambda path: torch.save({"a": torch.ones(1).expand(10**12)}, path),
}


def deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(300):
        found = [found]
    return found


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", PICKLES)
def test_pickles(tmp_path: Path, name: str) -> None:
    PICKLES[name](tmp_path / "pytorch_model.bin")
    with pytest.raises(CorruptFileError, match=r"pytorch_model\.bin"):
        Checkpoint([str(tmp_path / "pytorch_model.bin")])


@pytest.mark.parametrize(
    "kind",
    [ValueError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError, KeyError, pickle.UnpicklingError],
)
def test_whatever_a_pickle_raises(tmp_path: Path, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")

    def load(*_: Any, **__: Any) -> Any:
        raise kind

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CorruptFileError, match=rf"pytorch_model\.bin .*{kind.__name__}"):
        Checkpoint([str(tmp_path / "pytorch_model.bin")])


def test_compressed_archives(tmp_path: Path) -> None:
    """torch maps the file and takes what is compressed for values: [-2.7e15, 1.4e7, ...] for zeros, and no error."""
    plain, packed = tmp_path / "plain.bin", tmp_path / "packed.bin"
    torch.save({"a": torch.zeros(64), "b": torch.randn(10_000)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w") as new:
        for info in old.infolist():
            how = zipfile.ZIP_DEFLATED if info.filename.endswith("data/0") else zipfile.ZIP_STORED
            new.writestr(info.filename, old.read(info), how)
    assert not torch.equal(torch.load(packed, mmap=True)["a"], torch.zeros(64))  # else this can go
    with pytest.raises(CorruptFileError, match=r"packed\.bin is a compressed archive"):
        Checkpoint([str(packed)])


UNUSABLE: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(3, device="meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNUSABLE)
def test_tensors_that_are_not_values(tmp_path: Path, kind: str) -> None:
    torch.save({"fine": torch.ones(2), "odd.weight": UNUSABLE[kind]()}, tmp_path / "a.bin")
    with pytest.raises(UnsupportedError, match=rf"odd\.weight in .*a\.bin is .*{kind.split()[0]}"):
        Checkpoint([str(tmp_path / "a.bin")])


def test_signs_that_are_not_in_the_values(tmp_path: Path) -> None:
    """torch keeps a minus as a flag of the tensor; bytes that are copied do not have it."""
    torch.save({"a": torch._neg_view(torch.tensor([2.0, -4.0]))}, tmp_path / "a.bin")
    checkpoint = Checkpoint([str(tmp_path / "a.bin")])
    assert torch.equal(torch.cat([*checkpoint.pieces("a")]).view(torch.float32), torch.tensor([-2.0, 4.0]))


def replaced(path: Path, state: dict[str, torch.Tensor], save: Callable[..., None]) -> None:
    save(state, path.with_name("new"))
    os.replace(path.with_name("new"), path)


LATER: dict[str, Callable[[Path, Callable[..., None]], Any]] = {
    "other values": lambda path, save: replaced(path, {"a": torch.zeros(4), "b": torch.ones(4)}, save),
    "another shape": lambda path, save: replaced(path, {"a": torch.zeros(2, 2), "b": torch.ones(4)}, save),
    "another name": lambda path, save: replaced(path, {"c": torch.zeros(8)}, save),
    "gone": lambda path, save: path.unlink(),
    "empty": lambda path, save: (path.unlink(), path.touch()),
    "a FIFO": lambda path, save: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path, save: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", LATER)
@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_file_that_is_replaced_after_its_header_was_read(tmp_path: Path, how: str, save: Callable[..., None]) -> None:
    path = tmp_path / ("a.safetensors" if save is save_file else "a.bin")
    save({"a": torch.ones(4), "b": torch.ones(4)}, path)
    checkpoint = Checkpoint([str(path)])
    LATER[how](path, save)
    for read in (checkpoint.load, lambda name: list(checkpoint.pieces(name)), lambda name: checkpoint.read([name])):
        with no_waiting(), pytest.raises(CheckpointError, match=path.name):
            read("a")


def test_a_file_that_is_changed_in_place(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, path := tmp_path / "a.safetensors")
    checkpoint = Checkpoint([str(path)])
    data = path.read_bytes()
    path.write_bytes(data[:-4] + bytes(4))
    os.utime(path, ns=(0, 0))  # as long as it was; a clock may be too coarse to tell
    with pytest.raises(CheckpointError, match="changed or replaced"):
        checkpoint.load("a")


def test_many_small_tensors_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over the header, whatever is asked of the table."""
    count = 20_000
    header = {f"layer.{i}.scale": {"dtype": "BF16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]} for i in range(count)}
    file = written(tmp_path / "a.safetensors", header, 2 * count)
    opened = []
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *a, **o: opened.append(str(path)) or real(path, *a, **o))
    checkpoint = Checkpoint([file])
    assert len(checkpoint.read(list(checkpoint.tensors))) == count
    assert opened.count(file) == 2  # the header, and the values


def test_errors_are_ours(tmp_path: Path) -> None:
    for name in ("gone.safetensors", "gone.bin", "model.gguf"):
        with pytest.raises(FP8Error, match=name):
            Checkpoint([str(tmp_path / name)])
    shutil.copy(__file__, tmp_path / "script.safetensors")
    with pytest.raises(CorruptFileError, match="script"):
        Checkpoint([str(tmp_path / "script.safetensors")])


def test_pickles_in_the_format_before_zip(tmp_path: Path) -> None:
    """They cannot be mapped, but read."""
    state = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = Checkpoint([str(tmp_path / "pytorch_model.bin")])
    assert all(torch.equal(found.load(name), tensor) for name, tensor in state.items())


def test_dtypes_that_only_the_library_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a newer safetensors: what it says about a dtype counts, also how many bits a value has."""
    monkeypatch.delitem(headers.BITS, "BF16")
    monkeypatch.delitem(headers.BITS, "F4")
    four = {"dtype": "F4", "shape": [3, 2], "data_offsets": [12, 15]}
    none = {"dtype": "BF16", "shape": [0, 7], "data_offsets": [15, 15]}
    file = written(tmp_path / "model.safetensors", {"a": BF16, "b": four, "c": none}, 15)
    assert {name: info.shape for name, info in Checkpoint([file]).tensors.items()} == {"a": (2, 3), "b": (3, 2), "c": (0, 7)}
    for wrong in ({"shape": [2, 2]}, {"shape": [1]}, {"shape": [0]}, {"shape": [5]}, {"shape": [2**40] * 2}, {"dtype": "BF17"}):
        file = written(tmp_path / "model.safetensors", {"a": BF16 | wrong}, 12)
        with pytest.raises(CorruptFileError, match=r"model.safetensors.* a "):
            Checkpoint([file])
