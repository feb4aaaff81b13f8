"""E5M2 weights: quantized, run, saved; which kernels decline them, and that no config group is written for them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from support.build import tiny_llama
from transformers import AutoModelForCausalLM

import hf_fp8
from hf_fp8 import FP8Config
from hf_fp8.checkpoint.group_schemes import write_group
from hf_fp8.errors import ConfigError, KernelError, ScaleError
from hf_fp8.formats import numerics
from hf_fp8.formats.code_types import E5M2
from hf_fp8.formats.scheme import FP8_DYNAMIC, ROW, TENSOR, Granularity, Scheme, TensorScheme
from hf_fp8.formats.weights import quantize_weight
from hf_fp8.kernels import GROUPED_KERNELS, KERNELS, Problem, select, select_grouped, use
from hf_fp8.kernels.triton import support as triton_support
from hf_fp8.nn.functional import scaled_linear
from hf_fp8.nn.grouped import scaled_grouped_linear
from hf_fp8.nn.linear import QuantizedLinear

GRANULARITIES = (TENSOR, ROW, Granularity(1, 32), Granularity(128, 128))
WEIGHT_ONLY = Scheme(TensorScheme(ROW, dtype=E5M2))
TOKEN = Scheme(TensorScheme(ROW, dtype=E5M2), FP8_DYNAMIC.input)
CPU = torch.device("cpu")


def values_by_hand(codes: torch.Tensor) -> torch.Tensor:
    """From the bits: a sign, five bits of exponent with a bias of 15, two of mantissa."""
    bits = codes.view(torch.uint8).to(torch.int64)
    exponent, mantissa = (bits >> 2) & 31, (bits & 3).double()
    found = torch.where(exponent == 0, mantissa / 4 * 2.0**-14, (1 + mantissa / 4) * 2.0 ** (exponent - 15).double())
    return torch.where(bits >= 128, -found, found)


@pytest.mark.hostless
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_every_code_is_dequantized_exactly(granularity: Granularity) -> None:
    finite = torch.arange(256, dtype=torch.uint8)
    finite = finite[(finite & 0x7F) < 0x7C]
    codes = finite.repeat(3)[: 16 * 40].reshape(16, 40).view(E5M2)
    grid = granularity.grid(16, 40)
    scale = 2.0 ** (torch.arange(grid[0] * grid[1]) % 23 - 3).reshape(grid).float()
    wide = numerics.expand_scale(scale, granularity, 16, 40).double()
    found = numerics.dequantize(codes, scale, granularity)
    assert torch.equal(found.double(), values_by_hand(codes) * wide)


@pytest.mark.hostless
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized(granularity: Granularity, dtype: torch.dtype) -> None:
    """To the nearest code, none of them infinite; two bits of mantissa are within an eighth."""
    weight = torch.randn(150, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scale = quantize_weight(weight, granularity, E5M2)
    assert codes.dtype == E5M2
    assert bool(codes.float().isfinite().all())
    assert float(codes.float().abs().max()) == 57344
    back = numerics.dequantize(codes, scale, granularity)
    error = (back - weight.float()).abs()
    wide = numerics.expand_scale(scale.float(), granularity, 150, 70)
    assert bool((error <= torch.maximum(weight.float().abs() * 0.13, wide * 2.0**-16)).all())
    held, again = quantize_weight(back, granularity, E5M2, held=scale)
    assert torch.equal(held.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(again, scale)


@pytest.mark.hostless
def test_values_that_are_not_finite_stay_visible() -> None:
    x = torch.tensor([[1.0, torch.inf, -torch.inf, torch.nan, 1e9, -1e9]])
    found = numerics.quantize(x, torch.ones(1, 1), ROW, E5M2).float()
    assert found[0, 0] == 1
    assert bool(found[0, 1:4].isnan().all())
    assert found[0, 4:].tolist() == [57344, -57344]
    codes = torch.full((16, 32), 0x7C, dtype=torch.uint8).view(E5M2)  # infinity, where E4M3 has 384
    for given in (torch.float32, torch.bfloat16):
        out = scaled_linear(torch.ones(2, 32, dtype=given), codes, torch.ones(16, 1), WEIGHT_ONLY)
        assert bool(out.isinf().all())
    with pytest.raises(ScaleError, match="NaN or infinite"):
        quantize_weight(torch.full((16, 32), torch.inf), ROW, E5M2)


@pytest.mark.hostless
@pytest.mark.parametrize("scheme", [Scheme(TensorScheme(g, dtype=E5M2)) for g in GRANULARITIES] + [TOKEN], ids=str)
@pytest.mark.parametrize("m", [0, 1, 17])
def test_a_layer(scheme: Scheme, m: int) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40)
    layer = hf_fp8.quantize_model(linear, scheme, inplace=False)
    assert isinstance(layer, QuantizedLinear)
    assert layer.weight.dtype == E5M2
    assert layer.scheme == scheme == Scheme.parse(scheme.text)
    x = torch.randn(m, 96, requires_grad=True)
    out = layer(x)
    assert out.shape == (m, 40)
    given, dense = x.detach().double(), layer.dequantized_weight().double()
    if scheme.input is not None:
        given = numerics.dequantize(*numerics.quantize_input(x.detach(), scheme.input, None), ROW).double()
    wanted = given @ dense.T + linear.bias.double()
    (grad,) = torch.autograd.grad(out.sum(), x)
    if m:
        assert float((out - wanted).norm() / wanted.norm()) <= 1e-6
        assert float((grad - dense.sum(0)).norm() / grad.norm()) <= 1e-6
    half = copy.deepcopy(layer).to(torch.bfloat16)
    again = pickle.loads(pickle.dumps(half))
    for other in (half, again):
        assert torch.equal(other.weight.codes.view(torch.uint8), layer.weight.codes.view(torch.uint8))
        assert torch.equal(other.weight_scale, layer.weight_scale)


@pytest.mark.hostless
def test_every_kernel_takes_them_or_says_why_not() -> None:
    codes, scale = quantize_weight(torch.randn(48, 64), ROW, E5M2)
    x = torch.randn(3, 64)
    wanted = x @ numerics.dequantize(codes, scale, ROW).T
    with triton_support.interpreted():
        for kernel in KERNELS:
            with use(kernel.name):
                try:
                    out = scaled_linear(x, codes, scale, WEIGHT_ONLY)
                except KernelError:
                    assert kernel.why_not_scheme(WEIGHT_ONLY)
                    continue
            assert kernel.name in ("dequantize", "weight_only")
            assert float((out - wanted).norm() / wanted.norm()) <= 1e-6
        for grouped in GROUPED_KERNELS:
            if grouped.name not in ("grouped_dequantize", "grouped_weight_only"):
                assert grouped.why_not_scheme(WEIGHT_ONLY) and grouped.why_not_scheme(TOKEN), grouped.name


@pytest.mark.hostless
def test_the_selection_says_why() -> None:
    found = select(Problem(CPU, WEIGHT_ONLY, 64, 64, torch.float32), "auto")
    assert found.kernel.name == "weight_only"
    assert "no kernel reads E5M2 codes" in found.reason
    found = select(Problem(CPU, TOKEN, 64, 64, torch.float32), "auto")
    assert found.kernel.name == "dequantize"
    assert found.reason == "no 8-bit kernel takes E5M2 weights"
    grouped = select_grouped(Problem(CPU, WEIGHT_ONLY, 64, 64, torch.float32), "auto")
    assert "no kernel reads E5M2 codes" in grouped.reason
    assert "no kernel reads" not in select(Problem(CPU, Scheme(FP8_DYNAMIC.weight), 64, 64, torch.float32), "auto").reason


@pytest.mark.hostless
@pytest.mark.parametrize("granularity", [TENSOR, ROW, Granularity(1, 32)], ids=str)
def test_experts(granularity: Granularity) -> None:
    scheme = Scheme(TensorScheme(granularity, dtype=E5M2))
    made = [quantize_weight(torch.randn(48, 64), granularity, E5M2) for _ in range(3)]
    codes, scale = (torch.stack(parts) for parts in zip(*made, strict=True))
    x, groups = torch.randn(7, 64, requires_grad=True), torch.tensor([0, 2, 2, 1, 0, 3, 2])
    out = scaled_grouped_linear(x, codes, scale, scheme, groups)
    dense = [numerics.dequantize(*one, granularity) for one in made]
    wanted = torch.stack([torch.zeros(48) if e == 3 else x[i] @ dense[e].T for i, e in enumerate(groups.tolist())])
    assert float((out - wanted).norm() / wanted.norm()) <= 1e-6
    (found,), (grad,) = torch.autograd.grad(out.sum(), x), torch.autograd.grad(wanted.sum(), x)
    assert float((found - grad).norm() / grad.norm()) <= 1e-6


def test_saved_and_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)

    def build() -> torch.nn.Sequential:
        return torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32))

    model = hf_fp8.quantize_model(build(), Scheme(TensorScheme(Granularity(1, 16), dtype=E5M2)))
    hf_fp8.save_quantized(model, tmp_path / "out")
    again = hf_fp8.load_quantized(build(), tmp_path / "out")
    assert again[0].weight.dtype == E5M2
    x = torch.randn(5, 64)
    assert torch.equal(again(x), model(x))

    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    wanted = adapted(x).detach()
    merged = adapted.merge_and_unload()
    assert merged[0].weight.dtype == E5M2
    assert float((merged(x) - wanted).norm() / wanted.norm()) <= 0.15


def test_no_config_describes_them(tmp_path: Path) -> None:
    """A group says `num_bits: 8, type: float`, which is E4M3: other readers would take the codes for that."""
    said = "cannot describe E5M2 weights: 8-bit floats .num_bits 8, type float. are E4M3"
    with pytest.raises(ConfigError, match=said):
        write_group(WEIGHT_ONLY, ["Linear"])
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match=said):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=FP8Config(WEIGHT_ONLY))
    model = tiny_llama()
    with pytest.raises(ConfigError, match=said):
        hf_fp8.quantize_model(model, WEIGHT_ONLY)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    with pytest.raises(ConfigError, match="inputs are quantized to E4M3 or int8, not to E5M2"):
        Scheme(FP8_DYNAMIC.weight, TensorScheme(ROW, dynamic=True, dtype=E5M2))
