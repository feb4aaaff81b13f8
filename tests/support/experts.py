"""Mixtures of every family with FP8 experts: written, loaded, and computed expert by expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.build import STATIC_TENSOR, State, group_input, write
from support.moe import MOE, TRANSPOSED, is_linear, write_transposed
from transformers import (
    PreTrainedModel,
)

from hf_fp8 import FP8Config, QuantizedExperts
from hf_fp8.formats import numerics
from hf_fp8.formats.scheme import TENSOR, Granularity
from hf_fp8.nn.experts_layout import Projection

KEEP = FP8Config(experts="fp8", backend="weight_only")
SCHEMES: dict[str, dict[str, Any]] = {
    "channel": {},
    "tensor static": {"weight": TENSOR, "inputs": STATIC_TENSOR},
    "tensor dynamic": {"weight": TENSOR, "inputs": {**STATIC_TENSOR, "dynamic": True}},
    "block 24x40": {"weight": Granularity(24, 40), "inputs": group_input(), "scale_dtype": torch.float32},
    "block 16x32": {"weight": Granularity(16, 32), "inputs": group_input(32)},
    "W8A16": {"inputs": None},
}


def write_family(family: str, path: Path, **scheme: Any) -> tuple[PreTrainedModel, State, State]:
    name, _, form = family.partition(" ")
    if name in TRANSPOSED:
        return write_transposed(name, form, path, **scheme)
    model = MOE[name]()
    return model, *write(model, path, quantized=is_linear, **scheme)


def load(model: PreTrainedModel, path: Path, config: Any = KEEP, dtype: torch.dtype = torch.float32, **rest: Any) -> Any:
    return type(model).from_pretrained(path, quantization_config=config, dtype=dtype, **rest)


def experts_of(model: PreTrainedModel) -> list[QuantizedExperts]:
    return [module for module in model.modules() if isinstance(module, QuantizedExperts)]


def reference(module: QuantizedExperts, x: torch.Tensor, ids: Any = None, weights: Any = None) -> torch.Tensor:
    """Expert by expert: inputs rounded as the scheme says, matrix by matrix; the family's own code for the rest."""
    n_experts, out = module.first.shape[0], torch.zeros(x.shape)
    if ids is None:
        ids = torch.arange(n_experts).repeat_interleave(len(x) // n_experts).unsqueeze(1)
        weights = torch.ones(ids.shape)

    def linear(x: torch.Tensor, projection: Projection, e: int) -> torch.Tensor:
        scheme, found = projection.scheme, []
        codes, scales = (getattr(module, n)[e].chunk(projection.parts) for n in (projection.name, projection.scale))
        for part, (q, scale) in enumerate(zip(codes, scales, strict=True)):
            given = x
            if scheme.input is not None:
                static = getattr(module, projection.input_scale)
                x_codes, x_scale = numerics.quantize_input(x, scheme.input, None if static is None else static[e, part])
                given = numerics.dequantize_input(x_codes, x_scale, scheme.input.granularity, x.dtype)
            found.append(given @ numerics.dequantize(q, scale, scheme.weight.granularity).t())
        return torch.cat(found, 1)

    for e in range(n_experts):
        rows, slots = torch.where(ids == e)
        y = linear(x[rows], module.first, e)
        if "GptOss" in module.family.__name__:
            if not module.interleaved:
                y = torch.stack(y.chunk(2, 1), 2).flatten(1)
            y = y + module.gate_up_proj_bias[e]
        if module.layout.is_prerouted:
            y = y.chunk(2, 1)[1] * module.act_fn(y.chunk(2, 1)[0])
        else:
            y = module.family._apply_gate(module, y)
        y = linear(y, module.second, e)
        if "GptOss" in module.family.__name__:
            y = y + module.down_proj_bias[e]
        out.index_add_(0, rows, y * weights[rows, slots].unsqueeze(1))
    return out


FAMILIES = [*MOE, *(f"{name} {form}" for name in TRANSPOSED for form in ("split", "stacked"))]
