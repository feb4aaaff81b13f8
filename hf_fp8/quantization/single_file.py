"""`load_fp8_state_dict`: FP8 weights of a single file as ComfyUI stores them, into any module; and such files are written."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.dialects import comfyui
from ..checkpoint.dialects.comfyui import COMFY_QUANT, SCALED_FP8, Layer
from ..checkpoint.reader import DENSE_DTYPES, DTYPE_NAMES, Checkpoint, TensorInfo
from ..checkpoint.writer import ShardWriter, whole_file
from ..errors import (
    CheckpointError,
    ConfigError,
    MismatchError,
    MissingTensorError,
    ScaleError,
    UnsupportedError,
    UnusedTensorError,
    by_reason,
    first,
)
from ..formats.code_types import FP8
from ..formats.quantized_weight.casts import codes_for_certain
from ..formats.storage import INPUT_SCALE, WEIGHT, WEIGHT_SCALE
from ..integrations.linears import candidates
from ..integrations.other_savers import guard_savers
from ..integrations.weight_readers import guard_readers
from ..kernels import BACKENDS_OF_LAYERS
from ..nn.base import holds_codes
from ..nn.linear import QuantizedLinear
from ..nn.swap import choose_fused_paths, copy_hooks, let_siblings_share, replace_module, submodule

logger = logging.getLogger(__name__)

# Prefixes of the diffusion model's keys, of ComfyUI's and other checkpoints.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model.")


@torch.inference_mode(False)
@torch.no_grad()
def load_fp8_state_dict(
    model: nn.Module,
    file: str | os.PathLike[str] | Mapping[str, torch.Tensor],
    *,
    backend: str = "auto",
    dequantize: bool = False,
    prefix: str | None = None,
    metadata: Mapping[str, str] | None = None,
    device: torch.device | str | None = None,
    strict: bool = True,
) -> nn.Module:
    """Load a file with FP8 weights as ComfyUI stores them into `model`, a float model whose names the file has, in place.

    Linears with FP8 weights become QuantizedLinears with one scale. All other tensors are loaded in the dtype of the model's;
    FP8 ones among them (biases, norms, and weights that cannot stay in FP8) are dequantized.

    Args:
        file: a path to a .safetensors file, or a state dict, whose codes are taken over, not copied. In the forms that
            `checkpoint/dialects/comfyui` describes: the marker `scaled_fp8` with `X.scale_weight`; `_quantization_metadata` or
            `X.comfy_quant` with `X.weight_scale`; or FP8 weights without any scale, which are values.
        backend: of the layers. "auto" follows the file: inputs of layers with an input scale are quantized with it where there
            are FP8 matmuls, unless the file asks for full precision; all other inputs stay as they are (where ComfyUI rounds
            inputs to FP8 without a scale). "weight_only" never quantizes inputs; "scaled_mm" does wherever there is a scale;
            "int8" quantizes weights again, to int8.
        dequantize: load all weights dense.
        prefix: of the keys that belong to the model; others are left out. None: the one of "", "model.diffusion_model.",
            "diffusion_model.", "transformer.", "unet." and "model." with which the file has the model's names.
        metadata: of a state dict, the header's metadata of the file that it was read from.
        device: where tensors go; by default the device of the model's tensors, or the CPU instead of meta.
        strict: whether missing and unexpected keys are an error. Scales without a weight always are.

    Raises, naming the tensor or the layer, before anything is changed: a subclass of CheckpointError for files that are
    damaged, contradict themselves or do not fit; UnsupportedError for other formats, and for a model that is quantized
    already. Returns `model` (or the new layer, if `model` is a Linear itself).
    """
    if backend not in BACKENDS_OF_LAYERS:
        raise ConfigError(f"backend={backend!r}: it must be one of {', '.join(BACKENDS_OF_LAYERS)}")
    if holds_codes(model):
        raise UnsupportedError(f"{type(model).__name__} has quantized layers: load the file into the float model")
    source = _Source.of(file, metadata)
    found = _match(model, source, prefix, strict)
    new = {} if dequantize else _layers(model, found, source, backend)
    return _fill(model, found, source, new, device)


@dataclass
class _Source:
    """The tensors of a file or a state dict. name: for messages."""

    name: str
    tensors: dict[str, TensorInfo]
    metadata: Mapping[str, str]
    held: Mapping[str, torch.Tensor] | None = None
    checkpoint: Checkpoint | None = None

    @classmethod
    def of(cls, file: Any, metadata: Mapping[str, str] | None) -> _Source:
        if isinstance(file, Mapping):
            infos = {}
            for key, tensor in file.items():
                if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPE_NAMES:
                    raise CheckpointError(f"{key} in the state dict is a {type(tensor).__name__}, not a tensor of safetensors")
                infos[key] = TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), "the state dict")
            return cls("the state dict", infos, metadata or {}, held=file)
        path = os.fspath(file)
        checkpoint = Checkpoint([path])
        return cls(path, checkpoint.tensors, checkpoint.metadata(path), checkpoint=checkpoint)

    def read(self, key: str) -> torch.Tensor:
        if self.held is not None:
            return self.held[key].detach()
        assert self.checkpoint is not None
        return self.checkpoint.load(key)


@dataclass
class _Found:
    """What a file has for a model, compared with it.

    layers: FP8 layers by the model's name. keys: the model's name of each tensor that is loaded -> key in the file. scales: key
    of each scale -> its value.
    """

    layers: dict[str, Layer]
    keys: dict[str, str]
    scales: dict[str, torch.Tensor]


def _match(model: nn.Module, source: _Source, prefix: str | None, strict: bool) -> _Found:
    """Compare the file with the model. Raises, naming the tensor, for all that does not fit."""
    described = comfyui.describe(source.metadata, source.tensors, source.read)
    held = model.state_dict(keep_vars=True)
    prefix = _prefix(held, source) if prefix is None else prefix
    layers = {name.removeprefix(prefix): layer for name, layer in described.layers.items() if (name + ".").startswith(prefix)}
    scales_at = {key for layer in layers.values() for role, key in layer.keys.items() if role != WEIGHT}
    keys, extra = {}, []
    for key in source.tensors:
        if key in described.markers or key in scales_at or not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        if name in held:
            keys[name] = key
        elif comfyui.is_beside(key):
            raise UnusedTensorError(
                f"{key} in {source.name} belongs to no FP8 weight that the file describes (form {described.form!r}): its "
                f"weight, the marker {comfyui.MARKER!r} or the metadata is missing, or it is of a format that is not read here"
            )
        else:
            extra.append(key)
    if not layers:
        raise CheckpointError(f"{source.name} has no FP8 weights under the prefix {prefix!r}: load it with load_state_dict")
    _check_names(held, keys, extra, source, strict)
    if lost := [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in keys]:
        raise ConfigError(f"{lost[0]} is a buffer on the meta device and not in {source.name}: build the model on the CPU")
    for name, key in keys.items():
        _check_tensor(name, held[name], key, source)
    layers = {name: layer for name, layer in layers.items() if layer.keys[WEIGHT] in keys.values()}  # not strict: it lacks one
    for name, layer in layers.items():
        scaled = described.form != SCALED_FP8 or WEIGHT_SCALE in layer.keys
        if not scaled and isinstance(submodule(model, name), nn.Linear):
            raise MissingTensorError(
                f"{layer.name}.scale_weight is not in {source.name}, but {layer.keys[WEIGHT]} is in FP8, and the file is "
                f"marked as one with scales ({comfyui.MARKER})"
            )
    return _Found(layers, keys, _scales(described.form, layers, source))


def _prefix(held: Mapping[str, Any], source: _Source) -> str:
    """The prefix under which the file has most names of the model."""
    count = {prefix: sum(prefix + name in source.tensors for name in held) for prefix in PREFIXES}
    best = max(PREFIXES, key=lambda prefix: count[prefix])
    if not count[best]:
        some = first(sorted(source.tensors), 3)
        raise CheckpointError(
            f"{source.name} has no tensor of the model, whose names are like {first(sorted(held), 3)}; it has {some}. Pass the "
            "`prefix` of its keys, or rename them to the model's names"
        )
    return best


def _check_names(held: Mapping[str, Any], keys: Mapping[str, str], extra: list[str], source: _Source, strict: bool) -> None:
    loaded = {id(held[name]) for name in keys}
    missing = sorted(name for name, tensor in held.items() if name not in keys and id(tensor) not in loaded)
    if strict and missing:
        raise MissingTensorError(f"{first(missing)} of the model: not in {source.name}")
    if strict and extra:
        raise CheckpointError(f"{first(sorted(extra))} in {source.name}: not in the model")
    if lost := [name for name in missing if held[name].is_meta]:
        raise MissingTensorError(f"{first(lost)} of the model: on the meta device, and not in {source.name}")


def _check_tensor(name: str, tensor: torch.Tensor, key: str, source: _Source) -> None:
    info = source.tensors[key]
    if info.shape != tuple(tensor.shape):
        raise MismatchError(f"{key} is {info} in {source.name}, but has shape {list(tensor.shape)} in the model")
    floats = (*DENSE_DTYPES, *comfyui.DTYPES)
    if info.dtype not in floats if tensor.is_floating_point() else info.dtype != DTYPE_NAMES.get(tensor.dtype):
        raise MismatchError(f"{key} is {info} in {source.name}, but {tensor.dtype} in the model ({name})")


def _scales(form: str, layers: dict[str, Layer], source: _Source) -> dict[str, torch.Tensor]:
    """The scales of all layers, float32 of shape (1,). Takes input scales that are placeholders out of `layers`."""
    found: dict[str, torch.Tensor] = {}
    for name, layer in list(layers.items()):
        for role, key in layer.keys.items():
            if role == WEIGHT:
                continue
            value = source.read(key).to("cpu", torch.float32).reshape(1)
            if not bool((value.isfinite() & (value > 0)).all()):
                raise ScaleError(f"{key} in {source.name} is {value.item()}: a scale must be finite and positive")
            if role == INPUT_SCALE and form == SCALED_FP8 and value.item() == 1:
                kept = {other: at for other, at in layer.keys.items() if other != INPUT_SCALE}
                layers[name] = Layer(layer.name, layer.dtype, kept, layer.full_precision)
            else:
                found[key] = value
    return found


def _layers(model: nn.Module, found: _Found, source: _Source, backend: str) -> dict[str, QuantizedLinear]:
    """Empty quantized layers for the Linears that can stay in FP8, by name; a Linear with several names once."""
    reasons = {candidate.name: candidate.reason for candidate in candidates(model, conv1x1=False)}
    dense = {name: why for name in found.layers if (why := reasons.get(name)) is not None}
    if dense:
        logger.warning(f"hf_fp8: loaded dense, not in FP8: {by_reason(dense)}")
    new: dict[str, QuantizedLinear] = {}
    seen = set[int]()
    for name, layer in found.layers.items():
        if name not in reasons or name in dense or id(old := model.get_submodule(name)) in seen:
            continue
        seen.add(id(old))
        full = layer.full_precision and backend == "auto"
        made = QuantizedLinear.like(old, layer.scheme, backend="weight_only" if full else backend)
        made.name_in_model = name
        new[name] = made
    return new


def _fill(
    model: nn.Module, found: _Found, source: _Source, new: dict[str, QuantizedLinear], device: torch.device | str | None
) -> nn.Module:
    """Read the tensors one after the other into `model` and its new layers."""
    for name, layer in new.items():
        old: Any = model.get_submodule(name)
        place, stored = _place(old.weight, device), found.layers[name]
        scale = found.scales.get(stored.keys.get(WEIGHT_SCALE, ""), torch.ones(1))
        with codes_for_certain():
            layer.weight_scale = nn.Parameter(scale.to(place), requires_grad=False)
            layer.weight = nn.Parameter(source.read(stored.keys[WEIGHT]).to(place), requires_grad=False)
        if INPUT_SCALE in stored.keys:
            layer.input_scale = nn.Parameter(found.scales[stored.keys[INPUT_SCALE]].to(place), requires_grad=False)
        copy_hooks(old, layer)
        for other, known in list(model.named_modules(remove_duplicate=False)):
            if known is old:
                model = replace_module(model, other, layer)
    done: dict[int, nn.Parameter | torch.Tensor] = {}
    owners = {f"{name}.{WEIGHT}" if name else WEIGHT for name in new}
    for name, key in found.keys.items():
        if name in owners:
            continue
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        held = getattr(module, leaf)
        if isinstance(module, QuantizedLinear) and leaf != "bias":
            continue  # another name of a layer
        if id(held) not in done:
            value = _dense(found, source, name, key).to(_place(held, device), held.dtype)
            keeps = isinstance(held, nn.Parameter)
            done[id(held)] = nn.Parameter(value, requires_grad=held.requires_grad) if keeps else value
            done[id(done[id(held)])] = done[id(held)]
        setattr(module, leaf, done[id(held)])
    for layer in new.values():
        if layer.backend == "int8":
            layer.requantize_int8()
    if device is not None:
        model.to(device)
    let_siblings_share(model)
    choose_fused_paths(model)
    guard_savers(model)
    guard_readers(model)
    return model


def _dense(found: _Found, source: _Source, name: str, key: str) -> torch.Tensor:
    """The values of a tensor: of FP8 ones in float32, times their scale."""
    value = source.read(key)
    if value.dtype.itemsize > 1 or not value.is_floating_point():
        return value
    layer = found.layers.get(name.removesuffix(WEIGHT).removesuffix("."))
    scale = None if layer is None or key != layer.keys[WEIGHT] else found.scales.get(layer.keys.get(WEIGHT_SCALE, ""))
    return value.float() if scale is None else value.float() * scale.to(value.device)


def _place(tensor: torch.Tensor, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cpu") if tensor.is_meta else tensor.device


def save_single_file(layers: Mapping[str, QuantizedLinear], state: Mapping[str, torch.Tensor], path: Path, form: str) -> None:
    """Write a model as one .safetensors file in `form`, "scaled_fp8" or "comfy_quant", which appears when it is complete.

    layers: the quantized layers by name. state: the model's state dict.

    Raises ConfigError for another file name, and UnsupportedError, naming the layer, for what the form cannot say.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: this format is one file, whose name must end in .safetensors")
    full = {name: layer.backend == "weight_only" or layer.input_scale is None for name, layer in layers.items()}
    for name, layer in layers.items():
        weight = layer.scheme.weight
        if type(layer) is not QuantizedLinear or weight.dtype != FP8 or not weight.granularity.is_tensor:
            raise UnsupportedError(
                f"{name} is a {type(layer).__name__} with {layer.scheme.describe()}; this format has Linears in FP8 (E4M3) "
                "with one scale per tensor: quantize the float model with scheme='FP8_TENSOR' (or 'FP8' and hf_fp8.calibrate)"
            )
        one = form == SCALED_FP8 and layer.input_scale is not None and bool((layer.input_scale == 1).all())
        if one or (form == SCALED_FP8 and full[name] != all(full.values())):
            what = "has an input scale of exactly 1" if one else "quantizes inputs, and other layers do not (or the reverse)"
            raise UnsupportedError(f"{name} {what}, which format='fp8_scaled' cannot say: write format='comfy_quant'")
    tensors: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name, _, leaf = key.rpartition(".")
        if name in layers and leaf in comfyui.SCALES[form]:
            leaf = comfyui.SCALES[form][leaf]
            tensors[f"{name}.{leaf}" if name else leaf] = value.detach().float().reshape(())
        else:
            tensors[key] = value
    if form == SCALED_FP8:
        tensors[comfyui.MARKER] = torch.zeros(2 if all(full.values()) else 0, dtype=FP8)
    infos = {name: TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), str(path)) for name, tensor in tensors.items()}
    metadata = comfyui.metadata_of(full) if form == COMFY_QUANT else None
    with whole_file(path) as part, ShardWriter(part, infos, metadata) as shard:
        for name, tensor in tensors.items():
            shard.write(name, tensor)
