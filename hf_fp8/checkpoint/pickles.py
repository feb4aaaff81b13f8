"""Pickled checkpoints (`.bin`): read without executing anything, and without believing what they say."""

from __future__ import annotations

import zipfile

import torch

from ..errors import CorruptFileError, UnsupportedError
from .files import Stamp, changed, check_names, reading, refuse_pointer, regular


def read_pickled(file: str) -> tuple[dict[str, torch.Tensor], Stamp]:
    """The tensors of a file by name, mapped into memory, and the stamp of the file that was read.

    Raises UnsupportedError for files of other kinds, and for tensors that are sparse, quantized, or without values, by name;
    CorruptFileError, naming the file, for what torch cannot read, or would read wrongly.
    """
    if not file.endswith((".bin", ".pt", ".pth")):
        raise UnsupportedError(f"{file}: hf_fp8 reads .safetensors and .bin checkpoints")
    with reading(file) as (opened, stamp):
        refuse_pointer(file, opened.read(64))
    _refuse_compressed(file)
    state = _load(file)
    if not isinstance(state, dict):
        raise CorruptFileError(f"{file} holds a {type(state).__name__}, not tensors by name")
    found = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if state and not found:
        raise CorruptFileError(f"{file} holds no tensors by name; it has {', '.join(sorted(map(repr, state))[:3])}")
    if bad := [name for name in found if not isinstance(name, str) or name == "__metadata__"]:
        raise CorruptFileError(f"{file}: a tensor is called {bad[0]!r}")
    check_names(file, found)
    for name, tensor in found.items():
        if kind := _kind(tensor):
            raise UnsupportedError(f"{name} in {file} is {kind}: hf_fp8 reads tensors whose values are all in the file")
        if tensor.numel() * tensor.element_size() > stamp[2]:
            raise CorruptFileError(f"{name} in {file} has shape {list(tensor.shape)}: more values than the file has bytes")
    if regular(file) != stamp:
        raise changed(file)
    return {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in found.items()}, stamp


def _load(file: str) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken pickle raises whatever its bytes happen to say
        said = str(error).strip() or type(error).__name__
        raise CorruptFileError(f"{file} cannot be read as a torch checkpoint ({said})") from error


def _refuse_compressed(file: str) -> None:
    """Of archives whose entries are compressed, torch takes the compressed bytes for values when it maps the file; so does
    transformers."""
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            compressed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except Exception as error:  # zipfile, too, raises whatever the bytes happen to say
        raise CorruptFileError(f"{file} cannot be read as a torch checkpoint ({error})") from error
    if compressed:
        raise CorruptFileError(
            f"{file} is a compressed archive ({compressed[0]}), which torch.load misreads: torch.save writes none. Unpack it, "
            "and pack it without compression"
        )


def _kind(tensor: torch.Tensor) -> str | None:
    """What keeps a tensor from being read as plain values, None if nothing does."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"sparse or nested ({tensor.layout})"
    if tensor.is_quantized:
        return f"quantized by torch ({tensor.dtype})"
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device}"
    return None
