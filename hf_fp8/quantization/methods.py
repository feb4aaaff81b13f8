"""Finds out how a checkpoint is quantized, and whether hf-fp8, transformers, or neither can read it."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ..checkpoint.config_groups import concerns_fp8, runs_here
from ..checkpoint.files import read_json
from ..checkpoint.quantization_spec import METHOD, METHODS
from ..errors import FP8Error
from .source import Source

HF_FP8, TRANSFORMERS = "hf-fp8", "transformers"
# File in which older versions of ModelOpt describe the quantization; newer ones write it into config.json.
_MODELOPT = "hf_quant_config.json"
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
    if method in (None, *METHODS) and (concerns_fp8(written) or runs_here(written)):
        return Stored(METHOD, HF_FP8)
    if method is None and "config_groups" in written:
        method = METHOD
    for bits in ("4bit", "8bit"):  # as transformers distinguishes the two
        if written.get(f"load_in_{bits}"):
            method = f"bitsandbytes_{bits}"
    if not isinstance(method, str):
        return Stored(f"something unknown (the quant_method of its config.json is {reprlib.repr(method)})", None)
    algorithm = f" ({written['quant_algo']})" if isinstance(written.get("quant_algo"), str) else ""
    known = method in AUTO_QUANTIZATION_CONFIG_MAPPING and method != "hf_fp8"
    return Stored(
        method + algorithm + (", with no group that hf-fp8 runs" if method in METHODS else ""), TRANSFORMERS if known else None
    )


def _unsaid(source: Source) -> Stored | None:
    """How a checkpoint is quantized whose config.json does not say so; None if it is dense."""
    if source.fs.is_there(path := source.folder / _MODELOPT):
        try:
            about = read_json(path, fs=source.fs).get("quantization")
            algorithm = about.get("quant_algo") if isinstance(about, dict) else "?"
        except FP8Error:
            algorithm = "?"
        if algorithm is not None:
            return Stored(f"ModelOpt's {algorithm} (says {_MODELOPT}; config.json does not say so)", None)
    tensors = source.checkpoint.tensors
    codes = [key for key, info in tensors.items() if info.dtype.startswith(_CODES) or key.endswith(_BESIDE_CODES)]
    if not codes:
        return None
    return Stored(
        f"something unknown ({len(codes):,} tensors such as {codes[0]}, {tensors[codes[0]]}, are codes or their scales, and "
        "config.json has no quantization_config)",
        None,
    )
