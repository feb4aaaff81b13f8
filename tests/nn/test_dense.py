"""Linears that stay in bfloat16 or float16, multiplied by the library of CPU kernels."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from support.build import IDS, error, load, logits, tensors
from torch import nn
from transformers import AutoModelForCausalLM

import hf_fp8
from hf_fp8 import FP8Config
from hf_fp8.formats import native
from hf_fp8.kernels import native as kernels
from hf_fp8.nn.dense import DenseLinear, adopt, release

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def no_units(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As on a CPU without units for 16-bit floats, whatever this one has."""
    monkeypatch.setattr(kernels, "has_bfloat16_units", lambda: False)
    kernels.why_not_dense.cache_clear()
    yield
    kernels.why_not_dense.cache_clear()


def linear(n: int, k: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(n + k)
    layer = nn.Linear(k, n, bias=bias, dtype=dtype).requires_grad_(False)
    adopt(layer)
    assert type(layer) is DenseLinear
    return layer


def exact(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 65), (130, 555), (64, 128), (16, 1030)])
@pytest.mark.parametrize("name", native.names()[0] if native.why_not() is None else [])
def test_products(name: str, n: int, k: int, dtype: torch.dtype) -> None:
    """Sums are float32: the result is that of float64, rounded once."""
    layer = linear(n, k, dtype, bias=n % 2 == 1)
    for m in (0, 1, 2, 7, 17, 40):
        x = torch.randn(m, k).to(dtype)
        direct = kernels.native.multiply(x, layer.weight, None, kernels.TENSOR, bias=layer.bias, dtype=torch.float32)
        assert error(direct, exact(layer, x)) < 1e-6 or not m
        assert torch.equal(layer(x), direct.to(dtype)) or error(layer(x), exact(layer, x)) < 4e-3


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_shapes_and_strides(dtype: torch.dtype) -> None:
    layer = linear(24, 40, dtype)
    x = torch.randn(3, 5, 80).to(dtype)[..., ::2]
    assert layer(x).shape == (3, 5, 24) and error(layer(x), exact(layer, x)) < 4e-3
    assert error(layer(x[0, 0]), exact(layer, x[0, 0])) < 4e-3
    layer.weight = nn.Parameter(torch.randn(40, 24).to(dtype).t(), requires_grad=False)  # not contiguous
    assert error(layer(x), exact(layer, x)) < 4e-3
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(x[..., :39])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_not_finite_is_visible(dtype: torch.dtype) -> None:
    layer = linear(20, 64, dtype, bias=False)
    with torch.no_grad():
        layer.weight[3, 5] = torch.nan
        layer.weight[4, 6] = torch.inf
        layer.weight[5] = 0
    for m in (1, 33):
        out = layer(torch.ones(m, 64, dtype=dtype))
        assert out[:, 3].isnan().all() and out[:, 4].isinf().all() and (out[:, 5] == 0).all()
        assert out[:, 6:].isfinite().all()
        assert layer(torch.full((m, 64), torch.nan, dtype=dtype)).isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [1, 33])
def test_gradients(m: int, dtype: torch.dtype) -> None:
    layer = linear(48, 72, dtype)
    given = torch.randn(m, 48).to(dtype)
    x = torch.randn(m, 72).to(dtype).requires_grad_()
    (layer(x) * given).sum().backward()
    assert error(x.grad, given.double() @ layer.weight.double()) < 4e-3
    (first,) = torch.autograd.grad((layer(x).float() ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.float().sum(), x)
    wanted = 2 * torch.ones(m, 72).double() @ layer.weight.double().t() @ layer.weight.double()
    assert error(second, wanted) < 2e-2


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_trained_weights(dtype: torch.dtype) -> None:
    """Of a whole model that is fine-tuned, or just called with gradients enabled."""
    layer = linear(48, 72, dtype)
    layer.requires_grad_()
    x, given = torch.randn(2, 9, 72).to(dtype), torch.randn(2, 9, 48).to(dtype)
    (layer(x) * given).sum().backward()
    rows, grads = x.double().flatten(0, 1), given.double().flatten(0, 1)
    assert layer.weight.grad is not None and layer.bias.grad is not None
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == dtype
    assert error(layer.weight.grad, grads.t() @ rows) < 4e-3 and error(layer.bias.grad, grads.sum(0)) < 4e-3
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    optimizer.step()
    assert error(layer(x), exact(layer, x)) < 4e-3


def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = linear(32, 64, torch.bfloat16), torch.randn(9, 64, dtype=torch.bfloat16)
    plain = copy.deepcopy(layer)
    release(plain)
    assert type(plain) is nn.Linear
    wanted = plain(x)
    calls = []
    monkeypatch.setattr(kernels, "times_dense", lambda *args, **kwargs: calls.append(args) or torch.zeros(9, 32))
    assert torch.equal(torch.vmap(layer)(x), wanted) or error(torch.vmap(layer)(x), wanted) < 4e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), wanted)
    with native.use(None):
        assert torch.equal(layer(x), wanted)
    assert layer.to("meta")(x.to("meta")).is_meta
    wide = copy.deepcopy(plain).float()
    adopt(wide)
    assert type(wide) is nn.Linear and calls == []


def test_compiled() -> None:
    layer, x = linear(32, 64, torch.bfloat16), torch.randn(3, 64, dtype=torch.bfloat16)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert error(found, exact(layer, x)) < 4e-3


def test_copies_and_pickles() -> None:
    layer, x = linear(32, 64, torch.bfloat16), torch.randn(3, 64, dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert type(other) is DenseLinear and torch.equal(other(x), layer(x))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_loaded_models(dtype: torch.dtype, fp8: Path, tmp_path: Path) -> None:
    """The lm_head of a model in 16 bits; files and the dequantized model are as without it."""
    model = AutoModelForCausalLM.from_pretrained(fp8, dtype=dtype)
    assert type(model.lm_head) is DenseLinear
    with native.use(None):
        wanted = logits(load(fp8, FP8Config(dequantize=True)))
    assert error(logits(model), wanted) < 2e-2
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, IDS.shape[1] + 3)
    model.save_pretrained(tmp_path)
    names = [name for name, tensor in tensors(fp8).items() if "lm_head" in name]
    assert all(torch.equal(tensors(tmp_path)[name], tensors(fp8)[name].to(dtype)) for name in names) and names
    hf_fp8.dequantize_model(model)
    assert type(model.lm_head) is nn.Linear
    dense = AutoModelForCausalLM.from_pretrained(fp8, dtype=dtype, quantization_config=FP8Config(dequantize=True))
    assert type(dense.lm_head) is nn.Linear
    assert type(AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.float32).lm_head) is nn.Linear


def test_adapters(fp8: Path) -> None:
    """LoRA on an lm_head in bfloat16: the gradients of the dense model."""
    peft = pytest.importorskip("peft")
    found = []
    for config in (FP8Config(), FP8Config(dequantize=True)):
        model = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.bfloat16, quantization_config=config)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
        model(IDS, labels=IDS).loss.backward()
        found.append({name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) >= 4
    assert all(error(found[0][name], found[1][name]) < 5e-2 for name in found[0])


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "INT8"])
def test_they_can_be_quantized(scheme: str) -> None:
    """As plain Linears are."""
    layer, x = linear(32, 64, torch.bfloat16), torch.randn(3, 64, dtype=torch.bfloat16)
    quantized = hf_fp8.quantize_model(copy.deepcopy(layer), scheme)
    assert isinstance(quantized, hf_fp8.QuantizedLinear) and error(quantized(x), layer(x)) < 5e-2


def test_new_tokens(fp8: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.bfloat16)
    before = model.config.vocab_size
    model.resize_token_embeddings(before + 8)
    assert logits(model).shape[-1] == before + 8
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert error(logits(again), logits(model)) < 1e-2


def test_what_is_not_adopted() -> None:
    """Layers of other libraries: packed weights instead of `weight`, a forward of their own, subclasses."""
    packed, own, buffered = (nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(3))
    del packed.weight
    packed.weight_packed = nn.Parameter(torch.zeros(8, 1))
    own.forward = lambda x: x  # type: ignore[method-assign]
    buffered.register_buffer("weight_scale", torch.ones(1))
    other = nn.LazyLinear(8, dtype=torch.bfloat16)
    model = nn.ModuleList([packed, own, buffered, other, nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16)])
    adopt(model)
    assert [type(layer) is DenseLinear for layer in model] == [False] * 5 + [True]


def test_biases_and_weights_that_are_views() -> None:
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    for make in (
        lambda b: torch.ones(1, dtype=b.dtype).expand(33),
        lambda b: torch.arange(66, dtype=b.dtype)[::2],
        lambda b: torch._neg_view(b),
    ):
        layer = linear(33, 64, torch.bfloat16)
        layer.bias = nn.Parameter(make(layer.bias.detach()), requires_grad=False)
        assert error(layer(x), exact(layer, x)) < 4e-3
        quantized = hf_fp8.quantize_model(nn.Linear(64, 33, dtype=torch.bfloat16), "FP8_DYNAMIC", backend="weight_only")
        plain = quantized.to_linear(torch.float64)
        quantized.bias = layer.bias
        for _ in range(2):  # the second call may be prepared
            with torch.no_grad():
                wanted = nn.functional.linear(x.double(), plain.weight, layer.bias.double())
                assert error(quantized(x), wanted) < 4e-3
    layer = linear(33, 64, torch.bfloat16)
    layer.weight = nn.Parameter(torch._neg_view(layer.weight.detach()), requires_grad=False)
    assert error(layer(x), exact(layer, x)) < 4e-3
    with pytest.raises(RuntimeError):  # of torch: no crash
        layer.weight.untyped_storage().resize_(0)
        layer(x)


def test_gradients_as_torch_computes_them() -> None:
    """Batched, in compiled backward passes, and with weights that change where they are not needed."""
    layer, x = linear(24, 40, torch.bfloat16), torch.randn(3, 40, dtype=torch.bfloat16).requires_grad_()
    plain = copy.deepcopy(layer)
    release(plain)
    given = torch.randn(5, 3, 24, dtype=torch.bfloat16)
    found, wanted = (torch.autograd.grad(each(x), x, given, is_grads_batched=True)[0] for each in (layer, plain))
    assert error(found, wanted) < 1e-2
    found, wanted = (torch.autograd.functional.jacobian(each, x.detach(), vectorize=True) for each in (layer, plain))
    assert error(found, wanted) < 1e-2
    with torch._dynamo.compiled_autograd._enable(lambda module: torch.compile(module, backend="eager")):
        (found,) = torch.autograd.grad(layer(x).float().pow(2).sum(), x)
    (wanted,) = torch.autograd.grad(plain(x).float().pow(2).sum(), x)
    assert error(found, wanted) < 2e-2
    layer.requires_grad_()
    out = layer(x.detach())
    with torch.no_grad():
        layer.weight.add_(1)
    out.sum().backward()
    assert error(layer.weight.grad, x.detach().double().sum(0).expand(24, 40)) < 4e-3


def test_outputs_and_forwards_outlive_it() -> None:
    layer, x = linear(24, 40, torch.bfloat16), torch.randn(3, 40, dtype=torch.bfloat16)
    layer(x).detach_()
    assert layer(x)._base is None
    held = layer.forward
    wanted = layer(x)
    release(layer)
    assert error(held(x), wanted) < 1e-2
    with torch.autocast("cpu"):
        assert error(held(x), wanted) < 1e-2
    nested = torch.nested.nested_tensor([torch.randn(2, 40, dtype=torch.bfloat16)])
    adopt(layer)
    assert layer(nested)[0].shape == (2, 24)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compiled_without_gradients(dtype: torch.dtype) -> None:
    """One op where nothing is differentiated, `nn.Linear` elsewhere; what multiplies is chosen when it runs."""
    layer = linear(33, 64, dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((1, 64), (64,), (2, 3, 64), (0, 64)):
            x = torch.randn(shape).to(dtype)
            assert torch.equal(compiled(x), layer(x)) and compiled(x).shape == (*shape[:-1], 33)
            torch.compiler.reset()  # a graph for each number of dimensions
        x = torch.randn(64, 5).t().to(dtype)
        assert torch.equal(compiled(x), layer(x))
        with native.use(None):
            assert error(compiled(x), exact(layer, x)) < 1e-2
        with torch.autocast("cpu", dtype):
            assert error(compiled(x.float()), exact(layer, x)) < 1e-2
    x = torch.randn(3, 64).to(dtype).requires_grad_()
    compiled(x).sum().backward()
    assert error(x.grad, layer.weight.sum(0).expand(3, 64)) < 1e-2


class Tripled(torch.Tensor):
    """A weight as other libraries have them: it says itself what `F.linear` is."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]  # type: ignore[attr-defined]
        out = func(*plain, **(kwargs or {}))
        return 3 * out if func is nn.functional.linear else out


def test_compiled_with_other_tensors() -> None:
    """`nn.Linear`, as before: the op is for plain tensors."""
    layer, x = linear(24, 40, torch.bfloat16), torch.randn(3, 40, dtype=torch.bfloat16)
    nested = torch.nested.nested_tensor([torch.randn(2, 40), torch.randn(5, 40)], dtype=torch.bfloat16, layout=torch.jagged)
    with torch.no_grad():
        found = torch.compile(layer, backend="aot_eager")(nested).values()
        assert error(found, exact(layer, nested.values())) < 1e-2
        wanted = 3 * exact(layer, x)
        layer._parameters["weight"] = layer.weight.detach().as_subclass(Tripled)  # type: ignore[assignment, arg-type]
        torch.compiler.reset()
        assert error(torch.compile(layer, backend="eager")(x), wanted) < 1e-2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forward_mode_gradients_in_compiled_code(backend: str) -> None:
    """They are computed without grad mode, too. A tangent that is lost would be a gradient of zero."""
    layer, x, tangent = linear(24, 40, torch.bfloat16), *torch.randn(2, 3, 40).bfloat16()
    wanted = tangent.double() @ layer.weight.double().t()
    with torch.no_grad():
        found = torch.compile(lambda x, t: torch.func.jvp(layer, (x,), (t,))[1], backend=backend)(x, tangent)
        assert error(found, wanted) < 1e-2
        torch.compiler.reset()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            out = torch.compile(layer, backend=backend)(dual)
            assert error(torch.autograd.forward_ad.unpack_dual(out).tangent, wanted) < 1e-2
            quantized = hf_fp8.quantize_model(nn.Linear(40, 24, dtype=torch.bfloat16), "FP8_DYNAMIC")
            for call in (quantized, torch.compile(quantized, backend=backend)):
                with pytest.raises(Exception, match="forward-mode gradients"):
                    call(dual)


def test_zeros_without_memory() -> None:
    zeros = torch._efficientzerotensor((3, 40), dtype=torch.bfloat16)
    quantized = hf_fp8.quantize_model(nn.Linear(40, 24, dtype=torch.bfloat16), "FP8_DYNAMIC").requires_grad_(False)
    for layer in (linear(24, 40, torch.bfloat16), quantized):
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(layer(zeros), layer.bias.expand(3, 24))
