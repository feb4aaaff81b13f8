"""Stacks of experts in one tensor of the files: read and written back with every shape that their scales may have."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme

from hf_fp8.checkpoint.config_groups import Group
from hf_fp8.checkpoint.stored_weight import StoredWeight
from hf_fp8.formats.scheme import SCHEMES, Scheme
from hf_fp8.formats.storage import WEIGHT, WEIGHT_SCALE, accepted_of_stack, dequantize, format_of
from hf_fp8.loading.ops import codes_from, weight_from

EVERY = sorted({scheme for scheme in SCHEMES.values() if not scheme.weight.packed}, key=str)


@pytest.mark.parametrize("scheme", EVERY, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_in_files_are_dequantized_from_every_shape_of_their_scales(scheme: Scheme, transposed: bool) -> None:
    """And quantized back to the same codes."""
    stored, n, k = format_of(scheme.weight), 72, 150
    made = [stored.quantize(torch.randn(n, k), scheme.weight) for _ in range(3)]
    wanted = torch.stack([dequantize(each, scheme.weight, k, torch.float32) for each in made])
    codes = torch.stack([each[WEIGHT] for each in made])
    if transposed:
        wanted, codes = wanted.transpose(1, 2), codes.transpose(1, 2)
    for shape in accepted_of_stack(scheme.weight, WEIGHT_SCALE, tuple(codes.shape), transposed):
        scales = torch.stack([each[WEIGHT_SCALE] for each in made])
        shared = math.prod(shape) == 1
        scale = scales[:1].reshape(shape) if shared else (scales.transpose(1, 2) if transposed and scales.ndim == 3 else scales)
        tensors = {WEIGHT: codes.contiguous(), WEIGHT_SCALE: scale.reshape(shape)}
        weight = StoredWeight(
            "experts", dict.fromkeys(tensors, ""), {role: tuple(t.shape) for role, t in tensors.items()}, {},
            Group("group_0", (), scheme, QuantizationScheme(targets=["Linear"]), "float-quantized"), transposed=transposed,
        )  # fmt: skip
        found = weight_from(weight, tensors, torch.float32)
        for index in (0,) if shared else range(3):
            assert torch.equal(found[index], wanted[index]), shape
        assert torch.equal(codes_from(weight, found, tensors).float(), tensors[WEIGHT].float()), shape
