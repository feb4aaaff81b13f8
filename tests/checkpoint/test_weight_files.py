"""Which files of a folder are the checkpoint: those that transformers reads, or an error that names what is in doubt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.build import tiny_llama
from support.special_files import SPECIAL, no_waiting
from transformers.modeling_utils import _get_resolved_checkpoint_files

from hf_fp8.checkpoint.weight_files import find_weight_files
from hf_fp8.errors import CheckpointError, ConfigError, CorruptFileError, FP8Error, MissingTensorError, UnsupportedError

INDEX = "model.safetensors.index.json"
SHARD = "model-0000{}-of-00003.safetensors"


def write_index(path: Path, files: list[str] | Any, **others: Any) -> None:
    listed = {f"layer.{number}.weight": file for number, file in enumerate(files)} if isinstance(files, list) else files
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed, **others}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    names = [SHARD.format(number) for number in (1, 2, 3)]
    for number, name in enumerate(names):
        save_file({f"layer.{number}.weight": torch.ones(2)}, tmp_path / name)
    write_index(tmp_path / INDEX, names)
    return tmp_path


def names(folder: Path, **options: Any) -> list[str] | None:
    found = find_weight_files(folder, **options)
    return None if found is None else [str(file.relative_to(folder)) for file in found.files]


FOLDERS = [
    ["model.safetensors"],
    ["pytorch_model.bin"],
    ["model.safetensors", "pytorch_model.bin"],
    ["pytorch_model.bin", INDEX],
    ["model.safetensors", "pytorch_model.bin.index.json"],
    ["pytorch_model.bin.index.json"],
    ["model.fp16.safetensors"],
    ["model.safetensors.index.fp16.json", "model.safetensors"],
    ["pytorch_model.fp16.bin", "pytorch_model.bin"],
    ["special.safetensors", "model.safetensors"],
    [],
]


@pytest.mark.parametrize("there", FOLDERS, ids="+".join)
@pytest.mark.parametrize("options", [{}, {"use_safetensors": True}, {"use_safetensors": False}, {"variant": "fp16"}], ids=str)
def test_the_files_that_transformers_reads(tmp_path: Path, there: list[str], options: dict[str, Any]) -> None:
    """In every folder that is beyond doubt, with every option: the same files in the same order."""
    for name in there:
        if name.endswith(".json"):
            kind = "bin" if ".bin" in name else "safetensors"
            files = [f"part-b.{kind}", f"part-a.{kind}"]
            write_index(tmp_path / name, files)
            for file in files:
                (tmp_path / file).touch()
        else:
            (tmp_path / name).touch()
    for explicit in (None, *(["special.safetensors"] if "special.safetensors" in there else [])):
        try:
            expected, _ = _get_resolved_checkpoint_files(
                str(tmp_path), variant=options.get("variant"), gguf_file=None, use_safetensors=options.get("use_safetensors"),
                user_agent=None, is_remote_code=False, transformers_explicit_filename=explicit,
            )  # fmt: skip
        except OSError:
            expected = None
        found = find_weight_files(tmp_path, explicit=explicit, **options)
        assert (None if found is None else [str(file) for file in found.files]) == expected


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_file_and_an_index_of_others(tmp_path: Path, kind: str) -> None:
    """transformers takes the one file without a word; which is meant, nobody can tell."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    one, index = f"{stem}.{kind}", f"{stem}.{kind}.index.json"
    (tmp_path / one).touch()
    write_index(tmp_path / index, [one])
    assert names(tmp_path) == [one]  # of itself: no doubt
    write_index(tmp_path / index, [one, f"{stem}-00001-of-00002.{kind}"])
    with pytest.raises(CheckpointError, match=rf"{one}, .*{index}.*00001-of-00002.*Delete {index} if"):
        names(tmp_path)
    (tmp_path / index).write_text("null")
    with pytest.raises(CorruptFileError, match=f"{index}.*Delete {index} if"):
        names(tmp_path)
    (tmp_path / index).unlink()
    assert names(tmp_path) == [one]


def test_an_index_that_saving_left_behind(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(names(tmp_path) or []) > 3
    stale = (tmp_path / INDEX).read_text()
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / INDEX).write_text(stale)  # stock transformers leaves it, and removes the shards
    with pytest.raises(CheckpointError, match=r"Delete model.*index.* if .* is the checkpoint"):
        names(tmp_path)


def raw(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


def mapped(weight_map: Any, **others: Any) -> Callable[[Path], Any]:
    return lambda path: write_index(path, weight_map, **others)


INDEXES: dict[str, Callable[[Path], Any]] = {
    "no JSON": raw("{"),
    "nothing": raw(""),
    "no UTF-8": lambda path: path.write_bytes(b'{"weight_map": {"\xff": "a"}}'),
    "null": raw("null"),
    "a list": raw("[]"),
    "a number": raw("9" * 5000),
    "deep": raw('{"weight_map": ' + "[" * 200_000),
    "deep objects": raw('{"a":' * 200_000),
    "no weight_map": raw('{"metadata": {}}'),
    "no metadata": raw('{"weight_map": {"a": "model-00001-of-00003.safetensors"}}'),
    "metadata null": mapped(["a.safetensors"], metadata=None),
    "null map": mapped(None),
    "string map": mapped("a"),
    "empty map": mapped({}),
    "numbers": mapped({"a": 1}),
    "null file": mapped({"a": None}),
    "empty file": mapped({"a": ""}),
    "above": mapped({"a": "../outside.safetensors"}),
    "above, deep": mapped({"a": "sub/../../outside.safetensors"}),
    "above, by backslash": mapped({"a": "..\\outside.safetensors"}),
    "absolute": mapped({"a": "/etc/passwd"}),
    "itself": mapped({"a": "."}),
    "a null byte": mapped({"a": "a\0.safetensors"}),
    "a newline": mapped({"a": "a\nb.safetensors"}),
    "half a character": mapped({"a": "\ud800.safetensors"}),
    "a tensor with a newline": mapped({"a\nok: all is well": "model-00001-of-00003.safetensors"}),
    "one tensor twice": raw('{"metadata": {}, "weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes_that_are_none(sharded: Path, name: str) -> None:
    INDEXES[name](sharded / INDEX)
    with pytest.raises(CorruptFileError, match=INDEX):
        names(sharded)


def test_a_giant_index_is_not_read(sharded: Path) -> None:
    os.truncate(sharded / INDEX, 10**12)
    with no_waiting(), pytest.raises(CorruptFileError, match=INDEX):
        names(sharded)


def test_shards_that_are_not_there(sharded: Path) -> None:
    assert names(sharded) == [SHARD.format(number) for number in (1, 2, 3)]
    (sharded / SHARD.format(2)).unlink()
    with pytest.raises(MissingTensorError, match=r"00002-of-00003.*download"):
        names(sharded)
    (sharded / SHARD.format(2)).symlink_to(sharded / "a blob that is gone")
    with pytest.raises(MissingTensorError, match="00002-of-00003"):
        names(sharded)


@pytest.mark.parametrize("there", [True, False])
def test_an_index_that_leaves_out_a_number(sharded: Path, there: bool) -> None:
    write_index(sharded / INDEX, [SHARD.format(1), SHARD.format(3)])
    if not there:
        (sharded / SHARD.format(2)).unlink()
    with pytest.raises(CheckpointError, match=rf"{INDEX}.*00002-of-00003.*incomplete"):
        names(sharded)


@pytest.mark.parametrize(
    ("listed", "lost"),
    [
        (["m-00001-of-000002.safetensors"], "m-00002-of-000002"),
        (["m-2-of-3.safetensors", "m-3-of-3.safetensors"], "m-1-of-3"),
        (["a-1-of-1.safetensors", "b-1-of-2.safetensors"], "b-2-of-2"),
        (["m-00000-of-00003.safetensors", "m-00002-of-00003.safetensors"], "m-00001-of-00003"),
        (["m-1-of-999999999.safetensors"], "m-2-of-999999999"),
        (["m-00000-of-00002.safetensors", "m-00001-of-00002.safetensors"], None),
        (["m.safetensors", "other-part.safetensors"], None),
        (["sub/m-1-of-2.safetensors", "sub/m-2-of-2.safetensors"], None),
    ],
)
def test_numbered_files(tmp_path: Path, listed: list[str], lost: str | None) -> None:
    (tmp_path / "sub").mkdir()
    for name in listed:
        (tmp_path / name).touch()
    write_index(tmp_path / INDEX, listed)
    if lost is None:
        assert names(tmp_path) == sorted(listed)
        return
    with pytest.raises(CheckpointError, match=lost):
        names(tmp_path)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [SHARD.format(2), INDEX, "model.safetensors"])
def test_what_is_no_file_is_not_opened(sharded: Path, kind: str, name: str) -> None:
    (sharded / name).unlink(missing_ok=True)
    SPECIAL[kind](sharded / name)
    with no_waiting(), pytest.raises(CorruptFileError, match=f"{name} is a {kind}"):
        names(sharded)


def test_links(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder of links into another, as in the Hub's cache."""
    snapshot = tmp_path_factory.mktemp("snapshot")
    for file in sharded.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    assert names(snapshot) == [SHARD.format(number) for number in (1, 2, 3)]
    (sharded / "model.safetensors").touch()
    (snapshot / "model.safetensors").symlink_to(sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match="only one of them"):
        names(snapshot)


def test_the_file_that_the_config_names(sharded: Path) -> None:
    (sharded / "model.safetensors").touch()
    (sharded / "sub").mkdir()
    write_index(sharded / "sub" / "other.safetensors.index.json", [SHARD.format(number) for number in (1, 2, 3)])
    assert names(sharded, explicit="model.safetensors") == ["model.safetensors"]  # no doubt: it is named
    for index in (INDEX, "sub/other.safetensors.index.json"):  # whose files are sought in the folder, as the host does
        assert names(sharded, explicit=index) == [SHARD.format(number) for number in (1, 2, 3)]
    for bad in ("model.bin", "../model.safetensors", "/model.safetensors", "", 3, ["model.safetensors"]):
        with pytest.raises(ConfigError, match="transformers_weights"):
            names(sharded, explicit=bad)
    with pytest.raises(MissingTensorError, match="gone"):
        names(sharded, explicit="gone.safetensors")


def test_checkpoints_of_several_processes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "shard-00000-model-00001-of-00001.safetensors").touch()
    with pytest.raises(UnsupportedError, match="distributed"):
        names(tmp_path)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FP8Error, match="nothing"):
        names(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(FP8Error, match="file"):
        names(tmp_path / "file")


def test_files_that_may_not_be_looked_at(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(SHARD.format(2)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(CheckpointError, match=r"00002-of-00003.*Permission denied"):
        names(sharded)
