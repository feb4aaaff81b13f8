"""Reads pickled checkpoints (`.bin`) without executing code from them, and checks what they contain."""

from __future__ import annotations

import zipfile

import torch

from ..errors import CorruptFileError, UnsupportedError
from .files import Stamp, changed, check_names, reading, refuse_pointer, regular


def read_pickled(file: str) -> tuple[dict[str, torch.Tensor], Stamp]:
    """Return the tensors of a file by name, memory-mapped, and the stamp of the file that was read.

    Raises UnsupportedError for other file types, and, naming it, for a tensor that is sparse, quantized or on the meta device;
    CorruptFileError, naming the file, if torch cannot read it or would misread it.
    """
    if not file.endswith((".bin", ".pt", ".pth")):
        raise UnsupportedError(f"{file}: hf_fp8 reads .safetensors and .bin checkpoints")
    with reading(file) as (opened, stamp):
        refuse_pointer(file, opened.read(64))
    _refuse_compressed(file)
    state = _load(file)
    if not isinstance(state, dict):
        raise CorruptFileError(f"{file} contains a {type(state).__name__}, not a dict of tensors")
    found = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if state and not found:
        raise CorruptFileError(f"{file} has no tensors at the top level; it has {', '.join(sorted(map(repr, state))[:3])}")
    if bad := [name for name in found if not isinstance(name, str) or name == "__metadata__"]:
        raise CorruptFileError(f"{file}: a tensor has the invalid name {bad[0]!r}")
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
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a broken pickle can raise any exception
        said = str(error).strip() or type(error).__name__
        raise CorruptFileError(f"{file} cannot be read as a torch checkpoint ({said})") from error


def _refuse_compressed(file: str) -> None:
    """Raise for an archive with compressed entries: torch and transformers map the file, and use compressed bytes as values."""
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            compressed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except Exception as error:  # zipfile can raise any exception, too
        raise CorruptFileError(f"{file} cannot be read as a torch checkpoint ({error})") from error
    if compressed:
        raise CorruptFileError(
            f"{file} is a compressed archive ({compressed[0]}), which torch.load misreads and torch.save never writes. Unpack "
            "it, and pack it again without compression"
        )


def _kind(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be read as plain values, None if it can."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"sparse or nested ({tensor.layout})"
    if tensor.is_quantized:
        return f"quantized by torch ({tensor.dtype})"
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device}"
    return None
