"""`hf-fp8 verify`: every check of loading a checkpoint, without loading the model, and a check of its codes for NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..checkpoint.writer import nbytes
from ..errors import CheckpointError, MissingTensorError
from ..formats.code_types import E5M2, FP8
from ..formats.storage import WEIGHT
from ..quantization.files import read_quantized, total_bytes
from ..quantization.source import Source, type_of

# The bits that are all set in codes (8-bit values) that are not finite: E4M3 has one NaN, E5M2 several, and infinity.
_NOT_FINITE = {FP8: 0x7F, E5M2: 0x7C}


def verify_source(source: Source, tick: Callable[[int], Any] = lambda count: None) -> list[str]:
    """Run every check of loading (names, dtypes, shapes, scales, config, experts, coverage), and check codes for NaN.

    tick: called with the number of bytes that were checked. Returns a line for each check that passed; raises a
    CheckpointError for the first that fails.
    """
    reading = read_quantized(source)
    checkpoint, layout = reading.checkpoint, reading.layout
    weights = layout.scan.weights
    if layout.missing:
        raise MissingTensorError(
            f"the files have no tensor for {layout.missing[0]} ({len(layout.missing)} parameters of {type_of(source)} in "
            "all): they would be random"
        )
    unmatched = [weight.name for weight in [*weights, *layout.scan.host] if not weight.target]
    codes = {weight.keys[WEIGHT] for weight in weights if weight.scheme.weight.dtype in _NOT_FINITE}  # int8 has no NaN
    for key, info in checkpoint.tensors.items():
        if key in codes:
            refuse_not_finite(key, checkpoint.load(key))
        tick(nbytes(info))
    source.check_unchanged()
    checks = [
        f"{len(source.files)} file(s), {len(checkpoint.tensors):,} tensors, {total_bytes(checkpoint) / 1e9:.2f} GB",
        f"{len(reading.spec.groups)} config group(s), {len(weights):,} FP8 weights; scales have right shapes, dtypes, values",
        "no scale without its weight, no FP8 weight that no group matches, no dense weight that a group matches",
        f"every parameter of {type_of(source)} is filled",
        "no NaN among the codes",
    ]
    if layout.scan.host:
        checks.insert(2, f"{len(layout.scan.host):,} weights of other formats, for transformers to run")
    if unmatched:
        checks.append(f"{len(unmatched)} weights (for example {unmatched[0]}) that the model lacks: they are not loaded")
    return checks


def refuse_not_finite(key: str, codes: torch.Tensor) -> None:
    """Raise CheckpointError, naming the tensor, for E4M3 or E5M2 codes that are NaN or infinite."""
    bits = _NOT_FINITE[codes.dtype]
    if bool(((codes.view(torch.uint8) & bits) == bits).any()):
        raise CheckpointError(
            f"{key} has codes that are NaN or infinite: the weight was not finite when it was quantized, or is damaged"
        )
