"""`quant_method: fp8` with blocks, as DeepSeek and Qwen publish it and transformers' FineGrainedFP8Config reads it.

Weights are E4M3 (`fmt`) with a `weight_scale_inv` for each block of `weight_block_size`, by which codes are multiplied despite
its name; with `weight_block_size: null` one for the tensor, and with `activation_scheme: static` also an `activation_scale`
(Mistral). `scale_fmt: ue8m0` says that scales are powers of two, in float32 or in one byte (E8M0). With groups of 32 columns
the weights are then MXFP8, which also has a method of its own, `mxfp8`. Sources: transformers' utils/quantization_config.py
and integrations/finegrained_fp8.py; DeepSeek-V3's README_WEIGHTS.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError, UnsupportedError
from ...formats.code_types import E5M2, FP8
from ...formats.scheme import MXFP8, ROW, TENSOR, Granularity, Scheme, TensorScheme
from ...formats.storage import INPUT_SCALE, WEIGHT_SCALE
from . import skip_list
from .base import Dialect, Target, Translation, Writer, one_of

METHOD, MXFP8_METHOD = "fp8", "mxfp8"
CODES = {"e4m3": FP8, "e4m3fn": FP8, "float8_e4m3fn": FP8, "e5m2": E5M2, "float8_e5m2": E5M2}
MX_BLOCK = [1, 32]


def read(config: Mapping[str, Any]) -> Translation:
    """What such a config says. Raises ConfigError, UnsupportedError."""
    if config.get("expert_dtype", "fp8") != "fp8":
        raise UnsupportedError(
            f"quantization_config.expert_dtype is {config['expert_dtype']!r}: hf_fp8 reads experts in FP8, not in FP4. "
            "transformers reads this checkpoint: load it without an FP8Config"
        )
    if config.get("modules_to_convert"):
        raise UnsupportedError(
            f"quantization_config.modules_to_convert is {config['modules_to_convert']!r}: hf_fp8 has no embeddings in FP8. "
            "transformers reads this checkpoint: load it without an FP8Config"
        )
    codes = one_of(config, "fmt", CODES, "e4m3")
    is_mx = config.get("quant_method") == MXFP8_METHOD
    has_powers = one_of(config, "scale_fmt", {"float": False, "ue8m0": True, None: is_mx})
    is_static = one_of(config, "activation_scheme", {"dynamic": False, "static": True}, "dynamic")
    scheme = _scheme(config.get("weight_block_size", MX_BLOCK if is_mx else None), codes, is_static)
    if has_powers and scheme.weight.granularity == MXFP8.weight.granularity and codes == FP8:
        scheme = MXFP8
    return Translation({"group_0": Target(scheme)}, skip_list.skipped(config), skip_list.listed(config))


def _scheme(block: Any, codes: Any, is_static: bool) -> Scheme:
    if block is None:
        return Scheme(TensorScheme(TENSOR, dtype=codes), TensorScheme(TENSOR if is_static else ROW, dynamic=not is_static))
    is_pair = (
        isinstance(block, list | tuple) and len(block) == 2 and all(type(extent) is int and extent > 0 for extent in block)
    )
    if not is_pair:
        raise ConfigError(f"quantization_config.weight_block_size is {block!r}: it must be null, or two positive integers")
    if is_static:
        raise UnsupportedError(
            f"quantization_config has weight_block_size {block!r} and activation_scheme 'static': hf_fp8 reads blocks with "
            "dynamic inputs"
        )
    return Scheme(TensorScheme(Granularity(*block), dtype=codes), TensorScheme(Granularity(1, block[1]), dynamic=True))


def write(groups: Mapping[str, Target], dense: Sequence[str]) -> dict[str, Any]:
    """The config of a checkpoint with one scheme for all modules that are not dense. Raises ConfigError for others."""
    schemes = list(dict.fromkeys(each.scheme for each in groups.values()))
    if len(schemes) != 1:
        said = "; ".join(scheme.describe() for scheme in schemes)
        raise ConfigError(f"`fp8` checkpoints have one scheme for all layers, and this one has {len(schemes)} ({said})")
    weight, inputs = schemes[0].weight, schemes[0].input
    rows, cols = weight.granularity.rows, weight.granularity.cols
    block = None if weight.granularity == TENSOR else [rows, cols]
    grouped = TensorScheme(Granularity(1, cols), dynamic=True, mx=weight.mx)
    possible = (TensorScheme(TENSOR), TensorScheme(ROW, dynamic=True)) if block is None else (grouped,)
    if weight.dtype != FP8 or weight.granularity == ROW or inputs not in possible:
        raise ConfigError(
            f"`fp8` checkpoints cannot have {schemes[0].describe()}: they have FP8 weights per block with dynamic inputs per "
            "group of as many columns, or per tensor with static or per-token inputs. Quantize anew with --scheme FP8_BLOCK, "
            "or convert to compressed-tensors"
        )
    is_static = inputs is not None and not inputs.dynamic
    return {
        "quant_method": METHOD, "fmt": "e4m3", "activation_scheme": "static" if is_static else "dynamic",
        "weight_block_size": block, "scale_fmt": "ue8m0" if weight.mx else "float", skip_list.KEY: list(dense),
    }  # fmt: skip


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a config with this method is transformers' own, not AutoFP8's."""
    return "weight_block_size" in config or config.get("quant_method") == MXFP8_METHOD


FINE_GRAINED = Dialect(
    name="fine-grained fp8",
    words="modules_to_not_convert lists dense modules, weight_block_size says what a scale covers, fmt what codes are, and "
    "activation_scheme whether inputs have static scales",
    methods=(METHOD, MXFP8_METHOD),
    describes=describes,
    read=read,
    ignoring=skip_list.ignoring,
)
WRITER = Writer(
    METHOD,
    write,
    scale_names={WEIGHT_SCALE: "weight_scale_inv", INPUT_SCALE: "activation_scale"},
    stack_suffixes={WEIGHT_SCALE: "_scale_inv", INPUT_SCALE: "_activation_scale"},
    is_scalar=True,
    dialect=FINE_GRAINED,
)
