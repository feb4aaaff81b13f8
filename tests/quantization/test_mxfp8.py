"""MXFP8: quantized to the same bytes as by compressed-tensors, on all ways; what other readers make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from support.build import State, is_linear, tensors, tiny_llama
from support.commands import run
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import hf_fp8
from hf_fp8 import FP8Config
from hf_fp8.errors import ConfigError
from hf_fp8.formats import numerics
from hf_fp8.formats.scheme import SCHEMES, Granularity, Scheme, TensorScheme
from hf_fp8.formats.storage import format_of
from hf_fp8.nn.experts import QuantizedExperts
from hf_fp8.nn.linear import QuantizedLinear

MXFP8 = SCHEMES["MXFP8"]
ORACLE = preset_name_to_scheme("MXFP8", ["Linear"])
IDS = torch.arange(1, 20).unsqueeze(0)


def of_compressed_tensors(weight: torch.Tensor, scheme: QuantizationScheme = ORACLE) -> State:
    grouped = weight.unflatten(1, (-1, 32))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    given = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    found: State = BaseCompressor.get_value_from_registry("mxfp8-quantized").compress(given, scheme)
    return {role: tensor for role, tensor in found.items() if role in ("weight", "weight_scale")}


def assert_same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def hard(dtype: torch.dtype, size: float = 1.0) -> torch.Tensor:
    """Rows of very different sizes, a group of zeros, and groups whose amax is at the limits of rounding."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(4 * torch.randn(64, 1, generator=generator))
    weight = torch.randn(64, 96, generator=generator) * spread * size
    weight[3, 32:64] = 0.0
    for row, amax in enumerate((1.0, 1.75, 1.7421875, 1.984375, 448.0, 447.0, 2.0**-9)):
        weight[10 + row, :32] = torch.linspace(-1, 1, 32) * amax
    return weight.clamp(-5e4, 5e4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e3])
def test_the_same_bytes(dtype: torch.dtype, size: float) -> None:
    weight = hard(dtype, size)
    found = format_of(MXFP8.weight).quantize(weight, MXFP8.weight)
    assert found["weight_scale"].dtype == torch.uint8
    assert_same(found, of_compressed_tensors(weight))


def test_the_same_bytes_in_float16() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).half()
    assert_same(format_of(MXFP8.weight).quantize(weight, MXFP8.weight), of_compressed_tensors(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [0, 1, 17])
def test_inputs_are_quantized_as_by_compressed_tensors(dtype: torch.dtype, m: int) -> None:
    x = hard(torch.float32)[10 : 10 + m].to(dtype) if dtype != torch.float16 else torch.randn(m, 96).half()
    codes, scale = numerics.quantize_input(x, MXFP8.input, None)
    found = numerics.dequantize_input(codes, scale, MXFP8.input.granularity, dtype)
    if not m:
        assert found.shape == x.shape
        return
    args = ORACLE.input_activations
    scales, points = compute_dynamic_scales_and_zp(x, args, None)  # type: ignore[arg-type]
    assert torch.equal(found, fake_quantize(x, scales, points, args))
    assert torch.equal(scale, scales.float())


def test_an_input_with_nan_stays_visible() -> None:
    x = torch.ones(2, 64)
    x[0, 3], x[1, 40] = torch.nan, torch.inf
    found = numerics.dequantize(*numerics.quantize_input(x, MXFP8.input, None), MXFP8.input.granularity)
    assert found.isnan().nonzero()[:, 0].unique().tolist() == [0, 1]
    assert torch.equal(found[0, 32:], x[0, 32:])
    assert torch.equal(found[1, :32], x[1, :32])


@pytest.mark.parametrize("m", [0, 1, 17])
def test_a_layer_computes_what_compressed_tensors_does(m: int) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40, dtype=torch.float64)
    layer = hf_fp8.quantize_model(linear, "MXFP8", backend="scaled_mm", inplace=False)
    assert isinstance(layer, QuantizedLinear)
    x = torch.randn(m, 96, dtype=torch.float64)
    out = layer(x)
    assert out.shape == (m, 40)
    if m:
        args = ORACLE.input_activations
        given = fake_quantize(x.float(), *compute_dynamic_scales_and_zp(x.float(), args, None), args)  # type: ignore[arg-type]
        stored = of_compressed_tensors(linear.weight.detach().float())
        codes, scale = stored["weight"].double(), 2.0 ** (stored["weight_scale"].double() - 127)
        wanted = given.double() @ (codes * scale.repeat_interleave(32, 1)).T + linear.bias
        assert float((out - wanted).norm() / wanted.norm()) <= 1e-12


def expected(dense: Path) -> State:
    found: State = {}
    for name, tensor in tensors(dense).items():
        if is_linear(name):
            found |= {name.removesuffix("weight") + role: t for role, t in of_compressed_tensors(tensor).items()}
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("way", ["load", "in place", "files"])
def test_every_way_to_quantize_writes_the_same_files(way: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    if way == "files":
        run("quantize", tmp_path / "dense", tmp_path / "out", "--scheme", "MXFP8")
    elif way == "load":
        config = FP8Config("MXFP8")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "out")
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
        hf_fp8.quantize_model(model, "MXFP8")
        model.save_pretrained(tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), expected(tmp_path / "dense"))
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert written["format"] == "mxfp8-quantized"
    (group,) = written["config_groups"].values()
    wanted = ORACLE.model_dump(mode="json")
    for key in ("weights", "input_activations"):
        parts = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "scale_dtype")
        assert {part: group[key][part] for part in parts} == {part: wanted[key][part] for part in parts}


def test_stock_transformers_reads_what_we_write(tmp_path: Path) -> None:
    """It multiplies weights out in bfloat16, which is exact: a code has 4 significant bits, and scales are powers of two."""
    tiny_llama().save_pretrained(tmp_path / "dense")
    config = FP8Config("MXFP8")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path / "out")
    hf_fp8.unregister()
    try:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        assert not any(isinstance(module, QuantizedLinear) for module in stock.modules())
        with torch.no_grad():
            stock(IDS)
    finally:
        hf_fp8.register()
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert torch.equal(stock.get_submodule(name).weight, layer.dequantized_weight(torch.bfloat16)), name


def test_rows_that_are_no_whole_groups_stay_dense(tmp_path: Path) -> None:
    """As compressed-tensors cannot store them ("tensor column shape must be divisble by the given group_size")."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Linear(48, 32))
    hf_fp8.quantize_model(model, "MXFP8")
    assert [type(layer) for layer in model] == [QuantizedLinear, torch.nn.Linear]
    with pytest.raises(ConfigError, match="K = 48 is not a multiple of the group size 32"):
        hf_fp8.quantize_model(torch.nn.Linear(48, 32), "MXFP8")


def test_experts_and_files(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, num_local_experts=4, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    asked: dict[str, Any] = {"quantization_config": FP8Config("MXFP8", backend="weight_only"), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **asked)
    experts = next(module for module in model.modules() if isinstance(module, QuantizedExperts))
    assert experts.down_proj_scale.dtype == torch.uint8
    assert experts.down_proj_scale.shape == (4, 64, 3)
    model.save_pretrained(tmp_path / "out")
    run("quantize", tmp_path / "dense", tmp_path / "files", "--scheme", "MXFP8")
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "files"))
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "files", quantization_config=FP8Config(backend="weight_only", experts="fp8"), dtype=torch.bfloat16
    )
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    run("verify", tmp_path / "files")
    run("dequantize", tmp_path / "files", tmp_path / "back", "--dtype", "float32")
    dense, back = tensors(tmp_path / "dense"), tensors(tmp_path / "back")
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = of_compressed_tensors(dense[name])
    scale = 2.0 ** (stored["weight_scale"].double() - 127)
    assert torch.equal(back[name].double(), stored["weight"].double() * scale.repeat_interleave(32, 1))


def test_save_quantized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf_fp8.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU()), "MXFP8", backend="weight_only")
    hf_fp8.save_quantized(model, tmp_path / "out")
    again = hf_fp8.load_quantized(torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU()), tmp_path / "out")
    assert again[0].scheme == MXFP8
    assert again[0].weight_scale.dtype == torch.uint8
    x = torch.randn(5, 64)
    assert torch.equal(again(x), model(x))


def test_texts() -> None:
    assert MXFP8.text == "1x32sm|1x32dm"
    assert Scheme.parse(MXFP8.text) == MXFP8
    assert Scheme(TensorScheme(Granularity(1, 32)), TensorScheme(Granularity(1, 32), dynamic=True)) != MXFP8
    assert MXFP8.describe() == "group 32 (MX scales) x group 32 (MX scales) (dynamic)"
    with pytest.raises(ConfigError, match="MX scales are of groups"):
        TensorScheme(Granularity(128, 128), mx=True)
    with pytest.raises(ConfigError, match="dynamically, or not at all"):
        Scheme(MXFP8.weight, TensorScheme(Granularity(-1, -1)))
    with pytest.raises(ConfigError, match="MX scales of groups of 32, not of 64"):
        FP8Config(Scheme(TensorScheme(Granularity(1, 64), mx=True)))
