"""Small checkpoints whose scales are exponents (E8M0), made by hand, and the weights that they stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.build import TOKEN, State, is_linear
from transformers import PreTrainedModel

E8M0 = torch.float8_e8m0fnu
MX = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
BLOCK = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [128, 128]}
GROUPS = {"strategy": "group", "group_size": 128}
# Name -> (format, arguments of weights, inputs, extent of the blocks, dtype of the scales).
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, tuple[int, int], torch.dtype]] = {
    "MXFP8": ("mxfp8-quantized", MX, {**MX, "dynamic": True}, (1, 32), torch.uint8),
    "MXFP8A16": ("mxfp8-quantized", MX, None, (1, 32), torch.uint8),
    "MXFP8 E8M0": ("mxfp8-quantized", MX, {**MX, "dynamic": True}, (1, 32), E8M0),
    "block": ("float-quantized", BLOCK, {**TOKEN, **GROUPS}, (128, 128), E8M0),
    "block in float32": ("float-quantized", BLOCK, {**TOKEN, **GROUPS}, (128, 128), torch.float32),
    "channel": ("float-quantized", {**BLOCK, "strategy": "channel", "block_structure": None}, TOKEN, (1, 1 << 30), E8M0),
}


def stored(kind: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """(role -> tensor of a weight (N, K) in the files, the weight that they stand for: float32, computed in float64)."""
    *_, (rows, cols), dtype = KINDS[kind]
    n, k = weight.shape
    values = weight.double()
    grid = torch.zeros(math.ceil(n / rows), math.ceil(k / cols), dtype=torch.uint8)
    codes, dense = torch.zeros(n, k, dtype=torch.float8_e4m3fn), torch.zeros(n, k, dtype=torch.float64)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols)
            exponent = math.ceil(math.log2(float(values[at].abs().max()) / 448))
            grid[i, j] = exponent + 127
            codes[at] = (values[at] * 2.0**-exponent).float().to(torch.float8_e4m3fn)
            dense[at] = codes[at].double() * 2.0**exponent
    scale = grid.view(E8M0).float() if dtype == torch.float32 else grid.view(dtype)
    return {"weight": codes, "weight_scale": scale}, dense.float()


def write_exponents(
    model: PreTrainedModel,
    path: Path,
    kind: str,
    quantized: Callable[[str], bool] = is_linear,
    config_edit: Callable[[dict[str, Any]], Any] = lambda config: None,
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
    fmt, weights, inputs, _, _ = KINDS[kind]
    config = json.loads((path / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": fmt}
    config["quantization_config"] = {
        "config_groups": {"group_0": group}, "format": fmt, "ignore": ["lm_head"],
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
    }  # fmt: skip
    config_edit(config)
    (path / "config.json").write_text(json.dumps(config))
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    return out, dense
