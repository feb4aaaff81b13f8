"""On which device a model will compute, from its `device_map`; and why its weights are dequantized there, if they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..formats.scheme import Scheme
from ..kernels import has_fp8_matmul, why_not_kept, why_not_kept_experts
from ..loading import options as load_options
from ..loading.matching import Policy
from .config import FP8Config

_PLACED_BY_SIZE = ("auto", "balanced", "balanced_low_0", "sequential")


def compute_device(device_map: Any) -> torch.device:
    """The device on which the model will compute. Offloaded parts compute on the accelerator; without a map the model
    is loaded on the CPU, and users then move it to the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device_map is None or device_map in _PLACED_BY_SIZE:
        return torch.device("cpu") if accelerator is None else accelerator
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    for device in devices:
        if device not in ("cpu", "disk", torch.device("cpu")):
            return torch.device(accelerator.type, device) if isinstance(device, int) and accelerator else torch.device(device)
    return torch.device("cpu")


def policy_of(config: FP8Config, device: torch.device, dtype: torch.dtype, *, read_values: bool = True) -> Policy:
    """The `Policy` for loading an FP8 checkpoint with `config`. device: where the model will compute. dtype: the model's."""
    return Policy(
        dense_because=why_dense(config, device, dtype),
        experts_because=partial(why_dense_experts, config, device, dtype),
        dequantize=config.dequantize,
        needs_input_scales=quantizes_inputs(config, device),
        other_sizes=load_options.current().ignore_mismatched_sizes,
        read_values=read_values,
    )


def quantizes_inputs(config: FP8Config, device: torch.device) -> bool:
    """Whether layers in FP8 quantize inputs there, as the checkpoint says: "auto" does where there are FP8 units."""
    return config.backend == "scaled_mm" or (config.backend == "auto" and has_fp8_matmul(device) is None)


def why_dense(config: FP8Config, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why all FP8 weights are dequantized while loading; None if they stay in FP8."""
    if config.dequantize:
        return "dequantize=True"
    if config.backend != "auto" or config.scheme is not None:
        return None
    reason = why_not_kept(device, dtype)
    return None if reason is None else f"backend='auto' on {device.type}: {reason}"


def why_dense_experts(config: FP8Config, device: torch.device, dtype: torch.dtype, scheme: Scheme) -> str | None:
    """Why merged experts of `scheme` are dequantized while loading; None if not. The option `experts` has priority."""
    because = why_dense(config, device, dtype)
    if config.dequantize or config.experts == "fp8":
        return because if config.dequantize else None
    if config.experts == "dequantize" or config.backend == "int8":
        return because or ("experts='dequantize'" if config.experts == "dequantize" else "backend='int8' is only for Linears")
    reason = why_not_kept_experts(device, dtype, scheme)
    where = f"experts='auto' on {device.type}, where no kernel gains from experts in FP8"
    return because or (None if reason is None else f"{where}: {reason}")
