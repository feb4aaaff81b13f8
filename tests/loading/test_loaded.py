"""What PyTorch, transformers and users do to a model once it is loaded."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.build import (
    IDS,
    KEEP,
    OFFLOAD,
    copies,
    differing,
    error,
    is_linear,
    load,
    logits,
    stock_transformers,
    tensors,
    tiny_llama,
    write,
)
from support.checkpoints import checkpoint
from support.other_floats import write_beside
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_fp8
from hf_fp8 import FP8Config, QuantizedLinear
from hf_fp8.formats.code_types import FP8
from hf_fp8.integrations.requests import is_for_us, is_request


@pytest.mark.parametrize("config", [KEEP, FP8Config(backend="scaled_mm")], ids=["weight_only", "scaled_mm"])
def test_what_is_done_to_models(config: FP8Config, fp8: Path, tmp_path: Path) -> None:
    model = load(fp8, config)
    wanted = logits(model)
    others = copies(model, lambda: load(fp8, config), tmp_path)
    for name, other in others.items():
        assert torch.equal(logits(other), wanted), name
        other.save_pretrained(tmp_path / name)
        assert not [n for n in differing(tensors(tmp_path / name), tensors(fp8)) if "_proj" in n], name


def test_generate(fp8: Path) -> None:
    model = load(fp8)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    out = model.generate(IDS, **greedy)
    assert out.shape == (2, 17)
    assert torch.equal(out, load(fp8, FP8Config(dequantize=True)).generate(IDS, **greedy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_first_call_through_a_submodule_and_casts(dtype: torch.dtype, fp8: Path) -> None:
    model = load(fp8)
    x = torch.randn(1, 3, 64)
    first = model.model.layers[0].mlp(x)
    assert first.isfinite().all()
    model.to(dtype)
    assert model.model.layers[0].mlp(x.to(dtype)).dtype == dtype
    assert error(model.model.layers[0].mlp(x.to(dtype)), first) < 0.02
    assert {m.weight.dtype for m in model.modules() if isinstance(m, QuantizedLinear)} == {FP8}
    assert {m.weight_scale.dtype for m in model.modules() if isinstance(m, QuantizedLinear)} == {torch.bfloat16}


def test_threads_on_first_call(fp8: Path) -> None:
    model = load(fp8)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: logits(model), range(8)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("no_native")  # the library adds up in another order than torch, with AVX-512 and AMX
def test_dequantize_afterwards(fp8: Path, tmp_path: Path) -> None:
    model = load(fp8)
    wanted = logits(model)
    model.dequantize()
    assert torch.equal(logits(model), wanted)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    model.save_pretrained(tmp_path / "dense")
    with stock_transformers():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(logits(stock), wanted)


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("folder_name", ["mixtral-dyn", "llama-static-kv"])
def test_dequantize_afterwards_writes_native_names(folder_name: str, tmp_path: Path) -> None:
    path = checkpoint(folder_name, tmp_path)
    model = load(path)
    wanted = logits(model)
    model.dequantize().save_pretrained(tmp_path / "dense")
    assert not any("scale" in name for name in tensors(tmp_path / "dense"))
    with stock_transformers():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(logits(stock), wanted)


def test_dequantizing_to_float32_does_not_round_through_bf16(tmp_path: Path) -> None:
    written, _ = write(tiny_llama(), tmp_path, scale_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj.weight"
    exact = written[name].double() * written[f"{name}_scale"].double()
    assert torch.equal(model.get_parameter(name).double(), exact)


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("config", [FP8Config(), FP8Config(dequantize=True), KEEP], ids=["auto", "dequantize", "weight_only"])
def test_mixed(config: FP8Config, tmp_path: Path) -> None:
    path = checkpoint("llama-mixed", tmp_path)
    reference = load_file(tmp_path / "reference.safetensors")
    model = load(path, config)
    with torch.no_grad():
        found = model(reference["input_ids"], use_cache=False).logits
    assert error(found, reference["logits"]) < 1e-2
    model.save_pretrained(tmp_path / "saved")
    if config.dequantize:
        assert not hasattr(model.config, "quantization_config")
        assert not any("packed" in name for name in tensors(tmp_path / "saved"))
    with stock_transformers():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        with torch.no_grad():
            read = stock(reference["input_ids"], use_cache=False).logits
    if config is KEEP:  # stock quantizes the inputs of this one, as the checkpoint says
        assert error(read, reference["logits_quantized_input"]) < 1e-2
    else:
        assert error(read, found) < 1e-5


def test_dequantizing_an_offloaded_model_is_refused(fp8: Path, tmp_path: Path) -> None:
    model = load(fp8, device_map=OFFLOAD, offload_folder=tmp_path / "offload")
    wanted = logits(model)
    with pytest.raises(hf_fp8.errors.UnsupportedError, match="offloaded"):
        model.dequantize()
    assert torch.equal(logits(model), wanted)


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("first", [None, FP8Config(dequantize=True), "afterwards"], ids=str)
@pytest.mark.parametrize("second", [None, KEEP], ids=["auto", "weight_only"])
def test_the_config_of_a_dequantized_model(first: Any, second: Any, fp8: Path, tmp_path: Path) -> None:
    """Nothing in it says FP8 any more; passed on, it must not make codes into values."""
    model = load(fp8).dequantize() if first == "afterwards" else load(fp8, first)
    wanted = logits(model)
    options = {} if second is None else {"quantization_config": second}
    again = LlamaForCausalLM.from_pretrained(fp8, config=model.config, dtype=torch.float32, **options)
    assert torch.equal(logits(again), wanted)
    assert any(isinstance(m, QuantizedLinear) for m in again.modules()) == (second is not None)
    model.save_pretrained(tmp_path / "dense")
    assert "_name_or_path" not in (tmp_path / "dense" / "config.json").read_text()
    if second is None:
        dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense", config=model.config, dtype=torch.float32)
        assert torch.equal(logits(dense), wanted)
        assert not hasattr(dense.config, "quantization_config")


def test_an_edited_weight_of_another_format_is_not_lost(tmp_path: Path) -> None:
    attention = {"mine": lambda name: "self_attn" in name and is_linear(name), "theirs": lambda name: "mlp" in name}
    write_beside(tiny_llama(), tmp_path / "mixed", "nvfp4", **attention, their_targets=["re:.*mlp.*"], targets=["re:.*attn.*"])
    model = load(tmp_path / "mixed", dtype=torch.bfloat16)
    logits(model)  # the host decompresses
    model.model.layers[0].mlp.gate_proj.weight.data.mul_(2)
    with pytest.raises(hf_fp8.errors.UnsupportedError, match=r"layers\.0\.mlp\.gate_proj"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("how", [lambda m: m.dequantize(), hf_fp8.dequantize_model], ids=["method", "function"])
def test_dequantize_after_saving(how: Any, fp8: Path, tmp_path: Path) -> None:
    model = load(fp8)
    model.save_pretrained(tmp_path / "fp8 again")
    wanted = logits(model)
    how(model).save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert error(logits(again), wanted) < 1e-2  # the host wrote the model's dtype, bfloat16


def test_one_layer_replaced(fp8: Path, tmp_path: Path) -> None:
    model = load(fp8)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = mlp.up_proj.to_linear(torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert type(again.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("backend", ["auto", "weight_only"])
def test_a_config_inside_text_config(backend: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    path = checkpoint("qwen2vl-dyn", tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    options = {"quantization_config": FP8Config(backend=backend), "dtype": torch.float32}
    model = AutoModelForImageTextToText.from_pretrained(path, **options)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").read_text().count("config_groups") == (backend != "auto")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    wanted = logits(AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32))
    assert torch.equal(logits(again), wanted)
    passed = AutoModelForImageTextToText.from_pretrained(path, config=model.config, dtype=torch.float32)
    assert torch.equal(logits(passed), wanted)


NAMED: dict[str, dict[str, Any]] = {
    "exact": {"targets": [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)],
              "quantized": lambda n: n.endswith("q_proj.weight")},
    "regex": {"targets": [r"re:model\.layers\..*_proj"]},
    "head group": {
        "quantized": lambda n: n.endswith(("_proj.weight", "lm_head.weight")), "ignore": [], "targets": ["re:.*_proj"],
        "config_edit": lambda c: c["quantization_config"]["config_groups"].update(
            head={**c["quantization_config"]["config_groups"]["group_0"], "targets": ["lm_head"]}
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_saved_as_another_class(name: str, tmp_path: Path) -> None:
    """The names lose their prefix, and a group may lose all of its modules."""
    from transformers import AutoModel

    write(tiny_llama(), tmp_path / "causal", **NAMED[name])
    options = {"quantization_config": KEEP, "dtype": torch.float32}
    base = AutoModel.from_pretrained(tmp_path / "causal", **options)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base", **options)
    assert torch.equal(again(IDS).last_hidden_state, base(IDS).last_hidden_state)
    assert any(isinstance(m, QuantizedLinear) for m in again.modules())


@pytest.mark.parametrize("config", [FP8Config(), FP8Config(backend="int8"), KEEP], ids=["dense", "int8", "kept"])
def test_adapters_are_saved_twice(config: FP8Config, fp8: Path, tmp_path: Path) -> None:
    """The model card of an adapter names the base model, as YAML, and is read at the next save."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load(fp8, config), LoraConfig(target_modules=["q_proj"]))
    for _ in range(2):
        adapted.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"base_model: {fp8}" in card and "python/object" not in card


@pytest.mark.usefixtures("no_native")
def test_explain(fp8: Path) -> None:
    kept, dense = hf_fp8.explain(load(fp8, FP8Config(backend="scaled_mm"))), hf_fp8.explain(load(fp8, FP8Config()))
    assert len(kept) == len(dense) == 14
    assert {row.kernel for row in kept} == {"scaled_mm_rowwise"} and {row.kernel for row in dense} == {"dense"}
    assert all("no FP8 units" in row.reason for row in dense)
    first = next(row for row in kept if row.name == "model.layers.0.mlp.up_proj")
    assert first.bytes == 96 * 64 + 96 * 2 and first.scheme == "channel x token (dynamic)"
    table = str(kept)
    assert "model.layers.*.mlp.up_proj" in table and f"{sum(row.bytes for row in kept):,}" in table
    assert str(hf_fp8.explain(torch.nn.Linear(2, 2))) == "no quantized modules"


def test_explain_takes_the_dtype_of_dense_parameters() -> None:
    """Not that of scales."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    model = hf_fp8.quantize_model(model, "FP8_BLOCK", backend="scaled_mm").bfloat16()
    assert str(hf_fp8.explain(model)) == str(hf_fp8.explain(model, torch.bfloat16))
    assert str(hf_fp8.explain(model)) != str(hf_fp8.explain(model, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("forward_first", [False, True])
def test_other_formats_keep_their_scales_too(dtype: torch.dtype, forward_first: bool, tmp_path: Path) -> None:
    """The host casts int4 scales to the model's dtype; what is saved is what was read."""
    path = checkpoint("llama-mixed", tmp_path)
    model = load(path, dtype=dtype)
    if forward_first:
        logits(model)
    model.save_pretrained(tmp_path / "saved")
    read, saved = tensors(path), tensors(tmp_path / "saved")
    quantized = {name for name in read if "weight_" in name or read[name].dtype == FP8}
    assert quantized <= set(saved) and not quantized & set(differing(read, saved))


def test_a_state_dict_of_floats_beside_the_config_of_a_dequantized_model(fp8: Path) -> None:
    """There are no files to be checked, and nothing in it is codes."""
    model = load(fp8).dequantize()
    state = model.state_dict()
    again = LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=state, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_configs_of_other_methods_may_have_a_scheme() -> None:
    for method, ours in (("quark", False), ("auto-round", False), ("hf_fp8", True), (None, True)):
        given = {"scheme": "FP8_DYNAMIC", **({} if method is None else {"quant_method": method})}
        assert is_request(given) == is_for_us(given) == ours, method


@pytest.mark.parametrize("inner", ["fp8", "dense"])
def test_a_subfolder_is_judged_by_its_own_config(inner: str, fp8: Path, tmp_path: Path) -> None:
    """Not by that of the folder around it, which is the other kind; with the config of a dequantized model, too."""
    load(fp8).dequantize().save_pretrained(tmp_path / "dense")
    root = tmp_path / "root"
    shutil.copytree(tmp_path / "dense" if inner == "fp8" else fp8, root)
    shutil.copytree(fp8 if inner == "fp8" else tmp_path / "dense", root / "inner")
    plain = LlamaForCausalLM.from_pretrained(root, subfolder="inner", dtype=torch.float32)
    assert error(logits(plain), logits(load(fp8))) < 1e-2
    again = LlamaForCausalLM.from_pretrained(root, subfolder="inner", config=plain.config, dtype=torch.float32)
    assert torch.equal(logits(again), logits(plain))
    if inner == "dense":
        asked = FP8Config("FP8_DYNAMIC", backend="weight_only")
        found = AutoModelForCausalLM.from_pretrained(root, subfolder="inner", quantization_config=asked)
        assert sum(isinstance(module, QuantizedLinear) for module in found.modules()) == 14
        with pytest.raises(hf_fp8.errors.ConfigError, match="no `quantization_config`"):
            AutoModelForCausalLM.from_pretrained(root, subfolder="inner", quantization_config=KEEP)
