"""Gradients through quantized layers: against the dequantized ones, in every mode that training runs in, and what they keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.build import IDS, error, load, sqnr, tiny_llama, write
from support.kernels import SCHEMES as ALL
from support.moe import gpt_oss, mixtral, qwen3_moe
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from hf_fp8 import FP8Config, QuantizedLinear, Scheme, dequantize_model
from hf_fp8.errors import InputError
from hf_fp8.formats import numerics
from hf_fp8.formats.code_types import FP8, INT8
from hf_fp8.formats.scheme import FP8_BLOCK, FP8_DYNAMIC, FP8_WEIGHT_ONLY, INT8_DYNAMIC, ROW, TENSOR, Granularity
from hf_fp8.formats.weights import quantize_weight
from hf_fp8.kernels import torch_fp8 as torch_mm
from hf_fp8.nn.grouped import scaled_grouped_linear

SCHEMES = {name: scheme for name, scheme in ALL.items() if scheme.weight.dtype == FP8}
# Gradients rounded to 8 bits per token, dB: E4M3 31.5 to 31.8 and int8 41 to 43.5 were measured on normal values.
E4M3_DB, INT8_DB = 31.0, 40.0


def layer(scheme: Scheme, n: int = 72, k: int = 200, bias: bool = True, **options: Any) -> QuantizedLinear:
    torch.manual_seed(0)
    module = QuantizedLinear.from_linear(nn.Linear(k, n, bias=bias), scheme, **options)
    if module.needs_calibration:
        module.input_scale.data.fill_(0.01)
        module.see_calibration()
    return module


def grad_of(call: Any, x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    x = x.detach().clone().requires_grad_()
    call(x).backward(seed)
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("m", [0, 1, 17])
@pytest.mark.parametrize("name", SCHEMES)
def test_those_of_the_dequantized_layer(name: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(SCHEMES[name], backend="weight_only")
    dense = module.to_linear(torch.float32)
    x, seed = torch.randn(m, 200), torch.randn(m, 72)
    for elements in (2**21, 72 * 64):  # all at once, and in pieces of columns
        monkeypatch.setattr(torch_mm, "CPU_ELEMENTS", elements)
        found, wanted = grad_of(module, x, seed), grad_of(dense, x, seed)
        assert m == 0 or error(module(x), dense(x)) < 1e-6
        assert m == 0 or error(found, wanted) < 1e-6
        assert error(module.bias.grad, dense.bias.grad) < 1e-6 or m == 0
        module.bias.grad = dense.bias.grad = None


@pytest.mark.parametrize("backend", ["scaled_mm", "weight_only"])
@pytest.mark.parametrize("name", SCHEMES)
def test_rounding_inputs_changes_nothing_about_them(name: str, backend: str) -> None:
    """The gradient is that of the layer that it stands for, whatever is rounded on the way forward."""
    module = layer(SCHEMES[name], backend=backend)
    seed = torch.randn(5, 72)
    assert error(grad_of(module, torch.randn(5, 200), seed), seed @ module.dequantized_weight()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_strides_and_zeros(dtype: torch.dtype) -> None:
    module = layer(FP8_BLOCK, backend="weight_only", bias=False)
    wide = torch.randn(2, 400, 3, dtype=dtype).transpose(1, 2)[..., ::2].detach()
    x, seed = wide.requires_grad_(), torch.randn(3, 2, 72, dtype=dtype).transpose(0, 1)
    module(x).backward(seed)
    assert x.grad is not None and x.grad.dtype == dtype
    wanted = seed.float() @ module.dequantized_weight()
    assert error(x.grad.float(), wanted) < {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}[dtype]
    assert torch.equal(grad_of(module, torch.randn(3, 200), torch.zeros(3, 72)), torch.zeros(3, 200))
    broken = torch.zeros(3, 72)
    broken[1, 4] = torch.nan
    found = grad_of(module, torch.randn(3, 200), broken)
    assert found[1].isnan().all() and not found[[0, 2]].any()


@pytest.mark.parametrize("name", [*SCHEMES, "int8"])
def test_rounded_gradients(name: str) -> None:
    """backward="quantized": E4M3 or int8 per token; exact where the scales of a weight cannot be turned (groups)."""
    scheme = SCHEMES.get(name, INT8_DYNAMIC)
    module = layer(scheme, 304, 200, bias=False, backend="int8" if name == "int8" else "scaled_mm")
    module.backward = "quantized"
    seed = torch.randn(33, 304) * torch.logspace(-8, 2, 33).unsqueeze(1)  # each token has its own scale
    x = torch.randn(33, 200, requires_grad=True)
    out = torch.ops.hf_fp8.times_weight(seed, module.weight, module.weight_scale, scheme.text, False, "quantized")
    wanted = seed @ module.dequantized_weight()
    rows = [sqnr(a, b) for a, b in zip(out, wanted, strict=True)]
    turned = scheme.weight.granularity.rows != 1 or scheme.weight.granularity == ROW
    assert min(rows) > ((INT8_DB if name == "int8" else E4M3_DB) - 1.5 if turned else 100), min(rows)
    assert sqnr(out, wanted) > ((INT8_DB if name == "int8" else E4M3_DB) - 1.5 if turned else 100)
    if not module.scheme.has_static_input:
        module(x).backward(seed)
        assert torch.equal(x.grad, out)
    for edge in (torch.zeros(3, 304), torch.zeros(0, 304)):
        assert not torch.ops.hf_fp8.times_weight(
            edge, module.weight, module.weight_scale, scheme.text, False, "quantized"
        ).any()


@pytest.mark.parametrize("scheme", [FP8_DYNAMIC, FP8_BLOCK, INT8_DYNAMIC], ids=str)
def test_gradients_of_gradients(scheme: Scheme) -> None:
    module = layer(scheme, 12, 20)

    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.hf_fp8.scaled_linear(
            x, module.weight, module.weight_scale, None, None, Scheme(scheme.weight).text, "weight_only", "exact"
        )

    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x,)) and torch.autograd.gradgradcheck(call, (x,))


@pytest.mark.parametrize("backend", ["weight_only", "scaled_mm", "int8"])
def test_nothing_is_kept_but_references(backend: str, fp8: Path) -> None:
    """Of a step over adapters: per linear its own codes and scale, and no float of a weight's or an input's size."""
    model = load(fp8, FP8Config(backend=backend))
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    own = {p.data_ptr() for m in linears for p in m.parameters(recurse=False)}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    for module in linears:
        x = torch.randn(5, module.in_features, requires_grad=True)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x)
        assert kept and {t.data_ptr() for t in kept} <= own


def test_weights_have_none_and_say_what_to_do() -> None:
    module = layer(FP8_DYNAMIC)
    module.weight.requires_grad_(True)
    with pytest.raises(InputError, match="Train adapters"):
        module(torch.randn(2, 200)).sum().backward()


def test_a_layer_that_is_used_twice() -> None:
    module = layer(FP8_DYNAMIC, 200, 200, backend="scaled_mm")
    module.backend = "weight_only"
    dense = module.to_linear(torch.float32)
    x, seed = torch.randn(4, 200), torch.randn(4, 200)
    assert (
        error(grad_of(lambda x: module(module(x).relu()), x, seed), grad_of(lambda x: dense(dense(x).relu()), x, seed)) < 1e-6
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["weight_only", "scaled_mm", "int8"])
def test_checkpointed(backend: str, reentrant: bool) -> None:
    scheme = INT8_DYNAMIC if backend == "int8" else FP8_DYNAMIC
    module = nn.Sequential(layer(scheme, 200, 200, backend=backend), nn.GELU(), layer(scheme, backend=backend))
    x, seed = torch.randn(6, 200), torch.randn(6, 72)
    wanted = grad_of(module, x, seed)
    assert torch.equal(grad_of(lambda x: checkpoint(module, x, use_reentrant=reentrant), x, seed), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    module = layer(FP8_DYNAMIC, backend="weight_only")
    dense = module.to_linear(torch.float32)
    x, seed = torch.randn(6, 200), torch.randn(6, 72)
    found = []
    for call in (module, dense):
        y = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            out = call(y)
            assert out.dtype == dtype
        out.backward(seed.to(dtype))
        assert y.grad is not None and y.grad.dtype == torch.float32
        found.append(y.grad)
    assert error(found[0], found[1]) < {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("backward", ["exact", "quantized"])
@pytest.mark.parametrize("backend", ["weight_only", "scaled_mm", "int8"])
def test_compiled(backend: str, backward: str, fp8: Path) -> None:
    torch.compiler.reset()
    mlp = load(fp8, FP8Config(backend=backend, backward=backward)).model.layers[0].mlp
    assert {m.backward for m in mlp.modules() if isinstance(m, QuantizedLinear)} == {backward}
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for rows in (1, 9, 24):
        x, seed = torch.randn(rows, 64), torch.randn(rows, 64)
        assert error(grad_of(compiled, x, seed), grad_of(mlp, x, seed)) < 1e-6
    torch.compiler.reset()


def adapted(path: Path, config: FP8Config | None, **options: Any) -> Any:
    """A model with LoRA whose B is not zero; without a config the dequantized one."""
    model = load(path, config or FP8Config(dequantize=True))
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options))
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


def grads(model: Any, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**(inputs or {"input_ids": IDS}), labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


WEIGHTS = {"channel": ROW, "tensor": TENSOR, "block": Granularity(32, 32), "group": Granularity(1, 32)}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_of_adapters(weight: str, tmp_path: Path) -> None:
    """Those of every LoRA matrix in a model, and of `inputs_embeds`, as through the dequantized float32 model."""
    write(tiny_llama(), tmp_path, weight=WEIGHTS[weight])
    ours, dense = adapted(tmp_path, FP8Config(backend="weight_only")), adapted(tmp_path, None)
    found, wanted = grads(ours), grads(dense)
    assert len(found) == len(wanted) == 28
    assert max(error(found[name], wanted[name]) for name in wanted) < 1e-5
    embeds = []
    for model in (ours, dense):
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=x, labels=IDS, use_cache=False).loss.backward()
        embeds.append(x.grad)
    assert error(*embeds) < 1e-5


# dB against the dequantized float32 model, over all LoRA gradients of the small Llama together: inputs rounded in all 14
# layers. Measured: 21.8, 21.6, 21.2, 30.2.
ROUNDED = {"channel x token": 20, "static": 20, "quantized backward": 19.5, "int8": 28.5}


@pytest.mark.parametrize("case", ROUNDED)
def test_of_adapters_with_rounded_inputs(case: str, tmp_path: Path) -> None:
    from support.build import STATIC_TENSOR

    write(tiny_llama(), tmp_path, **({"weight": TENSOR, "inputs": STATIC_TENSOR} if case == "static" else {}))
    backward = "quantized" if "backward" in case else "exact"
    ours = adapted(tmp_path, FP8Config(backend="int8" if case == "int8" else "scaled_mm", backward=backward))
    found, wanted = grads(ours), grads(adapted(tmp_path, None))
    whole = [torch.cat([part[name].flatten() for name in sorted(wanted)]) for part in (found, wanted)]
    assert sqnr(*whole) > ROUNDED[case]


@pytest.mark.parametrize("reentrant", [False, True])
def test_of_a_checkpointed_model(reentrant: bool, fp8: Path) -> None:
    model = adapted(fp8, FP8Config(backend="scaled_mm")).train()
    wanted = grads(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = grads(model)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("family", [mixtral, qwen3_moe, gpt_oss])
@pytest.mark.parametrize("reentrant", [False, True])
def test_of_a_checkpointed_mixture(family: Any, reentrant: bool, tmp_path: Path) -> None:
    family().save_pretrained(tmp_path)
    config = FP8Config("FP8_DYNAMIC", backend="scaled_mm", experts="fp8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, **options)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    wanted = grads(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = grads(model)
    assert found.keys() == wanted.keys() and len(found) >= 12
    assert all(error(found[name], wanted[name]) < 1e-6 for name in wanted)


@pytest.mark.parametrize("backend", ["weight_only", "auto"])
def test_functions_of_torch_func(backend: str) -> None:
    module = layer(FP8_WEIGHT_ONLY, backend=backend)
    dense, x, func = module.to_linear(torch.float32), torch.randn(5, 200), torch.func

    def both(made: Callable[[Any], Any], at: torch.Tensor = x) -> float:
        return error(made(module)(at), made(dense)(at))

    def squares(call: Any) -> Any:
        return lambda given: call(given).square().sum()

    assert both(lambda call: func.grad(squares(call))) < 1e-6
    assert both(lambda call: func.jacrev(call)) < 1e-6
    assert both(lambda call: func.vmap(func.grad(squares(call)))) < 1e-6
    assert both(lambda call: func.grad(squares(func.vmap(call)))) < 1e-6
    assert both(lambda call: func.jacrev(func.jacrev(squares(call))), x[0]) < 1e-6
    assert both(lambda call: lambda at: func.vjp(call, at)[1](call(at))[0]) < 1e-6
    of_bias = [func.grad(lambda bias, m=m: func.functional_call(m, {"bias": bias}, x).square().sum()) for m in (module, dense)]
    assert error(of_bias[0](module.bias.detach()), of_bias[1](module.bias.detach())) < 1e-6


def test_functions_of_torch_func_through_experts() -> None:
    weight, x, ids = torch.randn(2, 8, 16).to(FP8), torch.randn(3, 16), torch.tensor([0, 1, 1])
    found = torch.func.grad(
        lambda x: scaled_grouped_linear(x, weight, torch.ones(2, 8, 1), FP8_WEIGHT_ONLY, ids).square().sum()
    )(x)
    wanted = torch.func.grad(lambda x: torch.einsum("sk,snk->sn", x, weight.float()[ids]).square().sum())(x)
    assert error(found, wanted) < 1e-6


def test_experts_have_no_second_derivative_and_say_so() -> None:
    weight = torch.randn(2, 8, 16).to(FP8)
    x = torch.randn(3, 16, requires_grad=True)
    out = scaled_grouped_linear(x, weight, torch.ones(2, 8, 1), FP8_DYNAMIC, torch.tensor([0, 1, 1]))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(InputError, match="gradients of gradients"):
        grad.sum().backward()


def test_int8_codes_of_a_group_are_multiplied_exactly() -> None:
    """No scheme of ours has them; the op takes what it is given."""
    scheme = Scheme(numerics.TensorScheme(Granularity(1, 32), dtype=INT8))
    codes, scale = quantize_weight(torch.randn(8, 64), Granularity(1, 32), INT8)
    seed = torch.randn(3, 8)
    out = torch.ops.hf_fp8.times_weight(seed, codes, scale, scheme.text, False, "quantized")
    assert error(out, seed @ numerics.dequantize(codes, scale, Granularity(1, 32))) < 1e-6


def test_a_config_that_means_nothing() -> None:
    from hf_fp8.errors import ConfigError

    with pytest.raises(ConfigError, match="exact, quantized"):
        FP8Config(backward="int4")


def test_a_model_that_is_dense_again_trains_its_weights(fp8: Path) -> None:
    model = dequantize_model(load(fp8), torch.float32)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_weights_beyond_the_range_of_float16() -> None:
    """Their gradients are not, if the gradients of the outputs are small."""
    linear = nn.Linear(64, 72, bias=False)
    linear.weight.data.mul_(1e6)
    module = QuantizedLinear.from_linear(linear, FP8_DYNAMIC, backend="weight_only")
    x, seed = (torch.randn(4, 64) * 1e-4).half(), (torch.randn(4, 72) * 1e-4).half()
    assert error(grad_of(module, x, seed).float(), seed.float() @ module.dequantized_weight()) < 1e-3
