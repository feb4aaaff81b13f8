"""Packed integers, held against compressed-tensors' packer, its scales and its zero points, byte for byte."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from support.integers import KINDS, stored

from hf_fp8.errors import ConfigError, ScaleError
from hf_fp8.formats import packing
from hf_fp8.formats.code_types import INT4, INT8
from hf_fp8.formats.scheme import ROW, SCHEMES, TENSOR, Granularity, Scheme, TensorScheme
from hf_fp8.formats.storage import COLUMN_GROUPS, PACKED, WEIGHT_SCALE, dequantize, format_of

pytestmark = pytest.mark.hostless
_GRANULARITIES = {"channel": ROW, "tensor": TENSOR}


def scheme_of(kind: str) -> TensorScheme:
    form, weights, _ = KINDS[kind]
    granularity = _GRANULARITIES.get(weights["strategy"]) or Granularity(1, weights["group_size"])
    return TensorScheme(
        granularity, dtype=INT4 if weights["num_bits"] == 4 else INT8, packed=form == "pack-quantized",
        has_zero_points=not weights.get("symmetric", True), is_ordered="actorder" in weights,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 8), (1, 1), (5, 7), (8, 64), (13, 129), (3, 1)])
def test_words(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed, rows = packing.pack(codes, bits), packing.pack_rows(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(rows, pack_to_int32(codes, bits, packed_dim=0))
    assert packed.shape[1] == packing.words(shape[1], bits)
    assert torch.equal(packing.unpack(packed, bits, shape[1]), codes)
    assert torch.equal(packing.unpack(packed.t().contiguous().t(), bits, shape[1]), codes)
    assert torch.equal(packing.unpack_rows(rows, bits, shape[0]), codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_are_those_of_compressed_tensors(kind: str, dtype: torch.dtype) -> None:
    """Also of a row of zeros, of a positive group, and of values whose quotient lies between two codes."""
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[3], weight[5, :32] = 0, weight[5, :32].abs()
    weight[7, :16] = torch.arange(16) - 7.5
    scheme = scheme_of(kind)
    wanted, dense = stored(kind, weight)
    held = None
    if scheme.is_ordered:  # its order comes from a checkpoint; the scale in it fits nothing
        held = {COLUMN_GROUPS: wanted[COLUMN_GROUPS], WEIGHT_SCALE: torch.full_like(wanted[WEIGHT_SCALE], torch.inf)}
    made = format_of(scheme).quantize(weight, scheme, held)
    assert made.keys() == wanted.keys()
    for role, tensor in wanted.items():
        assert made[role].dtype == tensor.dtype, role
        assert torch.equal(made[role], tensor), role
    assert torch.equal(dequantize(wanted, scheme, 96, torch.float32), dense)
    assert torch.equal(dequantize(wanted, scheme, 96, dtype), dense.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_come_back(kind: str) -> None:
    """From the dequantized weight, with its scales; and quantizing it again as a small change keeps all tensors."""
    scheme, weight = scheme_of(kind), torch.randn(20, 96, generator=torch.Generator().manual_seed(2))
    wanted, dense = stored(kind, weight)
    form = format_of(scheme)
    assert torch.equal(form.encode(dense, scheme, wanted), wanted[form.codes])
    again = form.quantize(dense, scheme, wanted)
    assert all(torch.equal(again[role], tensor) for role, tensor in wanted.items())
    pieces = [piece for piece, _ in form.pieces(wanted, scheme, 96, torch.float32, 96 * 9)]
    assert len(pieces) in (1, 3)  # scales per tensor have no smaller blocks
    assert torch.equal(torch.cat(pieces), dense)


def test_a_changed_weight_gets_new_scales_where_it_must() -> None:
    scheme, weight = scheme_of("W4A16 asymmetric"), torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    wanted, dense = stored("W4A16 asymmetric", weight)
    dense[2, :32] *= 3
    form = format_of(scheme)
    again = form.quantize(dense, scheme, wanted)
    changed = again[WEIGHT_SCALE] != wanted[WEIGHT_SCALE]
    assert changed[2, 0]
    assert int(changed.sum()) == 1
    rounded = dequantize(again, scheme, 64, torch.float32)
    assert (rounded - dense).abs().max() <= 0.51 * again[WEIGHT_SCALE].max()
    assert torch.equal(again[PACKED][3:], wanted[PACKED][3:])


@pytest.mark.parametrize("kind", ["W4A16", "W4A16 asymmetric", "W8A8"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_no_number_no_weight(kind: str, wrong: float) -> None:
    weight = torch.ones(4, 32)
    weight[2, 3] = wrong
    with pytest.raises(ScaleError, match="NaN or infinite"):
        format_of(scheme_of(kind)).quantize(weight, scheme_of(kind))


def test_a_range_that_overflows_is_not_called_nan() -> None:
    weight = torch.ones(4, 32, dtype=torch.float16)
    weight[2, 3:5] = torch.tensor([60000.0, -60000.0])
    scheme = scheme_of("W4A16 asymmetric")
    with pytest.raises(ScaleError, match=r"more than torch\.float16 can hold: use symmetric"):
        format_of(scheme).quantize(weight, scheme)
    assert format_of(scheme).quantize(weight.float(), scheme)[WEIGHT_SCALE].isfinite().all()


def test_schemes_that_there_are_not() -> None:
    for arguments in ("W4A16",), (None,), (SCHEMES["W4A16"].weight, "FP8"):
        with pytest.raises(ConfigError, match=r"hf_fp8\.SCHEMES has the Scheme of each name"):
            Scheme(*arguments)  # type: ignore[arg-type]
    for arguments in (
        {"granularity": TENSOR, "dtype": INT4}, {"granularity": Granularity(8, 8), "dtype": INT4},
        {"granularity": ROW, "packed": True}, {"granularity": ROW, "dtype": INT8, "has_zero_points": True},
        {"granularity": ROW, "dtype": INT4, "is_ordered": True},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            TensorScheme(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1x-1w"):
        TensorScheme.parse("1x-1w")
