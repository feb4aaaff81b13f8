"""Parts of quantized matrices: their scales give exactly the values of the whole."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from hf_fp8.errors import ConfigError
from hf_fp8.formats import numerics
from hf_fp8.formats.cuts import Cut, MatrixPart
from hf_fp8.formats.scheme import FP8_BLOCK, ROW, TENSOR, Granularity

pytestmark = pytest.mark.hostless

GRANULARITIES = (TENSOR, ROW, Granularity(1, 32), Granularity(32, 32), Granularity(128, 128), Granularity(24, 40))


def parts(n: int, k: int, index: int, of: int) -> list[MatrixPart]:
    found = [MatrixPart(Cut(n, index, of), Cut(k)), MatrixPart(Cut(n), Cut(k, index, of))]
    packed = [MatrixPart(Cut(n, index, of, pieces=2), Cut(k))] if n % 2 == 0 else []
    return [*found, *packed, *([MatrixPart(Cut(n), Cut(k, index, of, pieces=2))] if k % 2 == 0 else [])]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_values_of_a_part_are_those_of_the_whole(granularity: Granularity) -> None:
    for n, k, of in product((96, 130, 7, 256), (96, 100, 384), (1, 2, 3, 4, 8)):
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
        scale = numerics.compute_scale(weight, granularity)
        codes = numerics.quantize(weight, scale, granularity)
        values, seen = numerics.dequantize(codes, scale, granularity), torch.zeros(n, k)
        for kind in range(len(parts(n, k, 0, of))):
            for index in range(of):
                part = parts(n, k, index, of)[kind]
                rows, cols = ([i for one in cut.ranges for i in one] for cut in (part.rows, part.cols))
                own = codes[rows][:, cols].contiguous()
                seen[torch.tensor(rows, dtype=torch.int64).unsqueeze(1), torch.tensor(cols, dtype=torch.int64)] += 1
                assert own.shape == part.shape
                if own.numel():
                    found = numerics.dequantize(own, part.scale(scale, granularity), part.granularity(granularity))
                    assert torch.equal(found, values[rows][:, cols])
        assert bool((seen == len(parts(n, k, 0, of))).all())  # each value belongs to one process


def test_scales_are_cut_where_blocks_allow_it() -> None:
    assert Cut(256, 0, 2).fits(128) and not Cut(256, 0, 4).fits(128) and Cut(256, 0, 4).unit(128) == 64
    assert Cut(96, 0, 2).unit(128) == 16 and Cut(96, 0, 2).fits(1) and not Cut(96, 0, 2).fits(-1)
    assert Cut(192, 0, 2, pieces=2).unit(64) == 16 and not Cut(192, 0, 2, pieces=2).fits(64)
    scale = torch.arange(6.0).view(2, 3)
    part = MatrixPart(Cut(256), Cut(384, 1, 2))
    assert torch.equal(part.scale(scale, Granularity(128, 128)), torch.tensor([[1.0, 2, 2], [4, 5, 5]]))
    assert part.scheme(FP8_BLOCK).text == "128x64s|1x64d"
    with pytest.raises(ConfigError, match="not 128x1"):
        MatrixPart(Cut(256), Cut(381, 1, 3)).scheme(FP8_BLOCK)
