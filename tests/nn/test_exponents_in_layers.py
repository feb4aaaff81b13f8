"""A layer whose scales are exponents: trained towards, compiled, exported, prepared, saved, with its original."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import hf_fp8
from hf_fp8.errors import StateDictError, UnsupportedError
from hf_fp8.formats import numerics
from hf_fp8.formats.exponents import EXPONENTS, exponents_of, scale_values
from hf_fp8.formats.scheme import FP8_BLOCK, MXFP8, Scheme
from hf_fp8.nn.linear import QuantizedLinear

A16 = Scheme(MXFP8.weight)
X = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))


def layer(dtype: torch.dtype = torch.uint8) -> QuantizedLinear:
    torch.manual_seed(0)
    found = hf_fp8.quantize_model(torch.nn.Linear(128, 64), A16)
    assert isinstance(found, QuantizedLinear)
    found.weight_scale = torch.nn.Parameter(found.weight_scale.detach().view(dtype), requires_grad=False)
    return found


def test_training_towards_it() -> None:
    model = hf_fp8.prepare_qat(torch.nn.Sequential(torch.nn.Linear(128, 64)), "MXFP8")
    wanted = model(X)
    wanted.sum().backward()
    assert float(model[0].weight.grad.norm()) > 0
    converted = hf_fp8.convert_qat(model)
    assert converted[0].scheme == MXFP8
    assert converted[0].weight_scale.dtype == torch.uint8
    assert torch.equal(converted(X), wanted)


@pytest.mark.parametrize("dtype", EXPONENTS)
def test_compiled_and_exported(dtype: torch.dtype) -> None:
    held = layer(dtype)
    wanted = held(X)
    assert torch.equal(torch.compile(held, fullgraph=True, backend="aot_eager")(X), wanted)
    assert torch.equal(torch.export.export(held, (X,)).module()(X), wanted)
    assert held.weight_scale.dtype == dtype


@pytest.mark.parametrize("dtype", EXPONENTS)
def test_a_call_is_prepared_and_seen_to_be_out_of_date(dtype: torch.dtype) -> None:
    held = layer(dtype)
    with torch.no_grad():
        before = held(X[:1])
        if held._prepared is not None:  # the library of CPU kernels is there
            assert held._prepared.takes(held, X[:1])
        held.weight_scale.view(torch.uint8).add_(1)
        assert held._prepared is None or not held._prepared.takes(held, X[:1])
        assert torch.allclose(held(X[:1]) - held.bias, 2 * (before - held.bias), atol=1e-6)


def test_floats_that_kernels_get_are_not_saved() -> None:
    held = layer()
    held(X)
    assert held.held_scale("weight").dtype == torch.float32
    buffer = io.BytesIO()
    torch.save(held, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    for other in (again, copy.deepcopy(held)):
        assert not any("derived" in name for name in vars(other))
        assert torch.equal(other(X), held(X))


def test_made_in_inference_mode_and_trained_through_later() -> None:
    with torch.inference_mode():
        held = layer()
        held(X)
    x = X.clone().requires_grad_()
    held(x).sum().backward()
    assert x.grad is not None
    assert float((x.grad - held.dequantized_weight().sum(0)).norm() / x.grad.norm()) <= 1e-6


@pytest.mark.parametrize("dtype", EXPONENTS)
def test_state_dicts(dtype: torch.dtype) -> None:
    """The dtype of a scale is that of the state dict; what was cast away from codes is refused as for other scales."""
    held, other = layer(dtype), layer()
    other.load_state_dict(held.state_dict())
    assert other.weight_scale.dtype == dtype
    assert torch.equal(other(X), held(X))
    floats = {**held.state_dict(), "weight_scale": scale_values(held.weight_scale.detach())}
    other.load_state_dict(floats)
    assert other.weight_scale.dtype == torch.float32
    assert torch.equal(other(X), held(X))
    with pytest.raises(StateDictError, match="without its"):
        other.load_state_dict({"weight": held.state_dict()["weight"], "bias": held.bias}, strict=False)


def test_reading_the_weight_as_values() -> None:
    for dtype in EXPONENTS:
        held = layer(dtype)
        assert torch.equal(held.weight.float(), held.dequantized_weight())
        assert torch.equal(
            held.weight[3:5] * 1.0, held.dequantized_weight(torch.float32)[3:5].to((held.weight[3:5] * 1.0).dtype)
        )


def test_the_original_is_quantized_again() -> None:
    held = hf_fp8.quantize_model(torch.nn.Linear(128, 64), "MXFP8", originals="keep")
    before = held.weight_scale.clone()
    with torch.no_grad():
        held.original.mul_(4.0)
    hf_fp8.requantize_model(held)
    assert held.weight_scale.dtype == torch.uint8
    assert torch.equal(held.weight_scale, before + 2)


def test_blocks_quantized_gradients_and_dense() -> None:
    torch.manual_seed(0)
    held = hf_fp8.quantize_model(torch.nn.Linear(256, 128), FP8_BLOCK, backward="quantized", backend="weight_only")
    scale = exponents_of(held.weight_scale.detach(), torch.float8_e8m0fnu)
    held.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    x = torch.randn(3, 256, requires_grad=True)
    held(x).sum().backward()
    dense = held.to_dense(torch.float32)
    assert torch.equal(dense.weight, numerics.dequantize(held.weight, scale, FP8_BLOCK.weight.granularity))
    assert x.grad is not None
    assert float((x.grad - dense.weight.sum(0)).norm() / x.grad.norm()) <= 0.05


def test_a_scale_of_another_dtype_is_refused() -> None:
    held = layer()
    held.weight_scale = torch.nn.Parameter(held.weight_scale.detach().to(torch.int16), requires_grad=False)
    with pytest.raises(UnsupportedError, match="float8_e8m0fnu or uint8"):
        held(X)
