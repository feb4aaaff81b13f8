"""Prepared calls: used again only while nothing has changed that the call depends on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune

import hf_fp8
from hf_fp8 import QuantizedLinear, kernels
from hf_fp8.formats import native, numerics
from hf_fp8.formats.scheme import FP8_BLOCK, FP8_WEIGHT_ONLY, INT8_DYNAMIC
from hf_fp8.formats.weights import quantize_weight
from hf_fp8.kernels import prepared
from hf_fp8.kernels.base import Weight

pytestmark = [
    pytest.mark.hostless,
    pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not())),
]


@pytest.fixture
def layer() -> QuantizedLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 40))
    hf_fp8.quantize_model(model, "FP8_DYNAMIC")
    found: QuantizedLinear = model[1]
    with torch.no_grad():
        found(torch.randn(2, 64))
    assert found._prepared is not None
    return found


def exact(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    weight = numerics.dequantize(layer.weight.codes, layer.weight_scale, layer.scheme.weight.granularity).double()
    return x.double() @ weight.t() + layer.bias.double()


def is_right(layer: QuantizedLinear, x: torch.Tensor) -> bool:
    with torch.no_grad():
        found = layer(x)
    return found.dtype == x.dtype and float((found.double() - exact(layer, x)).norm() / exact(layer, x).norm()) < (
        1e-5 if x.dtype == torch.float32 else 1e-2
    )


def test_any_shape_dtype_and_stride(layer: QuantizedLinear) -> None:
    for x in (
        torch.randn(64), torch.randn(1, 64), torch.randn(2, 3, 64), torch.randn(2, 1, 5, 64), torch.randn(3, 64).bfloat16(),
        torch.randn(3, 64).half(), torch.randn(64, 7).t(), torch.randn(5, 128)[:, ::2], torch.randn(600, 64),
    ):  # fmt: skip
        assert is_right(layer, x) and layer(x).shape == (*x.shape[:-1], 40)
    with torch.no_grad():
        assert layer(torch.randn(0, 64)).shape == (0, 40) and layer(torch.randn(2, 0, 64)).shape == (2, 0, 40)
        assert layer(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64
        with pytest.raises(hf_fp8.errors.InputError, match="columns"):
            layer(torch.randn(2, 32))


def other_codes(layer: QuantizedLinear) -> None:
    layer.weight = nn.Parameter(layer.weight.codes.roll(1, 0), requires_grad=False)


def other_memory(layer: QuantizedLinear) -> None:
    layer.weight.data = layer.weight.codes.roll(3, 0)


class Twice(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * 2


def not_a_parameter(layer: QuantizedLinear, as_buffer: bool) -> None:
    bias = layer.bias.detach() + 1
    del layer.bias
    layer.register_buffer("bias", bias) if as_buffer else setattr(layer, "bias", bias)


CHANGES: dict[str, Callable[[QuantizedLinear], object]] = {
    "bias parametrized": lambda layer: parametrize.register_parametrization(layer, "bias", Twice()),
    "bias pruned": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "bias a buffer": lambda layer: not_a_parameter(layer, True),
    "bias a tensor": lambda layer: not_a_parameter(layer, False),
    "codes replaced": other_codes,
    "codes in other memory": other_memory,
    "codes in place": lambda layer: layer.weight.codes.view(torch.uint8).copy_(layer.weight.codes.roll(1, 0).view(torch.uint8)),
    "scale in place": lambda layer: layer.weight_scale.data.mul_(2),
    "scale replaced": lambda layer: setattr(layer, "weight_scale", nn.Parameter(layer.weight_scale * 3, requires_grad=False)),
    "scale's data": lambda layer: setattr(layer.weight_scale, "data", layer.weight_scale.data * 3),
    "bias in place": lambda layer: layer.bias.data.add_(1),
    "bias replaced": lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias.detach() + 1)),
    "bias's data": lambda layer: setattr(layer.bias, "data", layer.bias.data + 2),
    "to bfloat16": lambda layer: layer.to(torch.bfloat16),
    "a state dict": lambda layer: layer.load_state_dict({**layer.state_dict(), "bias": torch.ones(40)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_seen(change: str, layer: QuantizedLinear) -> None:
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = layer(x)
        CHANGES[change](layer)
        assert is_right(layer, x)
    assert change == "to bfloat16" or not torch.equal(layer(x), before)


def test_modes_and_options_are_seen(layer: QuantizedLinear) -> None:
    x = torch.randn(3, 64)
    with torch.no_grad():
        plain = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        prepared = layer._prepared
        assert prepared is not None and prepared.takes(layer, x)
        with kernels.use("weight_only"):
            assert not prepared.takes(layer, x) and torch.allclose(layer(x), plain, atol=1e-5)
        with pytest.raises(hf_fp8.errors.KernelError), kernels.use("int8_mm"):
            layer(x)
        with native.use(None):
            assert torch.allclose(layer(x), plain, atol=0.1)
        seen: list[torch.Tensor] = []
        layer.observer = seen.append
        layer(x)
        layer.observer = None
        assert len(seen) == 1
    y = x.clone().requires_grad_()
    layer(y).sum().backward()
    assert y.grad is not None and layer.bias.grad is not None


def test_another_device_is_an_error(layer: QuantizedLinear) -> None:
    """An address of another device would end the process."""
    with torch.no_grad():
        assert layer(torch.randn(3, 64, device="meta")).is_meta
        layer(torch.randn(3, 64))
        layer.bias = nn.Parameter(torch.ones(40, device="meta"))
        with pytest.raises(hf_fp8.errors.InputError, match="on the CPU"):
            layer(torch.randn(3, 64))


def test_negative_views(layer: QuantizedLinear) -> None:
    lazy = torch.randn(3, 64, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    for given in (lazy, torch._neg_view(torch.randn(3, 64))):
        assert is_right(layer, given)


def test_a_backend_that_is_changed_after_a_call(layer: QuantizedLinear) -> None:
    x = torch.randn(3, 64)
    with torch.no_grad():
        plain = layer(x)
        layer.backend = "scaled_mm"  # rounds inputs
        assert not torch.equal(layer(x), plain)
        layer.backend = "auto"
        assert torch.equal(layer(x), plain)


def test_copies_have_their_own(layer: QuantizedLinear) -> None:
    x = torch.randn(3, 64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        with torch.no_grad():
            other.weight_scale.data.mul_(1)
            assert torch.equal(other(x), layer(x))
    twin = copy.deepcopy(layer)
    assert twin._prepared is None
    with torch.no_grad():
        twin.bias.data.zero_()
        assert is_right(twin, x) and is_right(layer, x)


def op(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """As compiled code without gradients calls it."""
    out: torch.Tensor = torch.ops.hf_fp8.scaled_linear_inference(
        x, layer.held_codes("weight"), layer.held_scale("weight"), None, layer.bias, layer.scheme.text, layer.backend
    )
    return out


@pytest.mark.parametrize("change", CHANGES)
def test_compiled_code_sees_what_changes(change: str, layer: QuantizedLinear) -> None:
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = op(layer, x)
        CHANGES[change](layer)
        assert torch.equal(op(layer, x), layer(x))
    assert change == "to bfloat16" or not torch.equal(op(layer, x), before)


def test_compiled_code_sees_other_kernels(layer: QuantizedLinear) -> None:
    x = torch.randn(3, 64)
    with torch.no_grad():
        for _ in range(2):
            plain = op(layer, x)
            with kernels.use("dequantize"):
                assert not torch.equal(op(layer, x), plain)  # inputs are rounded
            with native.use(None):
                assert torch.allclose(op(layer, x), plain, atol=0.1)
            with pytest.raises(hf_fp8.errors.KernelError), kernels.use("int8_mm"):
                op(layer, x)


@pytest.mark.parametrize("rows", [0, 1, 17, 600])
def test_compiled_code_takes_any_input(rows: int, layer: QuantizedLinear) -> None:
    layer.backend = "weight_only"  # "auto" rounds inputs in float64, as no kernel takes them
    with torch.no_grad():
        for x in (
            torch.randn(rows, 64), torch.randn(64, rows).t(), torch.randn(rows, 128)[:, ::2],
            torch._neg_view(torch.randn(rows, 64)), torch.randn(rows, 64).bfloat16(), torch.randn(rows, 64).half(),
            torch.randn(rows, 64).double(),
        ):  # fmt: skip
            found = op(layer, x)
            assert found.shape == (rows, 40) and found.dtype == x.dtype
            assert not rows or (is_right(layer, x) and torch.allclose(found, layer(x), rtol=1e-2, atol=1e-2))


def test_memory_that_is_used_again() -> None:
    """Calls are found by the memory of their operands: other layers may be there later, of other sizes and kinds."""
    memory, scales = torch.zeros(64 * 64, dtype=torch.uint8), torch.zeros(4096)
    torch.manual_seed(0)
    for count in range(200):
        n, k = (8 * int(i) for i in torch.randint(1, 9, (2,)))
        scheme = (FP8_WEIGHT_ONLY, FP8_BLOCK, INT8_DYNAMIC)[count % 3]
        codes, scale = quantize_weight(torch.randn(n, k), scheme.weight.granularity, scheme.weight.dtype)
        there = memory[: n * k].view(codes.dtype).view(n, k)
        there.copy_(codes)
        if count % 2:
            there = there.view(k, n).t()
        grid = scales[: scale.numel()].view(scale.shape).copy_(scale)
        x, weight = torch.randn(2, k), numerics.dequantize(there, grid, scheme.weight.granularity)
        out = torch.ops.hf_fp8.scaled_linear_inference(x, there, grid, None, None, scheme.text, "weight_only")
        assert torch.allclose(out, x @ weight.t(), rtol=1e-4, atol=1e-4)


def test_calls_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch, layer: QuantizedLinear) -> None:
    monkeypatch.setattr(prepared, "_MOST", 3)
    codes, scale, bias = layer.held_codes("weight"), layer.held_scale("weight"), layer.bias
    for n in range(1, 10):
        weight = Weight(codes[:n], scale[:n], bias[:n], layer.scheme)
        call = prepared.prepared(torch.ones(1, 64), weight, layer.scheme.text, "auto")
        assert call is not None and call.run.n == n and len(prepared._calls) <= 3


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias"])
def test_freed_memory(name: str, layer: QuantizedLinear) -> None:
    """As FSDP frees it between uses. Fake tensors have the same address, 0, and are not remembered."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        fake = QuantizedLinear(64, 40, layer.scheme, bias=True, bias_dtype=torch.float32)
        for _ in range(2):
            assert fake(torch.randn(3, 64)).shape == (3, 40)
    held = {"weight": layer.held_codes("weight"), "weight_scale": layer.held_scale("weight"), "bias": layer.bias}
    x = torch.randn(3, 64)
    held[name].untyped_storage().resize_(0)
    for call in (layer, lambda x: op(layer, x)):
        with torch.no_grad(), pytest.raises(hf_fp8.errors.InputError, match="was freed"):
            call(x)


def test_a_wrong_name_leaves_the_library_off() -> None:
    with native.use(None):
        with pytest.raises(hf_fp8.errors.KernelError), native.use("sse9"):
            pass
        assert native.why_not() is not None
    assert native.why_not() is None
