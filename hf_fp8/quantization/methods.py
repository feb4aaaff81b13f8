"""How a checkpoint is quantized, and who reads that: hf-fp8, transformers itself, or neither."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ..checkpoint.config_groups import concerns_fp8
from ..checkpoint.files import is_there, read_json
from ..errors import FP8Error
from .source import Source

HF_FP8, TRANSFORMERS = "hf-fp8", "transformers"
_OURS = ("compressed-tensors", "sparseml")
# Where ModelOpt writes how it quantized, before it wrote it into config.json.
_MODELOPT = "hf_quant_config.json"
# What only quantized weights have, whatever their method.
_CODES = ("F8_", "F6_", "F4")
_BESIDE_CODES = (".weight_scale", ".weight_scale_inv", ".weight_packed", ".qweight")


@dataclass(frozen=True)
class Stored:
    """method: what a checkpoint is quantized as, in words. reader: who reads it, None if neither hf-fp8 nor transformers."""

    method: str
    reader: str | None

    def __str__(self) -> str:
        if self.reader == TRANSFORMERS:
            return f"quantized as {self.method}: hf-fp8 leaves that to transformers itself"
        if self.reader == HF_FP8:
            return f"quantized as {self.method}: hf-fp8 reads it"
        return (
            f"quantized as {self.method}: neither hf-fp8 nor transformers {transformers.__version__} reads that, and plainly "
            "read, its codes would be taken for values"
        )


def how_stored(source: Source) -> Stored | None:
    """How a checkpoint is quantized; None if it is dense. Looks at the headers where the config says nothing."""
    written = source.quantization
    if written is None:
        return _unsaid(source)
    method = written.get("quant_method")
    if method in (None, *_OURS) and concerns_fp8(written):
        return Stored("compressed-tensors", HF_FP8)
    if method is None and "config_groups" in written:
        method = "compressed-tensors"
    for bits in ("4bit", "8bit"):  # transformers' own way to tell the two
        if written.get(f"load_in_{bits}"):
            method = f"bitsandbytes_{bits}"
    if not isinstance(method, str):
        return Stored(f"something unknown (the quant_method of its config.json is {reprlib.repr(method)})", None)
    algorithm = f" ({written['quant_algo']})" if isinstance(written.get("quant_algo"), str) else ""
    known = method in AUTO_QUANTIZATION_CONFIG_MAPPING and method != "hf_fp8"
    return Stored(method + algorithm + (", with no FP8 group" if method in _OURS else ""), TRANSFORMERS if known else None)


def _unsaid(source: Source) -> Stored | None:
    """How it is quantized although config.json does not say so."""
    if is_there(path := source.folder / _MODELOPT):
        try:
            about = read_json(path).get("quantization")
            algorithm = about.get("quant_algo") if isinstance(about, dict) else "?"
        except FP8Error:
            algorithm = "?"
        if algorithm is not None:
            return Stored(f"ModelOpt's {algorithm} (by {_MODELOPT}; config.json does not say so)", None)
    tensors = source.checkpoint().tensors
    codes = [key for key, info in tensors.items() if info.dtype.startswith(_CODES) or key.endswith(_BESIDE_CODES)]
    if not codes:
        return None
    return Stored(
        f"something unknown ({len(codes):,} tensors such as {codes[0]}, {tensors[codes[0]]}, are codes or their scales, and "
        "config.json has no quantization_config)",
        None,
    )
