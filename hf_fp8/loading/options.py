"""Arguments of the current `from_pretrained` call, for code to which transformers does not pass them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class LoadOptions:
    """Arguments of a `from_pretrained` call.

    folder: the local folder that is loaded, None for a name on the Hub. has_float_state: whether a `state_dict` without codes
    was given. broken: errors for which transformers would raise only a general one. The rest as in `from_pretrained`.
    """

    folder: Path | None = None
    variant: str | None = None
    use_safetensors: bool | None = None
    ignore_mismatched_sizes: bool = False
    has_float_state: bool = False
    broken: list[str] = field(default_factory=list)


_CURRENT: ContextVar[LoadOptions | None] = ContextVar("hf_fp8_load_options", default=None)


def current() -> LoadOptions:
    """The options of the current load; the defaults outside of one."""
    return _CURRENT.get() or LoadOptions()


@contextmanager
def loading(name: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Context manager: set the options while a model is loaded from `name` with the keyword arguments `options`."""
    folder = None
    if isinstance(name, str | Path) and Path(name).is_dir() and options.get("gguf_file") is None:
        folder = Path(name, options.get("subfolder") or "")
    found = LoadOptions(
        folder,
        options.get("variant"),
        options.get("use_safetensors"),
        bool(options.get("ignore_mismatched_sizes")),
        _has_no_codes(options.get("state_dict")),
    )
    token = _CURRENT.set(found)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _has_no_codes(state: Any) -> bool:
    return isinstance(state, Mapping) and all(
        isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.itemsize > 1 for tensor in state.values()
    )
