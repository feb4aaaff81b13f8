"""Arguments of the current `from_pretrained` call, for code to which transformers does not pass them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Arguments of `from_pretrained` that say where the files of a checkpoint are.
_WHERE = ("subfolder", "revision", "cache_dir", "token")


@dataclass(frozen=True)
class LoadOptions:
    """Arguments of a `from_pretrained` call.

    name: the folder or the name on the Hub, None if the model is not loaded from a checkpoint of its own kind. where: arguments
    that say where its files are (`revision`, ...). folder: the local folder that is loaded, None for a name on the Hub.
    broken: errors for which transformers would raise only a general one. The rest as in `from_pretrained`.
    """

    name: str | Path | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    variant: str | None = None
    use_safetensors: bool | None = None
    ignore_mismatched_sizes: bool = False
    broken: list[str] = field(default_factory=list)


_CURRENT: ContextVar[LoadOptions | None] = ContextVar("hf_fp8_load_options", default=None)


def current() -> LoadOptions:
    """The options of the current load; the defaults outside of one."""
    return _CURRENT.get() or LoadOptions()


@contextmanager
def loading(name: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Context manager: set the options while a model is loaded from `name` with the keyword arguments `options`."""
    folder = None
    if not isinstance(name, str | Path) or options.get("gguf_file") is not None:
        name = None
    elif Path(name).is_dir():
        folder = Path(name, options.get("subfolder") or "")
    found = LoadOptions(
        name,
        {key: options[key] for key in _WHERE if options.get(key) is not None},
        folder,
        options.get("variant"),
        options.get("use_safetensors"),
        bool(options.get("ignore_mismatched_sizes")),
    )
    token = _CURRENT.set(found)
    try:
        yield
    finally:
        _CURRENT.reset(token)
