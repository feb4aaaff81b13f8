"""FP8 weights as ComfyUI and tools for it store them: one scale per tensor, in a single safetensors file.

There are two forms, and files without any scale:

- "scaled_fp8": a marker tensor `<prefix>scaled_fp8` of a float8 dtype (or float32), with no element, or with two if inputs
  must not be quantized. A quantized layer X has `X.weight`, `X.scale_weight` (float32, one value) and perhaps
  `X.scale_input`, where exactly 1 stands for none. Source: ComfyUI, comfy/utils.py, `convert_old_quants`.
- "comfy_quant": `_quantization_metadata` in the header's metadata, JSON such as
  ``{"format_version": "1.0", "layers": {"X": {"format": "float8_e4m3fn"}}}``; or for each layer a tensor `X.comfy_quant`
  with the UTF-8 bytes of ``{"format": ...}``. The scales are `X.weight_scale` and `X.input_scale`;
  ``"full_precision_matrix_mult": true`` says that inputs must not be quantized. Sources: ComfyUI, QUANTIZATION.md
  ("Checkpoint Format"), comfy/quant_ops.py (`QUANT_ALGOS`) and comfy/ops.py (`_load_quantized_module`).
- "cast": no marker. FP8 weights are values that were cast to FP8: their scale is 1.

Scales are factors that stored values are multiplied by. Nothing here reads values, except those tensors with JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import ConfigError, MismatchError, MissingTensorError, ScaleError, UnsupportedError, UnusedTensorError
from ...formats.scheme import TENSOR, Scheme, TensorScheme
from ...formats.storage import INPUT_SCALE, WEIGHT, WEIGHT_SCALE
from ..headers import TensorInfo

METADATA = "_quantization_metadata"
MARKER = "scaled_fp8"
QUANT = "comfy_quant"
ATTENTION = "comfy_attention.config"  # asks for an attention kernel; ComfyUI runs without it, too
FULL_PRECISION = "full_precision_matrix_mult"
# Forms of files.
SCALED_FP8, COMFY_QUANT, CAST = "scaled_fp8", "comfy_quant", "cast"
# Name of a format -> safetensors' dtype of its weights.
FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Names of scales, by form.
SCALES = {
    SCALED_FP8: {WEIGHT_SCALE: "scale_weight", INPUT_SCALE: "scale_input"},
    COMFY_QUANT: {WEIGHT_SCALE: "weight_scale", INPUT_SCALE: "input_scale"},
    CAST: {},
}
# Options of a layer that do not change what its FP8 weights mean.
_HARMLESS = {"format", FULL_PRECISION, "orig_dtype", "orig_shape", "group_size", "params"}
# Tensors beside a weight, in these forms and in formats that are not read here.
_BESIDE = re.compile(
    r"(^|\.)(scale_weight|scale_input|weight_scale(_2|_inv)?|input_scale|pre_quant_scale|weight_s_rel|weight_s_channel|"
    r"weight_codebook|weight_zeros|comfy_quant|scaled_fp8)$"
)


@dataclass(frozen=True)
class Layer:
    """A layer with FP8 weights.

    name: in the file. dtype: safetensors' name of the dtype of its codes (stored values). keys: role ("weight",
    "weight_scale", "input_scale") -> key in the file; only "weight" if the scale is 1. full_precision: whether the file says
    that inputs must not be quantized.
    """

    name: str
    dtype: str
    keys: Mapping[str, str]
    full_precision: bool = False

    @property
    def scheme(self) -> Scheme:
        """One scale for the weight; inputs static if there is a scale for them, else not quantized."""
        inputs = TensorScheme(TENSOR) if INPUT_SCALE in self.keys else None
        return Scheme(TensorScheme(TENSOR, dtype=DTYPES[self.dtype]), inputs)


@dataclass(frozen=True)
class Description:
    """The FP8 layers of a file.

    form: one of the three above. layers: by name in the file. markers: keys of tensors that describe others, and are no values
    of a model.
    """

    form: str
    layers: dict[str, Layer] = field(default_factory=dict)
    markers: frozenset[str] = frozenset()


def describe(
    metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]
) -> Description:
    """Describe the FP8 layers of a file by its header.

    metadata: the header's `__metadata__`. tensors: by key. read: the values of a tensor, called for `X.comfy_quant` only.

    Raises, naming the tensor or the layer: UnusedTensorError for a scale under a name that is not known; ConfigError for
    metadata that cannot be read; UnsupportedError for other formats than FP8 with one scale per tensor; MissingTensorError,
    MismatchError and ScaleError for layers whose tensors do not fit.
    """
    markers = {key for key in tensors if _leaf(key) in (MARKER, QUANT) or key == ATTENTION or key.endswith(f".{ATTENTION}")}
    configs = _configs(metadata, tensors, read)
    if configs is not None:
        layers = {name: _configured(name, config, tensors) for name, config in configs.items()}
        layers |= _cast(tensors, without=layers)
        return Description(COMFY_QUANT, layers, frozenset(markers))
    prefixes = {key.removesuffix(MARKER): tensors[key] for key in markers if _leaf(key) == MARKER}
    if not prefixes:
        return Description(CAST, _cast(tensors), frozenset(markers))
    layers = {}
    for prefix, marker in sorted(prefixes.items()):  # the longest last
        _check_marker(prefix + MARKER, marker)
        layers |= _scaled(prefix, marker, tensors)
    layers |= _cast(tensors, without=layers)
    return Description(SCALED_FP8, layers, frozenset(markers))


def is_beside(key: str) -> bool:
    """Whether a key is named like a scale, or like another tensor that belongs to a quantized weight."""
    return _BESIDE.search(key) is not None


def metadata_of(layers: Mapping[str, bool]) -> dict[str, str]:
    """The header's metadata in the form "comfy_quant".

    layers: name of a layer with E4M3 codes -> whether its inputs must not be quantized.
    """
    said = {name: {"format": "float8_e4m3fn", **({FULL_PRECISION: True} if full else {})} for name, full in layers.items()}
    return {METADATA: json.dumps({"format_version": "1.0", "layers": said})}


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _configs(
    metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]
) -> dict[str, Mapping[str, Any]] | None:
    """Name of a layer -> its config, of the header and of tensors; None if there is neither."""
    found: dict[str, Mapping[str, Any]] = {}
    if METADATA in metadata:
        whole = _json(METADATA, metadata[METADATA])
        version, layers = whole.get("format_version", "1.0"), whole.get("layers")
        if str(version).partition(".")[0] != "1":
            raise UnsupportedError(f"{METADATA} has format_version {version!r}: hf_fp8 reads version 1")
        if not isinstance(layers, Mapping) or not all(isinstance(config, Mapping) for config in layers.values()):
            raise ConfigError(f"{METADATA} has no `layers`: a table of layers with their formats")
        found.update(layers)
    keys = [key for key in tensors if _leaf(key) == QUANT]
    for key in keys:
        if tensors[key].dtype != "U8" or len(tensors[key].shape) != 1:
            raise ConfigError(f"{key} is {tensors[key]}, and must be the bytes of a JSON text (U8, one dimension)")
        name, config = key.removesuffix(QUANT).removesuffix("."), _json(key, bytes(read(key).tolist()))
        if found.setdefault(name, config) != config:
            raise ConfigError(f"{key} says {dict(config)}, but {METADATA} says {dict(found[name])}: one of them is wrong")
    return found if keys or METADATA in metadata else None


def _json(where: str, text: str | bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is not a JSON object")
    return found


def _configured(name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Layer:
    """A layer of the form "comfy_quant"."""
    stated = config.get("format")
    if stated not in FORMATS:
        raise UnsupportedError(
            f"{name} has the format {stated!r}: of ComfyUI's formats hf_fp8 reads {' and '.join(FORMATS)} (a scale per tensor)"
        )
    params = config.get("params") or {}
    nested = params if isinstance(params, Mapping) else {"params": params}
    if odd := [key for key, value in {**config, **nested}.items() if key not in _HARMLESS and value not in (None, False)]:
        raise UnsupportedError(
            f"{name} ({stated}) has the option {odd[0]!r}, which hf_fp8 does not know: it may change weights"
        )
    layer = _layer(name, COMFY_QUANT, tensors, config.get(FULL_PRECISION) is True)
    if layer.dtype != FORMATS[stated]:
        key = layer.keys[WEIGHT]
        raise MismatchError(f"{key} is {tensors[key]}, but the format of {name} is {stated}, stored as {FORMATS[stated]}")
    return layer


def _check_marker(key: str, marker: TensorInfo) -> None:
    if marker.dtype not in (*DTYPES, "F32") or marker.shape not in ((0,), (2,), ()):
        raise ConfigError(f"{key} is {marker}, and must be a float8 tensor with no element or two")


def _scaled(prefix: str, marker: TensorInfo, tensors: Mapping[str, TensorInfo]) -> dict[str, Layer]:
    """The layers under the marker of a prefix."""
    scales = SCALES[SCALED_FP8].values()
    names = [
        key.removesuffix(_leaf(key)).removesuffix(".") for key in tensors if _leaf(key) in scales and key.startswith(prefix)
    ]
    return {name: _layer(name, SCALED_FP8, tensors, marker.shape == (2,)) for name in dict.fromkeys(names)}


def _layer(name: str, form: str, tensors: Mapping[str, TensorInfo], full_precision: bool) -> Layer:
    dot = f"{name}." if name else ""
    keys = {WEIGHT: f"{dot}{WEIGHT}", **{role: dot + leaf for role, leaf in SCALES[form].items()}}
    for role in (WEIGHT, WEIGHT_SCALE):
        if keys[role] not in tensors:
            raise MissingTensorError(f"{keys[role]} is not in the file, but {name} is quantized to FP8 with a scale per tensor")
    weight = tensors[keys[WEIGHT]]
    if weight.dtype not in DTYPES:
        raise MismatchError(f"{keys[WEIGHT]} is {weight}, but {name} is quantized: it must be {' or '.join(DTYPES)}")
    keys = {role: key for role, key in keys.items() if key in tensors}
    for role, key in keys.items():
        info = tensors[key]
        if role != WEIGHT and (info.dtype not in ("F32", "F16", "BF16") or info.shape not in ((), (1,), (1, 1))):
            raise ScaleError(f"{key} is {info}, and must be one float value: hf_fp8 reads such files with a scale per tensor")
    return Layer(name, weight.dtype, keys, full_precision)


def _cast(tensors: Mapping[str, TensorInfo], without: Mapping[str, Any] | None = None) -> dict[str, Layer]:
    """The matrices named `weight` that are in FP8 without a scale, of layers that are not in `without`, by name.

    Raises UnusedTensorError if there is a number beside one that may be its scale.
    """
    found = {}
    for key, info in tensors.items():
        name = key.removesuffix(WEIGHT).removesuffix(".")
        if _leaf(key) == WEIGHT and info.dtype in DTYPES and len(info.shape) == 2 and name not in (without or {}):
            found[name] = Layer(name, info.dtype, {WEIGHT: key})
    for key, info in tensors.items():
        owner = re.sub(r"[._](weight\.)?[a-z_]*scale[a-z_]*$", "", key)
        if owner != key and owner in found and math.prod(info.shape) == 1 and not is_beside(key):
            raise UnusedTensorError(
                f"{key} looks like a scale of {owner}.{WEIGHT}, which is in FP8, but is not a name of one that hf_fp8 knows "
                f"({', '.join([*SCALES[SCALED_FP8].values(), *SCALES[COMFY_QUANT].values()])}): rename it, or remove it"
            )
    return found
