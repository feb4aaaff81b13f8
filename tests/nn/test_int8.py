"""backend="int8": re-quantized after loading, saved as what it is."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from support.build import IDS, OFFLOAD, STATIC_TENSOR, load, logits, sqnr, stock_transformers, tensors, tiny_llama, write
from support.kernels import int_mm
from support.moe import mixtral, qwen3_moe
from transformers import AutoModelForCausalLM

import hf_fp8
from hf_fp8 import FP8Config, QuantizedLinear, kernels
from hf_fp8.errors import ConfigError, UnsupportedError
from hf_fp8.formats import native, numerics
from hf_fp8.formats.code_types import INT8
from hf_fp8.formats.scheme import FP8_BLOCK, INT8_DYNAMIC, ROW, TENSOR, Granularity, scale_shape
from hf_fp8.formats.weights import requantize
from hf_fp8.kernels import prepared, selection
from hf_fp8.kernels.base import Problem
from hf_fp8.kernels.thresholds import weight_only_limit

INT8_CONFIG = FP8Config(backend="int8")
WEIGHTS = {
    "channel": {},
    "tensor, static": {"weight": TENSOR, "inputs": STATIC_TENSOR},
    "block": {"weight": Granularity(32, 32)},
    "weight-only": {"inputs": None},
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_layers_are_int8_and_near(kind: str, tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path, **WEIGHTS[kind])
    dense = load(tmp_path, FP8Config(dequantize=True))
    model = load(tmp_path, copy.deepcopy(INT8_CONFIG))
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            assert module.weight.dtype == INT8 and module.scheme == INT8_DYNAMIC and module.input_scale is None
            assert module.weight_scale.shape == (module.out_features, 1)
            exact = dense.get_submodule(name).weight
            scale = numerics.compute_scale(exact, ROW, INT8)
            assert torch.equal(module.weight_scale, scale)
            assert torch.equal(module.weight, numerics.quantize(exact, scale, ROW, INT8))
    assert sqnr(logits(model), logits(dense)) > 25
    with int_mm(is_slow=False), native.use(None):
        found = {row.name.rpartition(".")[2]: row.kernel for row in hf_fp8.explain(model)}
    assert found["q_proj"] == "int8_weight_only (M <= 4), int8_mm_outliers"
    assert found["down_proj"] == "int8_mm_outliers"  # K = 96
    if native.why_not() is None:
        with int_mm(is_slow=False):
            limit = weight_only_limit(Problem(torch.device("cpu"), INT8_DYNAMIC, 64, 64, torch.float32)).m
            assert {row.kernel for row in hf_fp8.explain(model)} == {f"native_weight_only (M <= {limit}), int8_mm_outliers"}
        with int_mm(is_slow=True):
            assert {row.kernel for row in hf_fp8.explain(model)} == {"native_weight_only (M <= 8), native_int8_outliers"}


def test_requantizing_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(300, 200)
    granularity = FP8_BLOCK.weight.granularity
    scale = numerics.compute_scale(w, granularity)
    q = numerics.quantize(w, scale, granularity)
    whole = requantize(q, scale, granularity, INT8)
    monkeypatch.setattr(numerics, "CPU_CHUNK", 1)
    for a, b in zip(whole, requantize(q, scale, granularity, INT8), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(
        numerics.dequantize(q, scale, granularity), q.float() * numerics.expand_scale(scale, granularity, 300, 200)
    )


@pytest.mark.parametrize("kind", WEIGHTS)
def test_what_is_saved_is_int8_and_says_so(kind: str, tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path / "fp8", **WEIGHTS[kind])
    model = load(tmp_path / "fp8", copy.deepcopy(INT8_CONFIG))
    model.save_pretrained(tmp_path / "int8")
    written = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    (group,) = written["config_groups"].values()
    assert written["format"] == group["format"] == "int-quantized" and written["quantization_status"] == "compressed"
    assert (group["weights"]["type"], group["weights"]["num_bits"], group["weights"]["strategy"]) == ("int", 8, "channel")
    assert (group["input_activations"]["type"], group["input_activations"]["strategy"]) == ("int", "token")
    state = tensors(tmp_path / "int8")
    assert not any(t.dtype == torch.float8_e4m3fn for t in state.values()) and not any("input_scale" in n for n in state)
    # Others read it: stock transformers, and compressed-tensors itself, tensor by tensor.
    with stock_transformers():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.float32).eval()
        found = logits(stock)
    # Both are as far from the same weights without quantized inputs; stock rounds inputs with other scales.
    exact = logits(hf_fp8.dequantize_model(copy.deepcopy(model)))
    assert sqnr(found, exact) > 25 and sqnr(logits(model), exact) > 25
    scheme = stock.hf_quantizer.quantization_config.quantization_config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            parts = {role: state[f"{name}.{role}"] for role in ("weight", "weight_scale")}
            assert torch.equal(compressor.decompress(parts, scheme)["weight"].float(), module.dequantized_weight())


def test_a_mixture_that_transformers_will_not_load(tmp_path: Path, propagated: None, caplog: pytest.LogCaptureFixture) -> None:
    """Its experts are dense, which the host cannot read beside int8 Linears: said when it is saved, while that is true."""
    write(qwen3_moe(), tmp_path / "fp8", ignore=["lm_head", "re:.*mlp.gate$"])
    model = load(tmp_path / "fp8", copy.deepcopy(INT8_CONFIG))
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "int8")
    assert "cannot load that, as it looks for quantized experts" in caplog.text
    with pytest.raises(RuntimeError, match="CONVERSION"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "int8")


def test_saved_twice_is_the_same(fp8: Path, tmp_path: Path) -> None:
    model = load(fp8, copy.deepcopy(INT8_CONFIG))
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    a, b = (tensors(tmp_path / name) for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


def test_experts_are_saved_dense_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stock transformers 5.23 reads no int8 checkpoint of a Mixtral, whoever wrote it: held against the config itself."""
    write(
        mixtral(),
        tmp_path / "fp8",
        quantized=lambda name: "proj" in name or "experts" in name,
        ignore=["lm_head", "re:.*gate$"],
    )
    with caplog.at_level("WARNING"):
        model = load(tmp_path / "fp8", copy.deepcopy(INT8_CONFIG))
    assert "saved dense" in caplog.text and "written back in FP8" not in caplog.text
    dense = load(tmp_path / "fp8", FP8Config(dequantize=True))
    dense.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "int8")
    state, plain = tensors(tmp_path / "int8"), tensors(tmp_path / "dense")
    assert {name for name in state if not name.endswith("_scale")} == set(plain)
    assert all(torch.equal(state[name], plain[name]) for name in plain if "experts" in name)
    config = FP8Config(checkpoint=json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"])
    for name in plain:
        if name.endswith("_proj.weight") or "experts" in name:
            group = config.spec.group_of([name.removesuffix(".weight")], ["Linear"])
            assert (group is not None) == (state[name].dtype == INT8) == (f"{name}_scale" in state), name


def test_dequantizing_an_int8_model(fp8: Path) -> None:
    model = load(fp8, copy.deepcopy(INT8_CONFIG))
    layer = model.model.layers[0].mlp.up_proj
    dense = hf_fp8.dequantize_model(model)
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(dense.model.layers[0].mlp.up_proj.weight, layer.dequantized_weight())


def test_offloaded_layers_are_refused(fp8: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="offloaded"):
        load(fp8, copy.deepcopy(INT8_CONFIG), device_map=OFFLOAD, offload_folder=tmp_path / "offload")


def test_few_rows_lose_no_more_than_many(fp8: Path) -> None:
    """The weight-only kernel that computes in bfloat16 is nearer to the truth than int8 inputs are."""
    torch.manual_seed(0)
    layer = QuantizedLinear(256, 64, FP8_BLOCK)
    w = torch.randn(64, 256)
    layer.weight_scale.data = numerics.compute_scale(w, FP8_BLOCK.weight.granularity)
    layer.weight.data = numerics.quantize(w, layer.weight_scale, FP8_BLOCK.weight.granularity)
    assert layer.weight_scale.shape == scale_shape(FP8_BLOCK.weight.granularity, 64, 256)
    layer.requantize_int8()
    x = torch.randn(4, 256)
    wanted = x.double() @ layer.dequantized_weight().double().t()
    found = {}
    for name in ("int8_weight_only", "int8_mm", "dequantize"):
        with hf_fp8.kernels.use(name), torch.no_grad():
            found[name] = sqnr(layer(x), wanted)
    assert found["int8_weight_only"] > found["int8_mm"] + 6 and found["int8_mm"] > 30
    assert abs(found["int8_mm"] - found["dequantize"]) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_not_finite_rows_stay_visible(dtype: torch.dtype) -> None:
    layer = QuantizedLinear(64, 32, INT8_DYNAMIC, backend="int8")
    layer.weight.data = torch.randint(-127, 128, (32, 64), dtype=INT8)
    layer.weight_scale.data.fill_(0.01)
    x = torch.randn(9, 64).to(dtype)
    x[3, 5], x[6, 7], x[8] = float("nan"), float("inf"), 0.0
    with torch.no_grad():
        found = layer(x)
        assert not found[[3, 6]].isfinite().any() and found[[0, 1, 2, 4, 5, 7]].isfinite().all() and (found[8] == 0).all()
        assert not layer(x[3:4]).isfinite().any() and not layer(x[6:7]).isfinite().any()


def test_its_config_passed_on_finds_the_fp8_checkpoint_again(fp8: Path, tmp_path: Path) -> None:
    model = load(fp8, copy.deepcopy(INT8_CONFIG))
    model.save_pretrained(tmp_path / "int8")
    dense = logits(load(fp8, FP8Config(dequantize=True)))
    for config in (model.config, model.dequantize().config):
        again = AutoModelForCausalLM.from_pretrained(fp8, config=copy.deepcopy(config), dtype=torch.float32)
        assert sqnr(logits(again), dense) > 100
    with pytest.raises(ConfigError, match="leave `config` out"):  # it still says FP8
        AutoModelForCausalLM.from_pretrained(tmp_path / "int8", config=load(fp8, copy.deepcopy(INT8_CONFIG)).config)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", config=copy.deepcopy(model.config), dtype=torch.float32)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.float32)
    wanted_logits = logits(wanted)
    assert torch.equal(logits(again), wanted_logits)
    assert sqnr(logits(load(tmp_path / "int8", copy.deepcopy(INT8_CONFIG))), wanted_logits) > 25


@torch.no_grad()
@pytest.mark.parametrize("is_slow", [False, True])
def test_another_default_device_changes_nothing(is_slow: bool) -> None:
    kernel = "int8_mm_outliers" if not is_slow else "native_int8_outliers" if native.why_not() is None else "dequantize"
    with int_mm(is_slow):
        under_another_default_device(kernel)


def under_another_default_device(kernel: str) -> None:
    layers = [QuantizedLinear(64, n, INT8_DYNAMIC, backend="int8") for n in (40, 56)]
    for layer in layers:
        layer.weight.data = torch.randint(-127, 128, tuple(layer.weight.shape), dtype=INT8)
        layer.weight_scale.data.fill_(0.01)
    selection._select.cache_clear()
    prepared._calls.clear()
    kernels.probe.cache_clear()
    few, many = torch.randn(3, 64), torch.randn(600, 64)
    with torch.device("meta"):
        found = [layer(x) for layer in layers for x in (few, many)]
    assert all(t.device.type == "cpu" for t in found)
    assert all(torch.equal(a, b) for a, b in zip(found, [layer(x) for layer in layers for x in (few, many)], strict=True))
    choice = kernels.select(kernels.Problem(torch.device("cpu"), INT8_DYNAMIC, 40, 64, torch.float32), "int8")
    few = "native_weight_only" if native.why_not() is None else "int8_weight_only"
    assert str(choice) == f"{few} (M <= {choice.limit}), {kernel}"


def test_generation(fp8: Path) -> None:
    model = load(fp8, copy.deepcopy(INT8_CONFIG))
    out = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert out.shape == (2, 17)
