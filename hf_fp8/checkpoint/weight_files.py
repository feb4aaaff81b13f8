"""Finds the checkpoint files of a folder: those that transformers reads, or an error if the folder is ambiguous."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError, ConfigError, CorruptFileError, MissingTensorError, UnsupportedError
from .files import LOCAL, FileSystem, Stamp, check_names, read_json

INDEX = "model.safetensors.index.json"
# (single file, index of several files), in transformers' order of preference
_SAFETENSORS = ("model.safetensors", INDEX)
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})(?P<end>\.[^/]+)")
# If a folder has one of these, transformers reads it as a checkpoint of several processes, whatever else is there.
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors$")


@dataclass(frozen=True)
class WeightFiles:
    """The files of a checkpoint, sorted.

    listed: tensor -> file, according to the index, if there is one. stamps: of all files, taken before any was opened.
    """

    files: tuple[Path, ...]
    index: Path | None = None
    listed: Mapping[str, Path] = field(default_factory=dict)
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)


def find_weight_files(
    folder: str | os.PathLike[str],
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    explicit: str | None = None,
    fs: FileSystem = LOCAL,
) -> WeightFiles | None:
    """Return the files that `from_pretrained` reads from `folder`; None if it has no weights. No weight file is opened.

    variant, use_safetensors: as for `from_pretrained`. explicit: the file, or index, that config.json names
    (`transformers_weights`). fs: where the folder is. It may consist of links, as in the Hub's cache.

    Raises errors that name the files: CheckpointError if there is a single file next to an index of others, or an index that
    leaves out numbers of a series; CorruptFileError for an invalid index, one that names files outside of the folder, and for
    anything that is not a regular file; MissingTensorError if files that the index lists do not exist; ConfigError for an
    invalid `explicit`; UnsupportedError for checkpoints of several processes.
    """
    folder = Path(folder)
    if any(map(_DISTRIBUTED.match, fs.names(folder))):
        raise UnsupportedError(f"{folder} holds a distributed checkpoint (shard-*.safetensors), which hf_fp8 does not read")
    if explicit is not None:
        return _explicit(folder, explicit, fs)
    kinds = ((_SAFETENSORS, use_safetensors is not False), (_PICKLED, not use_safetensors))
    for single, index in (pair for pair, wanted in kinds if wanted):
        one, several = folder / _with_variant(single, variant), folder / _with_variant(index, variant)
        if fs.is_there(one):
            stamp = fs.regular(one)
            if fs.is_there(several):
                _refuse_two(one, several, fs)
            return WeightFiles((one,), stamps={one: stamp})
        if fs.is_there(several):
            return _sharded(folder, several, fs)
    return None


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, end = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{end}"


def _explicit(folder: Path, name: object, fs: FileSystem) -> WeightFiles:
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")) or not _is_inside(name):
        raise ConfigError(
            f"{folder}: transformers_weights of config.json is {name!r}; it must name a .safetensors file, or the "
            ".safetensors.index.json of several, in the folder"
        )
    path = folder / name
    return _sharded(folder, path, fs) if name.endswith(".json") else WeightFiles((path,), stamps={path: fs.regular(path)})


def _sharded(folder: Path, index: Path, fs: FileSystem) -> WeightFiles:
    stamp = fs.regular(index)
    listed = _weight_map(index, fs)
    names = sorted(set(listed.values()))
    _check_series(index, names)
    stamps, missing = {index: stamp}, []
    for name in names:
        if fs.is_there(folder / name):
            stamps[folder / name] = fs.regular(folder / name)
        else:
            missing.append(name)
    if missing:
        raise MissingTensorError(
            f"{index} lists {_some(missing)}, which {'does' if len(missing) == 1 else 'do'} not exist: download what is missing"
        )
    return WeightFiles(
        tuple(folder / name for name in names), index, {key: folder / name for key, name in listed.items()}, stamps
    )


def _weight_map(index: Path, fs: FileSystem) -> dict[str, str]:
    """Tensor -> file, read from the index. Raises CorruptFileError, naming the index, if it is invalid."""
    content = read_json(index, unique=True, fs=fs)
    found = content.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise CorruptFileError(f"{index} has no weight_map from tensors to files")
    if not found:
        raise CorruptFileError(f"{index} has an empty weight_map: it lists no file")
    if not isinstance(content.get("metadata"), dict):
        raise CorruptFileError(f'{index} has no "metadata" object, which transformers requires: add an empty one, {{}}')
    names = set(found.values())
    check_names(str(index), [*found, *names])
    if bad := sorted(name for name in names if not _is_inside(name)):
        raise CorruptFileError(f"{index} lists {bad[0]!r}, which is not a file in its folder")
    return found


def _is_inside(name: str) -> bool:
    """Whether a relative path stays below the folder from which it starts, on any operating system."""
    return not Path(name).drive and not {"", ".", ".."} & set(re.split(r"[/\\]", name))


def _check_series(index: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if only some of `NAME-00001-of-0000N.EXT` are listed."""
    series: dict[tuple[str, str, str], dict[int, str]] = {}
    for name in names:
        if found := _NUMBERED.fullmatch(name):
            series.setdefault((found["stem"], found["count"], found["end"]), {})[int(found["number"])] = found["number"]
    for (stem, count, end), numbers in series.items():
        first, width = 0 if 0 in numbers else 1, len(min(numbers.values()))
        absent = (number for number in range(first, first + int(count)) if number not in numbers)
        if lost := [f"{stem}-{number:0{width}d}-of-{count}{end}" for number in itertools.islice(absent, 4)]:
            raise CheckpointError(
                f"{index} lists files that are numbered up to {count}, but not {_some(lost)}: it is incomplete, and tensors in "
                "those files would be left out. Download the index again"
            )


def _refuse_two(one: Path, several: Path, fs: FileSystem) -> None:
    """Raise CheckpointError if the index of several files lists other files than the single file next to it."""
    advice = f"Delete {several.name} if {one.name} is the checkpoint"
    try:
        others = sorted(set(_weight_map(several, fs).values()) - {one.name})
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}. {advice}") from error
    if others:
        raise CheckpointError(
            f"{one.parent} has {one.name}, which transformers would read, and {several.name}, which lists {_some(others)}: "
            f"only one of them is the checkpoint. {advice} (saving into a folder leaves the index of an older checkpoint "
            f"there), and {one.name} if it is not"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")
