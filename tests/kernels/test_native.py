"""The library of CPU kernels by itself: what the tests of all kernels (test_kernels, test_extremes, ...) do not cover."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.fresh import run_fresh
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_fp8.errors import InputError, KernelError
from hf_fp8.formats import native, native_library, numerics
from hf_fp8.formats.code_types import FP8, INT8
from hf_fp8.formats.scheme import INT8_DYNAMIC, ROW, Granularity
from hf_fp8.kernels import Weight, why_not_kept, why_not_kept_experts
from hf_fp8.kernels import native as kernels

pytestmark = [
    pytest.mark.hostless,
    pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not())),
]
GRANULARITIES = {
    "channel": Granularity(1, -1),
    "tensor": Granularity(-1, -1),
    "group 32": Granularity(1, 32),
    "group 128": Granularity(1, 128),
    "group 5": Granularity(1, 5),
    "block 128": Granularity(128, 128),
    "block 48x20": Granularity(48, 20),
    "rows of 3": Granularity(3, -1),
}
SIZES = [(64, 64), (37, 97), (5, 40), (100, 1000), (300, 513), (96, 1030)]
# ‖a−b‖/‖b‖ to a float64 product: float32 sums, then one rounding to the dtype of the output.
ERROR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8 + 1e-6, torch.float16: 2.0**-11 + 1e-6}


def codes(n: int, k: int, dtype: torch.dtype = FP8, seed: int = 0) -> torch.Tensor:
    """Every code but NaN, subnormal ones too."""
    found = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed + n + k))
    if dtype == INT8:
        return found.view(INT8)
    return torch.where(found & 0x7F == 0x7F, found - 1, found).view(FP8)


def scales(granularity: Granularity, n: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n * k)
    return ((torch.rand(granularity.grid(n, k), generator=generator) + 0.5) / 130).to(dtype)


def exact(weight: torch.Tensor, scale: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    return weight.double() * numerics.expand_scale(scale, granularity, *weight.shape).double()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", GRANULARITIES)
def test_products_and_gradients(name: str, instructions: str) -> None:
    granularity = GRANULARITIES[name]
    for n, k in SIZES:
        for code in (FP8, INT8):
            weight, scale = codes(n, k, code), scales(granularity, n, k)
            dense = exact(weight, scale, granularity)
            for m in (1, 2, 3, 4, 5, 6, 7, 17, 21, 70):
                for dtype in ERROR if code == FP8 else (torch.float32,):
                    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
                    found = native.multiply(x, weight, scale, granularity, bias=bias)
                    assert found.dtype == dtype and error(found, x.double() @ dense.t() + bias.double()) < ERROR[dtype], (
                        n,
                        k,
                        m,
                    )
                    grad = torch.randn(m, n).to(dtype)
                    back = native.multiply(grad, weight, scale, granularity, transposed=True)
                    assert back.dtype == dtype and error(back, grad.double() @ dense) < ERROR[dtype], (n, k, m)


@pytest.mark.parametrize("name", GRANULARITIES)
def test_dequantized_weights_are_those_of_torch_bit_for_bit(name: str, instructions: str) -> None:
    granularity = GRANULARITIES[name]
    for n, k in [*SIZES, (700, 300)]:
        for code in (FP8, INT8):
            for of_scale in (torch.float32, torch.bfloat16, torch.float16):
                weight, scale = codes(n, k, code), scales(granularity, n, k, of_scale)
                weight.view(torch.uint8).view(-1)[k // 2] = 0x7F  # NaN
                for dtype in ERROR:
                    found = native.dequantize(weight, scale, granularity, torch.empty((n, k), dtype=dtype))
                    wanted = (weight.float() * numerics.expand_scale(scale, granularity, n, k).float()).to(dtype)
                    assert torch.equal(found.nan_to_num(nan=7e4), wanted.nan_to_num(nan=7e4)), (n, k, code, dtype)


@pytest.mark.parametrize("magnitude", [1e-41, 1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_inputs_and_scales_of_any_size(magnitude: float, instructions: str) -> None:
    """What fits into the output does not overflow or vanish before; with subnormal numbers flushed by the caller, too."""
    for granularity in (Granularity(1, -1), Granularity(1, 32), Granularity(1, 5)):
        for m in (1, 3, 16, 40):
            weight, factor = codes(24, 160), 1e30 if magnitude < 1e-20 else 1e-30 if magnitude > 1e20 else 1.0
            scale, x = scales(granularity, 24, 160) * factor, (torch.rand(m, 160) - 0.5) * magnitude
            wanted = x.double() @ exact(weight, scale, granularity).t()
            assert error(native.multiply(x, weight, scale, granularity), wanted) < 1e-6
            if magnitude > 1e-38:
                flushes = torch.set_flush_denormal(True)
                try:
                    assert error(native.multiply(x, weight, scale, granularity), wanted) < 1e-6, flushes
                finally:
                    torch.set_flush_denormal(False)


def test_subnormal_codes_only(instructions: str) -> None:
    weight = torch.randint(1, 8, (40, 200), dtype=torch.uint8).view(FP8)
    granularity = Granularity(1, -1)
    scale = scales(granularity, 40, 200)
    for m in (1, 6, 30):
        x = torch.randn(m, 200)
        assert error(native.multiply(x, weight, scale, granularity), x.double() @ exact(weight, scale, granularity).t()) < 1e-6


@pytest.mark.parametrize("name", ["channel", "group 32", "group 5"])
def test_nan_and_infinity_stay_where_they_are(name: str, instructions: str) -> None:
    granularity = GRANULARITIES[name]
    for n, k in ((40, 100), (64, 64), (33, 70)):
        weight, scale = codes(n, k), scales(granularity, n, k)
        weight = torch.where(weight.float() == 0, 1.0, weight.float()).to(FP8)  # zero times infinity is NaN
        broken = weight.clone()
        broken.view(torch.uint8)[3, k - 1], broken.view(torch.uint8)[n - 1, 0] = 0x7F, 0xFF
        for m in (1, 2, 5, 16, 40):
            x, grad = torch.randn(m, k), torch.randn(m, n)
            found = native.multiply(x, broken, scale, granularity)
            assert found.isnan().any(0).nonzero().flatten().tolist() == [3, n - 1] and found[:, 3].isnan().all()
            back = native.multiply(grad, broken, scale, granularity, transposed=True)
            assert back.isnan().any(0).nonzero().flatten().tolist() == [0, k - 1]
            x[0, k // 2] = torch.inf
            found = native.multiply(x, weight, scale, granularity)
            assert torch.equal(found[0], torch.inf * weight.float()[:, k // 2].sign()) and found[1:].isfinite().all()
            x[0, k // 3] = torch.nan
            assert native.multiply(x, weight, scale, granularity)[0].isnan().all()
            scale_of = scale.clone()
            scale_of[1] = torch.nan
            x = torch.randn(m, k)
            assert native.multiply(x, weight, scale_of, granularity).isnan().any(0).nonzero().flatten().tolist() == [1]


def test_one_number(instructions: str) -> None:
    weight, granularity = codes(1, 1), Granularity(-1, -1)
    for m in (1, 30):
        x = torch.randn(m, 1)
        wanted = x.double() * weight.double() * 0.25
        assert error(native.multiply(x, weight, torch.tensor(0.25), granularity), wanted) < 1e-6
        assert error(native.multiply(x, weight, torch.tensor(0.25), granularity, transposed=True), wanted) < 1e-6


def test_zero_rows_and_no_rows(instructions: str) -> None:
    weight, granularity = codes(20, 64), Granularity(1, -1)
    scale = scales(granularity, 20, 64)
    x = torch.zeros(3, 64)
    x[1] = 1.0
    found = native.multiply(x, weight, scale, granularity)
    assert not found[0].any() and not found[2].any() and found[1].any()
    for m, n, k in ((0, 20, 64), (2, 0, 64), (2, 20, 0)):
        found = native.multiply(
            torch.ones(m, k), codes(n, k), scales(granularity, n, max(k, 1)), granularity, bias=torch.ones(n)
        )
        assert found.shape == (m, n) and (k > 0 or bool((found == 1).all()))


def test_strided_operands(instructions: str) -> None:
    granularity = Granularity(1, -1)
    wide, scale = codes(48, 200), scales(granularity, 24, 100)
    weight = wide[::2, 50:150]  # rows apart, not aligned
    x = torch.randn(100, 9).t()
    wanted = x.double() @ exact(weight, scale, granularity).t()
    assert error(native.multiply(x, weight, scale, granularity), wanted) < 1e-6
    assert error(native.multiply(torch.randn(9, 300)[:, 7:107].copy_(x), weight, scale, granularity), wanted) < 1e-6
    assert error(native.multiply(x, weight.t().contiguous().t(), scale, granularity), wanted) < 1e-6
    assert torch.equal(
        native.multiply(x.half(), weight, scale, granularity), native.multiply(x.half().clone(), weight, scale, granularity)
    )


def test_int8_products_are_exact(instructions: str) -> None:
    for m, n, k in ((1, 1, 1), (3, 37, 97), (7, 64, 64), (33, 100, 1000), (500, 50, 2050), (6, 16, 2)):
        weight, x = codes(n, k, INT8), codes(m, k, INT8, seed=1)
        x_scale, scale = torch.rand(m, 1), torch.rand(n, 1)
        sums = (x.double() @ weight.double().t()).float()
        wanted = sums * scale.t() * x_scale
        assert torch.equal(native.multiply_int8(x, x_scale, weight, scale, torch.float32), wanted)
        added, bias = torch.randn(m, n), torch.randn(n).bfloat16()
        found = native.multiply_int8(x, x_scale, weight, scale.bfloat16(), torch.bfloat16, bias=bias, added=added)
        wanted = (sums * scale.bfloat16().float().t() * x_scale + added + bias.float()).bfloat16()
        assert torch.equal(found, wanted)
    large = native.multiply_int8(x, torch.full((6, 1), 1e-20), weight, torch.full((16, 1), 1e38), torch.float32)
    assert torch.equal(large, sums * 1e-20 * 1e38)
    # The largest sums that int32 holds, also of -128, which is a code although quantizing does not make it.
    x, weight = torch.full((2, 100_000), -128, dtype=INT8), torch.full((3, 100_000), 127, dtype=INT8)
    found = native.multiply_int8(x, torch.ones(2, 1), weight, torch.ones(3, 1), torch.float32)
    assert bool((found == -128 * 127 * 100_000).all())


ALL_BITS = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(256, 256)
VALUES = {
    "every bfloat16": ALL_BITS.view(torch.bfloat16),
    "every float16": ALL_BITS.view(torch.float16),
    "many sizes": torch.randn(300, 511) * torch.exp2(torch.arange(511) % 40 - 20.0),
    "ties": (torch.arange(-4000, 4000) / 1024).view(80, 100),
    "ends": torch.tensor([[torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, 447.9, 464.0, 464.1, 3e38]]),
}


@pytest.mark.parametrize("values", VALUES)
def test_rounding_is_that_of_torch_bit_for_bit(values: str, instructions: str) -> None:
    x = VALUES[values]
    for granularity in (Granularity(1, -1), Granularity(-1, -1), Granularity(1, 32), Granularity(128, 128), Granularity(3, 7)):
        with native.use(None):
            scale = numerics.compute_scale(x, granularity)
        if granularity.rows != -1:
            assert torch.equal(numerics.compute_scale(x, granularity).nan_to_num(nan=-1.0), scale.nan_to_num(nan=-1.0))
        given = [scale, scale.bfloat16(), *(torch.full_like(scale, v) for v in (1.0, 0.0, torch.nan, -0.01, 3e38))]
        for dtype in (FP8, INT8):
            for each in given:
                found = numerics.quantize(x, each, granularity, dtype)
                with native.use(None):
                    wanted = numerics.quantize(x, each, granularity, dtype)
                assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), (granularity, dtype)
    assert torch.equal(native.quantize(x.t(), torch.ones(1), Granularity(-1, -1), FP8).view(torch.uint8),
                       native.quantize(x, torch.ones(1), Granularity(-1, -1), FP8).view(torch.uint8).t())  # fmt: skip


def test_autocast_does_not_round_the_products() -> None:
    """Columns that are split off are multiplied by torch, which autocast would have in 16 bits."""
    x = torch.randn(20, 64)
    x[:, 5] = 100.0
    weight = Weight(codes(48, 64, INT8), torch.rand(48, 1) / 100, None, INT8_DYNAMIC)
    given = kernels.INT8_OUTLIERS.quantize(x, None, INT8_DYNAMIC)
    assert given.columns is not None and len(given.columns)
    wanted = kernels.multiply_int8(given, weight, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.multiply_int8(given, weight, torch.float32), wanted)


@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("each", [1, 4, 40], ids="{} rows each".format)
def test_experts(share: int, each: int, instructions: str) -> None:
    """Two parts with grids of their own, rows gathered and scattered, an expert without rows, outputs without an expert."""
    for granularity in (Granularity(1, -1), Granularity(-1, -1), Granularity(16, 32), Granularity(5, 7)):
        n, k, experts = 24, 70, 4
        weight = torch.stack([codes(2 * n, k, seed=e) for e in range(experts)])
        parts = [torch.stack([scales(granularity, n, k) * (1 + e + 7 * part) for e in range(experts)]) for part in range(2)]
        scale = torch.cat(parts, 1)
        dense = [
            torch.cat([exact(weight[e, p * n : (p + 1) * n], parts[p][e], granularity) for p in range(2)])
            for e in range(experts)
        ]
        counts = torch.tensor([each, 0, 2 * each, 1])
        ends, s = counts.cumsum(0).int(), int(counts.sum())
        total = s + 2  # the last two have no expert
        x = torch.randn(-(-total // share), k)
        sources, targets = torch.randperm(total), torch.randperm(total)
        found = native.multiply(
            x, weight, scale, granularity, parts=2, rows=total, ends=ends, sources=sources, targets=targets, share=share
        )
        of = torch.repeat_interleave(torch.arange(experts), counts)
        wanted = torch.zeros(total, 2 * n, dtype=torch.float64)
        for i in range(s):
            wanted[targets[i]] = dense[of[i]] @ x[sources[i] // share].double()
        assert error(found, wanted) < 1e-6
        assert not found[targets[s:]].any()
        grad = torch.randn(total, 2 * n)
        back = native.multiply(grad, weight, scale, granularity, parts=2, transposed=True, rows=total, ends=ends)
        wanted = torch.stack([grad[i].double() @ dense[of[i]] if i < s else torch.zeros(k) for i in range(total)])
        assert error(back, wanted) < 1e-6 and not back[s:].any()


def test_operands_that_do_not_fit_are_refused() -> None:
    """Rather than memory read that is not theirs."""
    weight, scale, x, granularity = codes(20, 64), torch.ones(20, 1), torch.ones(3, 64), Granularity(1, -1)
    for bad in (
        {"scale": torch.ones(19, 1)}, {"x": torch.ones(3, 63)}, {"bias": torch.ones(19)}, {"granularity": Granularity(1, 32)},
        {"transposed": True}, {"parts": 2, "granularity": Granularity(-1, -1)},
    ):  # fmt: skip
        given: dict[str, Any] = {"x": x, "codes": weight, "scale": scale, "granularity": granularity} | bad
        with pytest.raises(InputError, match=r"needed|does not fit"):
            native.multiply(**given)
    for other in (
        {"x": x.to("meta")},
        {"codes": weight.to("meta")},
        {"scale": scale.to("meta")},
        {"bias": torch.ones(20).to("meta")},
    ):
        with pytest.raises(InputError, match="on the CPU"):
            native.multiply(**{"x": x, "codes": weight, "scale": scale, "granularity": granularity} | other)
    ends = torch.tensor([3], dtype=torch.int32)
    for wrong in (
        {"ends": torch.tensor([1, 3], dtype=torch.int32)}, {"ends": ends.long()}, {"ends": ends + 1},
        {"sources": torch.tensor([0, 1, 3])}, {"sources": torch.tensor([0, -1, 2])}, {"targets": torch.tensor([0, 1, 3])},
        {"targets": torch.tensor([0, 1])}, {"sources": torch.tensor([0, 1, 2], dtype=torch.int32)}, {"rows": 4},
    ):  # fmt: skip
        routing: dict[str, Any] = {"ends": ends, "rows": 3} | wrong
        with pytest.raises(InputError, match=r"is needed|outside of|do not fit"):
            native.multiply(x, weight.unsqueeze(0), scale.unsqueeze(0), granularity, **routing)
    with pytest.raises(InputError, match="there are 2 scales of the input, where 3 are needed"):
        native.multiply_int8(codes(3, 64, INT8), torch.ones(2, 1), codes(20, 64, INT8), scale, torch.float32)
    with pytest.raises(InputError, match="scales"):
        native.dequantize(weight, torch.ones(3), granularity, torch.empty(20, 64))
    with pytest.raises(InputError, match="scales"):
        native.quantize(x, torch.ones(2), granularity, FP8)


def test_between_products_of_torch(instructions: str) -> None:
    """Tiles (AMX) are state of the processor that torch's own products in bfloat16 configure, too."""
    torch.manual_seed(0)
    x, other = torch.randn(100, 96).bfloat16(), torch.randn(96, 80).bfloat16()
    codes, scale = torch.randn(80, 96).to(FP8), torch.rand(80, 1)
    wanted, torchs = native.multiply(x, codes, scale, ROW), x @ other
    for _ in range(3):
        assert torch.equal(x @ other, torchs)
        assert torch.equal(native.multiply(x, codes, scale, ROW), wanted)


def test_the_same_bits_whatever_the_threads() -> None:
    """Sums do not depend on how work is divided; several threads may call at once."""
    granularity, before = Granularity(1, -1), torch.get_num_threads()
    weight, scale = codes(1000, 700), scales(Granularity(1, -1), 1000, 700)
    for blocks in (Granularity(96, 96), Granularity(100, 70), Granularity(-1, -1)):  # pieces may end within a block
        for m, transposed in ((260, False), (300, True), (600, False), (600, True)):
            x, found = torch.randn(m, 1000 if transposed else 700), []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(native.multiply(x, weight, scales(blocks, 1000, 700), blocks, transposed=transposed))
            torch.set_num_threads(before)
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for m in (1, 5, 30, 600):
        x = torch.randn(m, 700)
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(native.multiply(x, weight, scale, granularity))
        torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        wrong = []

        def call(x: torch.Tensor = x, wanted: torch.Tensor = found[0], wrong: list[int] = wrong) -> None:
            for _ in range(5):
                if not torch.equal(native.multiply(x, weight, scale, granularity), wanted):
                    wrong.append(1)

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_variables_and_threads_of_a_fresh_process() -> None:
    """It starts no threads of its own: they are those of torch's runtime. It can be turned off, and be told what to use."""
    script = """
import os, torch
os.environ["HF_FP8_NATIVE"] = "{}"
import hf_fp8
from hf_fp8.formats import native
from hf_fp8.formats.scheme import INT8_DYNAMIC, Granularity
from hf_fp8.kernels import Weight
from hf_fp8.kernels import native as kernels
print(native.why_not())
if native.why_not() is None:
    def threads(): return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
    torch.set_num_threads(2)
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    torch.randn(3000000).exp()
    before = threads()
    weight = torch.zeros(1000, 1000, dtype=torch.float8_e4m3fn)
    native.multiply(torch.randn(30, 1000), weight, torch.ones(1000, 1), Granularity(1, -1))
    print(native.names()[1], threads() - before)
"""
    found = run_fresh({name: script.format(name) for name in ("0", "OFF", "scalar", "Scalar", "", "nonsense")})
    assert found["0"].strip() == "the library of CPU kernels is turned off (HF_FP8_NATIVE=0)"
    assert found["scalar"].split("\n")[:2] == ["None", "scalar 0"]
    assert found[""].split("\n")[:2] == ["None", f"{native.names()[1]} 0"]
    assert found["nonsense"].startswith("HF_FP8_NATIVE=nonsense: not among")
    assert "(HF_FP8_NATIVE=off)" in found["OFF"] and found["Scalar"].startswith("None")


def test_a_name_that_is_not_there_is_said_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for instructions does not want to run without any."""
    monkeypatch.setenv(native_library.VARIABLE, "unknown")
    with native.use(native.names()[1]), pytest.warns(UserWarning, match="unknown: not among .*not used at all"):
        assert isinstance(native_library._load.__wrapped__(), str)


def test_instructions_that_compute_wrongly_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients and dequantizing have no probe of their own."""
    library = native_library.library()
    assert native_library._is_right(library)
    for name in ("hf_fp8_multiply", "hf_fp8_dequantize", "hf_fp8_quantize"):
        with monkeypatch.context() as patch:
            patch.setattr(library, name, lambda *_: 0)  # computes nothing
            assert not native_library._is_right(library)
    monkeypatch.setattr(native_library, "_is_right", lambda _: False)
    with native.use(native.names()[1]):  # restores what loading leaves in use
        assert "gives wrong numbers" in str(native_library._load.__wrapped__())


def test_what_traces_or_differentiates_is_torchs() -> None:
    granularity, x = Granularity(1, -1), torch.randn(4, 64)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert numerics.quantize(fake, numerics.compute_scale(fake, granularity), granularity).shape == (4, 64)
    y = x.clone().requires_grad_()
    numerics.compute_scale(y, granularity).sum().backward()
    assert y.grad is not None and int((y.grad != 0).sum()) == 4
    scales_of = torch.func.vmap(lambda row: numerics.compute_scale(row.unsqueeze(0), granularity))(x)
    assert torch.equal(scales_of.reshape(4, 1), numerics.compute_scale(x, granularity))


def test_without_vectors_nothing_is_kept_by_default() -> None:
    """A tenth of dense speed: as without the library."""
    with native.use("scalar"):
        assert "no vector instructions" in str(why_not_kept(torch.device("cpu"), torch.float32))
        assert "no vector instructions" in str(why_not_kept_experts(torch.device("cpu"), torch.float32))
    if native.names()[1] != "scalar":
        assert why_not_kept(torch.device("cpu"), torch.float32) is None


def test_use_restores_what_was_used() -> None:
    before = native.names()[1]
    with native.use(None):
        assert native.why_not() == "the library of CPU kernels is turned off"
        with native.use("scalar"):
            assert native.why_not() is None and native.names()[1] == "scalar"
        assert native.why_not() is not None
    assert native.why_not() is None and native.names()[1] == before
    with pytest.raises(KernelError, match="sse9"), native.use("sse9"):
        pass
    assert native.names()[1] == before
