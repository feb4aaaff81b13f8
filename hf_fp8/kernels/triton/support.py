"""Check whether Triton kernels run on a device. This module does not import Triton."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache

import torch

# Device types that Triton compiles for; the type of ROCm devices is "cuda", too.
_DEVICES = ("cuda", "xpu")
_interpreted: ContextVar[bool] = ContextVar("hf_fp8_triton_interpreted", default=False)


@contextmanager
def interpreted() -> Iterator[None]:
    """Context manager: kernels run on a CPU in Triton's interpreter, to test their logic; thousands of times slower.

    TRITON_INTERPRET=1 must be set before the first kernel is imported.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before hf_fp8's kernels are imported")
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(device: torch.device) -> str | None:
    """None if Triton kernels run on `device`, else the reason why not."""
    if device.type == "cpu" and _interpreted.get():
        return None if _installed() else "Triton is not installed"
    if device.type not in _DEVICES:
        return f"Triton does not compile for {device.type}"
    if not _installed():
        return "Triton is not installed"
    return None


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Context manager that makes the device of x current, as Triton launches kernels on the current device."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


@cache
def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors (or compute units), to choose grid sizes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).max_compute_units)
    return 4  # the interpreter: a small number, so that tests cover a split K


@cache
def native_e4m3(device: torch.device) -> bool:
    """Whether Triton supports float8e4nv on `device`; if not, codes are converted with integer operations."""
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "xpu"
