"""Quantization-aware training of experts of MoE models: what is trained is what is quantized, bit for bit; gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from support import moe
from support.build import error
from transformers import AutoModelForCausalLM

import hf_fp8
from hf_fp8 import FP8Config, Granularity, Scheme, convert_qat, prepare_qat
from hf_fp8.errors import ConfigError, ScaleError, UnsupportedError
from hf_fp8.formats.code_types import INT4
from hf_fp8.formats.scheme import SCHEMES, W4A16_FBGEMM, TensorScheme
from hf_fp8.kernels.torch_fp8 import fake_quantize
from hf_fp8.nn.experts import QuantizedExperts
from hf_fp8.nn.fake_quantized import fake_quantized
from hf_fp8.nn.fake_quantized_experts import FakeQuantizedExperts

IDS = torch.arange(1, 20).unsqueeze(0)
FAMILIES = {**moe.MOE, "gemma4": moe.gemma4, **moe.TRANSPOSED}


def groups_of(name: str, size: int) -> Scheme:
    """A named scheme with smaller groups, for small models."""
    scheme = SCHEMES[name]
    w = scheme.weight
    weight = TensorScheme(Granularity(1, size), dtype=w.dtype, has_zero_points=w.has_zero_points, recipe=w.recipe)
    return Scheme(weight, scheme.input)


EVERY = {
    **{name: groups_of(name, 8) for name in ("W4A16", "W4A16_ASYM", "W4A8", "W4AFP8", "W4AFP8_FBGEMM")},
    **{name: SCHEMES[name] for name in ("FP8_DYNAMIC", "FP8_WEIGHT_ONLY", "FP8_TENSOR", "INT8", "INT8_WEIGHT_ONLY")},
    "blocks": Scheme(TensorScheme(Granularity(16, 16)), TensorScheme(Granularity(1, 16), dynamic=True)),
}


def made(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A small model, loaded from files: casts round the frequencies of rotary embeddings, too."""
    FAMILIES[family]().save_pretrained(folder / family)
    return AutoModelForCausalLM.from_pretrained(folder / family, dtype=dtype)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def train(model: Any, steps: int = 3, rate: float = 1.0) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def of(model: Any, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def cases() -> list[Any]:
    packed = ("W4A16", "W4A16_ASYM", "W4A8", "W4AFP8")
    return [
        pytest.param(family, name, id=f"{family}-{name}")
        for family in FAMILIES
        for name in EVERY
        if family == "qwen3_moe" or (name in ("FP8_DYNAMIC", "INT8") or (name in packed[::3] and family not in moe.TRANSPOSED))
    ]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("family", "name"), cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converted_is_what_was_trained(family: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(family, tmp_path, dtype)
    names = {key: tensor.shape for key, tensor in model.named_parameters()}
    prepare_qat(model, EVERY[name])
    assert {key: tensor.shape for key, tensor in model.named_parameters()} == names
    experts = of(model, FakeQuantizedExperts)
    before = [{key: p.clone() for key, p in one.named_parameters(recurse=False)} for one in experts]
    assert experts
    losses = train(model, rate=0.1 if family == "gemma4" else 1.0)
    assert losses[-1] < losses[0]
    for one, old in zip(experts, before, strict=True):
        assert all(not torch.equal(getattr(one, p.name), old[p.name]) for p in one.projections)
    wanted = logits(model)
    assert convert_qat(model) is model
    assert len(of(model, QuantizedExperts)) == len(experts) and not of(model, FakeQuantizedExperts)
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "saved")
    config = FP8Config(backend="scaled_mm", experts="fp8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype, quantization_config=config)
    assert torch.equal(logits(again), wanted)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_gradients_pass_the_rounding(family: str, name: str) -> None:
    """Those of the host's experts with quantized weights, and inputs that are quantized with straight-through gradients."""
    model = FAMILIES[family]().double()
    if family != "qwen3_moe" and EVERY[name].weight.packed:
        pytest.skip("packed stacks that are transposed in files are not supported")
    prepare_qat(model, EVERY[name], backend="weight_only")
    experts = of(model, FakeQuantizedExperts)[0]
    twin: Any = copy.deepcopy(experts.to_float())
    if family != "llama4":
        twin.config._experts_implementation = "eager"  # the others lack float64
    for projection in experts.projections:
        with torch.no_grad():
            rows = experts.rows(projection)
            dense = torch.stack([
                torch.cat([fake_quantized(part, EVERY[name].weight) for part in one.chunk(projection.parts)]) for one in rows
            ])  # fmt: skip
        if projection is experts.first and not experts.layout.is_concatenated and not experts.interleaved:
            dense = torch.stack(dense.chunk(2, 1), 2).flatten(1, 2)
        if experts.layout.is_transposed:
            dense = dense.transpose(1, 2)
        getattr(twin, projection.name).data.copy_(dense)
    n_experts, _, hidden = experts.first.shape
    generator = torch.Generator().manual_seed(0)
    count = 4 * n_experts if family == "llama4" else 7
    x = torch.randn(count, hidden, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(n_experts, generator=generator)[:2] for _ in range(count)])
    weights = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    arguments = () if family == "llama4" else (ids, weights)
    found, wanted = ([], [])
    for module, into in ((experts, found), (twin, wanted)):
        given = x.clone().requires_grad_(True)
        out = module(given, *arguments)
        out.square().sum().backward()
        into += [out, given.grad, *(p.grad for p in module.parameters(recurse=False))]
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and error(a, b) < 1e-9


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "W4AFP8", "INT8", "FP8_TENSOR"])
def test_gradients_see_quantized_inputs(name: str) -> None:
    model = moe.qwen3_moe().float()
    prepare_qat(model, EVERY[name], filter_fn=lambda called, _: called.endswith("experts"))
    experts, scheme = of(model, FakeQuantizedExperts)[0], EVERY[name]
    hidden = experts.second.shape[1]
    x, ids = torch.randn(6, hidden), torch.zeros(6, 1, dtype=torch.long)
    stack = experts.first
    y = experts.rows(stack)[0]
    routed = hf_fp8.nn.grouped.route(ids, stack.shape[0], sort=True)[0]
    out = experts._multiply(stack, x, routed)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, getattr(experts, stack.name), grad)[0]
    rounded = fake_quantize(x, None, scheme).x
    assert not torch.equal(rounded, x)
    assert error(found[0], grad.t() @ rounded) < 1e-6 and not found[1:].any() and y.shape == found[0].shape


@pytest.mark.parametrize("how", ["", "nested", "another root"])
def test_experts_with_a_scheme_of_their_own(how: str, tmp_path: Path) -> None:
    experts, others = EVERY["W4A16"], SCHEMES["FP8_DYNAMIC"]
    model = made("qwen3_moe", tmp_path)
    if how == "another root":
        prepare_qat(model.model, {experts: [r"re:^layers\.1\.mlp\.experts.*"], others: [r"re:^layers.*self_attn.*"]})
    else:
        prepare_qat(model, {experts: [r"re:^model\.layers\.1\.mlp\.experts.*"], others: ["re:.*self_attn.*"]})
    losses = train(model)
    assert losses[-1] < losses[0]
    wanted = logits(model)
    convert_qat(torch.nn.ModuleDict({"inner": model}) if how == "nested" else model)
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "saved")
    config = FP8Config(backend="scaled_mm", experts="fp8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32", quantization_config=config)
    assert torch.equal(logits(again), wanted)
    assert [m.first.scheme for m in of(again, QuantizedExperts)] == [experts]


def test_what_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    for options, said in (
        ({"scheme": "FP8"}, "not trained for static input scales"),
        ({"scheme": "FP8_DYNAMIC", "experts": "dequantize"}, ""),
    ):
        caplog.clear()
        model = moe.qwen3_moe()
        prepare_qat(model, **options)  # type: ignore[arg-type]
        assert not of(model, FakeQuantizedExperts) and said in caplog.text
        train(model, 1)
        wanted = logits(model)
        convert_qat(model)
        assert not of(model, QuantizedExperts) and torch.equal(logits(model), wanted)


@pytest.mark.parametrize("scheme", ["FP8", W4A16_FBGEMM])
def test_experts_alone_that_cannot_be_trained(scheme: Any) -> None:
    if isinstance(scheme, Scheme):
        scheme = Scheme(TensorScheme(Granularity(1, 8), dtype=INT4, has_zero_points=True, recipe="fbgemm"))
    with pytest.raises(ConfigError, match=r"can be prepared \(.*experts"):
        prepare_qat(moe.qwen3_moe(), scheme, targets=["re:.*experts.*"])


def test_conversion_that_fails_changes_nothing() -> None:
    model = moe.qwen3_moe().float()
    prepare_qat(model, EVERY["W4A16"])
    experts = of(model, FakeQuantizedExperts)[1]
    experts.down_proj.data[1, 0, 0] = torch.nan
    with pytest.raises(ScaleError, match=r"layers\.1\.mlp\.experts cannot be quantized"):
        convert_qat(model)
    assert of(model, FakeQuantizedExperts)[1] is experts
    experts.down_proj.data.nan_to_num_()
    experts.forward = lambda *args: args[0]
    with pytest.raises(UnsupportedError, match="had its forward replaced"):
        convert_qat(model)


@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
def test_adapters_on_stacks(stack: str) -> None:
    """PEFT adds them to the parameter in each forward, so the merged stack is quantized."""
    model = prepare_qat(moe.qwen3_moe().float(), EVERY["W4A16"])
    config = LoraConfig(r=2, target_modules=[], target_parameters=[f"mlp.experts.{stack}"], lora_dropout=0.0)
    model = get_peft_model(model, config)
    losses = train(model)
    assert losses[-1] < losses[0]
    wanted = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), wanted)
    converted = convert_qat(model)
    assert of(converted, QuantizedExperts) and torch.equal(logits(converted), wanted)


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["get_peft_model", "inject", "two adapters", "autocast"])
def test_adapters_on_both_stacks(how: str, dtype: torch.dtype, family: str, tmp_path: Path) -> None:
    if how == "autocast" and dtype == torch.float16:
        pytest.skip("autocast to another 16-bit dtype")
    model, plain = (prepare_qat(made(family, tmp_path, dtype), "FP8_DYNAMIC") for _ in range(2))
    stacks = [name.replace("mlp", "feed_forward") for name in BOTH] if family == "llama4" else BOTH
    config = LoraConfig(r=4, target_modules=[], target_parameters=stacks)
    model = inject_adapter_in_model(config, model) if how == "inject" else get_peft_model(model, config)
    if how == "two adapters":
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        wanted = logits(model)
        assert not torch.allclose(wanted, logits(plain), atol=1e-3)
    converted = convert_qat(model)
    assert not any("lora" in name for name, _ in converted.named_parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert torch.equal(logits(converted), wanted)


def test_a_broken_adapter_on_a_stack_changes_nothing() -> None:
    model = prepare_qat(moe.qwen3_moe().float(), "FP8_DYNAMIC")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=[], target_parameters=BOTH))
    weights = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    next(iter(weights.values())).data[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ScaleError, match="experts cannot be quantized"):
        convert_qat(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n].nan_to_num(), before[n].nan_to_num()) for n in before)


def test_hooks_of_experts(tmp_path: Path) -> None:
    for prepare in (lambda m: prepare_qat(m, "FP8_DYNAMIC"), lambda m: hf_fp8.quantize_model(m, "FP8_DYNAMIC")):
        model = made("qwen3_moe", tmp_path)
        model.model.layers[0].mlp.experts.register_forward_hook(lambda _, __, out: out * 2)
        prepare(model)
        wanted = logits(model)
        if of(model, FakeQuantizedExperts):
            convert_qat(model)
        assert torch.equal(logits(model), wanted)
        model.model.layers[0].mlp.experts._forward_hooks.clear()
        assert not torch.equal(logits(model), wanted)


def test_a_prepared_model_is_not_quantized_otherwise() -> None:
    model = prepare_qat(moe.qwen3_moe().float(), "FP8_DYNAMIC")
    with pytest.raises(UnsupportedError, match="convert_qat"):
        hf_fp8.quantize_model(model, "FP8_DYNAMIC")
    with pytest.raises(UnsupportedError, match="convert the model that was prepared"):
        convert_qat(model.model.layers[0])
    assert len(of(model, FakeQuantizedExperts)) == 2


def test_checkpointing_autocast_copies_and_explain() -> None:
    model = prepare_qat(moe.qwen3_moe().float(), EVERY["W4A16"]).train()
    plain = copy.deepcopy(model)
    loss = plain(IDS, labels=IDS).loss
    loss.backward()
    model.gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad), name
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(IDS, labels=IDS).loss
    rounded.backward()
    assert abs(rounded.item() - loss.item()) < 0.1
    rows = [row for row in hf_fp8.explain(model) if row.name.endswith("experts")]
    assert len(rows) == 2 and all("convert_qat" in row.reason for row in rows)


def test_no_rows_and_no_expert() -> None:
    model = prepare_qat(moe.qwen3_moe().float(), EVERY["W4A16"])
    experts = of(model, FakeQuantizedExperts)[0]
    n_experts, _, hidden = experts.first.shape
    nothing = experts(torch.zeros(0, hidden, requires_grad=True), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert nothing.shape == (0, hidden)
    nothing.sum().backward()
    assert not experts.down_proj.grad.any()
    out = experts(torch.ones(3, hidden), torch.full((3, 2), n_experts), torch.ones(3, 2))
    assert not out.any()
    out.sum().backward()
    assert not experts.gate_up_proj.grad.any()
