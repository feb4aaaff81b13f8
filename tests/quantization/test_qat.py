"""Quantization-aware training: what is trained is what is quantized, bit for bit; gradients; training loops; adapters."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from support.build import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_fp8
from hf_fp8 import FP8Config, Granularity, PackedLinear, QuantizedLinear, Scheme, convert_qat, prepare_qat
from hf_fp8.errors import CalibrationError, ConfigError, ScaleError, UnsupportedError
from hf_fp8.formats import numerics
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.scheme import FP8_DYNAMIC, SCHEMES, W4A16_FBGEMM, W4AFP8_FBGEMM, TensorScheme
from hf_fp8.formats.storage import dequantize, format_of
from hf_fp8.nn import fake_quantized
from hf_fp8.nn.fake_quantized import FakeQuantizedLinear

IDS = torch.arange(1, 20).unsqueeze(0)
EVERY = sorted({*SCHEMES, "W4A16_FBGEMM"})
SIZES = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny_llama(**SIZES).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def train(model: Any, steps: int = 4, rate: float = 0.3) -> list[float]:
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


@pytest.mark.parametrize("scheme", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converted_is_what_was_trained(scheme: str, dtype: torch.dtype, dense: Path, tmp_path: Path) -> None:
    """All numbers of the logits, also after saving and loading."""
    model = prepare_qat(load(dense, dtype), scheme)
    losses = train(model)
    assert losses[-1] < losses[0]
    wanted = logits(model)
    converted = convert_qat(model)
    layers = [module for module in converted.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == (0 if scheme == "W4A16_FBGEMM" else 14)
    assert torch.equal(logits(converted), wanted)
    converted.save_pretrained(tmp_path / "saved")
    options = {} if scheme == "W4A16_FBGEMM" else {"quantization_config": FP8Config(backend="scaled_mm")}
    assert torch.equal(logits(load(tmp_path / "saved", dtype, **options)), wanted)


@pytest.mark.parametrize("scheme", EVERY)
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_gradients_pass_the_rounding(scheme: str, rows: int) -> None:
    """Those of a product of the quantized operands, as if rounding were not there."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 24)
    wanted = copy.deepcopy(linear)
    layer: Any = prepare_qat(linear, scheme)
    x = torch.randn(rows, 128, requires_grad=True)
    given = x.detach().clone().requires_grad_()
    out = layer(x)
    out.backward(grad := torch.randn(rows, 24))
    weight = fake_quantized.fake_quantized(layer.weight.detach(), layer.scheme.weight)
    product = quantized_input(given, layer) @ weight.T + wanted.bias
    product.backward(grad)
    assert float((out - product).abs().max() if rows else 0.0) <= 1e-5
    assert torch.allclose(x.grad, given.grad, rtol=1e-5, atol=1e-6)
    of_weight = grad.T @ quantized_input(given, layer).detach()
    assert torch.allclose(layer.weight.grad, of_weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.bias.grad, grad.sum(0))


def quantized_input(x: torch.Tensor, layer: FakeQuantizedLinear) -> torch.Tensor:
    """x, with the values of its codes and the gradient of x."""
    scheme = layer.scheme.input
    if scheme is None or not x.shape[0]:
        return x
    scale = layer.input_scale()
    codes, scale = numerics.quantize_input(x.detach(), scheme, scale)
    values = numerics.dequantize_input(codes, scale, scheme.granularity, x.dtype)
    return x + (values - x).detach()


def test_a_static_scale_that_clips_stops_the_gradient() -> None:
    layer: Any = prepare_qat(nn.Linear(32, 8, bias=False), "FP8")
    layer.input_amax.fill_(1.0)
    layer.eval()
    x = torch.full((2, 32), 0.5)
    x[1] = 3.0
    x.requires_grad_()
    layer(x).sum().backward()
    assert bool((x.grad[0] != 0).all())
    assert not x.grad[1].any()


def test_the_average_of_inputs() -> None:
    layer: Any = prepare_qat(nn.Linear(4, 4), "FP8")
    layer.train()
    layer(torch.full((1, 4), 2.0))
    assert float(layer.input_amax) == 2.0  # the first as it is
    layer(torch.full((1, 4), -4.0))
    assert float(layer.input_amax) == pytest.approx(2.0 * fake_quantized.MOMENTUM + 4.0 * (1 - fake_quantized.MOMENTUM))
    before = float(layer.input_amax)
    layer(torch.full((1, 4), torch.nan))
    layer(torch.zeros(0, 4))
    layer.eval()
    layer(torch.full((1, 4), 100.0))
    assert float(layer.input_amax) == before


def test_static_inputs_that_were_never_seen(dense: Path) -> None:
    model = prepare_qat(load(dense), "FP8").eval()
    assert logits(model).isfinite().all()  # each with a scale of its own
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\..*have seen none in training"):
        convert_qat(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, FakeQuantizedLinear)


def test_parameters_names_and_what_is_said(dense: Path) -> None:
    model = load(dense)
    before = dict(model.named_parameters())
    assert prepare_qat(model, "W4A16", ignore=["lm_head", "re:.*down_proj"]) is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert model.state_dict().keys() == load(dense).state_dict().keys()
    assert "fake-quantized: int4 group 128" in repr(model) and type(model.lm_head) is nn.Linear
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        assert type(convert_qat(twin).model.layers[0].mlp.up_proj) is PackedLinear
    assert type(convert_qat(model).model.layers[0].mlp.down_proj) is nn.Linear
    assert "re:.*down_proj" not in model.config.quantization_config.ignore  # it lists modules, as llm-compressor does
    assert "model.layers.0.mlp.down_proj" in model.config.quantization_config.ignore


def test_explain_shows_what_is_prepared(dense: Path) -> None:
    model = prepare_qat(load(dense), {"W4A16": ["re:.*mlp.*"], "FP8_DYNAMIC": ["re:.*q_proj"]})
    rows = {row.name: row for row in hf_fp8.explain(model)}
    assert len(rows) == 2 * 4
    row = rows["model.layers.1.mlp.up_proj"]
    assert "int4" in row.scheme and "convert_qat" in row.reason and row.bytes == 4 * 128 * 256
    convert_qat(model)
    assert all(row.kernel != rows[row.name].kernel for row in hf_fp8.explain(model))


def test_several_schemes_and_other_models() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 8)).bfloat16()
    groups: dict[Any, Any] = {"W4AFP8": ["0"], Scheme(TensorScheme(Granularity(1, 32), dtype=torch.int4)): ["2"]}
    prepare_qat(model, groups)
    x = torch.randn(5, 128).bfloat16()
    wanted = model(x)
    convert_qat(model)
    assert [type(layer) for layer in model] == [PackedLinear, nn.ReLU, PackedLinear, nn.Linear]
    assert [model[0].scheme, model[2].scheme] == [SCHEMES["W4AFP8"], [*groups][1]]
    assert torch.equal(model(x), wanted)


def test_a_layer_that_is_the_model() -> None:
    layer = prepare_qat(nn.Linear(128, 8), "W4A16")
    assert isinstance(layer, FakeQuantizedLinear)
    assert type(convert_qat(layer)) is PackedLinear


def test_shared_layers_and_weights() -> None:
    first = nn.Linear(128, 128)
    model: Any = nn.ModuleDict({"a": first, "b": first, "c": nn.Linear(128, 128)})
    model["c"].weight = first.weight
    prepare_qat(model, "W4A16")
    assert model["a"] is model["b"] is not model["c"]
    assert model["a"].weight is model["c"].weight
    convert_qat(model)
    assert model["a"] is model["b"]
    assert model["a"].coded is model["c"].coded


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8", "W4A16", "W4AFP8", "INT8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_adapters_the_merged_weight_is_quantized(scheme: str, dtype: torch.dtype, dense: Path) -> None:
    model = get_peft_model(prepare_qat(load(dense, dtype), scheme), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    base = model.base_model.model.model.layers[0].mlp
    losses = train(model, rate=5.0)
    assert losses[-1] < losses[0]
    assert base.up_proj.weight.grad is None and base.down_proj.base_layer.weight.grad is None
    wanted = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), wanted)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    assert torch.equal(logits(merged), wanted)
    converted = convert_qat(model)
    assert type(converted).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(converted), wanted)


@pytest.mark.parametrize("how", ["inject_adapter_in_model", "add_adapter", "nested"])
def test_adapters_that_were_added_in_other_ways(how: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers 5.24 asks for a PEFT that is not published, but works with the one that is
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
    model = prepare_qat(load(dense), "W4A16")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], init_lora_weights=False)
    if how == "add_adapter":
        model.add_adapter(config)
    elif how == "nested":
        model = nn.ModuleDict({"inner": get_peft_model(model, config)})
    else:
        model = inject_adapter_in_model(config, model)
    wanted = logits(model["inner"] if how == "nested" else model)
    converted = convert_qat(model)
    converted = converted["inner"] if how == "nested" else converted
    assert not any("lora" in name or "base_layer" in name for name, _ in converted.named_modules())
    assert torch.equal(logits(converted), wanted)
    converted.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", quantization_config=FP8Config())), wanted)


def test_adapters_as_they_are_active(dense: Path) -> None:
    """What is converted is what the last forward computed with, whatever the state of the adapters."""

    def made() -> Any:
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(prepare_qat(load(dense), "W4A16"), config)
        model.add_adapter("second", config)
        return model

    def merged_then_both(model: Any) -> None:
        model.merge_adapter(["default"])
        model.base_model.set_adapter(["default", "second"])

    states: dict[str, Any] = {
        "one": lambda m: None, "second": lambda m: m.set_adapter("second"),
        "both": lambda m: m.base_model.set_adapter(["default", "second"]),
        "disabled": lambda m: m.base_model.disable_adapter_layers(), "merged": lambda m: m.merge_adapter(),
        "merged then both": merged_then_both,
    }  # fmt: skip
    found = {}
    for name, change in states.items():
        model = made()
        change(model)
        wanted = logits(model)
        found[name] = logits(convert_qat(model))
        assert torch.equal(found[name], wanted), name
    assert torch.equal(found["one"], found["merged"]) and not torch.equal(found["one"], found["second"])
    assert torch.equal(found["disabled"], logits(convert_qat(prepare_qat(load(dense), "W4A16"))))


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "down_proj"]}, {"target_parameters": ["q_proj.weight"]}])
def test_adapters_under_autocast(options: dict[str, Any], dense: Path) -> None:
    """The merged weight is that without autocast, in which it would be rounded."""
    config = LoraConfig(**{"target_modules": [], **options}, r=4, init_lora_weights=False)
    model = get_peft_model(prepare_qat(load(dense), "W4A16"), config)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = logits(model)
    converted = convert_qat(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(converted), wanted)


@pytest.mark.parametrize("disabled", [False, True])
def test_adapters_on_layers_that_stay_dense(disabled: bool, dense: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    model = get_peft_model(prepare_qat(load(dense), "W4A16"), config)
    if disabled:
        model.base_model.disable_adapter_layers()
    wanted = logits(model)
    assert torch.equal(logits(convert_qat(model)), wanted)


def test_hooks_of_a_layer_under_adapters(dense: Path) -> None:
    model, seen = prepare_qat(load(dense), "W4A16"), []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    logits(model)
    logits(convert_qat(model))
    assert len(seen) == 2


def test_an_encoder_has_no_fast_path_around_its_layers() -> None:
    layer = nn.TransformerEncoderLayer(128, 4, 128, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 128)
    with torch.no_grad():
        dense = model(x)
        wanted = prepare_qat(model, "W4A16")(x)
        assert not torch.allclose(dense, wanted, atol=1e-3)
        assert torch.equal(convert_qat(model)(x), wanted)


class Doubled(nn.Module):
    """A wrapper of one's own that looks like an adapter of PEFT."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) * 2


def test_a_wrapper_that_is_no_adapter() -> None:
    model, x = nn.Sequential(Doubled(nn.Linear(128, 128)), nn.Linear(128, 8)), torch.randn(3, 128)
    prepare_qat(model, "W4A16")
    model = inject_adapter_in_model(LoraConfig(target_modules=["1"], init_lora_weights=False), model)
    wanted = model(x)
    assert torch.equal(convert_qat(model)(x), wanted)
    assert isinstance(model[0], Doubled) and isinstance(model[0].base_layer, PackedLinear)


def test_a_prepared_model_is_not_quantized_otherwise(dense: Path) -> None:
    model = prepare_qat(load(dense), "W4A16")
    wanted = logits(model)
    with pytest.raises(UnsupportedError, match="convert_qat"):
        hf_fp8.quantize_model(model, "FP8_DYNAMIC")
    assert torch.equal(logits(model), wanted)


def test_adapters_that_have_no_merged_form(dense: Path) -> None:
    model = get_peft_model(prepare_qat(load(dense), "W4A16"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        convert_qat(model)


@pytest.mark.parametrize("change", ["backend", "tied"])
def test_adapters_stay_if_layers_cannot_be_converted(change: str, dense: Path) -> None:
    model = get_peft_model(
        prepare_qat(load(dense), "W4A16"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    inner = model.base_model.model.model
    if change == "tied":
        inner.embed_tokens.weight = inner.layers[0].self_attn.o_proj.weight
    wanted, names = logits(model), list(model.state_dict())
    with pytest.raises(ConfigError if change == "backend" else UnsupportedError):
        convert_qat(model, backend="x" if change == "backend" else None)
    assert list(model.state_dict()) == names and torch.equal(logits(model), wanted)
    with model.disable_adapter():
        assert not torch.equal(logits(model), wanted)


def test_adapters_stay_if_the_conversion_fails(dense: Path) -> None:
    model = get_peft_model(prepare_qat(load(dense), "W4A16"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight.data[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with pytest.raises(ScaleError, match=r"layers\.1\.self_attn\.q_proj.* cannot be quantized"):
        convert_qat(model)
    assert list(before) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(before[n].nan_to_num(), tensor.nan_to_num()) for n, tensor in model.named_parameters())


def test_gradients_of_adapters(dense: Path) -> None:
    """As of a plain product of the quantized merged weight."""
    model = get_peft_model(
        prepare_qat(load(dense), "W4A16"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x, grad = torch.randn(3, 128), torch.randn(3, 128)
    layer(x).backward(grad)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    of_delta = grad.T @ x * layer.scaling["default"]
    assert torch.allclose(b.grad, of_delta @ a.T, rtol=1e-4, atol=1e-5)
    assert torch.allclose(a.grad, b.T @ of_delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("options", "word"), [
    ({"lora_dropout": 0.1}, "lora_dropout"), ({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias"),
])  # fmt: skip
def test_adapters_that_cannot_be_merged_each_time(options: dict[str, Any], word: str, dense: Path) -> None:
    model = prepare_qat(load(dense), "W4A16")
    with pytest.raises(UnsupportedError, match=word):
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **options))


def test_checkpointing_autocast_and_compile(dense: Path) -> None:
    model = prepare_qat(load(dense), "FP8").train()
    plain = copy.deepcopy(model)
    loss = plain(IDS, labels=IDS).loss
    loss.backward()
    model.gradient_checkpointing_enable()
    again = model(IDS, labels=IDS).loss
    again.backward()
    assert torch.equal(loss, again)
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), model.buffers(), strict=True))  # counted once
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(IDS, labels=IDS).loss
    rounded.backward()
    assert abs(rounded.item() - loss.item()) < 0.1
    layer = model.model.layers[0].mlp.up_proj
    compiled, x = torch.compile(layer, fullgraph=True), torch.randn(5, 128, requires_grad=True)
    layer.eval()
    out = compiled(x)
    (found,) = torch.autograd.grad(out.sum(), x)
    (wanted,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(out, layer(x)) and torch.equal(found, wanted)
    torch.library.opcheck(
        torch.ops.hf_fp8.fake_quantized_linear.default,
        (x, layer.weight, layer.input_scale(), None, layer.scheme.text, "scaled_mm"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("scheme", ["W4A16", "FP8"])
def test_trainer_and_a_second_start(scheme: str, dense: Path, tmp_path: Path) -> None:
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8

    def run(folder: str, steps: int, resume: bool = False) -> Any:
        torch.manual_seed(0)
        model = prepare_qat(load(dense), scheme)
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=1, save_steps=2, learning_rate=1e-3,
            lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return model.eval()

    straight = logits(run("straight", 4))
    run("resumed", 2)
    resumed = run("resumed", 4, resume=True)
    assert torch.allclose(logits(resumed), straight, atol=1e-5)
    assert torch.equal(logits(convert_qat(resumed)), logits(resumed))


def test_what_cannot_be_prepared_or_converted(dense: Path) -> None:
    model = load(dense)
    with pytest.raises(ConfigError, match="no layers that prepare_qat has prepared"):
        convert_qat(model)
    with pytest.raises(ConfigError, match="W9"):
        prepare_qat(model, "W9")
    prepare_qat(model, "W4A16")
    with pytest.raises(UnsupportedError, match="prepared already"):
        prepare_qat(model, "W4A16")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ScaleError, match="NaN or infinite"):
        logits(model)
    with pytest.raises(UnsupportedError, match="quantized already"):
        prepare_qat(hf_fp8.quantize_model(load(dense), "FP8_DYNAMIC"), "W4A16")


# -- each layer is converted as it was trained, or none is --


def pair(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)).to(dtype)


X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"scheme": "W4A16"}, {"scheme": "INT8"}),
        ({"scheme": "W4A16_FBGEMM"}, {"scheme": "INT8"}),
        ({"scheme": "FP8_DYNAMIC"}, {"scheme": "FP8"}),
        ({"scheme": "FP8_DYNAMIC"}, {"scheme": "FP8_DYNAMIC", "backend": "weight_only"}),
    ],
    ids=["int4-int8", "float-int8", "dynamic-static", "backends"],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_parts_prepared_by_calls_of_their_own(first: dict[str, Any], second: dict[str, Any], swapped: bool) -> None:
    model = pair()
    how = (second, first) if swapped else (first, second)
    model[0], model[2] = prepare_qat(model[0], **how[0]), prepare_qat(model[2], **how[1])
    model.train()(X)
    before = model.eval()(X)
    assert torch.equal(convert_qat(model)(X), before)
    assert not any(isinstance(module, fake_quantized.FakeQuantizedLinear) for module in model.modules())


def test_names_of_another_root(dense: Path) -> None:
    model = load(dense)
    prepare_qat(model.model.layers[0], {"W4A16": ["mlp.up_proj", "re:.*down_proj"], "INT8": ["Linear"]})
    before = logits(model)
    assert torch.equal(logits(convert_qat(model)), before)
    assert model.model.layers[0].mlp.up_proj.scheme == SCHEMES["W4A16"]
    wrapped = nn.ModuleDict({"inner": prepare_qat(pair(), "W4A16", targets=["0", "re:.*2"])})
    convert_qat(wrapped)
    assert [type(module) for module in wrapped["inner"]] == [hf_fp8.PackedLinear, nn.ReLU, hf_fp8.PackedLinear]


def test_conversion_that_fails_changes_nothing(dense: Path) -> None:
    def prepared() -> Any:
        model = load(dense)
        prepare_qat(model, "W4A16")
        return model

    def nan(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan

    def tie(model: Any) -> None:
        model.model.embed_tokens.weight = model.model.layers[0].self_attn.o_proj.weight

    def replace_forward(model: Any) -> None:
        layer = model.model.layers[0].mlp.up_proj
        layer.forward = lambda x: type(layer).forward(layer, x) * 2

    def prune(model: Any) -> None:
        torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)

    cases: list[tuple[Any, type[Exception], str]] = [
        (nan, ScaleError, "layers.1.mlp.up_proj cannot be quantized"),
        (tie, UnsupportedError, "its weight is also model.embed_tokens"),
        (replace_forward, UnsupportedError, "up_proj had its forward replaced"),
        (prune, UnsupportedError, "up_proj was changed after prepare_qat"),
    ]
    for change, error, said in cases:
        model = prepared()
        change(model)
        layers = {name for name, module in model.named_modules() if isinstance(module, fake_quantized.FakeQuantizedLinear)}
        weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
        with pytest.raises(error, match=said):
            convert_qat(model)
        assert layers == {n for n, module in model.named_modules() if isinstance(module, fake_quantized.FakeQuantizedLinear)}
        assert all(torch.equal(weights[n].nan_to_num(), tensor.nan_to_num()) for n, tensor in model.named_parameters())
    with pytest.raises(UnsupportedError, match="cannot be one scheme of several"):
        prepare_qat(load(dense), {"W4A16_FBGEMM": ["re:.*mlp.*"], "INT8": ["Linear"]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_of_inputs_stays_in_float32(dtype: torch.dtype) -> None:
    model = prepare_qat(nn.Linear(16, 16), "FP8").to(dtype)
    assert isinstance(model, fake_quantized.FakeQuantizedLinear) and model.input_amax is not None
    for value in (1.0, *([1.25] * 1000)):
        model(torch.full((1, 16), value, dtype=dtype))
    assert model.input_amax.dtype == torch.float32
    assert float(model.input_amax) == pytest.approx(1.25 - 0.25 * 0.99**1000, rel=1e-5)


# -- FBGEMM's numerics, computed here in float64 --


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fbgemm_with_inputs_in_fp8(dtype: torch.dtype) -> None:
    weight = (torch.randn(40, 256, generator=torch.Generator().manual_seed(0)) * 0.03).to(dtype)
    weight[3], weight[5] = 0, 1e-9
    wide = weight.double()
    row = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
    row = row.to(dtype if dtype == torch.bfloat16 else torch.float32).double()  # as torchao has it; in float16 it could be 0
    in_fp8 = ((wide / row).clamp(-448, 448).float().to(FP8).double() * row).to(dtype).double()
    groups = in_fp8.view(40, -1, 128)
    scale = (groups.abs().amax(2, keepdim=True) / 8).clamp(min=1e-6)
    codes = (groups / scale).to(dtype).double().round().clamp(-8, 7)
    scheme = W4AFP8_FBGEMM.weight
    made = format_of(scheme).quantize(weight, scheme)
    found = dequantize(made, scheme, 256, torch.float64)
    assert torch.allclose(found, (codes * scale.to(dtype).double()).flatten(1), rtol=1e-7, atol=0)


def test_fbgemm_with_inputs_in_bfloat16() -> None:
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)) * 0.03
    weight[3] = 0
    groups = weight.double().view(40, -1, 128)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (high - low).clamp(min=1e-6) / 15
    wanted = ((groups - low) / scale).round().clamp(0, 15) * scale + low
    found = fake_quantized.fake_quantized(weight, W4A16_FBGEMM.weight).double()
    assert float((found - wanted.flatten(1)).abs().max()) <= 1e-6 * float(weight.abs().max())
    with pytest.raises(UnsupportedError, match="W4A16_ASYM"):
        format_of(W4A16_FBGEMM.weight).quantize(weight, W4A16_FBGEMM.weight)


@pytest.mark.parametrize("activations", [FP8, torch.bfloat16])
def test_against_torchao(activations: torch.dtype) -> None:
    """Its fake quantizer multiplies by the reciprocal of the scale, where the kernels divide: ties may round otherwise."""
    pytest.importorskip("torchao")
    from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import Int4WeightFakeQuantizer

    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.03
    theirs = Int4WeightFakeQuantizer(Int4WeightFakeQuantizeConfig(128, activations))(weight)
    scheme = (W4AFP8_FBGEMM if activations == FP8 else W4A16_FBGEMM).weight
    ours = fake_quantized.fake_quantized(weight, scheme)
    differs = ours != theirs
    assert float(differs.float().mean()) <= (0.005 if activations == FP8 else 0.0)
    step = weight.view(64, -1, 128).abs().amax(2) / 8
    assert bool(((ours - theirs).view(64, -1, 128).abs() <= 1.01 * step.unsqueeze(2)).all())


def test_the_recipe_stays_with_a_request_but_not_in_files(dense: Path, tmp_path: Path) -> None:
    """Loading, in place: both quantize as FBGEMM; a file says W4AFP8."""
    config = FP8Config("W4AFP8_FBGEMM", backend="scaled_mm")
    loaded = load(dense, quantization_config=config)
    made = hf_fp8.quantize_model(load(dense), "W4AFP8_FBGEMM", backend="scaled_mm")
    plain = hf_fp8.quantize_model(load(dense), "W4AFP8", backend="scaled_mm")
    assert torch.equal(logits(loaded), logits(made))
    assert not torch.equal(logits(made), logits(plain))
    made.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", quantization_config=FP8Config(backend="scaled_mm"))
    assert torch.equal(logits(again), logits(made))
    assert again.model.layers[0].mlp.up_proj.scheme == SCHEMES["W4AFP8"] != FP8_DYNAMIC
