"""The dialects that hf_fp8 reads, and which of them a config is in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import LOCAL, FileSystem, read_json
from .autofp8 import AUTOFP8
from .base import COMPRESSED_TENSORS, Dialect, Writer
from .fbgemm import FBGEMM
from .fine_grained import FINE_GRAINED
from .fine_grained import WRITER as FP8
from .modelopt import MODELOPT

DIALECTS = (FINE_GRAINED, AUTOFP8, FBGEMM, MODELOPT)
# What a checkpoint can be converted to.
WRITERS: dict[str, Writer] = {writer.name: writer for writer in (COMPRESSED_TENSORS, FP8)}
# Files beside config.json that may describe the quantization.
SIDECARS = {dialect.sidecar.file: dialect.sidecar for dialect in DIALECTS if dialect.sidecar is not None}


def dialect_of(config: Mapping[str, Any]) -> Dialect | None:
    """The dialect of a `quantization_config`; None for compressed-tensors and methods that hf_fp8 does not read."""
    method = config.get("quant_method")
    return next((dialect for dialect in DIALECTS if method in dialect.methods and dialect.describes(config)), None)


def config_beside(folder: Path, fs: FileSystem = LOCAL) -> dict[str, Any] | None:
    """The `quantization_config` that another file of a folder than config.json describes; None if there is none.

    Raises CorruptFileError, ConfigError.
    """
    found = (sidecar.read(read_json(folder / name, fs=fs)) for name, sidecar in SIDECARS.items() if fs.is_there(folder / name))
    return next((config for config in found if config is not None), None)
