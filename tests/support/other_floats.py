"""Checkpoints of FP8 beside formats that compressed-tensors compresses: integers and floats of four bits, integers of eight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from support.build import State, write

# Name -> format, arguments of the weights.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}),
    "int4 asymmetric": (
        "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": False},
    ),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {
            "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8",
            "zp_dtype": "torch.uint8",
        },
    ),
}  # fmt: skip


def compressed(name: str, weight: torch.Tensor) -> State:
    """Role -> tensor of a weight (N, K), as compressed-tensors writes it."""
    form, arguments = FORMATS[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format=form)
    size = weight.float().abs()
    given = {"weight": weight}
    amax = size.view(len(size), -1, arguments.get("group_size", size.shape[1])).amax(-1)
    if name == "nvfp4":
        given["weight_global_scale"] = (448 * 6 / size.max()).reshape(1)
        given["weight_scale"] = (amax * given["weight_global_scale"] / 6).clamp(1e-3, 448).to(weight.dtype)
    elif name == "mxfp4":
        given["weight_scale"] = torch.exp2(torch.floor(torch.log2(amax)) - 2).to(weight.dtype)
    else:
        given["weight_scale"] = (amax / (2 ** (arguments["num_bits"] - 1) - 0.5)).to(weight.dtype)
    if "asymmetric" in name:
        given["weight_zero_point"] = (torch.arange(amax.numel()).view(amax.shape) % 6 - 3).to(torch.int8)
    found: State = BaseCompressor.get_value_from_registry(form).compress(given, scheme)
    return found


def write_beside(
    model: Any,
    path: Path,
    name: str,
    mine: Callable[[str], bool],
    theirs: Callable[[str], bool],
    their_targets: list[str],
    **options: Any,
) -> State:
    """Write `model` with the weights `mine` in FP8 and `theirs` in the format `name`; returns the files' tensors."""
    form, arguments = FORMATS[name]

    def add(config: dict[str, Any]) -> None:
        found = config["quantization_config"]
        found["config_groups"]["theirs"] = {"targets": their_targets, "weights": arguments | {"dynamic": False}, "format": form}
        found["config_groups"]["group_0"]["format"] = "float-quantized"
        found["format"] = "mixed-precision"

    state, _ = write(model, path, quantized=mine, config_edit=add, **options)
    out: State = {}
    for key, tensor in state.items():
        parts = compressed(name, tensor) if theirs(key) else None
        out |= {key: tensor} if parts is None else {key.removesuffix("weight") + role: part for role, part in parts.items()}
    out = {key: tensor.contiguous() for key, tensor in out.items()}
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    return out
