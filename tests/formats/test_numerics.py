from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from support.build import weights_json
from support.kernels import fake_quantize

from hf_fp8.formats import numerics
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.scheme import CODE_MAX, ROW, TENSOR, Granularity

pytestmark = pytest.mark.hostless

GRANULARITIES = [TENSOR, ROW, Granularity(1, 16), Granularity(1, 100), Granularity(32, 48), Granularity(128, 128)]


def by_hand(x: torch.Tensor, granularity: Granularity) -> tuple[torch.Tensor, torch.Tensor]:
    """amax and expanded scale, block by block in Python."""
    rows, cols = x.shape
    step_rows = rows if granularity.rows == -1 else granularity.rows
    step_cols = cols if granularity.cols == -1 else granularity.cols
    grid = torch.zeros(granularity.grid(rows, cols))
    wide = torch.zeros(rows, cols)
    for i, r in enumerate(range(0, rows, step_rows)):
        for j, c in enumerate(range(0, cols, step_cols)):
            block = x[r : r + step_rows, c : c + step_cols].float()
            grid[i, j] = max(block.abs().max().item() / CODE_MAX[FP8], numerics.MIN_SCALE)
            wide[r : r + step_rows, c : c + step_cols] = grid[i, j]
    return grid, wide


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (17, 96), (70, 200)])
def test_scales_cover_their_blocks(granularity: Granularity, shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    grid, wide = by_hand(x, granularity)
    assert torch.equal(numerics.compute_scale(x, granularity), grid)
    assert torch.equal(numerics.expand_scale(grid, granularity, *shape).expand(shape), wide)


@pytest.mark.parametrize("granularity", [TENSOR, ROW, Granularity(1, 16), Granularity(16, 32)], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_equal_to_compressed_tensors(granularity: Granularity, scale_dtype: torch.dtype) -> None:
    x = torch.randn(64, 96)
    args = QuantizationArgs(**weights_json(granularity))
    scale = numerics.compute_scale(x, granularity).to(scale_dtype)
    theirs = scale.reshape(1) if granularity == TENSOR else scale
    q = numerics.quantize(x, scale, granularity)
    zero = torch.zeros_like(theirs)
    assert torch.equal(q, ct_quantize(x, theirs.float(), zero, args, dtype=FP8))
    assert torch.equal(numerics.dequantize(q, scale, granularity), ct_dequantize(q, theirs.float(), zero, args))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_codes_survive_a_round_trip_through_bf16(granularity: Granularity) -> None:
    q = numerics.quantize(torch.randn(70, 200), scale := numerics.compute_scale(torch.randn(70, 200), granularity), granularity)
    dense = numerics.dequantize(q, scale, granularity, torch.bfloat16)
    assert torch.equal(numerics.quantize(dense, scale, granularity).view(torch.uint8), q.view(torch.uint8))


def test_every_code_dequantizes_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).reshape(16, 16)
    scale = torch.full((16, 1), 2.0**-7)
    expected = codes.double() * 2.0**-7
    assert torch.equal(numerics.dequantize(codes, scale, ROW).double().nan_to_num(), expected.nan_to_num())


def test_zero_rows_give_zeros() -> None:
    x = torch.randn(4, 32)
    x[1] = 0
    scale = numerics.compute_scale(x, ROW)
    back = fake_quantize(x, scale, ROW)
    assert back.isfinite().all()
    assert torch.equal(back[1], torch.zeros(32))


def test_tiny_rows_stay_finite() -> None:
    x = torch.full((1, 8), 1e-44)
    assert fake_quantize(x, numerics.compute_scale(x, ROW), ROW).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("static", [False, True])
def test_what_is_not_finite_stays_visible(bad: float, static: bool) -> None:
    x = torch.randn(3, 8)
    x[1, 2] = bad
    scale = torch.full((3, 1), 0.01) if static else numerics.compute_scale(x, ROW)
    back = fake_quantize(x, scale, ROW)
    assert not back[1].isfinite().all()
    assert back[0].isfinite().all() and back[2].isfinite().all()


def test_values_saturate() -> None:
    q = numerics.quantize(torch.tensor([[1e6, -1e6, 460.0, 470.0]]), torch.ones(1, 1), ROW)
    assert q.float().tolist() == [[448.0, -448.0, 448.0, 448.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_empty(dtype: torch.dtype) -> None:
    x = torch.zeros(0, 16, dtype=dtype)
    scale = numerics.compute_scale(x, ROW)
    assert scale.shape == (0, 1)
    assert numerics.quantize(x, scale, ROW).shape == (0, 16)
