"""Log messages about a checkpoint that was loaded, or quantized while loading."""

from __future__ import annotations

import torch
from transformers.utils import logging

from ..errors import by_reason
from ..kernels import why_not_kept
from ..loading.extra_tensors import some
from ..loading.layout import Layout
from .config import FP8Config

logger = logging.get_logger(__name__)
KEEP_EXPERTS = "experts='fp8' keeps experts in FP8 on any device, in half the memory; it is slower where no kernel reads them."


def report_planned(config: FP8Config, device: torch.device, dtype: torch.dtype) -> None:
    """Log that a dense checkpoint, quantized while loading, runs slowly on this device."""
    slow = why_not_kept(device, dtype)
    if slow and config.backend == "auto":
        logger.warning(
            f"hf_fp8: newly quantized FP8 layers, which quantize their inputs, are slow on {device.type} ({slow}). "
            "Save and reload the model, so that it is loaded as suits the device; or use backend='weight_only', which is faster"
        )


def report(
    config: FP8Config, layout: Layout, dtype: torch.dtype, because: str | None, carried: bool, quantizes_inputs: bool
) -> None:
    """Log how an FP8 checkpoint was loaded. because: why its Linears are dequantized, None if they are not. carried: whether
    the tensors that the model has no place for will be written back. quantizes_inputs: as the placement says."""
    merged = any(weight.is_expert for weight in layout.scan.weights)
    if because is not None and layout.dense and because != "dequantize=True":
        saved = "they are saved dense" if layout.scan.host else "the model is saved as a plain dense one"
        logger.warning(
            f"hf_fp8: {sum(bool(w.target) for w in layout.scan.weights)} FP8 weights are dequantized to {dtype} "
            f"while loading ({because}), and {saved}. "
            "FP8Config(backend='weight_only') or 'scaled_mm' keeps Linears in FP8 all the same, which is slower here."
            + (f" {KEEP_EXPERTS}" if merged else "")
        )
    elif because is None and layout.reasons:
        saved = "saved dense" if config.backend == "int8" else "written back in FP8"
        hint = f" {KEEP_EXPERTS}" if any("experts='auto'" in reason for reason in layout.reasons.values()) else ""
        logger.warning(f"hf_fp8: parameters held in {dtype} and {saved}: {by_reason(layout.reasons)}.{hint}")
    if config.experts == "fp8" and not merged:
        logger.warning("hf_fp8: experts='fp8' has no effect: the checkpoint has no experts that the model holds merged.")
    if layout.scan.cache and because is None:
        logger.warning(
            "hf_fp8: the checkpoint's KV-cache scales are kept and written back, but not applied: the cache stays in the dtype "
            "of the model."
        )
    if layout.input_scales:
        said = list(layout.input_scales.values())
        lacking = [weight.name for plan in layout.experts.values() for stack in plan.stacks for weight in stack.weights]
        routed = quantizes_inputs and any(name in layout.input_scales for name in lacking)
        logger.warning(
            f"hf_fp8: {len(said)} static input scales are not valid ({'; '.join(said[:8])}{'; ...' if len(said) > 8 else ''}). "
            + ("Tokens that are routed to those experts give NaN" if routed else "Nothing that runs here uses them")
        )
    if layout.unplaced:
        keys = layout.unplaced.values()
        what = f"hf_fp8: the model has no place for {len(keys)} tensors of the files ({some(keys)})"
        if carried:
            logger.info(f"{what}: they are read again when it is saved, and written back unchanged")
        else:
            logger.warning(f"{what}: they are dropped, and will not be saved")
