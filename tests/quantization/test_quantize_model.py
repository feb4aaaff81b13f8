"""quantize_model of plain PyTorch models: what is quantized, what is left and why, shapes, dtypes, sharing, devices."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from support.build import differing, error, sqnr
from support.moe import qwen3_moe
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import hf_fp8
from hf_fp8 import QuantizedConv1x1, QuantizedLinear, dequantize_model, quantize_model
from hf_fp8.errors import ConfigError, ScaleError
from hf_fp8.formats.code_types import FP8

NAMES = ["FP8_DYNAMIC", "FP8", "FP8_BLOCK", "FP8_WEIGHT_ONLY", "FP8_TENSOR", "INT8", "INT8_WEIGHT_ONLY"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class UNet(nn.Module):
    """Down and up again, with time embedding, attention over points, and convolutions of one point."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.down = nn.Conv2d(32, 64, 1, stride=2)
        self.time = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64))
        self.qkv = nn.Conv2d(64, 192, 1, bias=False)
        self.depth = nn.Conv2d(64, 64, 1, groups=64)
        self.up = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.skip = nn.Conv2d(32, 32, 1)
        self.leave = nn.Conv2d(32, 3, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.enter(x)).relu()
        y = self.down(x) + self.time(t)[:, :, None, None]
        q, k, v = self.qkv(y).flatten(2).chunk(3, 1)
        y = y + ((q.transpose(1, 2) @ k / 8).softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).reshape(y.shape)
        out: torch.Tensor = self.leave(self.up(self.depth(y)) + self.skip(x))
        return out


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(self.patches(x).flatten(2).transpose(1, 2))
        out: torch.Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return out


def run(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(*inputs)
    return out


def images(size: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def measured(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    if any(getattr(m, "needs_calibration", False) for m in model.modules()):
        with hf_fp8.calibrate(model), torch.no_grad():
            model(*inputs)
    return model


def fp8(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("scheme", NAMES)
def test_unet(scheme: str, memory_format: torch.memory_format, caplog: pytest.LogCaptureFixture) -> None:
    model, t = UNet().eval().to(memory_format=memory_format), torch.randn(2, 16)
    x = images().to(memory_format=memory_format)
    wanted = run(model, x, t)
    plain = quantize_model(model, scheme, inplace=False)
    assert fp8(plain) == {"time.0", "time.2"}
    new = measured(quantize_model(model, scheme, inplace=False, conv1x1=True), x, t)
    assert fp8(new) == {"time.0", "time.2", "down", "qkv", "skip", "leave"}
    assert "depth (it has 64 groups)" in caplog.text and "enter (its kernel is 3x3" in caplog.text
    found = run(new, x, t)
    assert found.shape == wanted.shape and found.stride() == wanted.stride() and sqnr(found, wanted) > 20
    if scheme.endswith("WEIGHT_ONLY"):
        assert error(run(dequantize_model(copy.deepcopy(new)), x, t), found) < 1e-5
    assert torch.equal(run(model, x, t), wanted)


@pytest.mark.parametrize("scheme", NAMES)
def test_vit(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x = ViT().eval(), images(16)
    wanted = run(model, x)
    measured(quantize_model(model, scheme), x)
    assert fp8(model) == {"head", *(f"encoder.layers.{i}.linear{n}" for i in (0, 1) for n in (1, 2))}
    assert "NonDynamicallyQuantizableLinear is a subclass" in caplog.text
    assert sqnr(run(model, x), wanted) > 20


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, (3, 1, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_one_point(dims: int, stride: Any, bias: bool) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = kind(16, 24, 1, stride=stride if isinstance(stride, int) else stride[:dims], bias=bias)
    model = quantize_model(nn.Sequential(conv), "FP8_WEIGHT_ONLY", conv1x1=True, inplace=False)
    dense = dequantize_model(copy.deepcopy(model), torch.float32)
    assert type(model[0]) is QuantizedConv1x1 and type(dense[0]) is kind and dense[0].stride == conv.stride
    last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(dims, torch.contiguous_format)
    x = torch.randn(2, 16, *(7, 5, 4)[:dims])
    for given in (x, x.to(memory_format=last), x[:0], x[:1], x[0], x.transpose(-1, 0).transpose(-1, 0), x[..., 1:]):
        found, wanted = run(model, given), run(dense, given)
        assert found.shape == wanted.shape
        assert not found.numel() or error(found, wanted) < 1e-5
    if dims < 3 and stride == 1:  # torch itself does not keep 3-D ones on CPUs
        assert run(model, x.to(memory_format=last)).stride() == run(dense, x.to(memory_format=last)).stride()


def test_channels_last_with_a_stride() -> None:
    conv, x = nn.Conv2d(16, 24, 1, stride=2), torch.randn(2, 16, 7, 5).to(memory_format=torch.channels_last)
    new = quantize_model(nn.Sequential(conv), conv1x1=True, inplace=False)
    assert run(new, x).stride() == run(conv, x).stride()


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "FP8_TENSOR"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers(scheme: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for weight in (torch.randn(40, 48), torch.randn(48, 40).t(), torch.randn(40, 96)[:, ::2]):
        linear = nn.Linear(48, 40, dtype=dtype)
        linear.weight = nn.Parameter(weight.to(dtype))
        layer = quantize_model(nn.Sequential(linear), scheme)[0]
        compute = torch.float32 if dtype == torch.float64 else dtype
        dense = weight.to(dtype).to(compute).contiguous()
        rows = scheme == "FP8_DYNAMIC"
        low, high = (dense.amin(1, keepdim=True), dense.amax(1, keepdim=True)) if rows else (dense.amin(), dense.amax())
        args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel" if rows else "tensor")
        scale, _ = calculate_qparams(low, high, args)
        codes = ct_quantize(dense, scale, None, args, dtype=FP8)
        assert differing({"q": codes}, {"q": layer.weight.data}) == [] and layer.weight.is_contiguous()
        assert layer.weight_scale.dtype == compute and torch.equal(layer.weight_scale.reshape(-1), scale.reshape(-1))
        x = torch.randn(5, 48).to(dtype)
        assert run(layer, x).dtype == dtype and sqnr(run(layer, x), run(linear, x)) > 20
        assert run(layer, x[0]).shape == (40,) and run(layer, x[:0]).shape == (0, 40)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(nn.functional.linear(x, self.read.weight))


class Lora(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def changed(change: Callable[[nn.Linear], Any]) -> nn.Linear:
    linear = nn.Linear(16, 16)
    change(linear)
    return linear


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight_norm": (lambda: weight_norm(nn.Linear(16, 16)), "more than a weight and a bias"),
    "spectral_norm": (lambda: spectral_norm(nn.Linear(16, 16)), "more than a weight and a bias"),
    "weight_norm, new": (lambda: parametrizations.weight_norm(nn.Linear(16, 16)), "subclass"),
    "spectral_norm, new": (lambda: parametrizations.spectral_norm(nn.Linear(16, 16)), "subclass"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5), "more than a weight and a bias"),
    "subclass": (lambda: Lora(16, 16), "subclass"), "no outputs": (lambda: nn.Linear(16, 0), "no values"),
    "forward": (lambda: changed(lambda m: setattr(m, "forward", lambda x: x)), "forward was set"),
    "function": (lambda: changed(lambda m: setattr(m, "after", torch.relu)), "after was set"),
    "tensor": (lambda: changed(lambda m: setattr(m, "scaling", torch.ones(16))), "scaling was set"),
    "ours": (lambda: changed(lambda m: setattr(m, "scheme", "mine")), "scheme was set"),
    "NaN": (lambda: changed(lambda m: m.weight.data[3, 3].fill_(torch.nan)), "NaN or infinite"),
    "inf": (lambda: changed(lambda m: m.weight.data[3, 3].fill_(-torch.inf)), "NaN or infinite"),
    "a child": (lambda: changed(lambda m: m.add_module("adapter", nn.Linear(16, 16))), "more than a weight"),
    "read": (Reader, "Reader reads its weight"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_and_why(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make, words = LEFT[kind]
    model, x = nn.Sequential(make(), nn.Linear(16, 16)).eval(), torch.randn(3, 16)
    wanted, left = run(model[0], x), model[0]
    with caplog.at_level(logging.WARNING):
        quantize_model(model, "FP8_WEIGHT_ONLY")
    assert model[0] is left and type(model[1]) is QuantizedLinear and words in caplog.text
    found = run(model[0], x)
    if kind == "read":
        assert fp8(model) == {"0.called", "1"} and sqnr(found, wanted) > 20
    else:
        assert torch.equal(found, wanted) or kind == "NaN"


def test_notes_of_others_are_carried_over() -> None:
    """As diffusers writes them on layers for its own use: what a plain Linear computes does not depend on them."""
    layer = nn.Linear(16, 16)
    layer._packed_blocks, layer.scaling = (3, 4), 2.0
    model = quantize_model(nn.Sequential(layer), "FP8_WEIGHT_ONLY")
    assert type(model[0]) is QuantizedLinear and model[0]._packed_blocks == (3, 4) and model[0].scaling == 2.0
    for again in (copy.deepcopy(model), hf_fp8.dequantize_model(model)):
        assert again[0]._packed_blocks == (3, 4) and again[0].scaling == 2.0
    assert fp8(quantize_model(model, "FP8_WEIGHT_ONLY")) == {"0"}


def test_nothing_is_left_to_quantize() -> None:
    for model in (nn.ReLU(), nn.Sequential(Lora(4, 4)), nn.Linear(0, 4), nn.MultiheadAttention(8, 2), nn.Conv2d(4, 4, 1)):
        with pytest.raises(ConfigError, match="no layer"):
            quantize_model(model)
    done = quantize_model(nn.Sequential(nn.Linear(8, 8)))
    for options in ({}, {"scheme": "INT8"}):
        with pytest.raises(ConfigError, match="no layer"):
            quantize_model(done, **options)
    for options in (
        {"scheme": "FP9"},
        {"originals": "burn"},
        {"backend": "x"},
        {"targets": "no"},
        {"filter_fn": lambda *_: False},
    ):
        with pytest.raises(ConfigError):
            quantize_model(model := nn.Sequential(nn.Linear(8, 8)), **options)
        assert type(model[0]) is nn.Linear


def test_nothing_but_nan() -> None:
    model = nn.Sequential(changed(lambda m: m.weight.data.fill_(torch.nan)))
    with pytest.raises(ConfigError):
        quantize_model(model)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.block, self.again = block, block
        layer = nn.Linear(16, 16)
        self.one, self.two, self.tied = layer, layer, nn.Linear(16, 16)
        self.tied.weight = layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.tied(self.two(self.one(self.again(self.block(x)))))
        return out


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("originals", ["discard", "keep", "offload"])
def test_what_was_shared_stays_shared(inplace: bool, originals: str) -> None:
    model, x = Shared(), torch.randn(3, 16)
    wanted = run(model, x)
    new = quantize_model(model, "FP8_WEIGHT_ONLY", inplace=inplace, originals=originals)
    assert (new is model) == inplace and fp8(new) == {"block.0", "one", "tied"}
    for each in (new, copy.deepcopy(new), dequantize_model(copy.deepcopy(new), torch.float32)):
        assert each.block is each.again and each.one is each.two and each.tied.weight is each.one.weight
        assert each.tied.bias is not each.one.bias
    assert sqnr(run(new, x), wanted) > 20
    if not inplace:
        assert torch.equal(run(model, x), wanted) and not fp8(model)


class SharedAndRead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two = self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.two(x), self.one.weight) + self.other(x)


READ = "the layer is quantized by its other name, and its codes are read: dtype error in forward"
NESTED = "a padding mask makes nn.TransformerEncoder use nested tensors, which QuantizedLinear cannot ask for a shape"


@pytest.mark.parametrize("inplace", [True, False])
def test_a_layer_in_two_places_whose_weight_is_read_by_one_name(inplace: bool) -> None:
    model, x = SharedAndRead(), torch.randn(3, 16)
    wanted = run(model, x)
    assert sqnr(run(quantize_model(model, "FP8_WEIGHT_ONLY", inplace=inplace), x), wanted) > 20


def test_a_layer_in_two_places_stays_one() -> None:
    model = quantize_model(SharedAndRead())
    assert model.one is model.two


@pytest.mark.parametrize("conv1x1", [True, False])
def test_linear_tied_to_something_else(conv1x1: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out, self.free = nn.Embedding(16, 8), nn.Linear(8, 16), nn.Linear(8, 8)
            self.out.weight = self.embed.weight

    model = quantize_model(Tied(), conv1x1=conv1x1)
    assert (
        model.out.weight is model.embed.weight and fp8(model) == {"free"} and "its weight is also embed.weight" in caplog.text
    )


@pytest.mark.parametrize("scheme", NAMES)
def test_meta_then_a_state_dict(scheme: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Conv1d(32, 8, 1))

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net[2](self.net[1](self.net[0](x)).transpose(1, 2))
            return out

    x = torch.randn(2, 5, 16)
    filled = measured(quantize_model(Run(), scheme, conv1x1=True), x)
    torch.save(filled.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    with torch.device("meta"):
        model = quantize_model(Run(), scheme, conv1x1=True, device="cpu")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.load_state_dict(state, assign=True)
    other = quantize_model(Run(), scheme, conv1x1=True)
    other.load_state_dict(state)
    for each in (model, other, copy.deepcopy(filled)):
        assert torch.equal(run(each, x), run(filled, x)) and not each.net[0].weight.requires_grad
    with pytest.raises(RuntimeError, match="would not quantize"):
        other.load_state_dict(Run().state_dict(), strict=False)


@pytest.mark.parametrize(("nested", "norm_first"), [
    (False, False), (False, True), (True, False)
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_transformer_encoder_with_padding(nested: bool, norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x, padding = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=padding)
        new = quantize_model(model, "FP8_WEIGHT_ONLY", inplace=False)
        found = new(x, src_key_padding_mask=padding)
        assert sqnr(found[~padding], wanted[~padding]) > 20
        dense = dequantize_model(copy.deepcopy(new))
        assert dense.layers[0].activation_relu_or_gelu == model.layers[0].activation_relu_or_gelu == 1
        assert error(dense(x, src_key_padding_mask=padding)[~padding], found[~padding]) < 1e-5
        assert torch.equal(model(x, src_key_padding_mask=padding), wanted)


def test_experts_too_large_for_a_scale() -> None:
    """Finite in float64, infinite in float32, in which scales are made: an error, and nothing is changed."""
    model = qwen3_moe().double()
    model.model.layers[0].mlp.experts.down_proj.data[0, 0, 0] = 1e300
    with pytest.raises(ScaleError, match="down_proj"):
        quantize_model(model)
    assert not [module for module in model.modules() if isinstance(module, QuantizedLinear)]
