"""What an FP8Config says of itself is what it does: as an object, a dict or JSON; and stock's own config means the same."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus, QuantizationStrategy, preset_name_to_scheme
from support.build import KEEP, differing, load, logits, stock_transformers, tensors, tiny_llama, write
from support.moe import qwen3_moe
from support.other_formats import write_other
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationMethod

import hf_fp8
from hf_fp8 import FP8Config, Granularity, QuantizedLinear, Scheme, TensorScheme
from hf_fp8.errors import ConfigError, UnsupportedError
from hf_fp8.formats.scheme import SCHEMES

SMALL = Scheme(TensorScheme(Granularity(40, 24)), TensorScheme(Granularity(1, 24), dynamic=True))
GROUP: dict[str, Any] = json.loads(preset_name_to_scheme("FP8_DYNAMIC", ["re:.*mlp.*"]).model_dump_json())
# Each differs from each.
CONFIGS: dict[str, FP8Config] = {
    "nothing": FP8Config(),
    "backend": FP8Config(backend="weight_only"),
    "dequantize": FP8Config(dequantize=True),
    "experts": FP8Config(experts="fp8"),
    "several": FP8Config(backend="scaled_mm", experts="dequantize", backward="quantized"),
    "name": FP8Config("FP8_DYNAMIC"),
    "name, nothing spared": FP8Config("FP8_DYNAMIC", ignore=[]),
    "name, some ignored": FP8Config("FP8_DYNAMIC", ignore=["re:.*o_proj", "lm_head"]),
    "name, one ignored": FP8Config("FP8_DYNAMIC", ignore="lm_head"),
    "name, targets": FP8Config("FP8", targets=["re:.*mlp.*", "lm_head"], backend="weight_only", experts="dequantize"),
    "name, target": FP8Config("FP8_BLOCK", targets="re:.*mlp.*"),
    "Scheme": FP8Config(SMALL, ignore=[]),
    "Scheme that has a name": FP8Config(SCHEMES["FP8_TENSOR"]),
    "several schemes": FP8Config({"FP8_WEIGHT_ONLY": "re:.*down_proj", SMALL: ["re:.*self_attn.*"]}, backward="quantized"),
    "config_groups": FP8Config({"group_7": GROUP}, ignore=["lm_head"]),
    "config_groups and a name": FP8Config({"group_7": GROUP, "FP8_BLOCK": ["re:.*self_attn.*"]}),
}


def round_trips(config: FP8Config, tmp_path: Path) -> Iterator[tuple[str, FP8Config]]:
    yield "to_dict", FP8Config.from_dict(config.to_dict())
    yield "call", FP8Config(**config.to_dict())
    yield "dict", FP8Config.from_dict(dict(config))
    yield "to_diff_dict", FP8Config.from_dict(config.to_diff_dict())
    yield "json", FP8Config.from_dict(json.loads(json.dumps(config.to_dict())))
    yield "to_json_string", FP8Config.from_dict(json.loads(config.to_json_string()))
    yield "to_json_string, all", FP8Config.from_dict(json.loads(config.to_json_string(use_diff=False)))
    config.to_json_file(tmp_path / "config.json")
    yield "to_json_file", FP8Config.from_dict(json.loads((tmp_path / "config.json").read_text()))
    yield "repr", eval(repr(config))  # with what this file imports
    yield "copy", copy.copy(config)
    yield "deepcopy", copy.deepcopy(config)
    yield "pickle", pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_said_is_all_of_it(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    assert config.to_dict()["quant_method"] == "hf_fp8"
    for way, again in round_trips(config, tmp_path):
        assert again == config, way
        assert again.to_dict() == config.to_dict(), way
        assert [(g.targets, g.scheme) for g in again.groups] == [(g.targets, g.scheme) for g in config.groups], way
        assert (again.scheme, again.spec) == (config.scheme, config.spec), way
        assert type(again.scheme) is type(config.scheme), way
    for other_name, other in CONFIGS.items():
        assert (other == config) == (name == other_name) and (other.to_dict() == config.to_dict()) == (name == other_name)


def test_ignore_is_one_of_three() -> None:
    said = [FP8Config("FP8_DYNAMIC", ignore=ignore) for ignore in (None, [], ["lm_head"])]
    assert [config.to_dict()["ignore"] for config in said] == [None, [], ["lm_head"]]
    assert [repr(config) for config in said] == [
        "FP8Config(scheme='FP8_DYNAMIC')", "FP8Config(scheme='FP8_DYNAMIC', ignore=[])",
        "FP8Config(scheme='FP8_DYNAMIC', ignore=['lm_head'])",
    ]  # fmt: skip


def test_what_was_passed_is_copied() -> None:
    ignore, scheme = ["lm_head"], {"FP8_DYNAMIC": ["Linear"], "group_7": copy.deepcopy(GROUP)}
    config = FP8Config(scheme, ignore=ignore)
    before = config.to_dict()
    ignore.append("x")
    scheme["group_7"]["targets"].append("x")
    config.to_dict()["scheme"]["group_7"]["targets"].append("x")
    config.options["ignore"].append("x")
    assert config.to_dict() == before


@pytest.mark.parametrize(("make", "words"), [
    (lambda: FP8Config.from_dict({"backnd": "int8", "quant_method": "hf_fp8", "bits": 8}), "'backnd', 'bits'"),
    (lambda: FP8Config.from_dict({"quant_method": "gptq", "bits": 8}), "'gptq'"),
    (lambda: FP8Config.from_dict([("backend", "int8")]), "a dict"),
    (lambda: FP8Config.from_dict({"scheme": "FP8_DYNAMIC", "config_groups": {"group_7": GROUP}}), "both select"),
    (lambda: FP8Config.from_dict({"checkpoint": {}, "backend": "int8"}), "'checkpoint'"),
    (lambda: FP8Config(quant_method="gptq"), "'gptq'"), (lambda: FP8Config(run_compressed=False), "'run_compressed'"),
    (lambda: FP8Config(dequantize="false"), "True or False"), (lambda: FP8Config(backend=["int8"]), "one of"),
    (lambda: FP8Config.from_dict({"run_compressed": "false"}), "run_compressed='false'"),
    (lambda: FP8Config(["FP8_DYNAMIC"]), "one of"), (lambda: FP8Config("1x|2"), "one of"),
    (lambda: FP8Config(FP8Config()), "one of"),
    (lambda: FP8Config({"FP8_DYNAMIC": ["Linear"]}, targets=["re:x"]), "each has its own"),
    (lambda: FP8Config({"FP8_DYNAMIC": None}), "list of names"), (lambda: FP8Config("FP8", ignore=[1]), "list of names"),
    (lambda: FP8Config("FP8", targets=None), "list of names"), (lambda: FP8Config({"group_7": ["Linear"]}), "group_7"),
    (lambda: FP8Config({"quant_method": "compressed-tensors", "config_groups": {"group_7": GROUP}}), "a whole"),
    (lambda: hf_fp8.quantize_model(tiny_llama(), FP8Config("FP8_DYNAMIC")), "one of"),
    (lambda: hf_fp8.quantize_model(tiny_llama(), {"FP8_DYNAMIC": ["Linear"]}, targets="re:.*mlp.*"), "each has its own"),
])  # fmt: skip
def test_nonsense_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_options_that_are_set_later() -> None:
    config = FP8Config("FP8_DYNAMIC")
    config.scheme, config.ignore = "FP8_WEIGHT_ONLY", []
    config.targets = "re:.*mlp.*"
    assert config == FP8Config("FP8_WEIGHT_ONLY", targets=["re:.*mlp.*"], ignore=[])
    assert config.groups[0].scheme == SCHEMES["FP8_WEIGHT_ONLY"] and not config.spec.dense_by_default
    assert config.update(backend="weight_only", modules_to_not_convert=["x"]) == {"modules_to_not_convert": ["x"]}
    assert config.backend == "weight_only" and config.scheme == "FP8_WEIGHT_ONLY"
    for name, value in {"backend": "int4", "experts": None, "dequantize": True, "scheme": "FP9", "ignore": 3}.items():
        before = config.to_dict()
        with pytest.raises(ConfigError):
            setattr(config, name, value)
        with pytest.raises(ConfigError):
            config.update(**{name: value})
        assert config.to_dict() == before
    made, unused = FP8Config.from_dict({"backend": "int8"}, return_unused_kwargs=True, backend="scaled_mm", foo=1)
    assert made == FP8Config(backend="scaled_mm") and unused == {"foo": 1}


# -- loading --


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "dense"
    tiny_llama().save_pretrained(path)
    return path


def saved(model: PreTrainedModel, path: Path) -> tuple[dict[str, torch.Tensor], str]:
    model.save_pretrained(path)
    return tensors(path), (path / "config.json").read_text()


def kept(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].scheme is not None])
def test_a_dict_quantizes_as_the_object_does(name: str, dense: Path, tmp_path: Path) -> None:
    config = CONFIGS[name]
    before = config.to_dict()
    ways = [config, config.to_dict(), json.loads(config.to_json_string()), config]
    found = []
    for number, way in enumerate(ways):
        # a class of its own: Auto classes copy what they are given
        model = LlamaForCausalLM.from_pretrained(dense, quantization_config=way)
        assert kept(model) and config.to_dict() == before and config.checkpoint is None
        if any(getattr(module, "needs_calibration", False) for module in model.modules()):
            with hf_fp8.calibrate(model):
                logits(model)
        found.append(saved(model, tmp_path / str(number)))
    for other in found[1:]:
        assert differing(other[0], found[0][0]) == [] and other[1] == found[0][1]
    written = json.loads(found[0][1])["quantization_config"]
    assert written["quant_method"] == "compressed-tensors" and not {"scheme", "targets", "backend", "experts"} & set(written)


@pytest.mark.parametrize("options", [{"backend": "weight_only"}, {"backend": "int8"}, {"dequantize": True}, {}], ids=str)
def test_a_dict_loads_as_the_object_does(options: dict[str, Any], fp8: Path, tmp_path: Path) -> None:
    config = FP8Config(**options)
    models = [load(fp8, way) for way in (config, config.to_dict(), json.loads(config.to_json_string()), dict(config))]
    first = saved(models[0], tmp_path / "first")
    for number, model in enumerate(models[1:]):
        assert torch.equal(logits(model), logits(models[0]))
        other = saved(model, tmp_path / str(number))
        assert differing(other[0], first[0]) == [] and other[1] == first[1]
    assert "weight_only" not in first[1] and "hf_fp8" not in first[1] + models[0].config.to_json_string()
    assert config == FP8Config(**options)


def test_a_request_for_quantizing_is_not_for_an_fp8_checkpoint(fp8: Path, dense: Path) -> None:
    for way in (CONFIGS["name"], CONFIGS["name"].to_dict()):
        with pytest.raises(ConfigError, match="quantized already"):
            load(fp8, way)
    for way in (KEEP, KEEP.to_dict(), {"quant_method": "hf_fp8"}):
        with pytest.raises(ConfigError, match="has no `quantization_config`"):
            load(dense, way)


def test_in_place_changes_nothing_that_was_passed() -> None:
    scheme, ignore = {"FP8_WEIGHT_ONLY": ["re:.*down_proj"], "group_7": copy.deepcopy(GROUP)}, ["lm_head"]
    before = copy.deepcopy((scheme, ignore))
    first, second = (hf_fp8.quantize_model(tiny_llama(), scheme, ignore=ignore) for _ in range(2))
    assert (scheme, ignore) == before and torch.equal(logits(first), logits(second))
    by_class = {"FP8_WEIGHT_ONLY": ["re:.*down_proj"], "group_7": QuantizationScheme(**GROUP)}
    assert torch.equal(logits(hf_fp8.quantize_model(tiny_llama(), by_class)), logits(first))


def test_the_config_of_a_checkpoint(fp8: Path, tmp_path: Path) -> None:
    written = AutoConfig.from_pretrained(fp8).quantization_config
    config = FP8Config.from_dict(written)
    assert config.checkpoint == written and config.to_dict() == written and config.groups and config.scheme is None
    assert FP8Config.from_dict({"quantization_config": written}) == config
    assert FP8Config.from_dict(json.loads(config.to_json_string())) == config == eval(repr(config))
    with_options = FP8Config.from_dict({**written, "backend": "weight_only"})
    assert with_options.backend == "weight_only" and with_options.to_dict() == written
    assert eval(repr(with_options)) == with_options == pickle.loads(pickle.dumps(with_options)) != config
    with_options.backward = "quantized"
    with pytest.raises(ConfigError, match="checkpoint"):
        with_options.update(scheme="FP8_DYNAMIC")
    wanted = load(fp8)
    for way in (with_options, {**written, "backend": "weight_only"}, wanted.config.quantization_config):
        model = load(fp8, way)
        assert torch.equal(logits(model), logits(wanted))
    model = load(fp8, with_options)
    assert kept(model) and model.model.layers[0].mlp.up_proj.backward == "quantized"
    assert model.config.quantization_config.to_dict() == written == with_options.checkpoint


def test_enums_and_objects_in_a_dict(fp8: Path, dense: Path) -> None:
    written = AutoConfig.from_pretrained(fp8).quantization_config
    wanted = load(fp8)
    for way in (
        {"quant_method": QuantizationMethod.COMPRESSED_TENSORS, "backend": "weight_only"},
        {**written, "quant_method": QuantizationMethod.COMPRESSED_TENSORS, "backend": "weight_only"},
        {**written, "quantization_status": QuantizationStatus.COMPRESSED, "backend": "weight_only"},
        {**CompressedTensorsConfig.from_dict(written).to_dict(), "backend": "weight_only"},
        FP8Config(**KEEP.get_loading_attributes(), quant_method=QuantizationMethod.COMPRESSED_TENSORS),
    ):
        model = load(fp8, way)
        assert len(kept(model)) == 14 and torch.equal(logits(model), logits(wanted))
        assert json.loads(model.config.to_json_string())["quantization_config"]["quant_method"] == "compressed-tensors"
    group = copy.deepcopy(GROUP)
    group["weights"]["strategy"] = QuantizationStrategy.CHANNEL
    for scheme in ({"group_7": group}, {"group_7": QuantizationScheme(**GROUP)}):
        assert FP8Config(scheme) == FP8Config({"group_7": GROUP})
        assert json.loads(FP8Config(scheme).to_json_string())["scheme"]["group_7"]["weights"]["strategy"] == "channel"


def test_a_request_on_the_config_of_a_model(fp8: Path, dense: Path) -> None:
    for request in (FP8Config("FP8_DYNAMIC"), {"scheme": "FP8_DYNAMIC"}, FP8Config("FP8_DYNAMIC").to_dict()):
        config = AutoConfig.from_pretrained(dense)
        config.quantization_config = request
        model = AutoModelForCausalLM.from_pretrained(dense, config=config)
        assert len(kept(model)) == 14 and not model.hf_quantizer.pre_quantized
        config.save_pretrained(dense)  # a user who writes it into a config.json means the same
        assert len(kept(AutoModelForCausalLM.from_pretrained(dense))) == 14
        tiny_llama().save_pretrained(dense)
    for request in (KEEP, {"backend": "weight_only"}, KEEP.to_dict()):
        config = AutoConfig.from_pretrained(fp8, quantization_config=request)
        assert len(kept(AutoModelForCausalLM.from_pretrained(fp8, config=config))) == 14
    for request in (FP8Config(dequantize=True), CompressedTensorsConfig(dequantize=True)):
        config = AutoConfig.from_pretrained(fp8, quantization_config=request)
        model = AutoModelForCausalLM.from_pretrained(fp8, config=config, dtype=torch.float32)
        assert torch.equal(logits(model), logits(load(fp8, FP8Config(dequantize=True))))


def test_the_config_of_a_model_quantized_while_loading(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=CONFIGS["name, some ignored"])
    model.save_pretrained(tmp_path / "fp8")
    used = model.config.quantization_config
    assert used.checkpoint is not None and used.options == CONFIGS["name, some ignored"].options
    assert used.update(backend="weight_only") == {}
    again = LlamaForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=used)
    assert kept(again) and differing(saved(again, tmp_path / "again")[0], tensors(tmp_path / "fp8")) == []
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "other")
    other = LlamaForCausalLM.from_pretrained(tmp_path / "other", quantization_config=used)
    assert len(kept(other)) == 18 and used.to_dict() == model.config.quantization_config.to_dict()


# -- stock's words --


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logging.enable_propagation()
    logging.warning_once.cache_clear()
    yield caplog
    logging.disable_propagation()


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("options", [
    {"run_compressed": False}, {"run_compressed": True}, {"run_compressed": None},
    {"run_compressed": False, "dequantize": True},
    {"run_compressed": True, "dequantize": True}, {"use_optimized_inference": True},
    {"use_optimized_inference": True, "dequantize": True}, {"use_optimized_inference": True, "run_compressed": False},
], ids=str)  # fmt: skip
def test_stock_options_in_a_dict(options: dict[str, Any], fp8: Path, warnings: pytest.LogCaptureFixture) -> None:
    stock = CompressedTensorsConfig(**options)
    stock.post_init()
    said = [record.message for record in warnings.records if record.levelname == "WARNING"]
    assert ("run_compressed" in "".join(said)) == (options.get("run_compressed") is not None)
    for way in ({**options}, {"quant_method": "compressed-tensors", **options}, {"quant_method": "hf_fp8", **options}):
        logging.warning_once.cache_clear()
        warnings.clear()
        config = FP8Config.from_dict(way)
        assert config.dequantize == stock.dequantize
        assert [record.message for record in warnings.records if record.levelname == "WARNING"] == said
        logging.warning_once.cache_clear()
        warnings.clear()
        model = load(fp8, way)
        found = [r.message for r in warnings.records if r.levelname == "WARNING" and r.name.startswith("transformers")]
        assert found == said and not kept(model)
        assert ("dequantized to" in warnings.text) == (not stock.dequantize)  # by the backend, on this machine, not by request
    if stock.dequantize:
        with pytest.raises(ConfigError, match="leaves nothing"):
            load(fp8, {**options, "backend": "weight_only"})
    else:
        assert len(kept(load(fp8, {**options, "backend": "weight_only"}))) == 14


def test_a_stock_object_is_left_as_it_was(fp8: Path, warnings: pytest.LogCaptureFixture) -> None:
    stock = CompressedTensorsConfig(dequantize=True, use_optimized_inference=True)
    before = copy.deepcopy(vars(stock))
    LlamaForCausalLM.from_pretrained(fp8, quantization_config=stock)
    assert vars(stock) == before and "Setting `use_optimized_inference=False`" in warnings.text


PRESET = {"FP8_DYNAMIC": ["Linear"]}
WHOLE = {"group_0": json.loads(preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]).model_dump_json())}
STOCK: dict[str, Any] = {
    "preset": lambda ignore: CompressedTensorsConfig(config_groups=PRESET, ignore=ignore),
    "json": lambda ignore: CompressedTensorsConfig(config_groups=WHOLE, ignore=ignore, format="float-quantized"),
    "class": lambda ignore: CompressedTensorsConfig(
        config_groups={"group_0": QuantizationScheme(**WHOLE["group_0"])}, ignore=ignore, use_optimized_inference=True
    ),
    "dict": lambda ignore: {"quant_method": "compressed-tensors", "config_groups": PRESET, "ignore": ignore},
    "dict without a method": lambda ignore: {"config_groups": WHOLE, "ignore": ignore},
    "to_dict": lambda ignore: CompressedTensorsConfig(config_groups=PRESET, ignore=ignore).to_dict(),
    "from_dict": lambda ignore: FP8Config.from_dict({"config_groups": PRESET, "ignore": ignore}),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("way", STOCK)
def test_stock_groups_quantize_a_dense_model(way: str, dense: Path, tmp_path: Path) -> None:
    for ignore in (None, [], ["lm_head"], ["re:.*self_attn.*", "lm_head"]):
        passed = STOCK[way](ignore)
        model = LlamaForCausalLM.from_pretrained(dense, quantization_config=passed)
        wanted = LlamaForCausalLM.from_pretrained(dense, quantization_config=FP8Config(PRESET, ignore=ignore or []))
        assert kept(model) == kept(wanted) and ("lm_head" in kept(model)) == (not ignore)
        assert torch.equal(logits(model), logits(wanted))
        found, expected = saved(model, tmp_path / "found"), saved(wanted, tmp_path / "expected")
        assert differing(found[0], expected[0]) == []
        written, other = (json.loads(text)["quantization_config"] for text in (found[1], expected[1]))
        assert list(written["config_groups"].values()) == list(other["config_groups"].values())
        assert {**written, "config_groups": 0} == {**other, "config_groups": 0}


def test_stock_ignores_exactly_what_is_listed(dense: Path) -> None:
    listed = CompressedTensorsConfig(config_groups=PRESET, ignore=["re:.*self_attn.*"])
    ours = FP8Config(PRESET, ignore=["re:.*self_attn.*"])
    assert "lm_head" in kept(AutoModelForCausalLM.from_pretrained(dense, quantization_config=listed))
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=ours)
    assert kept(model) and "lm_head" not in kept(model)
    # The config of what was loaded so asks for the same again.
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=listed)
    again = AutoModelForCausalLM.from_pretrained(dense, quantization_config=model.config.quantization_config)
    assert kept(again) == kept(model)


def test_stock_groups_and_experts(tmp_path: Path) -> None:
    source = qwen3_moe()
    source.save_pretrained(tmp_path / "dense")
    stock = CompressedTensorsConfig(config_groups=PRESET, ignore=["lm_head", "re:.*mlp.gate$"])
    models = [
        type(source).from_pretrained(tmp_path / "dense", quantization_config=way)
        for way in (stock, FP8Config("FP8_DYNAMIC", ignore=["lm_head", "re:.*mlp.gate$"]))
    ]
    assert any(isinstance(module, hf_fp8.QuantizedExperts) for module in models[0].modules())
    assert torch.equal(logits(models[0]), logits(models[1]))


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"dequantize": True}, ConfigError, "would undo"), ({"run_compressed": False}, ConfigError, "would undo"),
    ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, UnsupportedError, "kv_cache_scheme"),
    ({"config_groups": {**PRESET, "W2A16": ["re:.*mlp.*"]}}, ConfigError, "2-bit int weights"),
    ({"format": "pack-quantized"}, ConfigError, "float-quantized"),
])  # fmt: skip
def test_stock_groups_that_cannot_be_made(options: dict[str, Any], error: type[Exception], words: str, dense: Path) -> None:
    for way in ({"config_groups": PRESET} | options, CompressedTensorsConfig(**{"config_groups": PRESET} | options)):
        with pytest.raises(error, match=words):
            AutoModelForCausalLM.from_pretrained(dense, quantization_config=way)
    with pytest.raises(ConfigError, match="nonsense"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config={"config_groups": PRESET, "nonsense": 1})


def test_other_groups_are_left_to_stock(dense: Path, tmp_path: Path) -> None:
    def said(way: Any, path: Path) -> str:
        with pytest.raises(ValueError) as info:
            AutoModelForCausalLM.from_pretrained(path, quantization_config=way)
        return f"{info.type.__name__}: {info.value}"

    write_other(tmp_path / "int4", "int4")
    int4 = {"config_groups": {"W4A16": ["Linear"]}, "ignore": ["lm_head"]}
    ways = [CompressedTensorsConfig(**int4), {"quant_method": "compressed-tensors", **int4}, int4, CompressedTensorsConfig()]
    ours = [said(way, dense) for way in ways]
    fp8_groups = AutoModelForCausalLM.from_pretrained(
        tmp_path / "int4", quantization_config=CompressedTensorsConfig(config_groups=PRESET)
    )
    with stock_transformers():
        assert [said(way, dense) for way in ways] == ours
        stock = AutoModelForCausalLM.from_pretrained(
            tmp_path / "int4", quantization_config=CompressedTensorsConfig(config_groups=PRESET)
        )
    assert torch.equal(logits(fp8_groups), logits(stock))
    with pytest.raises(ConfigError, match="quantized already"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "int4", quantization_config=FP8Config.from_dict({"config_groups": PRESET})
        )


@pytest.mark.parametrize("way", STOCK)
def test_stock_groups_on_an_fp8_checkpoint(way: str, fp8: Path, warnings: pytest.LogCaptureFixture) -> None:
    wanted = load(fp8, FP8Config())
    assert torch.equal(logits(load(fp8, STOCK[way](["lm_head"]))), logits(wanted))
    assert "`ignore`" not in warnings.text
    load(fp8, STOCK[way](["lm_head", "re:.*mlp.*"]))
    assert "re:.*mlp.*: in the `ignore` that was passed" in warnings.text


@pytest.mark.parametrize("other", [
    {"FP8": ["Linear"]}, {"W4A16": ["Linear"]}, {"FP8_DYNAMIC": ["re:.*mlp.*"]}, {"FP8_BLOCK": ["Linear"], **PRESET}
], ids=str)  # fmt: skip
def test_other_groups_on_an_fp8_checkpoint(other: dict[str, Any], fp8: Path) -> None:
    stock = CompressedTensorsConfig(config_groups=other, dequantize=True)
    for way in (stock, stock.to_dict(), FP8Config.from_dict({"config_groups": other})):
        with pytest.raises(ConfigError, match="quantized already, with 'group_0'"):
            load(fp8, way)
    with pytest.raises(ConfigError, match="kv_cache_scheme"):
        load(fp8, {"config_groups": PRESET, "kv_cache_scheme": {"num_bits": 8, "type": "float"}})


def test_configs_of_models_that_became_something_else(fp8: Path, tmp_path: Path) -> None:
    """int8, a replaced head: what such a model's config says is not what the files say, and may be passed on all the same."""
    int8 = load(fp8, FP8Config(backend="int8"))
    again = LlamaForCausalLM.from_pretrained(fp8, quantization_config=int8.config.quantization_config, dtype=torch.float32)
    assert torch.equal(logits(again), logits(int8))
    path = tmp_path / "head"
    write(tiny_llama(), path, quantized=lambda name: name.endswith("_proj.weight") or name == "lm_head.weight", ignore=[])
    model = load(path)
    model.lm_head = torch.nn.Linear(64, 128, bias=False)
    model.save_pretrained(tmp_path / "saved")
    assert "lm_head" in model.config.quantization_config.ignore
    assert "lm_head" in kept(LlamaForCausalLM.from_pretrained(path, quantization_config=model.config.quantization_config))


@pytest.mark.usefixtures("no_native")  # which adds up in another order than torch
def test_whole_configs_of_models_that_became_something_else(fp8: Path, tmp_path: Path) -> None:
    """Passed on with the same checkpoint they load what it is; with another, the files decide, or it is an error."""
    int8 = load(fp8, FP8Config(backend="int8"))
    again = LlamaForCausalLM.from_pretrained(fp8, config=int8.config, dtype=torch.float32)
    assert torch.equal(logits(again), logits(load(fp8)))
    int8.save_pretrained(tmp_path / "int8")
    dense = load(fp8, FP8Config(dequantize=True))
    moved = fp8.rename(tmp_path / "moved")
    found = LlamaForCausalLM.from_pretrained(moved, config=dense.config, dtype=torch.float32)  # judged by its own config.json
    assert torch.equal(logits(found), logits(dense))
    with pytest.raises(hf_fp8.FP8Error, match="int8 codes, which it does not describe"):
        LlamaForCausalLM.from_pretrained(tmp_path / "int8", config=int8.config, dtype=torch.float32)


@pytest.mark.usefixtures("no_native")
def test_the_config_of_a_model_made_dense_and_a_scheme(fp8: Path, tmp_path: Path) -> None:
    model = load(fp8, FP8Config())
    model.save_pretrained(tmp_path / "dense")
    for way in (FP8Config("FP8_DYNAMIC"), CompressedTensorsConfig(config_groups=PRESET)):
        with pytest.raises(ConfigError, match="leave `config` out"):  # it says nothing of FP8, but the folder's does
            LlamaForCausalLM.from_pretrained(fp8, config=model.config, quantization_config=way)
        for config in ({"config": model.config}, {}):
            assert kept(LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=way, **config))
