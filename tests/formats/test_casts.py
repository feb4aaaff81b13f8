from __future__ import annotations

import pytest
import torch

from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.cpu import multiply_out

pytestmark = pytest.mark.hostless

ALL = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8).reshape(16, 16)
FINITE = torch.where(ALL.float().isnan(), torch.zeros(()), ALL.float()).to(FP8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codes", [ALL, FINITE], ids=["with NaN", "finite"])
@pytest.mark.parametrize("scale", [1.0, 0.0123, 1e-38, 1e-45, 3e38, float("nan"), float("inf"), 0.0, -2.0])
def test_every_code_times_any_scale(dtype: torch.dtype, codes: torch.Tensor, scale: float) -> None:
    for wide in (torch.full((1, 1), scale), torch.full((16, 1), scale), torch.rand(16, 16) * scale):
        found = multiply_out(codes, wide, torch.empty(16, 16, dtype=dtype))
        torch.testing.assert_close(found, (codes.float() * wide).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_of_nothing_and_of_a_view() -> None:
    assert multiply_out(ALL[:0], torch.ones(1, 1), torch.empty(0, 16)).shape == (0, 16)
    wide = FINITE.repeat(3, 3)
    assert torch.equal(multiply_out(wide[1:9, 3:20], torch.ones(1, 1), torch.empty(8, 17)), wide[1:9, 3:20].float())
