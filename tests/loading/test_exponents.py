"""Checkpoints whose weight scales are exponents (E8M0): blocks, channels, and MXFP8; loaded, run, changed, saved."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.build import State, is_linear, tensors, tiny_llama
from support.exponents import E8M0, KINDS, write_exponents
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_fp8 import FP8Config
from hf_fp8.errors import ScaleError, UnsupportedError
from hf_fp8.formats.exponents import scale_values
from hf_fp8.nn.experts import QuantizedExperts
from hf_fp8.nn.linear import QuantizedLinear

IDS = torch.arange(1, 20).unsqueeze(0)
KEPT: dict[str, Any] = {"backend": "weight_only", "experts": "fp8"}
Q = "model.layers.0.self_attn.q_proj"


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=FP8Config(**options), dtype=dtype)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def dense_logits(model: PreTrainedModel, path: Path, dense: State) -> torch.Tensor:
    """Those of the family's own model, with weights multiplied out by hand."""
    model.save_pretrained(path)
    save_file({name: tensor.contiguous() for name, tensor in dense.items()}, path / "model.safetensors", {"format": "pt"})
    return logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def assert_saved(model: PreTrainedModel, path: Path, written: State) -> None:
    model.save_pretrained(path)
    found = tensors(path)
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def wide_llama() -> PreTrainedModel:
    """With sizes that are no multiples of the blocks of 128."""
    return tiny_llama(hidden_size=192, intermediate_size=160)


def tiny_moe() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=96, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=128, num_experts=4, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_run_and_saved(kind: str, tmp_path: Path) -> None:
    written, dense = write_exponents(wide_llama(), tmp_path / "model", kind)
    wanted = dense_logits(wide_llama(), tmp_path / "dense", dense)
    model = load(tmp_path / "model", **KEPT)
    layer = model.get_submodule(Q)
    assert type(layer) is QuantizedLinear
    assert layer.weight_scale.dtype == written[f"{Q}.weight_scale"].dtype == KINDS[kind][-1]
    assert torch.equal(layer.dequantized_weight(), dense[f"{Q}.weight"])
    assert difference(logits(model), wanted) <= 1e-5
    assert_saved(model, tmp_path / "kept", written)

    multiplied_out = load(tmp_path / "model", dequantize=True)
    assert type(multiplied_out.get_submodule(Q)) is torch.nn.Linear
    assert difference(logits(multiplied_out), wanted) <= 1e-5
    assert_saved(load(tmp_path / "model", torch.bfloat16, backend="auto", experts="auto"), tmp_path / "again", written)


@pytest.mark.parametrize("kind", ["MXFP8", "MXFP8 E8M0", "block", "channel"])
def test_casts_copies_and_pickles_leave_scales_as_they_are(kind: str, tmp_path: Path) -> None:
    written, _ = write_exponents(tiny_llama(), tmp_path / "model", kind)
    model = load(tmp_path / "model", torch.bfloat16, **KEPT)
    wanted = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), wanted)
        assert_saved(other, tmp_path / "again", written)
    assert_saved(model.to(torch.bfloat16), tmp_path / "again", written)
    half = torch.nn.Sequential(model).half()[0]  # transformers refuses half() of a quantized model itself
    layer, scale = half.get_submodule(Q), written[f"{Q}.weight_scale"]
    assert layer.weight_scale.dtype == scale.dtype
    assert torch.equal(layer.weight_scale.view(torch.uint8), scale.view(torch.uint8))
    state = half.state_dict()
    assert state[f"{Q}.weight_scale"].dtype == scale.dtype
    half.load_state_dict(state)
    assert torch.equal(layer.weight_scale.view(torch.uint8), scale.view(torch.uint8))


@pytest.mark.parametrize("kind", ["MXFP8", "MXFP8 E8M0", "block"])
def test_a_changed_scale_is_used(kind: str, tmp_path: Path) -> None:
    """Kernels get floats that are made once: not of a scale that was changed or replaced since."""
    write_exponents(tiny_llama(), tmp_path / "model", kind)
    layer = load(tmp_path / "model", **KEPT).get_submodule(Q)
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        before = layer(x)
        assert layer.held_scale("weight") is layer.held_scale("weight")
        layer.weight_scale.view(torch.uint8).add_(1)
        assert torch.equal(layer(x), 2 * before)
        layer.weight_scale = torch.nn.Parameter(
            (layer.weight_scale.view(torch.uint8) + 1).view(layer.weight_scale.dtype), False
        )
        assert torch.equal(layer(x), 4 * before)


@pytest.mark.parametrize("kind", ["MXFP8", "block"])
@pytest.mark.parametrize("m", [0, 1, 17])
def test_numbers_of_rows(kind: str, m: int, tmp_path: Path) -> None:
    _, dense = write_exponents(wide_llama(), tmp_path / "model", kind)
    layer = load(tmp_path / "model", **KEPT).get_submodule(Q)
    x = torch.randn(m, 192, generator=torch.Generator().manual_seed(m), requires_grad=True)
    out = layer(x)
    wanted = x @ dense[f"{Q}.weight"].T
    assert out.shape == wanted.shape
    (grad,) = torch.autograd.grad(out.sum(), x)
    if m:
        assert difference(out, wanted) <= 1e-6
        assert difference(grad, torch.ones_like(wanted) @ dense[f"{Q}.weight"]) <= 1e-6


@pytest.mark.parametrize("kind", ["MXFP8", "MXFP8 E8M0", "block"])
def test_experts(kind: str, tmp_path: Path) -> None:
    written, dense = write_exponents(
        tiny_moe(), tmp_path / "model", kind, lambda name: is_linear(name) and ".gate." not in name
    )
    wanted = dense_logits(tiny_moe(), tmp_path / "dense", dense)
    model = load(tmp_path / "model", **KEPT)
    experts = next(module for module in model.modules() if isinstance(module, QuantizedExperts))
    assert experts.gate_up_proj_scale.dtype == KINDS[kind][-1]
    assert difference(logits(model), wanted) <= 1e-5
    assert_saved(load(tmp_path / "model", torch.bfloat16, **KEPT), tmp_path / "again", written)
    for options in ({"experts": "dequantize", "backend": "weight_only"}, {"dequantize": True}):
        assert difference(logits(load(tmp_path / "model", **options)), wanted) <= 1e-5
    assert_saved(load(tmp_path / "model", torch.bfloat16, experts="dequantize"), tmp_path / "dequantized", written)
    assert difference(logits(pickle.loads(pickle.dumps(model))), wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["MXFP8", "MXFP8 E8M0", "block"])
def test_a_byte_that_is_no_number_is_refused(kind: str, tmp_path: Path) -> None:
    write_exponents(tiny_llama(), tmp_path, kind)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight_scale"].view(torch.uint8)[0, 0] = 255
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ScaleError, match=r"model\.layers\.1\.mlp\.down_proj\.weight_scale contains nan"):
        load(tmp_path, **KEPT)


def test_plain_bytes_are_no_scales_unless_the_config_says_so(tmp_path: Path) -> None:
    def forget(config: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["weights"] = {**group["weights"], "scale_dtype": None}
        group["format"] = config["quantization_config"]["format"] = "float-quantized"

    write_exponents(tiny_llama(), tmp_path, "MXFP8A16", config_edit=forget)
    with pytest.raises(ScaleError, match=r"weight_scale has dtype U8; supported are F32, F16, BF16, F8_E8M0"):
        load(tmp_path, **KEPT)


@pytest.mark.parametrize("kind", ["MXFP8", "MXFP8 E8M0", "block", "channel"])
def test_merged_adapters_get_powers_of_two_that_hold_them(kind: str, tmp_path: Path) -> None:
    """A changed weight overflows no code, and what did not change keeps its bytes."""
    peft = pytest.importorskip("peft")
    written, dense = write_exponents(tiny_llama(), tmp_path / "model", kind)
    model = load(tmp_path / "model", **KEPT)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    delta = adapted.base_model.model.get_submodule(Q).get_delta_weight("default")
    with torch.no_grad():
        adapted.base_model.model.get_submodule(Q).lora_B["default"].weight.mul_(8)
    merged = adapted.merge_and_unload()
    layer = merged.get_submodule(Q)
    assert layer.weight_scale.dtype == KINDS[kind][-1]
    wanted = dense[f"{Q}.weight"] + 8 * delta
    error = (layer.dequantized_weight() - wanted).abs()
    largest = scale_values(layer.weight_scale).max() * 448
    assert float(wanted.abs().max()) <= float(largest)  # nothing was clipped
    assert difference(layer.dequantized_weight(), wanted) <= 0.05
    assert float(error.max()) <= float(largest) / 448 * 32  # stochastic rounding: a step of the largest codes
    merged.save_pretrained(tmp_path / "merged")
    found = tensors(tmp_path / "merged")
    for name, tensor in written.items():
        if "q_proj" not in name:
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    again = load(tmp_path / "merged", **KEPT)
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize("kind", ["MXFP8", "MXFP8 E8M0", "block"])
def test_edited_experts_are_written_back(kind: str, tmp_path: Path) -> None:
    """A dense expert that was changed gets new scales, which no value exceeds; all others their bytes."""

    def is_expert(name: str) -> bool:
        return "experts" in name and is_linear(name)

    def others_are_dense(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"] = ["lm_head", "re:.*self_attn.*"]

    written, dense = write_exponents(tiny_moe(), tmp_path / "model", kind, is_expert, others_are_dense)
    model = load(tmp_path / "model", experts="dequantize")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2].mul_(5.0)
    model.save_pretrained(tmp_path / "edited")
    found, changed = tensors(tmp_path / "edited"), "model.layers.0.mlp.experts.2.down_proj.weight"
    for name, tensor in written.items():
        if name.startswith(changed):
            assert found[name].dtype == tensor.dtype
        else:
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    again = load(tmp_path / "edited", dequantize=True).model.layers[0].mlp.experts.down_proj[2]
    wanted = 5.0 * dense[changed]
    assert difference(again, wanted) <= 0.06
    scale = scale_values(found[changed + "_scale"])
    assert float(wanted.abs().max()) <= 448 * float(scale.max())
    assert bool((scale >= 2 * scale_values(written[changed + "_scale"])).all())


@pytest.mark.parametrize("kind", ["MXFP8", "block"])
def test_int8_from_exponents(kind: str, tmp_path: Path) -> None:
    _, dense = write_exponents(wide_llama(), tmp_path / "model", kind)
    layer = load(tmp_path / "model", backend="int8").get_submodule(Q)
    assert layer.weight.dtype == torch.int8
    assert layer.weight_scale.dtype == torch.float32
    assert difference(layer.dequantized_weight(), dense[f"{Q}.weight"]) <= 0.01


def test_compiled(tmp_path: Path) -> None:
    write_exponents(tiny_llama(), tmp_path / "model", "MXFP8 E8M0")
    layer = load(tmp_path / "model", **KEPT).get_submodule(Q)
    x = torch.randn(5, layer.in_features)
    with torch.no_grad():
        wanted = layer(x)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), wanted)
    assert layer.weight_scale.dtype == E8M0


def test_inputs_with_exponents_for_other_groups_are_refused(tmp_path: Path) -> None:
    """compressed-tensors computes MX scales for groups of 32 only, and would round other scales to whole numbers."""

    def by_64(config: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"] = {**group["input_activations"], "group_size": 64}

    write_exponents(tiny_llama(), tmp_path, "MXFP8", config_edit=by_64)
    with pytest.raises(UnsupportedError, match=r"input_activations\.strategy is 'group \(dynamic\), scale_dtype torch.uint8'"):
        load(tmp_path, **KEPT)


@pytest.mark.parametrize("kind", ["MXFP8", "MXFP8 E8M0", "block"])
def test_experts_that_adapters_change(kind: str, tmp_path: Path) -> None:
    """As merging does: through the family's dense module and back."""

    def is_expert(name: str) -> bool:
        return is_linear(name) and ".gate." not in name

    write_exponents(tiny_moe(), tmp_path / "model", kind, is_expert)
    experts = load(tmp_path / "model", **KEPT).model.layers[0].mlp.experts
    dense = experts.to_dense(torch.float32)
    with torch.no_grad():
        dense.down_proj[1].mul_(3.0)
        dense.gate_up_proj[2, 5].mul_(100.0)
    wanted = {name: getattr(dense, name).detach().clone() for name in ("gate_up_proj", "down_proj")}
    new, change = experts.requantized(dense, torch.Generator().manual_seed(0))
    assert change.kept >= 0.99
    again = new.to_dense(torch.float32)
    for name, values in wanted.items():
        scale = getattr(new, f"{name}_scale")
        assert scale.dtype == KINDS[kind][-1]
        assert difference(getattr(again, name), values) <= 0.06
        is_same = torch.eq(scale.view(torch.uint8), getattr(experts, f"{name}_scale").view(torch.uint8))
        assert bool(is_same[0].all()) and bool(is_same[3].all())
        assert not bool(is_same.all())
