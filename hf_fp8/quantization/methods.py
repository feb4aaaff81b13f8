"""Finds out how a checkpoint is quantized, and whether hf-fp8, transformers, or neither can read it."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ..checkpoint.dialects.registry import dialect_of
from ..checkpoint.quantization_spec import METHOD, METHODS, is_ours
from ..errors import UnsupportedError
from .source import Source

HF_FP8, TRANSFORMERS = "hf-fp8", "transformers"
# dtypes and suffixes that only quantized weights have, with any method.
_CODES = ("F8_", "F6_", "F4")
_BESIDE_CODES = (".weight_scale", ".weight_scale_inv", ".weight_packed", ".qweight")


@dataclass(frozen=True)
class Stored:
    """method: description of the quantization. reader: which library reads it, None if neither hf-fp8 nor transformers."""

    method: str
    reader: str | None

    def __str__(self) -> str:
        if self.reader == TRANSFORMERS:
            return f"quantized as {self.method}: transformers reads it without hf-fp8"
        if self.reader == HF_FP8:
            return f"quantized as {self.method}: hf-fp8 reads it"
        return (
            f"quantized as {self.method}: neither hf-fp8 nor transformers {transformers.__version__} reads that; loaded "
            "without its config, its codes would be used as values"
        )


def how_stored(source: Source) -> Stored | None:
    """How a checkpoint is quantized; None if it is dense. Checks the headers if the config has no entry."""
    written = source.quantization
    if written is None:
        return _unsaid(source)
    method = written.get("quant_method")
    if is_ours(written, asked=True) and (name := _readable(written)) is not None:
        return Stored(name, HF_FP8)
    if method is None and "config_groups" in written:
        method = METHOD
    for bits in ("4bit", "8bit"):  # as transformers distinguishes the two
        if written.get(f"load_in_{bits}"):
            method = f"bitsandbytes_{bits}"
    if not isinstance(method, str):
        return Stored(f"something unknown (the quant_method of its config.json is {reprlib.repr(method)})", None)
    about = written.get("quantization", written)  # ModelOpt's
    algorithm = f" ({about['quant_algo']})" if isinstance(about, dict) and isinstance(about.get("quant_algo"), str) else ""
    known = method in AUTO_QUANTIZATION_CONFIG_MAPPING and method != "hf_fp8"
    return Stored(
        method + algorithm + (", with no group that hf-fp8 runs" if method in METHODS else ""), TRANSFORMERS if known else None
    )


def _readable(written: dict[str, Any]) -> str | None:
    """The name of the dialect of a config; None if hf_fp8 cannot read what it says (`is_ours` leaves that to its dialect)."""
    dialect = dialect_of(written)
    try:
        if dialect is not None:
            dialect.read(written)
    except UnsupportedError:
        return None
    return METHOD if dialect is None else dialect.name


def _unsaid(source: Source) -> Stored | None:
    """How a checkpoint is quantized whose config does not say so; None if it is dense."""
    tensors = source.checkpoint.tensors
    codes = [key for key, info in tensors.items() if info.dtype.startswith(_CODES) or key.endswith(_BESIDE_CODES)]
    if not codes:
        return None
    return Stored(
        f"something unknown ({len(codes):,} tensors such as {codes[0]}, {tensors[codes[0]]}, are codes or their scales, and "
        "config.json has no quantization_config)",
        None,
    )
