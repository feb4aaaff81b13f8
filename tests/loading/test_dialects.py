"""Checkpoints in the dialects of other libraries: loaded, kept, saved in their own dialect, and refused if they are
malformed."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from support.build import differing, error, is_linear, tensors, tiny_llama
from support.commands import run
from support.dialects import VARIANTS, State, llava, write_in
from support.moe import MOE, causal, dense_logits
from support.moe import is_linear as is_linear_of_moe
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_fp8 import FP8Config, QuantizedExperts, QuantizedLinear
from hf_fp8.errors import (
    ConfigError,
    FP8Error,
    MismatchError,
    MissingTensorError,
    ScaleError,
    UnsupportedError,
    UnusedTensorError,
)

KEEP = FP8Config(backend="weight_only", experts="fp8")
FILE = "hf_quant_config.json"
UNEVEN = {"hidden_size": 192, "intermediate_size": 320}  # 128 divides neither


def load(path: Path, config: Any = KEEP, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype)


def config_of(path: Path) -> Any:
    return json.loads((path / "config.json").read_text()).get("quantization_config")


@pytest.mark.parametrize("name", VARIANTS)
def test_llama(name: str, tmp_path: Path) -> None:
    model, path = tiny_llama(**UNEVEN), tmp_path / "fp8"
    written, dense = write_in(name, model, path, is_linear)
    wanted = dense_logits(model, dense, tmp_path / "dense")
    kept = load(path)
    assert isinstance(kept.model.layers[0].self_attn.k_proj, QuantizedLinear)
    assert error(causal(kept), wanted) <= 1e-5
    assert error(causal(load(path, FP8Config(dequantize=True))), wanted) <= 1e-5
    if VARIANTS[name].by_default:
        by_default = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert error(causal(by_default), wanted) <= 1e-5
    load(path, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []
    assert_same_config(path, tmp_path / "saved", VARIANTS[name].file)
    assert torch.equal(causal(load(tmp_path / "saved")), causal(kept))


def assert_same_config(path: Path, saved: Path, file: str) -> None:
    """That the config is saved in its own dialect, word for word; one that was in another file, in both files."""
    if not file:
        assert config_of(saved) == config_of(path)
        return
    assert (saved / file).read_text() == (path / file).read_text()
    assert config_of(saved) == {"quant_method": "modelopt", **json.loads((path / file).read_text())}


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.thinned(5)
def test_experts(name: str, family: str, tmp_path: Path) -> None:
    model, path = MOE[family](), tmp_path / "fp8"
    written, dense = write_in(name, model, path, is_linear_of_moe)
    wanted = dense_logits(model, dense, tmp_path / "dense")
    kept = load(path)
    assert any(isinstance(module, QuantizedExperts) for module in kept.modules())
    assert error(causal(kept), wanted) <= 1e-5
    assert error(causal(load(path, FP8Config(dequantize=True))), wanted) <= 1e-5
    load(path, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    rest = [key for key in differing(written, tensors(tmp_path / "saved")) if "e_score_correction_bias" not in key]
    assert rest == []
    assert_same_config(path, tmp_path / "saved", VARIANTS[name].file)


@pytest.mark.parametrize("form", ["sharded", "bin"])
def test_files_of_other_forms(form: str, tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "fp8"
    written, dense = write_in("modelopt, in its own file", model, path, is_linear)
    (path / "model.safetensors").unlink()
    if form == "bin":
        torch.save(written, path / "pytorch_model.bin")
    else:
        split = split_torch_state_dict_into_shards(written, filename_pattern="model{suffix}.safetensors", max_shard_size=40_000)
        for file, names in split.filename_to_tensors.items():
            save_file({name: written[name] for name in names}, path / file, metadata={"format": "pt"})
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert len(split.filename_to_tensors) > 2
    assert error(causal(load(path)), dense_logits(model, dense, tmp_path / "dense")) <= 1e-5


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.by_default])
def test_stock_runs_it_unless_asked(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_in(name, tiny_llama(hidden_size=128, intermediate_size=128), tmp_path, is_linear)
    if name == "fbgemm":
        with pytest.raises(ImportError, match="fbgemm"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        return
    for options in ({}, {"quantization_config": None}):  # the second makes transformers' Auto classes drop its config
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
        assert causal(model).isfinite().all()


def test_inputs_are_quantized_as_the_config_says(tmp_path: Path) -> None:
    """Against a layer computed by hand: AutoFP8's static scale, and one per group of 128 for blocks."""
    for name in ("autofp8", "deepseek"):
        path = tmp_path / name
        _, dense = write_in(name, tiny_llama(**UNEVEN), path, is_linear)
        layer = load(path, FP8Config(backend="scaled_mm")).model.layers[0].mlp.up_proj
        x = torch.randn(17, 192)
        scale = torch.tensor(3.0 / 448)
        if name == "deepseek":
            grouped = torch.nn.functional.pad(x, (0, 64)).reshape(17, 2, 128).abs().amax(-1) / 448
            scale = grouped.repeat_interleave(128, 1)[:, :192]
        codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        assert error(layer(x), codes @ dense["model.layers.0.mlp.up_proj.weight"].T) <= 1e-5


def test_a_layer_made_dense_is_saved_in_the_dialect(tmp_path: Path) -> None:
    """The config then names it, in its own way, and the rest is as it was."""
    for name, key in (("deepseek", "modules_to_not_convert"), ("modelopt", "ignore"), ("autofp8", "ignored_layers")):
        path, saved = tmp_path / name, tmp_path / f"{name} saved"
        write_in(name, tiny_llama(), path, is_linear)
        before, model = config_of(path), load(path)
        place = model.model.layers[1].mlp
        place.up_proj = torch.nn.Linear(64, 96, bias=False)
        wanted = causal(model)
        model.save_pretrained(saved)
        after = config_of(saved)
        assert {**after, key: None} == {**before, key: None}
        assert set(after[key]) >= {*before.get(key, ()), "model.layers.1.mlp.up_proj", "lm_head"}
        assert error(causal(load(saved)), wanted) <= 1e-5


def test_int8_is_saved_as_compressed_tensors(tmp_path: Path) -> None:
    write_in("autofp8", tiny_llama(), tmp_path / "fp8", is_linear)
    model = load(tmp_path / "fp8", FP8Config(backend="int8"))
    model.save_pretrained(tmp_path / "int8")
    assert config_of(tmp_path / "int8")["quant_method"] == "compressed-tensors"
    again = load(tmp_path / "int8", FP8Config())
    assert torch.equal(causal(again), causal(load(tmp_path / "fp8", FP8Config(backend="int8"))))


def test_weights_that_the_config_does_not_name_may_be_dense(tmp_path: Path) -> None:
    """Older exporters leave out vision towers and routers: the files decide."""
    for name in ("deepseek", "modelopt"):
        path = tmp_path / name
        model = tiny_llama()
        written, dense = write_in(name, model, path, lambda key: is_linear(key) and "layers.1" not in key, dense=())
        assert error(causal(load(path)), dense_logits(model, dense, tmp_path / f"{name} dense")) <= 1e-5
        load(path, dtype=torch.bfloat16).save_pretrained(tmp_path / f"{name} saved")
        assert differing(written, tensors(tmp_path / f"{name} saved")) == []
        assert config_of(tmp_path / f"{name} saved") == config_of(path)


def test_each_of_modelopts_mixed_layers_has_its_own_scheme(tmp_path: Path) -> None:
    layers = {
        f"model.layers.{i}.{name}": {"quant_algo": "FP8" if i else "FP8_PER_CHANNEL_PER_TOKEN"}
        for i in range(2)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                     "mlp.up_proj", "mlp.down_proj")
    }  # fmt: skip
    about = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    for i, name in enumerate(("modelopt, per channel", "modelopt")):  # the second writes over the first
        model = tiny_llama()
        part, values = write_in(name, model, tmp_path / str(i), lambda key, i=i: is_linear(key) and f"layers.{i}." in key)
        if i == 0:
            written, dense = part, values
    written = {k: v for k, v in written.items() if "layers.1." not in k} | {k: v for k, v in part.items() if "layers.1." in k}
    dense = {k: v for k, v in dense.items() if "layers.1." not in k} | {k: v for k, v in values.items() if "layers.1." in k}
    path = tmp_path / "mixed"
    write_in("modelopt", model, path, is_linear, edit=lambda state: written, config_edit=lambda config: config.update(about))
    found = load(path)
    assert error(causal(found), dense_logits(model, dense, tmp_path / "dense")) <= 1e-5
    schemes = {str(found.model.layers[i].mlp.up_proj.scheme) for i in range(2)}
    assert schemes == {"1x-1s|1x-1d", "-1x-1s|-1x-1s"}
    found.save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved") == config_of(path)


def test_wildcards_and_regular_expressions_name_what_is_dense(tmp_path: Path) -> None:
    """Each in the syntax of its dialect; a quantized weight that they match contradicts them."""
    cases = (
        ("modelopt", ["lm_head", "model.layers.1*"], "model.layers.0.mlp*"),
        ("deepseek", ["lm_head", "model.layers.1"], "up_proj"),
        ("deepseek", ["lm_head", r"model\.layers\.1\..*"], r"model.layers.\d+.mlp"),
        ("autofp8", ["lm_head", "model.layers.1"], "model.layers.0.mlp.up_proj"),
    )
    for number, (name, right, wrong) in enumerate(cases):
        for listed, is_right in ((right, True), ([*right, wrong], False)):
            path = tmp_path / f"{number}{is_right}"
            write_in(name, tiny_llama(), path, lambda key: is_linear(key) and "layers.1" not in key, dense=tuple(listed))
            if is_right:
                load(path)
                continue
            with pytest.raises(MismatchError, match=r"model\.layers\.0\.mlp\.\w+\.weight is stored in FP8"):
                load(path)


def dropped(leaf: str) -> Any:
    return lambda state: {key: tensor for key, tensor in state.items() if not key.endswith(f"layers.0.mlp.up_proj.{leaf}")}


def changed(leaf: str, new: Any) -> Any:
    key = f"model.layers.0.mlp.up_proj.{leaf}"
    return lambda state: {**state, key: new(state.get(key))}


UP = "model.layers.0.mlp.up_proj"
# (variant, change of the files, change of the config, error, what it says)
MALFORMED: dict[str, tuple[str, Any, Any, type[FP8Error], str]] = {
    "no scale": ("deepseek", dropped("weight_scale_inv"), None, MissingTensorError, f"{UP}.weight_scale is not in the files"),
    "no input scale": ("autofp8", dropped("input_scale"), None, MissingTensorError, f"{UP}.input_scale"),
    "scale of another grid": (
        "deepseek", changed("weight_scale_inv", lambda s: s[:, :1].clone()), None, ScaleError, f"{UP}.weight_scale_inv has",
    ),
    "blocks where the config says tensor": (
        "modelopt", changed("weight_scale", lambda s: torch.ones(3, 2)), None, ScaleError, f"{UP}.weight_scale has shape",
    ),
    "NaN": ("fbgemm", changed("weight_scale", lambda s: s * torch.nan), None, ScaleError, f"{UP}.weight_scale contains nan"),
    "zero": ("modelopt", changed("weight_scale", lambda s: s * 0), None, ScaleError, f"{UP}.weight_scale contains 0"),
    "negative": ("qwen", changed("weight_scale_inv", lambda s: -s), None, ScaleError, f"{UP}.weight_scale_inv contains -"),
    "infinite input scale": (
        "modelopt", changed("input_scale", lambda s: s / 0), None, ScaleError, f"{UP}.input_scale contains inf",
    ),
    "both spellings": (
        "deepseek", changed("weight_scale", lambda s: torch.ones(3, 2)), None, UnusedTensorError, "are both in the files",
    ),
    "static scale in a dynamic checkpoint": (
        "deepseek", changed("input_scale", lambda s: torch.ones(())), None, UnusedTensorError, f"{UP}.input_scale",
    ),
    "dequantized with its scale left in": (
        "autofp8", changed("weight", lambda w: w.to(torch.bfloat16)), None, MismatchError, f"{UP}.weight is stored dense",
    ),
    "int8 codes": (
        "deepseek", changed("weight", lambda w: w.view(torch.int8)), None, MismatchError, f"{UP}.weight is stored as I8",
    ),
    "nothing quantized": (
        "modelopt", lambda state: {k: v.to(torch.bfloat16) for k, v in state.items() if "scale" not in k}, None, MismatchError,
        "no weight in the files is stored in FP8",
    ),
    "block of one number": ("deepseek", None, {"weight_block_size": [128]}, ConfigError, "weight_block_size"),
    "block of zero": ("deepseek", None, {"weight_block_size": [128, 0]}, ConfigError, "weight_block_size"),
    "block as text": ("deepseek", None, {"weight_block_size": "128"}, ConfigError, "weight_block_size"),
    "unknown scheme of inputs": ("deepseek", None, {"activation_scheme": "later"}, ConfigError, "activation_scheme is 'later'"),
    "AutoFP8's too": ("autofp8", None, {"activation_scheme": ["static"]}, ConfigError, "activation_scheme"),
    "blocks with static inputs": ("deepseek", None, {"activation_scheme": "static"}, UnsupportedError, "weight_block_size"),
    "unknown codes": ("deepseek", None, {"fmt": "e3m4"}, ConfigError, "fmt is 'e3m4'"),
    "unknown scales": ("deepseek", None, {"scale_fmt": "ue4m3"}, ConfigError, "scale_fmt is 'ue4m3'"),
    "experts in FP4": ("deepseek", None, {"expert_dtype": "fp4"}, UnsupportedError, "expert_dtype is 'fp4'"),
    "embeddings in FP8": ("deepseek", None, {"modules_to_convert": ["embed"]}, UnsupportedError, "modules_to_convert"),
    "skip list that is none": ("deepseek", None, {"modules_to_not_convert": "lm_head"}, ConfigError, "modules_to_not_convert"),
    "skip list of numbers": ("modelopt", None, {"ignore": [1]}, ConfigError, "ignore"),
    "skip list that is no pattern": ("fbgemm", None, {"modules_to_not_convert": ["a("]}, ConfigError, r"'a\('"),
    "bound of zero": ("fbgemm", None, {"activation_scale_ub": 0}, ConfigError, "activation_scale_ub is 0"),
    "NVFP4": ("modelopt", None, {"quant_algo": "NVFP4"}, UnsupportedError, "'NVFP4'"),
    "no algorithm": ("modelopt", None, {"quant_algo": None}, ConfigError, "quant_algo is None"),
    "mixed without layers": ("modelopt", None, {"quant_algo": "MIXED_PRECISION"}, ConfigError, "quantized_layers"),
    "mixed with FP4": (
        "modelopt", None, {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.b": {"quant_algo": "NVFP4"}}},
        UnsupportedError, r"quantized_layers\['a.b'\] has ModelOpt's quant_algo 'NVFP4'",
    ),
    "mixed, a layer without": (
        "modelopt", None, {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.b": {}}}, ConfigError, r"\['a.b'\]",
    ),
    "its own file is no object": (
        "modelopt, in its own file", None, {"quantization": ["FP8"]}, ConfigError, "hf_quant_config.json has no object",
    ),
    "its own file says another method": (
        "modelopt, in its own file", lambda state: {k: v for k, v in state.items() if k != f"{UP}.weight_scale"},
        {"quant_method": "fp8"}, MissingTensorError, "format of ModelOpt",
    ),
    "groups of four bits": (
        "modelopt", None, {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}}}, UnsupportedError, "4-bit",
    ),
    "groups that are none": ("modelopt", None, {"config_groups": [1]}, ConfigError, "config_groups"),
    "cache that is a number": ("modelopt", None, {"kv_cache_scheme": 8}, ConfigError, "kv_cache_scheme is 8"),
    "AutoFP8's pattern": ("autofp8", None, {"ignored_layers": ["re:a("]}, ConfigError, r"ignored_layers: 're:a\('"),
    "AutoFP8's codes": ("autofp8", None, {"fmt": "e5m2"}, ConfigError, "fmt is 'e5m2'"),
    "both lists, one malformed": (
        "autofp8", None, {"modules_to_not_convert": 3}, ConfigError, "modules_to_not_convert",
    ),
    "a flag inside of a pattern": (
        "deepseek", None, {"modules_to_not_convert": ["(?i)lm_head"]}, ConfigError, r"modules_to_not_convert: '\(\?i\)lm_head'",
    ),
    "its own file in NVFP4": (
        "modelopt, in its own file", None, {"quantization": {"quant_algo": "NVFP4"}}, UnsupportedError, "'NVFP4'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed(fault: str, tmp_path: Path) -> None:
    name, edit, config, kind, said = MALFORMED[fault]
    write_in(
        name, tiny_llama(**UNEVEN), tmp_path, is_linear, edit=edit or (lambda state: state),
        config_edit=lambda about: about.update(config or {}),
    )  # fmt: skip
    with pytest.raises(kind, match=said):
        load(tmp_path, FP8Config(backend="scaled_mm"))


def test_a_file_of_modelopt_that_cannot_be_read(tmp_path: Path) -> None:
    write_in("modelopt, in its own file", tiny_llama(), tmp_path, is_linear)
    (tmp_path / "hf_quant_config.json").write_text("{")
    with pytest.raises(FP8Error, match=r"hf_quant_config\.json cannot be read as JSON"):
        load(tmp_path)


def test_two_entries_with_one_name_for_a_group(tmp_path: Path) -> None:
    write_in("deepseek", tiny_llama(), tmp_path, is_linear, dense=("(?P<x>lm_head)", "(?P<x>norm)"))
    load(tmp_path)


def test_errors_are_in_the_words_of_the_config(tmp_path: Path) -> None:
    for name, word in (("deepseek", "modules_to_not_convert"), ("modelopt", "quant_algo"), ("autofp8", "ignored_layers")):
        write_in(name, tiny_llama(), tmp_path / name, is_linear, dense=("model.layers.0.mlp.up_proj",))
        with pytest.raises(MismatchError, match=word):
            load(tmp_path / name)


def both_files(path: Path, **about: Any) -> Path:
    """A ModelOpt checkpoint with its config in both files."""
    write_in("modelopt", tiny_llama(), path, is_linear)
    content = {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head"],
        "awq_block_size": None,
    } | about
    (path / FILE).write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": content}, indent=4))
    return path


def test_both_files_of_modelopt(tmp_path: Path, propagated: None, caplog: pytest.LogCaptureFixture) -> None:
    """Both are saved as they were read, and both name a layer that has become dense. One is not invented."""
    path = both_files(tmp_path / "fp8")
    model = load(path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved") == config_of(path)
    assert (tmp_path / "saved" / FILE).read_bytes() == (path / FILE).read_bytes()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "changed")
    lists = [config_of(tmp_path / "changed")["ignore"], json.loads((tmp_path / "changed" / FILE).read_text())["quantization"]]
    assert lists[0] == lists[1]["exclude_modules"] and "model.layers.1.mlp.up_proj" in lists[0]
    assert torch.equal(causal(load(tmp_path / "changed", dtype=torch.bfloat16)), causal(model))
    both_files(tmp_path / "other", exclude_modules=["*"])
    load(tmp_path / "other")
    assert "hf_quant_config.json lists other dense modules" in caplog.text
    write_in("modelopt", tiny_llama(), tmp_path / "one", is_linear)
    load(tmp_path / "one").save_pretrained(tmp_path / "one saved")
    assert not (tmp_path / "one saved" / FILE).exists()


@pytest.mark.parametrize(
    "about", [{"quant_algo": "NVFP4"}, {"quant_algo": "FP8_PB_WO"}, {"quant_algo": None}, {"exclude_modules": 1}]
)
def test_files_that_contradict_each_other(about: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = both_files(tmp_path, **about)
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json (contradicts|says)"):
        load(path)
    run("verify", path, code=1)
    assert "hf_quant_config.json" in capsys.readouterr().err


def test_a_file_of_what_was_there_before_is_removed(tmp_path: Path) -> None:
    """A model that is dense, or in another format, is saved over a ModelOpt checkpoint."""
    for number, config in enumerate((FP8Config(dequantize=True), FP8Config(backend="int8"), None)):
        path = both_files(tmp_path / str(number))
        model = tiny_llama() if config is None else load(path, config, dtype=torch.bfloat16)
        model.save_pretrained(path)
        assert not (path / FILE).exists()
        AutoModelForCausalLM.from_pretrained(path)
    path = both_files(tmp_path / "of ModelOpt itself")  # which writes the file, and then passes the codes as a state dict
    tiny_llama().save_pretrained(path, state_dict=load_file(path / "model.safetensors"))
    assert (path / FILE).exists()
    write_in("modelopt, in its own file", tiny_llama(), tmp_path / "fp8", is_linear)
    model = load(tmp_path / "fp8")
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, module.to_linear(dtype=torch.float32))
    model.save_pretrained(tmp_path / "dense")
    assert config_of(tmp_path / "dense") is None and not (tmp_path / "dense" / FILE).exists()
    tiny_llama().save_pretrained(tmp_path / "other")  # by another program, which leaves the file
    shutil.copy(tmp_path / "fp8" / FILE, tmp_path / "other")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert not any(isinstance(module, QuantizedLinear) for module in dense.modules())


@pytest.mark.parametrize("name", ["deepseek", "autofp8", "modelopt", "fbgemm"])
def test_files_with_other_names_than_the_model(name: str, tmp_path: Path) -> None:
    """A vision-language model: its config lists modules by the names of the files, and is saved as it was."""
    model, path = llava(), tmp_path / "fp8"
    listed = ("lm_head", "vision_tower", "multi_modal_projector")
    entries = tuple(f"*{entry}*" for entry in listed) if name == "modelopt" else listed
    if name == "autofp8":
        entries = ("language_model.lm_head", *listed[1:])
    written, dense = write_in(name, model, path, lambda key: is_linear(key) and "language" in key, dense=entries)
    wanted = dense_logits(model, dense, tmp_path / "dense")
    kept = type(model).from_pretrained(path, quantization_config=KEEP, dtype=torch.float32)
    assert error(causal(kept), wanted) <= 1e-5
    type(model).from_pretrained(path, quantization_config=KEEP, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []
    assert config_of(tmp_path / "saved") == config_of(path)


def test_modelopts_file_about_the_cache_alone_changes_nothing(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    about = {"producer": {}, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(about))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_a_config_of_a_dialect_is_rebuilt_from_its_dict(tmp_path: Path) -> None:
    for name in ("deepseek", "modelopt", "fbgemm", "autofp8"):
        write_in(name, tiny_llama(), tmp_path / name, is_linear)
        config = load(tmp_path / name).config.quantization_config
        assert config.to_dict() == config_of(tmp_path / name)
        again = FP8Config.from_dict(config.to_dict())
        assert again.groups == config.groups and again.checkpoint == config.checkpoint
        assert copy.deepcopy(config) == config and pickle.loads(pickle.dumps(config)) == config
        assert FP8Config(checkpoint=config.to_dict(), backend="weight_only").backend == "weight_only"


def test_a_loaded_models_config_loads_it_again(tmp_path: Path) -> None:
    """``from_pretrained(same, config=model.config)``: also for a model that was dequantized."""
    for name in ("modelopt", "autofp8", "modelopt, in its own file"):
        path = tmp_path / name
        write_in(name, tiny_llama(), path, is_linear)
        for config in (KEEP, FP8Config(dequantize=True)):
            model = load(path, config)
            again = AutoModelForCausalLM.from_pretrained(path, config=model.config, dtype=torch.float32)
            assert error(causal(again), causal(model)) <= 1e-5


def test_dequantized_is_saved_dense(tmp_path: Path) -> None:
    write_in("modelopt", tiny_llama(), tmp_path / "fp8", is_linear)
    load(tmp_path / "fp8", FP8Config(dequantize=True)).save_pretrained(tmp_path / "dense")
    assert config_of(tmp_path / "dense") is None
    saved: State = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(tensor.dtype in (torch.float32, torch.bfloat16) for tensor in saved.values())
    assert not (tmp_path / "dense" / "hf_quant_config.json").exists()


def test_skip_lists_of_every_layer_are_matched_in_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Qwen3's MoE checkpoints name hundreds of modules; there are tens of thousands of experts."""
    from hf_fp8.checkpoint.quantization_spec import QuantizationSpec

    with caplog.at_level(logging.WARNING):
        leaves = ("mlp.gate", "input_layernorm", "post_attention_layernorm")
        listed = [f"model.layers.{i}.{leaf}" for i in range(94) for leaf in leaves]
        spec = QuantizationSpec.read({**VARIANTS["deepseek"].config, "modules_to_not_convert": ["lm_head", *listed]})
        group = spec.group_of(("model.layers.93.mlp.experts.127.gate_proj",), ("Linear",))
        assert group is not None
        assert spec.group_of(("model.layers.93.mlp.gate",), ("Linear",)) is None
        assert len(spec.ignore) == 1
