"""The files of a checkpoint folder, read as they are: which of them count, JSON, tensors."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from support.build import State

from .bases import INDEX, PICKLE, SINGLE
from .says import Contradiction


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that are loaded, and the index's map."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if (folder / INDEX).is_file():
        try:
            places = parsed(folder / INDEX)["weight_map"]
        except (KeyError, TypeError) as error:
            raise Contradiction("the index has no map") from error
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise Contradiction("the index has no map")
        return [Path(os.path.join(folder, file)) for file in sorted(set(places.values()))], places
    if (folder / PICKLE).is_file():
        return [folder / PICKLE], {}
    raise Contradiction("no file of weights")


def parsed(path: Path) -> Any:
    try:
        if not path.is_file() or path.stat().st_size > 2**28:
            raise Contradiction(f"{path.name} is no text")
        return json.loads(path.read_bytes().decode())  # not of bytes: those may begin with a mark that is no JSON
    except (ValueError, OSError, RecursionError) as error:
        raise Contradiction(f"{path.name} cannot be read") from error


def tensors_of(folder: Path) -> State:
    """Every tensor of the files; of one that is in two, the one that the index speaks of."""
    files, places = weight_files(folder)
    found: State = {}
    for path in files:
        for name, tensor in _tensors(path).items():
            other = found.get(name)
            if other is None or places.get(name) == path.name:
                found[name] = tensor
    return found


def _tensors(path: Path) -> State:
    if not path.is_file():
        raise Contradiction(f"{path.name} is not there")
    try:
        if path.suffix == ".bin":
            state = torch.load(path, weights_only=True)
            if not isinstance(state, dict):
                raise Contradiction(f"{path.name} holds no tensors by name")
            return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        with safe_open(path, framework="pt") as opened:
            sizes = {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            return {name: opened.get_tensor(name).clone() for name, size in sizes.items() if size < 2**28}
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:
        raise Contradiction(f"{path.name} cannot be read ({type(error).__name__})") from error
