"""Checkpoints of int4 and int8 weights, packed and not: loaded, run, saved, beside FP8 and alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.build import State, is_linear, tensors, tiny_llama
from support.checkpoints import checkpoint
from support.integers import KINDS, stored, write_integers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

import hf_fp8
from hf_fp8 import FP8Config
from hf_fp8.errors import MismatchError, MissingTensorError, ScaleError, UnsupportedError, UnusedTensorError
from hf_fp8.nn.experts import QuantizedExperts
from hf_fp8.nn.linear import QuantizedLinear
from hf_fp8.nn.packed_linear import PackedLinear

IDS = torch.arange(1, 20).unsqueeze(0)
KEPT: dict[str, Any] = {"backend": "weight_only", "experts": "fp8"}


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=FP8Config(**options), dtype=dtype)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def dense_logits(model: PreTrainedModel, path: Path, dense: State, cls: Any = AutoModelForCausalLM) -> torch.Tensor:
    """Those of the family's own model, with weights multiplied out by hand."""
    model.save_pretrained(path)
    save_file({name: tensor.contiguous() for name, tensor in dense.items()}, path / "model.safetensors", {"format": "pt"})
    return logits(cls.from_pretrained(path, dtype=torch.float32))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def assert_saved(model: PreTrainedModel, path: Path, written: State) -> None:
    model.save_pretrained(path)
    found = tensors(path)
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_run_and_saved(kind: str, tmp_path: Path) -> None:
    written, dense = write_integers(tiny_llama(), tmp_path / "model", kind)
    wanted = dense_logits(tiny_llama(), tmp_path / "dense", dense)
    model = load(tmp_path / "model", **KEPT)
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is (QuantizedLinear if kind.startswith("W8A8") else PackedLinear)
    assert difference(logits(model), wanted) <= 1e-5
    assert torch.equal(layer.dequantized_weight(), dense["model.layers.0.self_attn.q_proj.weight"])

    assert_saved(load(tmp_path / "model", torch.bfloat16, **KEPT), tmp_path / "again", written)
    multiplied_out = load(tmp_path / "model", dequantize=True)
    assert type(multiplied_out.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert difference(logits(multiplied_out), wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["W4A8", "W4AFP8", "W8A8", "W8A8 tensor"])
def test_inputs_are_quantized_as_the_config_says(kind: str, tmp_path: Path) -> None:
    """As compressed-tensors quantizes them in plain torch: within the rounding of single codes."""
    written, dense = write_integers(tiny_llama(), tmp_path / "model", kind)
    model = load(tmp_path / "model", torch.float64, backend="scaled_mm")
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    amax = x.abs().amax() if "tensor" in kind else x.abs().amax(1, keepdim=True)
    if "FP8" in kind:
        given = (x / (amax / 448)).to(torch.float8_e4m3fn).double() * (amax / 448)
    else:
        given = (x / (amax / 127)).round() * (amax / 127)
    wanted = given @ dense["model.layers.0.self_attn.q_proj.weight"].double().T
    assert difference(layer(x), wanted) <= 1e-12
    assert_saved(load(tmp_path / "model", torch.bfloat16, backend="scaled_mm"), tmp_path / "again", written)


@pytest.mark.parametrize("kind", ["W4A16", "W4A16 asymmetric", "W4AFP8", "W8A8"])
def test_experts(kind: str, tmp_path: Path) -> None:
    written, dense = write_integers(tiny_moe(), tmp_path / "model", kind, quantized=_of_experts)
    wanted = dense_logits(tiny_moe(), tmp_path / "dense", dense)
    model = load(tmp_path / "model", **KEPT)
    experts = next(module for module in model.modules() if isinstance(module, QuantizedExperts))
    held = sum(parameter.nbytes for name, parameter in experts.named_parameters() if not name.endswith("_shape"))
    count = sum(experts.first.shape[0] * p.shape[1] * p.shape[2] for p in experts.projections)
    assert held <= count * (1.3 if kind == "W8A8" else 0.85)
    assert difference(logits(model), wanted) <= 1e-5
    assert_saved(load(tmp_path / "model", torch.bfloat16, **KEPT), tmp_path / "again", written)
    for options in ({}, {"experts": "dequantize"}, {"dequantize": True}):
        found = load(tmp_path / "model", **options)
        if "W4A16" in kind:
            assert difference(logits(found), wanted) <= 1e-5
    assert_saved(load(tmp_path / "model", torch.bfloat16, experts="dequantize"), tmp_path / "dequantized", written)


def _of_experts(name: str) -> bool:
    return is_linear(name) and ".gate." not in name


def tiny_moe() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=96, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=128, num_experts=4, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize("kind", ["W4A16", "W4A16 asymmetric", "W4A16 ordered", "W8A8"])
def test_a_vision_language_model(kind: str, tmp_path: Path) -> None:
    folder = checkpoint("qwen2vl-dyn", tmp_path)
    edit = json.loads((folder / "config.json").read_text())
    del edit["quantization_config"]
    (folder / "config.json").write_text(json.dumps(edit))
    torch.manual_seed(0)
    cls = AutoModelForImageTextToText
    model = cls.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).eval()

    def leave_vision(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"] = ["lm_head", "re:.*visual.*"]

    written, dense = write_integers(
        model, tmp_path / "model", kind, lambda name: is_linear(name) and "visual" not in name, leave_vision
    )
    wanted = dense_logits(model, tmp_path / "dense", dense, cls)
    found = cls.from_pretrained(tmp_path / "model", quantization_config=FP8Config(**KEPT), dtype=torch.float32)
    assert sum(isinstance(module, QuantizedLinear) for module in found.modules()) == 14
    assert difference(logits(found), wanted) <= 1e-5
    kept = cls.from_pretrained(tmp_path / "model", quantization_config=FP8Config(**KEPT), dtype=torch.bfloat16)
    assert_saved(kept, tmp_path / "again", written)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_fp8(kind: str, tmp_path: Path) -> None:
    """Both are ours, without being asked for; what is stored in another way is an error."""
    written, _ = write_integers(tiny_llama(), tmp_path / "int", kind, lambda name: is_linear(name) and "self_attn" in name)
    fp8, _ = _fp8_of_mlp(written)
    config = json.loads((tmp_path / "int/config.json").read_text())
    found = config["quantization_config"]
    found["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*"]
    found["config_groups"]["fp8"] = {
        "targets": ["re:.*mlp.*"], "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"},
    }  # fmt: skip
    found["format"] = "mixed-precision"
    (tmp_path / "int/config.json").write_text(json.dumps(config))
    save_file(fp8, tmp_path / "int/model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "int", dtype=torch.bfloat16)
    kinds = {type(module) for module in model.modules() if isinstance(module, QuantizedLinear)}
    assert kinds == {QuantizedLinear} | ({PackedLinear} if "weight_packed" in "".join(fp8) else set())
    assert_saved(model, tmp_path / "again", fp8)


def _fp8_of_mlp(state: State) -> tuple[State, State]:
    out: State = {}
    for name, tensor in state.items():
        if "mlp" in name and is_linear(name):
            scale = (tensor.abs().amax(1, keepdim=True) / 448).to(tensor.dtype)
            out[name] = (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            out[name + "_scale"] = scale
        else:
            out[name] = tensor
    return out, state


def test_without_fp8_it_is_for_transformers_unless_we_are_asked(tmp_path: Path) -> None:
    write_integers(tiny_llama(), tmp_path / "model", "W4A16")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(stock.hf_quantizer) is CompressedTensorsHfQuantizer
    assert not any(isinstance(module, QuantizedLinear) for module in stock.modules())
    for asked in (FP8Config(), {"backend": "auto"}):
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=asked, dtype=torch.float32)
        assert isinstance(ours.model.layers[0].mlp.up_proj, PackedLinear)
        assert difference(logits(ours), logits(stock)) <= 1e-2  # the host multiplies out in bfloat16


@pytest.mark.parametrize("kind", ["W4A16", "W4A16 channel", "W4A8", "W4AFP8", "W8A16", "W8A8"])
def test_stock_transformers_reads_what_we_save(kind: str, tmp_path: Path) -> None:
    """Not weights with zero points: its modules have none of the packed ones."""
    write_integers(tiny_llama(), tmp_path / "model", kind)
    load(tmp_path / "model", torch.bfloat16, **KEPT).save_pretrained(tmp_path / "again")
    wanted = logits(load(tmp_path / "model", **KEPT))
    hf_fp8.unregister()
    try:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        limit = 1e-6 if kind in ("W4A16", "W4A16 channel", "W8A16") else 0.1  # it quantizes inputs
        assert difference(logits(stock), wanted) <= limit
    finally:
        hf_fp8.register()


@pytest.mark.parametrize("kind", ["W4A16", "W4A16 asymmetric"])
def test_a_load_quantizes_to_the_same_bytes_as_compressed_tensors(kind: str, tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    model.save_pretrained(tmp_path / "dense")
    scheme = "W4A16" if kind == "W4A16" else "W4A16_ASYM"
    ours = load(tmp_path / "dense", torch.bfloat16, scheme=scheme)
    weight = load_file(tmp_path / "dense/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    form, arguments, inputs = KINDS[kind]
    KINDS["wide"] = form, {**arguments, "group_size": 128}, inputs
    try:
        wanted, _ = stored("wide", weight)
    finally:
        del KINDS["wide"]
    for role, tensor in wanted.items():
        assert torch.equal(getattr(ours.model.layers[0].mlp.up_proj, role), tensor), role


def _edit(path: Path, name: str, edit: Any) -> None:
    state = load_file(path / "model.safetensors")
    edited = edit(state.pop(name))
    if edited is not None:
        state[name] = edited
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path / "model.safetensors", {"format": "pt"})


STEM = "model.layers.1.mlp.down_proj."
BAD: dict[str, tuple[str, str, Any, type[Exception], str]] = {
    "no scale": ("W4A16", "weight_scale", lambda t: None, MissingTensorError, r"weight_scale is not in the files.*int4"),
    "no shape": ("W4A16", "weight_shape", lambda t: None, MissingTensorError, "weight_shape is not in the files"),
    "no zero point": (
        "W4A16 asymmetric", "weight_zero_point", lambda t: None, MissingTensorError, "weight_zero_point is not in the files",
    ),
    "no order": ("W4A16 ordered", "weight_g_idx", lambda t: None, MissingTensorError, "weight_g_idx is not in the files"),
    "NaN": ("W4A16", "weight_scale", lambda t: t.fill_(torch.nan), ScaleError, r"weight_scale contains nan"),
    "another shape": ("W4A16", "weight_shape", lambda t: t.flip(0), MismatchError, r"weight_shape is \[96, 64\]"),
    "scales of other groups": (
        "W4A16", "weight_scale", lambda t: t[:, :2], ScaleError, r"weight_scale has shape \[64, 2\].*must be \[64, 3\]",
    ),
    "scales of fewer rows": ("W4A16", "weight_scale", lambda t: t[:-1], ScaleError, "weight_scale has shape"),
    "zero points of fewer rows": (
        "W4A16 asymmetric", "weight_zero_point", lambda t: t[:-1], ScaleError, "weight_zero_point has shape",
    ),
    "unpacked zero points": (
        "W4A16 asymmetric", "weight_zero_point", lambda t: t.to(torch.int8), MismatchError, "weight_zero_point has dtype I8",
    ),
    "bytes": ("W4A16", "weight_packed", lambda t: t.view(torch.uint8), MismatchError, "weight_packed is stored as U8"),
    "columns in no group": ("W4A16 ordered", "weight_g_idx", lambda t: t - 1, ScaleError, "weight_g_idx does not put"),
    "columns in too large a group": ("W4A16 ordered", "weight_g_idx", lambda t: t * 0, ScaleError, "weight_g_idx does not put"),
    "order of fewer columns": ("W4A16 ordered", "weight_g_idx", lambda t: t[:-1], ScaleError, "weight_g_idx has shape"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_files(fault: str, tmp_path: Path) -> None:
    kind, role, edit, error, said = BAD[fault]
    write_integers(tiny_llama(), tmp_path, kind)
    _edit(tmp_path, STEM + role, edit)
    with pytest.raises(error, match=said) as raised:
        load(tmp_path, **KEPT)
    assert STEM.removesuffix(".") in str(raised.value)


def test_an_order_that_the_config_does_not_know(tmp_path: Path) -> None:
    def forget(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = None

    write_integers(tiny_llama(), tmp_path, "W4A16 ordered", config_edit=forget)
    with pytest.raises(UnusedTensorError, match=r"weight_g_idx is in the files.*actorder"):
        load(tmp_path, **KEPT)


def test_zero_points_that_the_config_does_not_know(tmp_path: Path) -> None:
    def forget(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True

    write_integers(tiny_llama(), tmp_path, "W4A16 asymmetric", config_edit=forget)
    with pytest.raises(UnsupportedError, match=r"weight_zero_point is not zero.*symmetric"):
        load(tmp_path, **KEPT)


def test_what_is_not_run_here_is_still_for_transformers(tmp_path: Path) -> None:
    def two_bits(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 2

    write_integers(tiny_llama(), tmp_path, "W4A16", config_edit=two_bits)
    with pytest.raises(hf_fp8.errors.ConfigError, match="hf_fp8 runs no config group"):
        load(tmp_path, backend="weight_only")
