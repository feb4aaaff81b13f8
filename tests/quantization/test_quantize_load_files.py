"""Quantized while loading: files of every kind, devices, and what stock transformers makes of what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from support.build import IDS, OFFLOAD, differing, error, load, logits, sqnr, stock_transformers, tensors, tiny_llama
from support.moe import MOE, TRANSPOSED, causal
from support.quantized_loads import config_of, kept
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CompressedTensorsConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_fp8
from hf_fp8 import FP8Config, Granularity, QuantizedLinear, Scheme, TensorScheme
from hf_fp8.errors import ConfigError, UnsupportedError
from hf_fp8.formats.code_types import FP8

NAMES = ["FP8_DYNAMIC", "FP8", "FP8_BLOCK", "FP8_WEIGHT_ONLY", "FP8_TENSOR"]
SMALL_BLOCK = Scheme(TensorScheme(Granularity(32, 32)), TensorScheme(Granularity(1, 32), dynamic=True))
OFFLOADED = "the host maps an offloaded weight to the dense file, since its name is the same: dense values are run as codes"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def quantized(path: Path, scheme: Any = "FP8_DYNAMIC", cls: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = cls.from_pretrained(path, quantization_config=FP8Config(scheme=scheme), **options)
    if scheme == "FP8" and "disk" not in str(options):
        with hf_fp8.calibrate(model), torch.no_grad():
            model(IDS, use_cache=False)
    return model


@pytest.mark.parametrize("scheme", [*NAMES, SMALL_BLOCK], ids=str)
def test_stock_transformers_reads_what_is_saved(scheme: Any, dense: Path, tmp_path: Path) -> None:
    model = quantized(dense, scheme, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    ours = load(tmp_path / "saved", FP8Config(backend="weight_only"), dtype=torch.float32)
    with stock_transformers():
        config = CompressedTensorsConfig(dequantize=True)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=config, dtype=torch.float32)
        assert not any(p.dtype.itemsize == 1 for p in plain.parameters())
        assert error(logits(plain), logits(ours)) < 1e-5
        if scheme != "FP8_BLOCK":  # it does not quantize inputs in groups that do not divide them
            default = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
            assert sqnr(logits(default), logits(ours)) > 15
    reference = logits(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32))
    assert sqnr(logits(plain), reference) > 12


@pytest.mark.parametrize("scheme", [*NAMES, SMALL_BLOCK], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compressor_multiplies_out_to_the_same(scheme: Any, dtype: torch.dtype, dense: Path, tmp_path: Path) -> None:
    model = quantized(dense, scheme, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    group: QuantizationScheme = parsed.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group.format)
    written, seen = tensors(tmp_path / "saved"), 0
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            state = {key.rpartition(".")[2]: value for key, value in written.items() if key.startswith(f"{name}.")}
            theirs = compressor.decompress(state, group)["weight"]
            wide = compressor.decompress({**state, "weight_scale": state["weight_scale"].float()}, group)["weight"]
            assert torch.equal(theirs.float(), module.dequantized_weight(theirs.dtype).float()), name
            assert torch.equal(wide, module.dequantized_weight()), name
            seen += 1
    assert seen == 14


@pytest.mark.parametrize("tied", [{}, {"ignore": []}, {"targets": ["Linear", "lm_head"]}], ids=str)
def test_tied_embeddings_stay_tied(tied: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_llama(tie_word_embeddings=True)
    source.save_pretrained(tmp_path / "dense")
    config = FP8Config(scheme="FP8_WEIGHT_ONLY", **tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    assert "lm_head.weight" not in tensors(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    assert torch.equal(logits(load(tmp_path / "saved", dtype=torch.bfloat16)), logits(model))
    two = hf_fp8.quantize_model(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), "FP8_WEIGHT_ONLY", **tied)
    assert torch.equal(logits(two), logits(model)) and two.lm_head.weight is two.model.embed_tokens.weight


def test_a_tied_head_alone(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lm_head"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FP8Config(scheme="FP8_DYNAMIC", targets="lm_head"))


def test_a_tied_head_that_was_named_is_told(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    config = FP8Config(scheme="FP8_DYNAMIC", targets=["Linear", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert "lm_head" in model.hf_quantizer.planned.reasons


@pytest.mark.usefixtures("no_native")
def test_shards_and_pickles(dense: Path, tmp_path: Path) -> None:
    model = quantized(dense)
    source = AutoModelForCausalLM.from_pretrained(dense)
    source.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    source.config.save_pretrained(tmp_path / "pickle")
    torch.save(source.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    model.save_pretrained(tmp_path / "model")
    for name in ("shards", "pickle"):
        other = quantized(tmp_path / name)
        assert torch.equal(logits(other), logits(model)), name
        other.save_pretrained(tmp_path / f"{name} saved", max_shard_size="20KB")
        assert differing(tensors(tmp_path / f"{name} saved"), tensors(tmp_path / "model")) == []
    again = load(tmp_path / "shards saved", FP8Config(backend="scaled_mm"), dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(model))


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="30KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises((hf_fp8.FP8Error, OSError)):
        quantized(tmp_path)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_device_maps(device_map: Any, dense: Path) -> None:
    assert torch.equal(logits(quantized(dense, device_map=device_map)), logits(quantized(dense)))


@pytest.mark.parametrize("form", [
    "safetensors", "pickle"
])  # fmt: skip
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_TENSOR", "FP8_WEIGHT_ONLY"])
def test_disk_offload(scheme: str, form: str, dense: Path, tmp_path: Path) -> None:
    if form == "pickle":
        source = AutoModelForCausalLM.from_pretrained(dense)
        source.config.save_pretrained(dense := tmp_path / "pickle")
        torch.save(source.state_dict(), dense / "pytorch_model.bin")
    model = quantized(dense, scheme)
    away = quantized(dense, scheme, device_map=OFFLOAD, offload_folder=str(tmp_path / "offload"))
    assert away.model.layers[0].mlp.up_proj.weight.is_meta
    for number, each in enumerate((model, away)):
        each.save_pretrained(tmp_path / str(number))
    assert error(logits(away), logits(model)) < 1e-6
    assert differing(tensors(tmp_path / "0"), tensors(tmp_path / "1")) == []


def test_disk_offload_of_experts(tmp_path: Path) -> None:
    source = MOE["qwen3_moe"]()
    source.save_pretrained(tmp_path / "dense")
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {"model.layers.0.mlp": "disk", "model.layers.1": "cpu"}
    device_map |= {f"model.layers.0.{n}": "cpu" for n in ("self_attn", "input_layernorm", "post_attention_layernorm")}
    config = FP8Config(scheme="FP8_DYNAMIC")
    model = type(source).from_pretrained(tmp_path / "dense", quantization_config=config)
    away = type(source).from_pretrained(
        tmp_path / "dense", quantization_config=config, device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert error(causal(away), causal(model)) < 1e-6


@pytest.mark.usefixtures("no_native")
def test_key_mapping_and_prefixes(dense: Path, tmp_path: Path) -> None:
    """The base model from the files of the whole, and the whole from files of the base model."""
    from transformers import LlamaForCausalLM, LlamaModel

    base = LlamaModel.from_pretrained(dense, quantization_config=FP8Config(scheme="FP8_DYNAMIC"))
    whole = quantized(dense)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = LlamaModel.from_pretrained(tmp_path / "base", quantization_config=FP8Config(backend="scaled_mm"))
    with torch.no_grad():
        assert torch.equal(again(IDS).last_hidden_state, base(IDS).last_hidden_state)
    LlamaModel.from_pretrained(dense).save_pretrained(tmp_path / "dense base")
    other = LlamaForCausalLM.from_pretrained(tmp_path / "dense base", quantization_config=FP8Config(scheme="FP8_DYNAMIC"))
    with torch.no_grad():
        assert torch.equal(other.model(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


@pytest.mark.usefixtures("no_native")
def test_experts_that_stay_dense(tmp_path: Path) -> None:
    source = MOE["mixtral"]()
    source.save_pretrained(tmp_path / "dense")
    config = FP8Config(scheme="FP8_DYNAMIC", experts="dequantize")
    model = type(source).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert type(model.model.layers[0].mlp.experts) is type(source.model.layers[0].mlp.experts)
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)
    model.save_pretrained(tmp_path / "saved")
    written = tensors(tmp_path / "saved")
    plain = tensors(tmp_path / "dense")
    experts = [name for name in plain if "experts" in name]
    assert experts and differing({n: plain[n] for n in experts}, {n: written[n] for n in written if "experts" in n}) == []
    again = type(source).from_pretrained(tmp_path / "saved", quantization_config=FP8Config(backend="scaled_mm"))
    assert torch.equal(causal(again), causal(model))


LEFT_DENSE: dict[str, dict[str, Any]] = {
    "experts=": {"experts": "dequantize"},
    "ignore": {"ignore": ["lm_head", "re:.*router", "re:.*experts.*"]},
    "one projection": {"ignore": ["lm_head", "re:.*router", "re:.*down_proj"]},
}


@pytest.mark.parametrize(
    ("options", "way"),
    [*((options, "load") for options in LEFT_DENSE), ("ignore", "in place"), ("one projection", "in place")],
)
def test_dense_experts_of_llama4_are_saved_one_by_one(options: str, way: str, tmp_path: Path) -> None:
    """Stock splits them whenever it loads codes, and would leave others random."""
    source = TRANSPOSED["llama4"]()
    source.save_pretrained(tmp_path / "dense")
    if way == "load":
        config = FP8Config("FP8_DYNAMIC", backend="weight_only", **LEFT_DENSE[options])
        model = type(source).from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
    else:
        model = hf_fp8.quantize_model(source, "FP8_DYNAMIC", backend="weight_only", **LEFT_DENSE[options])
    model.save_pretrained(tmp_path / "saved")
    with stock_transformers():
        stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert error(causal(stock), causal(model)) < 0.15  # it quantizes inputs
    keep = FP8Config(backend="weight_only")
    again = type(source).from_pretrained(tmp_path / "saved", quantization_config=keep, dtype=torch.float32)
    assert error(causal(again), causal(model)) < 0.02


def test_after_loading(dense: Path, tmp_path: Path) -> None:
    model = quantized(dense, "FP8_WEIGHT_ONLY")
    wanted = logits(model)
    plain = model.dequantize()
    assert error(logits(plain), wanted) < 0.02 and not any(p.dtype == FP8 for p in plain.parameters())
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    with stock_transformers():
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(plain))
    with pytest.raises(UnsupportedError, match="quantized already"):
        hf_fp8.quantize_model(quantized(dense))


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("config", [
    {"scheme": "FP8_DYNAMIC", "backend": "weight_only"}, {"scheme": "FP8_DYNAMIC", "backend": "scaled_mm"},
    {"scheme": "FP8_DYNAMIC"},
])  # fmt: skip
def test_backends(config: dict[str, str], dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=FP8Config(**config))
    assert {m.backend for m in model.modules() if isinstance(m, QuantizedLinear)} == {config.get("backend", "auto")}
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text()
    assert '"backend"' not in text and '"scheme"' not in text
    again = load(tmp_path / "saved", FP8Config(backend=config.get("backend", "scaled_mm")), dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(model))


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    return BertForSequenceClassification(config).eval()


def test_a_base_model_from_the_files_of_a_task(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    model = quantized(tmp_path, cls=BertModel)
    assert len(kept(model)) == 13


@pytest.mark.usefixtures("no_native")
def test_an_encoder(tmp_path: Path) -> None:
    source = bert()
    source.save_pretrained(tmp_path / "dense")
    model = quantized(tmp_path / "dense", cls=type(source))
    model.save_pretrained(tmp_path / "saved")
    again = type(source).from_pretrained(tmp_path / "saved", quantization_config=FP8Config(backend="scaled_mm"))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert sqnr(model(IDS).logits, source(IDS).logits) > 15
    assert kept(again) == kept(model) and "classifier" in kept(model)


def test_t5_whose_code_reads_a_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=4, vocab_size=50, decoder_start_token_id=0
    )
    source = T5ForConditionalGeneration(config).eval()
    source.save_pretrained(tmp_path / "dense")
    model = quantized(tmp_path / "dense", "FP8_WEIGHT_ONLY", type(source))
    assert type(model.encoder.block[0].layer[1].DenseReluDense.wo) is torch.nn.Linear
    assert all("reads its weight" in reason for reason in model.hf_quantizer.planned.reasons.values())
    two = hf_fp8.quantize_model(type(source).from_pretrained(tmp_path / "dense"), "FP8_WEIGHT_ONLY")
    with torch.no_grad():
        one, other, plain = (m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (model, two, source))
    assert torch.equal(one, other) and sqnr(one, plain) > 20
    model.save_pretrained(tmp_path / "saved")
    assert any("wo" in name for name in config_of(tmp_path / "saved")["ignore"])


def test_a_pattern_that_takes_in_a_router(tmp_path: Path) -> None:
    source = MOE["mixtral"]()
    source.save_pretrained(tmp_path)
    model = quantized(tmp_path, {"FP8_DYNAMIC": ["re:.*self_attn.*"], "FP8_WEIGHT_ONLY": ["re:.*mlp.*"]}, type(source))
    assert sqnr(causal(model), causal(source)) > 9
