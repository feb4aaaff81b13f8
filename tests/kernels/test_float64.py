"""Inputs in float64: every layer takes them, on every route, and computes in float64 what it quantizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.build import error
from support.experts import FAMILIES, experts_of, write_family
from support.experts import SCHEMES as STORED
from support.grouped import INTERPRETED, SCHEMES
from support.kernels import SCHEMES as ALL
from support.kernels import expected, fake_quantize, operands
from support.moe import IDS, causal
from torch import nn

from hf_fp8 import FP8Config, QuantizedConv1x1, QuantizedLinear, kernels
from hf_fp8.formats import native, numerics
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.scheme import FP8_BLOCK, FP8_DYNAMIC, FP8_STATIC, FP8_WEIGHT_ONLY, INT8_DYNAMIC, ROW, Scheme
from hf_fp8.kernels import ExpertWeights, Routing
from hf_fp8.kernels import torch_grouped as grouped_mm
from hf_fp8.kernels.triton import support as triton_support
from hf_fp8.nn.functional import scaled_linear
from hf_fp8.nn.grouped import known, route, scaled_grouped_linear

pytestmark = pytest.mark.hostless

WIDE = torch.float64
# Products of codes and scales are rounded to float32; all else is float64.
CLOSE = 1e-6
SIZES = [1.0, 1e-3, 1e200, 1e-200]


def stack(scheme: Scheme, n: int, k: int, parts: int) -> ExpertWeights:
    """Four experts, of which the last is given no rows."""
    torch.manual_seed(n + k)
    granularity = scheme.weight.granularity
    codes, scales = [], []
    for matrix in torch.randn(4 * parts, n // parts, k):
        scales.append(numerics.compute_scale(matrix, granularity))
        codes.append(numerics.quantize(matrix, scales[-1], granularity))
    grid = torch.stack(scales).reshape(4, -1, scales[0].shape[1])
    scale = grid.reshape(4, parts) if granularity.is_tensor else grid
    return ExpertWeights(torch.stack(codes).view(4, n, k), scale, scheme, parts)


def by_hand(x: torch.Tensor, w: ExpertWeights, ids: torch.Tensor, quantized: bool, static: Any) -> torch.Tensor:
    """Row by row, part by part, all in float64."""
    of_x, of_w = w.scheme.input, w.scheme.weight.granularity
    out = torch.zeros(*ids.shape, w.codes.shape[1], dtype=WIDE)
    for expert in range(4):
        rows, slots = torch.where(ids == expert)
        for index in range(w.parts):
            part = w.part(index) if w.parts > 1 else w
            given = x[rows]
            if quantized and of_x is not None and len(rows):
                q, scale = numerics.quantize_input(given, of_x, None if static is None else static[expert, index])
                given = q.to(WIDE) * numerics.expand_scale(scale, of_x.granularity, *q.shape)
            height = part.codes.shape[1]
            dense = part.codes[expert].to(WIDE) * numerics.expand_scale(part.scale[expert], of_w, height, x.shape[1]).to(WIDE)
            out[rows, slots, index * height : (index + 1) * height] = given @ dense.t()
    return out


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kernel", ["grouped_dequantize", "grouped_weight_only"])
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
def test_grouped(kernel: str, name: str, size: float) -> None:
    scheme = SCHEMES[name]
    if scheme.has_static_input and size in (1e200, 1e-200):
        pytest.skip("its scale is a float32")
    for count, n, k, parts in ((0, 48, 64, 1), (1, 48, 64, 2), (17, 66, 421, 1), (17, 66, 421, 2)):
        w = stack(scheme, n, k, parts)
        x = torch.randn(count, k, dtype=WIDE) * size
        x = (x.repeat(1, 2)[:, ::2] if count else x).requires_grad_()  # not contiguous
        ids = torch.randint(0, 3, (count, 2))
        if count > 2:
            ids[1, 0] = 7  # nobody
        static = torch.full((4, parts), 4 * size / 448) if scheme.has_static_input else None
        wanted = by_hand(x.detach(), w, ids, kernel == "grouped_dequantize", static)
        for sort in (True, False):
            first, second = route(known(ids, 4)[0], 4, sort=sort)
            routing = first._replace(slots=second.slots)
            with kernels.use(kernel):
                found = scaled_grouped_linear(x, w.codes, w.scale, scheme, routing, input_scale=static, parts=parts)
                with torch.no_grad():
                    plain = scaled_grouped_linear(x, w.codes, w.scale, scheme, routing, input_scale=static, parts=parts)
            assert found.dtype == WIDE and found.shape == (2 * count, n) and torch.equal(found, plain)
            grad = torch.randn(2 * count, n, dtype=WIDE)
            (back,) = torch.autograd.grad(found, x, grad)
            assert back.dtype == WIDE and back.shape == x.shape
            if count:
                assert error(found / size, wanted.view(-1, n) / size) < CLOSE
                assert error(back, gradient(w, ids, grad)) < CLOSE
    assert scaled_grouped_linear(x[:0], w.codes, w.scale, scheme, Routing(ids[:0, 0]), parts=2).shape == (0, 66)


def gradient(w: ExpertWeights, ids: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    dense = [torch.cat([piece for piece, _, _ in grouped_mm.pieces(w, expert, w.codes.shape[2], WIDE)]) for expert in range(4)]
    found = torch.zeros(len(ids), w.codes.shape[2], dtype=WIDE)
    for slot, expert in enumerate(ids.flatten().tolist()):
        if expert < 4:
            found[slot // 2] += grad[slot] @ dense[expert]
    return found


@pytest.mark.thinned(8)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["channel", "tensor static", "tensor dynamic", "block 24x40"])
@pytest.mark.parametrize("backend", ["auto", "scaled_mm", "weight_only"])
def test_mixtures(family: str, scheme: str, backend: str, tmp_path: Path) -> None:
    model, _, _ = write_family(family, tmp_path / "fp8", **STORED[scheme])
    config = FP8Config(experts="fp8", backend=backend)
    kept, wide = (
        type(model).from_pretrained(tmp_path / "fp8", quantization_config=config, dtype=t) for t in (torch.float32, WIDE)
    )
    assert experts_of(wide) and causal(wide).dtype == WIDE
    for module, narrow in zip(experts_of(wide), experts_of(kept), strict=True):
        torch.manual_seed(0)
        x, ids, weights = torch.randn(17, 64, dtype=WIDE), torch.randint(0, 4, (17, 2)), torch.rand(17, 2, dtype=WIDE)
        given = (torch.cat([x, x, 0 * x, x]),) if module.layout.is_prerouted else (x, ids, weights)
        # float32 rounds an input here and there to the next code, and so what follows
        close = 1e-5 if backend != "scaled_mm" else 0.02
        assert error(module(*given), narrow(*(t.float() if t.is_floating_point() else t for t in given))) < close
    embedded = wide.get_input_embeddings()(IDS).detach().requires_grad_()
    wide(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    assert embedded.grad is not None and embedded.grad.dtype == WIDE and bool(embedded.grad.isfinite().all())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss split", "llama4 stacked"])
def test_adapters_on_experts(family: str, tmp_path: Path) -> None:
    """torch has no grouped matmul for float64."""
    model, _, _ = write_family(family, tmp_path / "fp8")
    config = FP8Config(experts="fp8", backend="weight_only")
    found, grads = [], []
    for dtype in (torch.float32, WIDE):
        kept = type(model).from_pretrained(tmp_path / "fp8", quantization_config=config, dtype=dtype)
        before = causal(kept).double()
        torch.manual_seed(0)
        stacks = ["experts.down_proj", "experts.gate_up_proj"]
        adapted: Any = get_peft_model(
            kept, LoraConfig(target_parameters=stacks, target_modules=[], init_lora_weights=False, r=3, lora_alpha=12)
        )
        drawn = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.1)
        out = adapted(IDS, use_cache=False).logits
        assert out.dtype == dtype and error(out, before) > 1e-3
        out.square().mean().backward()
        found.append(out)
        grads.append(torch.cat([p.grad.flatten().double() for n, p in adapted.named_parameters() if "lora_" in n]))
    assert error(found[0], found[1]) < 1e-4 and error(grads[0], grads[1]) < 1e-3


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", SIZES)
def test_linears(name: str, size: float) -> None:
    scheme = ALL[name]
    if scheme.has_static_input and size in (1e200, 1e-200):
        pytest.skip("its scale is a float32")
    for m, n, k in ((1, 16, 64), (17, 33, 257), (4, 5, 1)):
        given = operands(scheme, m, n, k, torch.float32)
        given["x"] = given["x"].double() * size
        if scheme.has_static_input:
            given["input_scale"] = given["input_scale"] * size
        bias = torch.randn(n, dtype=WIDE) * size
        for kernel in ("dequantize", "weight_only"):
            with kernels.use(kernel):
                found = scaled_linear(**given, bias=bias, scheme=scheme)
            q, w_scale = given["weight"].double(), numerics.expand_scale(given["weight_scale"], scheme.weight.granularity, n, k)
            x = given["x"]
            if kernel == "dequantize" and scheme.input is not None:
                codes, scale = numerics.quantize_input(x, scheme.input, given["input_scale"])
                x = codes.double() * numerics.expand_scale(scale, scheme.input.granularity, m, k)
                assert error(x / size, given["x"] / size) < 0.05
            wanted = x @ (q * w_scale.double()).t() + bias
            assert found.dtype == WIDE and error(found / size, wanted / size) < CLOSE, kernel
    if size == 1.0:
        assert error(found, expected(scheme, {**given, "x": given["x"].float()}, False) + bias) < CLOSE


@pytest.mark.parametrize("scheme", [FP8_DYNAMIC, FP8_WEIGHT_ONLY, INT8_DYNAMIC], ids=str)
def test_layers(scheme: Scheme) -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(64, 24, dtype=WIDE), nn.Conv1d(64, 24, 1, dtype=WIDE)
    for layer, dense, x in (
        (QuantizedLinear.from_linear(linear, scheme), linear, torch.randn(5, 64, dtype=WIDE)),
        (QuantizedConv1x1.from_linear(conv, scheme), conv, torch.randn(2, 64, 9, dtype=WIDE)),
    ):
        back = x.clone().requires_grad_()
        out = layer(back)
        out.sum().backward()
        assert out.dtype == back.grad.dtype == WIDE and error(out, dense(x)) < 0.06  # type: ignore[union-attr]
        assert layer(x * 1e250).isfinite().all() and error(layer(x * 1e250) / 1e250, dense(x)) < 0.2


@torch.no_grad()
@pytest.mark.parametrize("scheme", [FP8_DYNAMIC, FP8_STATIC, FP8_BLOCK], ids=str)
def test_inputs_are_rounded_no_more_than_narrower_ones(scheme: Scheme) -> None:
    """Where "auto" does not quantize inputs, it does not quantize those in float64 either."""
    layer = QuantizedLinear.from_linear(nn.Linear(64, 24), scheme)
    if layer.needs_calibration:
        layer.input_scale.data.fill_(0.01)
        layer.see_calibration()
    x = torch.randn(5, 64, dtype=WIDE)
    wanted = x @ layer.dequantized_weight().to(WIDE).t() + layer.bias
    rounded = native.why_not() is not None
    assert (error(layer(x), wanted) > 1e-3) == (error(layer(x.float()).to(WIDE), wanted) > 1e-3) == rounded
    assert rounded or error(layer(x), wanted) < CLOSE


def test_scales_and_codes() -> None:
    x = torch.randn(5, 40, dtype=WIDE) * torch.tensor([[1e-300], [1e-40], [1.0], [1e40], [1e300]], dtype=WIDE)
    x[2, 3] = 0
    scale = numerics.compute_scale(x, ROW)
    assert scale.dtype == WIDE and torch.equal(scale, x.abs().amax(1, keepdim=True) / 448)
    back = fake_quantize(x, scale, ROW)
    assert all(error(row / scale[i], x[i] / scale[i]) < 0.04 for i, row in enumerate(back))
    narrow = numerics.compute_scale(x[2:3].float(), ROW)
    assert narrow.dtype == torch.float32 and torch.equal(numerics.compute_scale(x[:0], ROW), torch.zeros(0, 1, dtype=WIDE))


@pytest.mark.skipif(not INTERPRETED, reason="Triton's kernels are not interpreted here")
def test_triton_leaves_float64_inputs_to_the_reference() -> None:
    """Its scales are float32."""
    x, codes = torch.randn(4, 64, dtype=WIDE) * 1e100, torch.randn(2, 32, 64).to(FP8)
    given = (x, codes, torch.full((2, 32, 1), 1e-2), FP8_DYNAMIC, torch.tensor([0, 1, 0, 1]))
    wanted = scaled_grouped_linear(*given, backend="scaled_mm")
    with triton_support.interpreted():
        found = scaled_grouped_linear(*given, backend="scaled_mm")
    assert wanted.isfinite().all() and error(found, wanted) < CLOSE
