"""The Scheme of a config group, and the group of a Scheme, in compressed-tensors' words: strategies, formats, arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from ..errors import ConfigError, UnsupportedError
from ..formats.code_types import FP8, INT4, INT8
from ..formats.scheme import ROW, TENSOR, Granularity, Scheme, TensorScheme

# Formats that store E4M3 codes (8-bit numbers) unpacked, under "weight": int-quantized differs from the others in name only
# (compressors/naive_quantized), and old writers fell back to it.
# mxfp8-quantized stores their scales as exponents, one byte each.
MX_FORMAT = CompressionFormat.mxfp8_quantized.value
FP8_FORMATS = (None, "float-quantized", "naive-quantized", "int-quantized", "mixed-precision", "dense", "fakequant", MX_FORMAT)
# The size of groups for which compressed-tensors computes MX scales (should_generate_mx_scales).
MX_GROUP = 32
# Formats of integers: packed into int32, or one in each element. naive-quantized: as llm-compressor wrote without inputs.
PACKED_FORMAT = CompressionFormat.pack_quantized.value
_INTEGER_FORMATS = (CompressionFormat.int_quantized.value, CompressionFormat.naive_quantized.value)


def value_of(x: Any) -> Any:
    """The value of `x` if it is an enum member: pydantic returns some enums as members, some as values."""
    return getattr(x, "value", x)


def is_fp8(weights: Any) -> bool:
    """Whether a group's `weights`, as JSON, are E4M3 codes with float scales, or with MX scales."""
    if not isinstance(weights, dict) or str(weights.get("type")).lower() != "float" or weights.get("num_bits") not in (8, "8"):
        return False
    return "uint8" not in str(weights.get("scale_dtype")) or weights.get("group_size") in (MX_GROUP, str(MX_GROUP))


def is_plain(fmt: Any) -> bool:
    """Whether a format stores one code in each byte; those of MX codes of fewer bits do not."""
    return fmt == MX_FORMAT or not (isinstance(fmt, str) and fmt.startswith("mx"))


def _are_exponents(arguments: QuantizationArgs) -> bool:
    return str(arguments.scale_dtype) == "torch.uint8"


def _is_mx(arguments: QuantizationArgs) -> bool:
    """Whether scales are MX scales, as compressed-tensors tells it."""
    return _are_exponents(arguments) and arguments.group_size == MX_GROUP


def scheme_of(name: str, group: QuantizationScheme, fmt: Any, ordered: bool) -> Scheme | None:
    """The scheme of a group; None if transformers runs it. Raises UnsupportedError for FP8 that hf_fp8 does not run."""
    weights = None if group.weights is None else group.weights.model_dump(mode="json")
    if is_fp8(weights) and is_plain(value_of(group.format)):
        return _fp8_scheme(name, group, fmt)
    return None if weights is None else _integer_scheme(group, fmt, ordered)


def _integer_scheme(group: QuantizationScheme, fmt: Any, ordered: bool) -> Scheme | None:
    """The scheme of a group of int4 or int8 weights; None for kinds of them that hf_fp8 does not run."""
    weights, inputs = group.weights, group.input_activations
    packed = fmt == PACKED_FORMAT
    strategy = value_of(weights.strategy)
    dtype = {(4, True): INT4, (8, True): INT8, (8, False): INT8}.get((weights.num_bits, packed))
    if weights.type != "int" or dtype is None or weights.dynamic or group.output_activations is not None:
        return None
    if not packed and (fmt not in _INTEGER_FORMATS or not weights.symmetric or ordered):
        return None
    granularities = {"channel": ROW, "group": Granularity(1, weights.group_size or -1), "tensor": TENSOR}
    if strategy not in granularities or (packed and strategy == "tensor") or (ordered and strategy != "group"):
        return None
    input_scheme = None if inputs is None else _input_scheme(inputs)
    if inputs is not None and input_scheme is None:
        return None
    stored = TensorScheme(
        granularities[strategy], dtype=dtype, packed=packed, has_zero_points=not weights.symmetric, is_ordered=ordered
    )
    return Scheme(stored, input_scheme)


def _input_scheme(inputs: QuantizationArgs) -> TensorScheme | None:
    """How inputs are quantized; None for a way that hf_fp8 does not run."""
    dtype = {"float": FP8, "int": INT8}.get(value_of(inputs.type))
    kinds = {
        ("tensor", True): TENSOR,
        ("tensor", False): TENSOR,
        ("token", True): ROW,
        ("group", True): Granularity(1, inputs.group_size or -1),
    }
    kind = kinds.get((value_of(inputs.strategy), inputs.dynamic))
    mx = _is_mx(inputs) and dtype == FP8
    if dtype is None or inputs.num_bits != 8 or not inputs.symmetric or kind is None or _are_exponents(inputs) != mx:
        return None
    return TensorScheme(kind, dynamic=bool(inputs.dynamic), dtype=dtype, mx=mx)


def _fp8_scheme(name: str, group: QuantizationScheme, fmt: Any) -> Scheme:
    """The scheme of an FP8 group. Raises UnsupportedError, naming the key, for FP8 that hf_fp8 does not run."""
    where = f"quantization_config.config_groups[{name!r}]"

    def refuse(key: str, value: Any, supported: str) -> UnsupportedError:
        return UnsupportedError(f"{where}.{key} is {value_of(value)!r}; hf_fp8 supports {supported}")

    own = value_of(group.format)
    if own not in FP8_FORMATS:
        raise ConfigError(f"{where}.format is {own!r}: FP8 weights come as float-quantized, naive-quantized or {MX_FORMAT}")
    weights, inputs = group.weights, group.input_activations
    if not weights.symmetric:
        raise refuse("weights.symmetric", False, "symmetric FP8 weights (no zero points)")
    if weights.dynamic:
        raise refuse("weights.dynamic", weights.dynamic, "weights quantized ahead of time")
    if group.output_activations is not None:
        raise refuse("output_activations", "set", "schemes that quantize weights and inputs only")
    weight = {
        "tensor": lambda: TENSOR,
        "channel": lambda: ROW,
        "group": lambda: Granularity(1, weights.group_size),
        "block": lambda: Granularity(*weights.block_structure),
    }.get(value_of(weights.strategy))
    if weight is None:
        raise refuse("weights.strategy", weights.strategy, "tensor, channel, group and block")
    mx = fmt == MX_FORMAT or _is_mx(weights)
    if mx and value_of(weights.strategy) != "group":
        raise refuse("weights.strategy", weights.strategy, f"group in format {MX_FORMAT}, or with scale_dtype torch.uint8")
    stored = TensorScheme(weight(), mx=mx)
    if inputs is None:
        return Scheme(stored)
    if inputs.type != "float" or inputs.num_bits != 8:
        raise refuse("input_activations", f"{inputs.num_bits}-bit {inputs.type}", "8-bit float inputs, or none")
    if not inputs.symmetric:
        raise refuse("input_activations.symmetric", False, "symmetric inputs (no zero points)")
    found = _input_scheme(inputs)
    if found is None:
        how = "dynamic" if inputs.dynamic is True else value_of(inputs.dynamic) or "static"
        raise refuse(
            "input_activations.strategy",
            f"{value_of(inputs.strategy)} ({how}){', scale_dtype torch.uint8' * _are_exponents(inputs)}",
            f"tensor (static or dynamic), token and group (dynamic); scale_dtype torch.uint8 with groups of {MX_GROUP} only",
        )
    return Scheme(stored, found)


def write_group(scheme: Scheme, targets: Iterable[str]) -> dict[str, Any]:
    """A group of `scheme` as JSON, in the format of compressed-tensors, which `read_groups` reads.

    Raises ConfigError for a scheme that the format cannot describe.
    """
    if reason := why_not_written(scheme):
        raise ConfigError(reason)
    fmt = CompressionFormat.naive_quantized.value if scheme.input is None else scheme.weight.code.format
    if scheme.weight.packed:
        fmt = PACKED_FORMAT
    if scheme.weight.mx:
        fmt = MX_FORMAT
    group = QuantizationScheme(
        targets=list(targets),
        weights=_arguments(scheme.weight, "channel"),
        input_activations=None if scheme.input is None else _arguments(scheme.input, "token"),
        format=fmt,
    )
    written: dict[str, Any] = group.model_dump(mode="json")
    return written


def why_not_written(scheme: Scheme) -> str | None:
    """The reason why no config group describes `scheme`; None if one does."""
    code = scheme.weight.code
    if not code.format:
        return (
            f"a config group of compressed-tensors cannot describe {code.label} weights: 8-bit floats (num_bits 8, type float) "
            "are E4M3 there, and readers would take the codes for those. Quantize to E4M3 (the default dtype of a "
            f"TensorScheme); models that are not transformers' can hold {code.label} (hf_fp8.quantize_model) and are saved "
            "with hf_fp8.save_quantized"
        )
    for operand in (scheme.weight, scheme.input):
        if operand is not None and operand.mx and operand.granularity.cols != MX_GROUP:
            return (
                f"a config group of compressed-tensors has MX scales of groups of {MX_GROUP}, not of "
                f"{operand.granularity.cols} ({scheme.describe()})"
            )
    return None


def _arguments(operand: TensorScheme, row: str) -> QuantizationArgs:
    granularity = operand.granularity
    options: dict[str, Any] = {"strategy": {TENSOR: "tensor", ROW: row}.get(granularity, "group")}
    if granularity.rows > 1:
        options = {"strategy": "block", "block_structure": [granularity.rows, granularity.cols]}
    elif options["strategy"] == "group":
        options["group_size"] = granularity.cols
    if operand.mx:
        options |= {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    code = operand.code
    return QuantizationArgs(
        num_bits=code.bits, type=code.kind, symmetric=not operand.has_zero_points, dynamic=operand.dynamic, **options
    )


def with_format(group: Mapping[str, Any]) -> dict[str, Any]:
    """A requested group, as JSON, with the format in which llm-compressor would store it, if it has none."""
    weights = group.get("weights")
    if group.get("format") or not isinstance(weights, Mapping) or weights.get("type", "int") != "int":
        return dict(group)
    one_byte = weights.get("num_bits") in (8, "8") and group.get("input_activations")
    return {**group, "format": CompressionFormat.int_quantized.value if one_byte else PACKED_FORMAT}
