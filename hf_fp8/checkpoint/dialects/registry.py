"""The dialects that hf_fp8 reads, and which of them a config is in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FP8Error
from ..files import LOCAL, FileSystem, read_json
from .autofp8 import AUTOFP8
from .base import COMPRESSED_TENSORS, Dialect, Writer
from .fbgemm import FBGEMM
from .fine_grained import FINE_GRAINED
from .fine_grained import WRITER as FP8
from .modelopt import MODELOPT

DIALECTS = (FINE_GRAINED, AUTOFP8, FBGEMM, MODELOPT)
# What hf_fp8 reads, for messages.
READ = ", ".join(["compressed-tensors", *(dialect.name for dialect in DIALECTS)])
# What a checkpoint can be converted to.
WRITERS: dict[str, Writer] = {writer.name: writer for writer in (COMPRESSED_TENSORS, FP8)}
# Files beside config.json that may describe the quantization, with the dialect that they are in.
CONFIG_FILES = {dialect.file.name: dialect for dialect in DIALECTS if dialect.file is not None}


def dialect_of(config: Mapping[str, Any]) -> Dialect | None:
    """The dialect of a `quantization_config`; None for compressed-tensors and methods that hf_fp8 does not read."""
    method = config.get("quant_method")
    mine = (dialect for dialect in DIALECTS if method in dialect.methods)
    return next((dialect for dialect in mine if dialect.describes is None or dialect.describes(config)), None)


def config_beside(folder: Path, fs: FileSystem = LOCAL) -> dict[str, Any] | None:
    """The `quantization_config` that another file of a folder than config.json describes; None if there is none.

    Raises CorruptFileError, ConfigError.
    """
    there = (name for name in CONFIG_FILES if fs.is_there(folder / name))
    return next((config_in(name, read_json(folder / name, fs=fs)) for name in there), None)


def config_in(name: str, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` that `content`, of the file `name` of `CONFIG_FILES`, stands for; None if it says nothing of
    weights. Raises ConfigError."""
    file = CONFIG_FILES[name].file
    assert file is not None
    return file.read(content)


def check_beside(config: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Raise ConfigError if the contents of another file (`Dialect.file`) contradict the config that is in config.json.

    Returns the lists of dense modules, for a message, if they differ; else "".
    """
    dialect = dialect_of(config)
    assert dialect is not None and dialect.file is not None
    own = dialect.read(config)
    try:
        other = dialect.file.read(content)
        said_there = None if other is None else dialect.read(other)
    except FP8Error as error:
        raise ConfigError(f"{dialect.file.name} contradicts the quantization_config in config.json ({error})") from error
    schemes = [] if said_there is None else [target.scheme for target in said_there.groups.values()]
    if said_there is None or set(schemes) != {target.scheme for target in own.groups.values()}:
        said = "; ".join(scheme.describe() for scheme in schemes) or "that no weights are quantized"
        raise ConfigError(
            f"{dialect.file.name} says {said}, and the quantization_config in config.json something else: only one of them can "
            "be right. Remove the other"
        )
    return "" if set(said_there.listed) == set(own.listed) else f"{list(said_there.listed)}, {list(own.listed)}"
