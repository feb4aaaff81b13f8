"""Small checkpoints of int4 and int8 weights, written by compressed-tensors' compressors, and the weights they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from support.build import TOKEN, State, is_linear
from transformers import PreTrainedModel

INT8_TOKEN = {**TOKEN, "type": "int"}
# Name -> format, arguments of weights, inputs.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "W4A16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "W4A16 asymmetric": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, None),
    "W4A16 channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, None),
    "W4A16 asymmetric channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}, None),
    "W4A16 ordered": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "group"}, None),
    "W4A8": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}, INT8_TOKEN),
    "W4AFP8": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}, TOKEN),
    "W8A16": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}, None),
    "W8A16 asymmetric": ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, None),
    "W8A8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, INT8_TOKEN),
    "W8A8 tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, {**INT8_TOKEN, "strategy": "tensor"}),
}


def stored(kind: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """(role -> tensor of a weight (N, K) as compressed-tensors writes it, what it is multiplied out, in float32)."""
    fmt, given, _ = KINDS[kind]
    arguments, order = {"type": "int", "dynamic": False, **given}, None
    if arguments.pop("actorder", None):  # which present versions of the library do not write
        generator = torch.Generator().manual_seed(weight.numel())
        groups = torch.arange(weight.shape[1], dtype=torch.int32) // arguments["group_size"]
        order = groups[torch.randperm(weight.shape[1], generator=generator)]
        weight = weight[:, order.argsort(stable=True)]
    args = QuantizationArgs(**arguments)
    grouped = weight.unflatten(1, (-1, args.group_size)) if args.strategy == "group" else weight
    dims = {"group": -1, "channel": 1, "tensor": (0, 1)}[args.strategy]
    keep = args.strategy != "group"
    scale, zero = calculate_qparams(grouped.amin(dims, keepdim=keep), grouped.amax(dims, keepdim=keep), args)
    scale, zero = (scale.reshape(1), zero.reshape(1)) if args.strategy == "tensor" else (scale, zero)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    found: State = BaseCompressor.get_value_from_registry(fmt).compress(
        {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}, scheme
    )
    lowest, highest = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1
    point = torch.zeros_like(scale) if args.symmetric else zero.to(scale)
    wide_scale, wide_point = (
        t.repeat_interleave(args.group_size, 1) if args.strategy == "group" else t for t in (scale, point)
    )
    codes = (weight / wide_scale + wide_point).clamp(lowest, highest).round()
    dense = (codes.float() - wide_point.float()) * wide_scale.float()
    found.pop("weight_zero_point", None) if args.symmetric else None
    if order is not None:
        back = order.argsort(stable=True).argsort()
        unpacked = codes[:, back].to(torch.int8)
        args_plain = QuantizationScheme(targets=["Linear"], weights=args)
        ones = torch.ones_like(scale, dtype=torch.float32)
        found["weight_packed"] = BaseCompressor.get_value_from_registry(fmt).compress(
            {"weight": unpacked.float(), "weight_scale": ones}, args_plain
        )["weight_packed"]
        found["weight_g_idx"], dense = order, dense[:, back]
    return {role: tensor.contiguous() for role, tensor in found.items()}, dense


def write_integers(
    model: PreTrainedModel,
    path: Path,
    kind: str,
    quantized: Callable[[str], bool] = is_linear,
    config_edit: Callable[[dict[str, Any]], Any] = lambda config: None,
    targets: list[str] | None = None,
) -> tuple[State, State]:
    """Save `model` dense, then quantize the files. Returns (tensors written, tensors of the dequantized model, float32)."""
    model.save_pretrained(path)
    out: State = {}
    dense: State = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if not quantized(name) or tensor.ndim != 2:
            out[name] = dense[name] = tensor
            continue
        parts, dense[name] = stored(kind, tensor)
        out |= {name.removesuffix("weight") + role: part for role, part in parts.items()}
    fmt, weights, inputs = KINDS[kind]
    config = json.loads((path / "config.json").read_text())
    group = {
        "targets": targets or ["Linear"], "weights": {"type": "int", "dynamic": False, "symmetric": True, **weights},
        "input_activations": inputs, "output_activations": None, "format": fmt,
    }  # fmt: skip
    config["quantization_config"] = {
        "config_groups": {"group_0": group}, "format": fmt, "ignore": ["lm_head"],
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
    }  # fmt: skip
    config_edit(config)
    (path / "config.json").write_text(json.dumps(config))
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    return out, dense
