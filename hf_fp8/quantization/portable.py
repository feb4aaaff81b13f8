"""`save_quantized`, `load_quantized`: quantized models of other libraries as safetensors and `quantization.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.dialects.comfyui import COMFY_QUANT, SCALED_FP8
from ..checkpoint.files import read_json
from ..checkpoint.reader import DENSE_DTYPES, DTYPE_NAMES, SCALE_DTYPES, Checkpoint, TensorInfo, weight_scale_dtypes
from ..checkpoint.writer import ShardWriter, nbytes, shard_names, whole_folder, write_index
from ..errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    MismatchError,
    MissingTensorError,
    ScaleError,
    UnsupportedError,
)
from ..formats.exponents import scale_values
from ..formats.scheme import Scheme
from ..formats.storage import SHAPE, WEIGHT_SCALE
from ..integrations.other_savers import guard_savers
from ..integrations.weight_readers import guard_readers
from ..kernels import BACKENDS_OF_LAYERS
from ..nn.backward import BACKWARDS
from ..nn.base import QuantizedModule
from ..nn.conv import Convolution, QuantizedConv1x1
from ..nn.linear import QuantizedLinear
from ..nn.packed_linear import linear_of
from ..nn.swap import choose_fused_paths, copy_hooks, let_siblings_share, replace_module, submodule
from ..version import __version__
from .single_file import save_single_file

CONFIG = "quantization.json"
# Version of the layout of `quantization.json`: files with another number are refused.
FORMAT = 1
COMPUTE = ("bfloat16", "float16", "float32", "float64")


# Other formats of `save_quantized`: the form of the single file.
FORMATS = {"fp8_scaled": SCALED_FP8, "comfy_quant": COMFY_QUANT}


def save_quantized(
    model: nn.Module, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9, format: str = "folder"
) -> None:
    """Write `model`, quantized by `quantize_model`, to `folder`, which is created or replaced when everything is written.

    Files: `model.safetensors` (or several with an index) with the state dict, shared tensors once; `quantization.json` with the
    scheme of each layer and the names of shared tensors. Kept float weights are not saved. `load_quantized` loads the folder
    into the structure of the float model.

    format: "folder", or how ComfyUI stores FP8 weights with one scale per tensor, in one file: "fp8_scaled" (a marker
    `scaled_fp8`, `X.scale_weight`) or "comfy_quant" (`_quantization_metadata` in the header, `X.weight_scale`). Then `folder`
    is the name of the .safetensors file, which is replaced if it exists. `load_fp8_state_dict` loads it. Neither can say that
    input scales are dynamic (FP8_TENSOR): such layers are read back as ones whose inputs are not quantized.

    Raises ConfigError if `folder` exists and was not written by this function; UnsupportedError for quantized transformers
    models (use `save_pretrained`, which other tools can read), offloaded layers, state that is not a tensor, and schemes that
    `format` cannot store; CalibrationError for layers without a calibrated input scale, StaleError for layers whose kept float
    weight was changed.
    """
    if format != "folder" and format not in FORMATS:
        raise ConfigError(f"format={format!r}: it must be one of folder, {', '.join(FORMATS)}")
    layers, state = _savable(model, single=format != "folder")
    if format != "folder":
        save_single_file(layers, state, Path(folder), FORMATS[format])
        return
    first: dict[Any, str] = {}
    shared = {}
    for name, value in state.items():
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        kept = first.setdefault(place, name) if value.numel() else name
        if kept != name:
            shared[name] = kept
    described = {
        "format": FORMAT,
        "hf_fp8": __version__,
        "modules": {name: _describe(module) for name, module in layers.items()},
        "shared": shared,
    }
    with whole_folder(Path(folder), replaces=CONFIG) as part:
        files = _shards({name: value for name, value in state.items() if name not in shared}, max_shard_bytes)
        for file, infos in files.items():
            with ShardWriter(part / file, infos) as shard:
                for name in infos:
                    shard.write(name, state[name])
        write_index(part, files)
        (part / CONFIG).write_text(json.dumps(described, indent=1) + "\n")


def _savable(model: nn.Module, single: bool) -> tuple[dict[str, QuantizedLinear], dict[str, torch.Tensor]]:
    """The quantized layers of `model` by name, and its state dict. Raises as `save_quantized`. single: whether it is written as
    one file, which describes Linears of transformers models as well."""
    layers: dict[str, QuantizedLinear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QuantizedModule):
            continue
        if not isinstance(module, QuantizedLinear):
            raise UnsupportedError(f"{name} is a {type(module).__name__} of a transformers model: use its save_pretrained")
        if module.is_offloaded:
            raise UnsupportedError(f"{name} is on the meta device, or offloaded, and cannot be saved: load it onto a device")
        if module.needs_calibration:
            raise CalibrationError(f"{name} has no input scale yet: calibrate the model before saving (hf_fp8.calibrate)")
        layers[name] = module
    if not single and isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedError(f"{type(model).__name__} is a transformers model: use its save_pretrained")
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.is_meta or value.dtype not in DTYPE_NAMES:
            raise UnsupportedError(
                f"{name} in the state dict cannot be saved: it is a {type(value).__name__}, and must be a tensor with values "
                "and a dtype of safetensors"
            )
    return layers, state


@torch.inference_mode(False)
def load_quantized(
    model: nn.Module, folder: str | os.PathLike[str], *, device: torch.device | str | None = None, strict: bool = True
) -> nn.Module:
    """Load the files of `save_quantized` into `model`, the float model before quantization, in place.

    Its Linears may be on any device, including meta: their values are not used. device: where tensors go; by default the device
    of the model's tensors, or the CPU instead of meta. strict: whether buffers and parameters that are missing in the files, or
    in the model, are an error.

    Raises a subclass of CheckpointError, naming the tensor or the module, before anything is changed. Returns `model` (or the
    new layer, if `model` is a Linear itself).
    """
    folder = Path(folder)
    described = _read_config(folder)
    checkpoint = Checkpoint([str(file) for file in sorted(folder.glob("model*.safetensors"))])
    held = {**checkpoint.tensors}
    for name, kept in described["shared"].items():
        if kept not in checkpoint.tensors:
            raise MissingTensorError(f"{kept}, which {name} shares, is not in the files of {folder}")
        held[name] = checkpoint.tensors[kept]
    made: dict[int, QuantizedLinear] = {}
    layers = {}
    for name, entry in described["modules"].items():
        old = _module(model, name, folder)
        layers[name] = made.setdefault(id(old), _empty(name, old, entry))
    _compare(model, layers, held, folder, strict)
    state = checkpoint.read(list(checkpoint.tensors))
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if module in layers and leaf.endswith("_scale") and not _is_valid(tensor):
            raise ScaleError(f"{name} in {folder} has values that are not finite and positive: the file is damaged")
        if module in layers and leaf == SHAPE and tensor.tolist() != [layers[module].out_features, layers[module].in_features]:
            raise MismatchError(
                f"{name} in {folder} says {tensor.tolist()}, but the model has {_module(model, module, folder)}"
            )
    for name, layer in layers.items():
        layer.to_empty(device=_place(_module(model, name, folder).weight, device))
    for name, layer in layers.items():
        copy_hooks(_module(model, name, folder), layer)
        model = replace_module(model, name, layer)
    _assign(model, state, described["shared"], device)
    let_siblings_share(model)
    choose_fused_paths(model)
    guard_savers(model)
    guard_readers(model)
    return model


def _is_valid(scale: torch.Tensor) -> bool:
    values = scale_values(scale)
    return bool((values.isfinite() & (values > 0)).all())


def _describe(layer: QuantizedLinear) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "linear", "scheme": layer.scheme.text, "backend": layer.backend}
    if isinstance(layer, QuantizedConv1x1):
        found.update(kind="conv1x1", stride=list(layer.stride))
    if layer.compute_dtype is not None:
        found["compute_dtype"] = str(layer.compute_dtype).removeprefix("torch.")
    if not layer.cast_output:
        found["cast_output"] = False
    if layer.backward != "exact":
        found["backward"] = layer.backward
    return found


def _empty(name: str, old: nn.Module, entry: dict[str, Any]) -> QuantizedLinear:
    scheme = Scheme.parse(entry["scheme"])
    kind = linear_of(scheme)
    if entry["kind"] == "conv1x1":
        kind = QuantizedConv1x1
        fits = isinstance(old, Convolution) and kind.why_not(old) is None and list(old.stride) == entry.get("stride")
    else:
        fits = isinstance(old, nn.Linear)
    if not fits or isinstance(old, QuantizedModule):
        raise MismatchError(
            f"{name} is {old} in the model, but was a {entry['kind']} with {entry} when it was quantized: build the float "
            "model as it was then"
        )
    new = kind.like(old, scheme, backend=entry["backend"])
    if new.bias is not None:
        # The bias of the model stays unchanged.
        new.bias = nn.Parameter(new.bias.detach().clone(), requires_grad=new.bias.requires_grad)
    new.compute_dtype = getattr(torch, entry["compute_dtype"]) if "compute_dtype" in entry else None
    new.cast_output = entry.get("cast_output", True)
    new.backward = entry.get("backward", "exact")
    return new


def _compare(
    model: nn.Module, layers: dict[str, QuantizedLinear], held: dict[str, TensorInfo], folder: Path, strict: bool
) -> None:
    """Raise unless the tensors in the files match those of the model after replacing `layers`."""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        wanted.update({f"{name}.{leaf}" if name else leaf: tensor for leaf, tensor in layer.state_dict().items()})
    quantized = {f"{name}.{leaf}" if name else leaf for name, layer in layers.items() for leaf in layer.quantized}
    for name, tensor in wanted.items():
        found = held.get(name)
        if found is None:
            if strict or name.rpartition(".")[0] in layers:  # a new layer has no values
                raise MissingTensorError(f"{name} is in the model, but not in the files of {folder}")
            continue
        if found.shape != tuple(tensor.shape):
            raise MismatchError(f"{name} is {found} in {folder}, but has shape {list(tensor.shape)} in the model")
        if name in quantized and name.endswith("_scale"):
            module, _, role = name.rpartition(".")
            mx = role == WEIGHT_SCALE and layers[module].scheme.weight.mx
            fits = found.dtype in (weight_scale_dtypes(mx) if role == WEIGHT_SCALE else SCALE_DTYPES)
        elif name not in quantized and DTYPE_NAMES.get(tensor.dtype) in DENSE_DTYPES:
            fits = found.dtype in DENSE_DTYPES
        else:
            fits = found.dtype == DTYPE_NAMES.get(tensor.dtype)
        if not fits:
            raise MismatchError(f"{name} is {found} in {folder}, but {tensor.dtype} in the model")
    if strict and (extra := sorted(set(held) - set(wanted))):
        raise CheckpointError(f"{extra[0]} is in the files of {folder}, but not in the model")
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in held]
    if lost:
        raise ConfigError(f"{lost[0]} is a buffer on the meta device and not in the files: build the model on the CPU")


def _assign(model: nn.Module, state: dict[str, torch.Tensor], shared: dict[str, str], device: Any) -> None:
    placed: dict[str, torch.Tensor] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name in [*state, *shared]:
        path, _, leaf = name.rpartition(".")
        module = submodule(model, path)
        old = module._parameters.get(leaf, module._buffers.get(leaf)) if module is not None else None
        if module is None or old is None:
            continue  # not strict: the model does not have it
        value = placed.get(shared.get(name, name))
        if value is None:
            value = state[shared.get(name, name)].to(_place(old, device))
        placed[name] = value
        if leaf in module._parameters:  # a buffer may share the memory of a parameter
            value = parameters.setdefault(id(value), nn.Parameter(value, requires_grad=old.requires_grad))
        setattr(module, leaf, value)
    if device is not None:
        model.to(device)


def _place(tensor: Any, device: Any) -> torch.device:
    if device is not None:
        return torch.device(device)
    found: torch.device = tensor.device
    return torch.device("cpu") if found.type == "meta" else found


def _module(model: nn.Module, name: str, folder: Path) -> Any:
    found = submodule(model, name)
    if found is None:
        raise MismatchError(f"{name} is quantized in {folder}, but {type(model).__name__} has no such module")
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise ConfigError(
            f"{folder} has no {CONFIG}: it was not written by hf_fp8.save_quantized. Load transformers checkpoints with "
            "from_pretrained"
        )
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {found.get('format')}; this version of hf_fp8 reads format {FORMAT}")
    modules, shared = found.get("modules"), found.get("shared", {})
    if not isinstance(modules, dict) or not isinstance(shared, dict) or not all(isinstance(k, str) for k in shared.values()):
        raise CheckpointError(f"{path} has no `modules`, or a `shared` that is not a table of names")
    for name, entry in modules.items():
        if (
            not isinstance(entry, dict)
            or entry.get("kind") not in ("linear", "conv1x1")
            or entry.get("backend") not in BACKENDS_OF_LAYERS
        ):
            raise CheckpointError(f"{path}: modules[{name!r}] is {entry!r}, which is not a layer that hf_fp8 supports")
        compute, backward = entry.get("compute_dtype"), entry.get("backward", "exact")
        known = compute in (None, *COMPUTE) and backward in BACKWARDS
        if not known or not isinstance(entry.get("cast_output", True), bool):
            raise CheckpointError(
                f"{path}: modules[{name!r}] is {entry!r}: compute_dtype must be one of {', '.join(COMPUTE)}, backward one of "
                f"{', '.join(BACKWARDS)}, and cast_output true or false"
            )
        try:
            Scheme.parse(entry["scheme"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: modules[{name!r}].scheme is {entry.get('scheme')!r}: unknown scheme") from error
    return {"modules": modules, "shared": shared}


def _shards(state: dict[str, torch.Tensor], most: int) -> dict[str, dict[str, TensorInfo]]:
    """Name of a file -> its tensors; each file has at most `most` bytes, or one tensor."""
    groups: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, tensor in state.items():
        info = TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), "")
        if groups[-1] and size + nbytes(info) > most:
            groups.append({})
            size = 0
        groups[-1][name] = info
        size += nbytes(info)
    return dict(zip(shard_names(len(groups)), groups, strict=True))
