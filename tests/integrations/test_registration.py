"""Without an FP8 group the host is left alone; and what of the host we rely on is as we think."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from support.build import differing, load, logits, tensors, tiny_llama
from support.moe import qwen3_moe
from support.other_formats import OTHER_FORMATS, write_other
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    core_model_loading,
    modeling_utils,
)
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

import hf_fp8
from hf_fp8 import FP8Config

IDS = torch.arange(24).reshape(2, 12)


def results(path: Path, out: Path, **kwargs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], str]:
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    model.save_pretrained(out / "before")
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    return logits, tensors(out / "before"), (out / "before" / "config.json").read_text()


@pytest.mark.parametrize("name", OTHER_FORMATS)
@pytest.mark.parametrize("options", [{}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}], ids=str)
def test_without_an_fp8_group_all_is_as_in_stock(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    write_other(tmp_path / "model", name)
    ours = results(tmp_path / "model", tmp_path / "ours", **options)
    hf_fp8.unregister()
    try:
        stock = results(tmp_path / "model", tmp_path / "stock", **options)
    finally:
        hf_fp8.register()
    assert torch.equal(ours[0], stock[0]) and ours[0].isfinite().all()
    assert differing(ours[1], stock[1]) == []
    assert json.loads(ours[2]) == json.loads(stock[2])


def test_fp8_config_on_another_format(tmp_path: Path) -> None:
    write_other(tmp_path / "model", "nvfp4")
    hf_fp8.unregister()
    try:
        stock = results(tmp_path / "model", tmp_path / "stock")
    finally:
        hf_fp8.register()
    ours = results(tmp_path / "model", tmp_path / "ours", quantization_config=FP8Config())
    assert torch.equal(ours[0], stock[0])
    with pytest.raises(hf_fp8.errors.ConfigError, match="no config group"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=FP8Config(backend="scaled_mm"))


def test_plain_models_load_as_ever(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    ours = results(tmp_path / "model", tmp_path / "ours")
    hf_fp8.unregister()
    try:
        stock = results(tmp_path / "model", tmp_path / "stock")
    finally:
        hf_fp8.register()
    assert torch.equal(ours[0], stock[0]) and differing(ours[1], stock[1]) == [] and ours[2] == stock[2]


def test_register_and_unregister_are_idempotent() -> None:
    ours = modeling_utils.get_hf_quantizer
    assert inspect.unwrap(ours) is auto.get_hf_quantizer
    hf_fp8.register()
    assert modeling_utils.get_hf_quantizer is ours
    hf_fp8.unregister()
    hf_fp8.unregister()
    assert modeling_utils.get_hf_quantizer is auto.get_hf_quantizer
    assert auto.AUTO_QUANTIZER_MAPPING["compressed-tensors"] is CompressedTensorsHfQuantizer
    assert "hf_fp8" not in auto.AUTO_QUANTIZER_MAPPING
    hf_fp8.register()
    again = modeling_utils.get_hf_quantizer
    assert again.__code__ is ours.__code__ and again.__wrapped__ is auto.get_hf_quantizer


def test_arguments_by_the_names_of_the_host(fp8: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(pretrained_model_name_or_path=fp8, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load(fp8)))
    model.save_pretrained(save_directory=str(fp8.parent / "saved"))
    assert (fp8.parent / "saved" / "config.json").exists()
    for name in ("from_pretrained", "save_pretrained", "resize_token_embeddings", "_load_pretrained_model"):
        theirs = list(inspect.signature(inspect.unwrap(getattr(PreTrainedModel, name))).parameters)
        assert list(inspect.signature(getattr(PreTrainedModel, name)).parameters) == [n for n in theirs if n != "cls"]


class TestHost:
    """A new transformers that changes one of these fails here, by name, not in a user's model."""

    def test_from_pretrained_takes_the_quantizer_from_the_name_we_replace(self) -> None:
        source = inspect.getsource(PreTrainedModel.from_pretrained)
        assert "get_hf_quantizer(" in source
        assert (
            source.index("preprocess_model(") < source.index("get_model_conversion_mapping(") < source.index("_get_device_map(")
        )

    def test_preprocess_is_given_the_files(self) -> None:
        assert "checkpoint_files=checkpoint_files" in inspect.getsource(PreTrainedModel.from_pretrained)

    def test_quantizer_hooks(self) -> None:
        for name in ("update_weight_conversions", "get_new_dtype", "get_state_dict_and_metadata", "update_parallel_plan"):
            assert callable(getattr(HfQuantizer, name))
        assert list(inspect.signature(HfQuantizer.get_new_dtype).parameters) == ["self", "converter", "param", "dtype"]

    def test_reversed_transforms_are_used_for_saving(self) -> None:
        source = inspect.getsource(core_model_loading.revert_weight_conversion)
        assert "_weight_conversions" in source and "reverse_transform()" in source
        assert source.index("apply_converters(original_key") < source.index("apply_renamings(target_name")

    def test_transform_slots(self) -> None:
        slots = core_model_loading.WeightTransform.__slots__ + core_model_loading.WeightConverter.__slots__
        assert {"collected_tensors", "layer_targets", "operations", "scope_prefix", "base_model_prefix"} <= set(slots)

    def test_merge_passes_a_stacked_tensor_through(self) -> None:
        stacked = torch.zeros(2, 3)
        merged = core_model_loading.MergeModulelist(0).convert({"a": stacked}, ["a"], ["b"])
        assert merged["b"] is stacked

    def test_the_last_hook_before_the_files_are_resolved(self) -> None:
        """`update_attn_implementation`, in which the folder is looked at, and which is given the model's config."""
        assert list(inspect.signature(HfQuantizer.update_attn_implementation).parameters) == ["self", "config"]
        assert ".update_attn_implementation(config)" in inspect.getsource(auto.get_hf_quantizer)
        source = inspect.getsource(PreTrainedModel.from_pretrained)
        assert source.index("get_hf_quantizer(") < source.index("_get_resolved_checkpoint_files(")

    def test_methods_that_are_wrapped(self) -> None:
        assert list(inspect.signature(PreTrainedModel._load_pretrained_model).parameters)[:4] == [
            "model", "state_dict", "checkpoint_files", "load_config",
        ]  # fmt: skip
        assert {"hf_quantizer", "weight_mapping"} <= set(inspect.signature(modeling_utils.LoadStateDictConfig).parameters)
        assert "cls._load_pretrained_model(" in inspect.getsource(PreTrainedModel.from_pretrained)
        options = {"variant", "use_safetensors", "ignore_mismatched_sizes", "subfolder", "gguf_file"}
        named = set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
        popped = set(re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(PreTrainedModel.from_pretrained)))
        assert options <= named | popped
        assert list(inspect.signature(PreTrainedModel.resize_token_embeddings).parameters)[1] == "new_num_tokens"
        assert list(inspect.signature(PreTrainedModel.save_pretrained).parameters)[:4] == [
            "self", "save_directory", "is_main_process", "state_dict",
        ]  # fmt: skip

    @pytest.mark.parametrize("dequantize", [False, True])
    def test_conversions_that_we_set_are_there_when_the_model_is_saved(self, dequantize: bool, fp8: Path) -> None:
        """5.24 deletes them with the quantization config, before one hook and after another."""
        model = AutoModelForCausalLM.from_pretrained(fp8, quantization_config=FP8Config(backend="weight_only"))
        if dequantize:
            model.dequantize()
        assert isinstance(model._weight_conversions, list)

    def test_parameters_that_the_host_keeps_in_float32(self, tmp_path: Path) -> None:
        """5.24 does so with routers: `_get_dtype_plan` has to be where that is said, or they are planned in another dtype."""
        model = qwen3_moe()
        plan = model._get_dtype_plan(torch.bfloat16)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
        wide = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
        assert wide == {name for name in loaded.state_dict() if any(re.search(pattern, name) for pattern in plan)}

    def test_which_peft_the_host_asks_for(self, fp8: Path) -> None:
        """A version that is not published, from 5.24 on: the pages say `get_peft_model`, which does not ask."""
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(fp8), LoraConfig(target_modules=["q_proj"]))
        assert model(IDS).logits.isfinite().all()

    def test_versions(self) -> None:
        """Those of the requirements, oldest and newest, are those that `scripts/test` runs."""
        root = Path(__file__).parents[2]
        oldest = re.search(r'"transformers>=([\d.]+)"', (root / "pyproject.toml").read_text())
        setup = (root / "scripts" / "setup").read_text()
        tested = re.search(r'oldest=\("transformers==([\d.]+)"', setup)
        assert oldest and tested and tested[1] == f"{oldest[1]}.0"
        assert Version(oldest[1]) <= Version(transformers.__version__)


def test_microscaling_groups_of_fewer_bits_are_left_to_the_host() -> None:
    from hf_fp8.checkpoint.config_groups import concerns_fp8

    weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights}
    assert concerns_fp8({"config_groups": {"g": group}, "format": "float-quantized"})
    assert not concerns_fp8({"config_groups": {"g": {**group, "format": "mxfp6-pack-quantized"}}})
    exponents = {**weights, "scale_dtype": "torch.uint8"}
    assert concerns_fp8({"config_groups": {"g": {**group, "weights": exponents, "format": "mxfp8-quantized"}}})
    assert not concerns_fp8({"config_groups": {"g": {**group, "weights": {**exponents, "group_size": 16}}}})
    assert not concerns_fp8({"config_groups": {"g": {**group, "weights": {**exponents, "num_bits": 4}}}})
