"""Weights of 4 bits in the library of CPU kernels: products and unpacking against float64, on each instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_fp8.errors import InputError
from hf_fp8.formats import native, native_library
from hf_fp8.formats.scheme import ROW, TENSOR, Granularity

pytestmark = [
    pytest.mark.hostless,
    pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not())),
]
GROUPS = [-1, 8, 16, 24, 32, 64, 128]
# No multiples of 8, 16 and 128 columns, or of 8 rows, among them; more columns than have their scales read at a time.
SIZES = [(64, 128), (37, 97), (5, 40), (1, 1), (3, 7), (41, 1000), (50, 513), (9, 2100)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 17, 40]
# To a float64 product, relative to the sum of magnitudes; then one rounding to the dtype of the output.
ERROR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def packed(nibbles: torch.Tensor) -> torch.Tensor:
    """(..., K) numbers from 0 to 15 -> (..., K / 8, rounded up) int32, the first in the lowest bits. Ones after the last."""
    count = nibbles.shape[-1]
    whole = (
        torch.cat([nibbles, nibbles.new_full((*nibbles.shape[:-1], -count % 8), 15)], -1)
        .view(*nibbles.shape[:-1], -1, 8)
        .long()
    )
    words = (whole << 4 * torch.arange(8)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


class Case:
    """A weight (N, K), or a stack of `count` with `parts` one above the other: as it is packed, and its numbers."""

    def __init__(
        self,
        n: int,
        k: int,
        group: int,
        *,
        has_zeros: bool,
        dtype: torch.dtype = torch.float32,
        count: int | None = None,
        parts: int = 1,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed + n + k)
        self.granularity = Granularity(1, group)
        blocks = self.granularity.grid(n, k)[1]
        stack = (1 if count is None else count) * parts
        nibbles = torch.randint(0, 16, (stack, n, k), generator=generator)
        zeros = torch.randint(0, 16, (stack, n, blocks), generator=generator)
        scale = ((torch.rand((stack, n, blocks), generator=generator) + 0.5) / 4).to(dtype)
        columns = torch.arange(k) // (k if group == -1 else group)
        less = zeros[..., columns] if has_zeros else torch.full_like(nibbles, 8)
        shape = (n,) if count is None else (count, parts * n)
        self.numbers = (nibbles - less).view(*shape, k)
        self.dense = self.numbers.double() * scale[..., columns].double().view(*shape, k)
        self.codes = packed(nibbles.view(*shape, k))
        self.scale = scale.view(*shape, blocks)
        words = packed(zeros.transpose(1, 2)).transpose(1, 2)
        self.zeros = words.reshape(*(() if count is None else (count,)), -1, blocks).contiguous() if has_zeros else None

    def multiply(self, x: torch.Tensor, **more: Any) -> torch.Tensor:
        return native.multiply(x, self.codes, self.scale, self.granularity, zero_points=self.zeros, **more)


def check(
    found: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None, error: float = 1e-6
) -> None:
    wanted, size = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
    if bias is not None:
        wanted, size = wanted + bias.double(), size + bias.double().abs()
    assert bool(((found.double() - wanted).abs() <= size * error).all())


@pytest.mark.parametrize("has_zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("group", GROUPS)
def test_products(group: int, has_zeros: bool, instructions: str) -> None:
    for n, k in SIZES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            case = Case(n, k, group, has_zeros=has_zeros, dtype=dtype)
            for m in ROWS if dtype == torch.float32 else (1, 5):
                x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
                found = case.multiply(x, bias=bias)
                assert found.dtype == dtype and found.shape == (m, n)
                check(found, x, case.dense, bias, ERROR[dtype])
                check(case.multiply(x, dtype=torch.float32), x, case.dense)


@pytest.mark.parametrize("has_zeros", [False, True], ids=["symmetric", "zero points"])
def test_unpacked(has_zeros: bool, instructions: str) -> None:
    for n, k in [*SIZES, (300, 700)]:
        for group in GROUPS:
            case = Case(n, k, group, has_zeros=has_zeros)
            found = native.unpack(case.codes, k, zero_points=case.zeros, granularity=case.granularity)
            assert found.dtype == torch.int8 and torch.equal(found, case.numbers.to(torch.int8)), (n, k, group)
    stack = Case(11, 90, 16, has_zeros=has_zeros, count=3, parts=2)
    found = native.unpack(stack.codes, 90, parts=2, zero_points=stack.zeros, granularity=stack.granularity)
    assert torch.equal(found, stack.numbers.to(torch.int8))
    strided = torch.stack([stack.codes, stack.codes], -1)[..., 0]
    assert torch.equal(native.unpack(strided, 90, parts=2, zero_points=stack.zeros, granularity=stack.granularity), found)


@pytest.mark.parametrize("has_zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("each", [1, 4, 40], ids="{} rows each".format)
def test_experts(each: int, share: int, has_zeros: bool, instructions: str) -> None:
    """Two parts with grids of their own, rows gathered and scattered, an expert without rows, outputs without an expert."""
    for group in (-1, 8, 24, 32):
        case = Case(12, 150, group, has_zeros=has_zeros, count=4, parts=2)
        counts = torch.tensor([each, 0, 2 * each, 1])
        ends, s = counts.cumsum(0).int(), int(counts.sum())
        total = s + 2  # the last two have no expert
        x = torch.randn(-(-total // share), 150)
        sources, targets = torch.randperm(total), torch.randperm(total)
        found = case.multiply(x, parts=2, rows=total, ends=ends, sources=sources, targets=targets, share=share)
        of = torch.repeat_interleave(torch.arange(4), counts)
        for i in range(s):
            check(found[targets[i]][None], x[sources[i] // share][None], case.dense[of[i]])
        assert not found[targets[s:]].any()


@pytest.mark.parametrize("magnitude", [1e-41, 1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_inputs_and_scales_of_any_size(magnitude: float, instructions: str) -> None:
    """What fits into the output does not overflow or vanish before; with subnormal numbers flushed by the caller, too."""
    for group in (-1, 8, 128):
        case = Case(24, 300, group, has_zeros=True)
        factor = 1e30 if magnitude < 1e-20 else 1e-30 if magnitude > 1e20 else 1.0
        case.scale, case.dense = case.scale * factor, case.dense * factor
        case.dense = case.numbers.double() * case.scale.double()[:, torch.arange(300) // (300 if group == -1 else group)]
        for m in (1, 3, 9):
            x = (torch.rand(m, 300) - 0.5) * magnitude
            check(case.multiply(x), x, case.dense)
            if magnitude > 1e-38:
                torch.set_flush_denormal(True)
                try:
                    found = case.multiply(x)
                finally:
                    torch.set_flush_denormal(False)
                check(found, x, case.dense)


def test_nan_and_infinity_stay_where_they_are(instructions: str) -> None:
    for group in (-1, 16, 128):
        for k in (256, 300):
            case = Case(33, k, group, has_zeros=False)
            for m in (1, 2, 5, 9):
                x = torch.randn(m, k)
                x[0, k // 2] = torch.inf
                found = case.multiply(x)
                column = case.numbers[:, k // 2].float()
                assert (
                    torch.equal(found[0].nan_to_num(7.0), (torch.inf * column).nan_to_num(7.0)) and found[1:].isfinite().all()
                )
                x[0, k // 3] = torch.nan
                found = case.multiply(x)
                assert found[0].isnan().all() and found[1:].isfinite().all()
                scale, case.scale = case.scale, case.scale.clone()
                case.scale[1, -1] = torch.nan
                assert case.multiply(torch.randn(m, k)).isnan().any(0).nonzero().flatten().tolist() == [1]
                case.scale = scale


def test_codes_that_are_their_zero_points_give_zeros(instructions: str) -> None:
    case = Case(20, 200, 32, has_zeros=True)
    nibbles = torch.full((20, 200), 5)
    case.codes, case.zeros = packed(nibbles), packed(torch.full((7, 20), 5)).t().contiguous()
    assert not case.multiply(torch.randn(3, 200)).any()


def test_no_rows_and_no_columns(instructions: str) -> None:
    for m, n, k in ((0, 20, 64), (2, 0, 64), (2, 20, 0)):
        codes, scale = torch.zeros((n, -(-k // 8)), dtype=torch.int32), torch.ones(n, 1)
        found = native.multiply(torch.ones(m, k), codes, scale, ROW, bias=torch.ones(n))
        assert found.shape == (m, n) and (k > 0 or bool((found == 1).all()))
        assert native.unpack(codes, k).shape == (n, k)


def test_strided_operands(instructions: str) -> None:
    case = Case(24, 128, 32, has_zeros=True)
    x = torch.randn(128, 9).t()
    wanted = case.multiply(x.contiguous())
    check(wanted, x, case.dense)
    codes, zeros = case.codes, case.zeros
    assert zeros is not None
    assert torch.equal(case.multiply(x), wanted)
    assert torch.equal(case.multiply(torch.randn(9, 300)[:, 7:135].copy_(x)), wanted)
    case.codes = torch.cat([codes, codes], 1)[:, :16]  # rows apart
    assert torch.equal(case.multiply(x), wanted)
    case.codes, case.zeros = codes.t().contiguous().t(), zeros.t().contiguous().t()
    assert torch.equal(case.multiply(x), wanted)
    case.scale = case.scale.double()  # a dtype that the library does not read
    assert torch.equal(case.multiply(x), wanted)


def test_one_scale_for_all_rows(instructions: str) -> None:
    case = Case(24, 100, -1, has_zeros=False)
    x = torch.randn(3, 100)
    for granularity, rows in ((TENSOR, 24), (Granularity(5, -1), 5)):
        scale = torch.rand(granularity.grid(24, 100))
        found = native.multiply(x, case.codes, scale, granularity)
        check(found, x, case.numbers.double() * scale.double().repeat_interleave(rows, 0)[:24])


def test_prepared(instructions: str) -> None:
    for has_zeros in (False, True):
        case = Case(40, 100, 32, has_zeros=has_zeros)
        bias = torch.randn(40)
        call = native.Prepared(case.codes, case.scale, case.granularity, bias, torch.float32, k=100, zero_points=case.zeros)
        x = torch.randn(2, 3, 100)
        assert torch.equal(call(x), case.multiply(x.flatten(0, 1), bias=bias).view(2, 3, 40))
        assert call.reads(case.codes, case.scale, bias, case.zeros)
        assert not call.reads(case.codes, case.scale, bias, torch.ones(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="not as the library reads it"):
        native.Prepared(
            case.codes.t().contiguous().t(), case.scale, case.granularity, bias, torch.float32, k=100, zero_points=case.zeros
        )


def test_the_same_bits_whatever_the_threads() -> None:
    before = torch.get_num_threads()
    for has_zeros in (False, True):
        case = Case(1000, 700, 32, has_zeros=has_zeros)
        for m in (1, 5, 30):
            x, found = torch.randn(m, 700), []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(case.multiply(x))
                assert torch.equal(
                    native.unpack(case.codes, 700, zero_points=case.zeros, granularity=case.granularity),
                    case.numbers.to(torch.int8),
                )
            torch.set_num_threads(before)
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_operands_that_do_not_fit_are_refused() -> None:
    """Rather than memory read that is not theirs."""
    case = Case(20, 100, 32, has_zeros=True)
    given: dict[str, Any] = {
        "x": torch.ones(3, 100), "codes": case.codes, "scale": case.scale, "granularity": case.granularity,
        "zero_points": case.zeros,
    }  # fmt: skip
    zeros = case.zeros
    assert zeros is not None
    native.multiply(**given)
    for bad in (
        {"x": torch.ones(3, 96)}, {"x": torch.ones(3, 105)}, {"x": torch.ones(3, 0)}, {"scale": case.scale[:19]},
        {"scale": None}, {"scale": case.scale[:, :3]},
        {"zero_points": zeros[:2]}, {"zero_points": zeros[:, :3]}, {"zero_points": zeros.long()},
        {"granularity": Granularity(1, 12)}, {"granularity": Granularity(2, 32)}, {"granularity": TENSOR}, {"transposed": True},
        {"parts": 3}, {"parts": 2}, {"bias": torch.ones(19)}, {"codes": case.codes.view(torch.int8)},
        {"zero_points": zeros.to("meta")}, {"codes": case.codes.to("meta")},
    ):  # fmt: skip
        with pytest.raises(InputError):
            native.multiply(**given | bad)
    for k in (96, 105, 0, -1):
        with pytest.raises(InputError):
            native.unpack(case.codes, k)
    with pytest.raises(InputError):
        native.unpack(case.codes, 100, zero_points=zeros[:2], granularity=case.granularity)
    with pytest.raises(InputError):
        native.unpack(torch.zeros((20, 13), dtype=torch.int8), 100)
    with pytest.raises(InputError):
        native.dequantize(case.codes, case.scale, case.granularity, torch.empty(20, 100))
    with pytest.raises(InputError):
        native.Prepared(case.codes, case.scale, case.granularity, None, torch.float32)
    with pytest.raises(InputError):
        native.Prepared(torch.zeros((20, 100), dtype=torch.int8), case.scale, case.granularity, None, torch.float32, k=100)


def test_instructions_that_compute_wrongly_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native_library.library()
    assert native_library._is_right_packed(library)
    for name in ("hf_fp8_multiply", "hf_fp8_unpack"):
        with monkeypatch.context() as patch:
            patch.setattr(library, name, lambda *_: 0)  # computes nothing
            assert not native_library._is_right_packed(library)
