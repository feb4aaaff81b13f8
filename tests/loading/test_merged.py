"""Merged experts multiplied out while loading, and written back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.build import State, differing, error, tensors, write
from support.moe import MOE, SCHEMES, causal, check, dense_logits, gemma4, is_linear, mixtral, qwen3_moe, write_transposed
from transformers import (
    AutoModelForCausalLM,
    MixtralForCausalLM,
    Qwen3MoeForCausalLM,
)

import hf_fp8
from hf_fp8 import FP8Config
from hf_fp8.formats.code_types import FP8


@pytest.mark.thinned(3)
@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_merged_experts(family: str, scheme: str, tmp_path: Path) -> None:
    model, path = MOE[family](), tmp_path / "fp8"
    written, dense = write(model, path, quantized=is_linear, **SCHEMES[scheme])
    assert any(".experts." in name and tensor.dtype == FP8 for name, tensor in written.items())
    check(model, path, written, dense, tmp_path)


@pytest.mark.parametrize("left_out", ["layers.1", "experts.2"])
def test_some_experts_left_dense(left_out: str, tmp_path: Path) -> None:
    model, path = qwen3_moe(), tmp_path / "fp8"
    written, dense = write(
        model, path, quantized=lambda n: is_linear(n) and left_out not in n, ignore=["lm_head", f"re:.*{left_out}.*"]
    )
    check(model, path, written, dense, tmp_path)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
@pytest.mark.parametrize("form", ["split", "stacked"])
def test_transposed_experts(family: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "fp8"
    model, file, dense = write_transposed(family, form, path)
    check(model, path, file, dense, tmp_path)


def test_experts_that_lie_in_the_layer_itself(tmp_path: Path) -> None:
    """Their converters are found by the name `experts` alone, in every layer."""
    gemma4().save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options)
    config = FP8Config("FP8_DYNAMIC", backend="weight_only", experts="fp8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, **options)
    hf_fp8.quantize_model(model, "FP8_DYNAMIC", backend="weight_only").save_pretrained(tmp_path / "fp8")
    assert sum(isinstance(module, hf_fp8.QuantizedExperts) for module in model.modules()) == 2
    assert torch.equal(causal(loaded), causal(model))
    written = tensors(tmp_path / "fp8")
    assert "model.layers.1.experts.3.gate_proj.weight" in written
    for asked in (FP8Config(backend="weight_only", experts="fp8"), FP8Config(dequantize=True), FP8Config()):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=asked, **options)
        assert error(causal(again), causal(model)) < 0.02
        if not asked.dequantize:
            again.save_pretrained(tmp_path / "saved")
            assert differing(tensors(tmp_path / "saved"), written) == []


@pytest.mark.usefixtures("no_native")
def test_edited_experts_are_quantized_anew_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(qwen3_moe(), tmp_path / "fp8", quantized=is_linear)
    options: dict[str, Any] = {"quantization_config": FP8Config(backend="weight_only"), "dtype": torch.float32}
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "fp8", **options)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2].mul_(3).add_(0.01)
    edited = causal(model)
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        model.save_pretrained(tmp_path / "saved")
    finally:
        logging.disable_propagation()
    assert "experts.2.down_proj" in caplog.text
    changed = differing(tensors(tmp_path / "fp8"), tensors(tmp_path / "saved"))
    quantized = [name for name in changed if tensors(tmp_path / "saved")[name].dtype == FP8]
    assert quantized == ["model.layers.0.mlp.experts.2.down_proj.weight"]
    again = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "saved", **options)
    assert error(causal(again), edited) < 0.05
    assert error(causal(again), causal(Qwen3MoeForCausalLM.from_pretrained(tmp_path / "fp8", **options))) > 0.05


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_an_edited_expert_of_a_stack(family: str, tmp_path: Path) -> None:
    model, _, _ = write_transposed(family, "stacked", tmp_path)
    options: dict[str, Any] = {"quantization_config": FP8Config(backend="weight_only"), "dtype": torch.float32}
    loaded = type(model).from_pretrained(tmp_path, **options)
    name = "model.layers.0.mlp.experts.down_proj" if family == "gpt_oss" else "model.layers.0.feed_forward.experts.down_proj"
    loaded.get_parameter(name).data[1].mul_(1.7)
    edited = causal(loaded)
    loaded.save_pretrained(tmp_path / "saved")
    assert error(causal(type(model).from_pretrained(tmp_path / "saved", **options)), edited) < 0.05
    codes, scales = (tensors(tmp_path / "saved")[name + end] for end in ("", "_scale"))
    before, old = (tensors(tmp_path)[name + end] for end in ("", "_scale"))
    for expert in (0, 2, 3):  # those that were left alone
        assert torch.equal(codes[expert].float(), before[expert].float()) and torch.equal(scales[expert], old[expert])
    assert not torch.equal(scales[1], old[1])


@pytest.mark.usefixtures("no_native")
def test_an_edited_expert_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    write(qwen3_moe(), tmp_path / "fp8", quantized=is_linear)
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=FP8Config(backend="weight_only"))
    model.model.layers[0].mlp.experts.down_proj.data[2, 0, 0] = torch.nan
    with pytest.raises(hf_fp8.errors.ScaleError, match=r"experts\.2\.down_proj was changed since loading.*NaN"):
        model.save_pretrained(tmp_path / "saved")


def test_experts_survive_a_cast_of_the_model(tmp_path: Path) -> None:
    written, _ = write(mixtral(), tmp_path / "fp8", quantized=is_linear)
    model = MixtralForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=FP8Config(backend="weight_only"), dtype=torch.bfloat16
    )
    model.to(torch.float32).save_pretrained(tmp_path / "saved")
    quantized = {name for name in written if written[name].dtype == FP8 or name.endswith("_scale")}
    assert not quantized & set(differing(written, tensors(tmp_path / "saved")))


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize(("backend", "bits", "dtype"), [
    ("auto", 4, torch.float32), ("weight_only", 4, torch.float32), ("dequantize", 4, torch.float32),
    ("weight_only", 4, torch.bfloat16), ("weight_only", 8, torch.bfloat16), ("weight_only", 8, torch.float16),
])  # fmt: skip
def test_fp8_attention_beside_integer_experts(backend: str, bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Packed experts, merged: multiplied out by their format's rules, and packed again on saving."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    integers = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
    scheme = QuantizationScheme(targets=["re:.*experts.*"], weights=integers, format="pack-quantized")
    compressor, unpacked = BaseCompressor.get_value_from_registry("pack-quantized"), {}

    def pack(state: State) -> State:
        packed = {}
        for name, tensor in state.items():
            if ".experts." not in name:
                packed[name] = tensor
                continue
            scale = (tensor.float().view(tensor.shape[0], -1, 8).abs().amax(-1) / (2 ** (bits - 1) - 0.5)).bfloat16()
            parts = compressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
            packed |= {name.removesuffix("weight") + role: part for role, part in parts.items()}
            wide = {**parts, "weight_scale": parts["weight_scale"].float()}
            unpacked[name] = compressor.decompress(wide, scheme)["weight"]
        return packed

    def two_groups(config: dict[str, Any]) -> None:
        config["quantization_config"]["format"] = "mixed-precision"
        experts = {"targets": ["re:.*experts.*"], "weights": integers, "format": "pack-quantized"}
        config["quantization_config"]["config_groups"]["experts"] = experts

    model, path = qwen3_moe(), tmp_path / "mixed"
    written, dense = write(
        model, path, quantized=lambda n: is_linear(n) and "experts" not in n, targets=["re:.*self_attn.*"], edit=pack,
        config_edit=two_groups,
    )  # fmt: skip
    wanted = dense_logits(model, {**dense, **unpacked}, tmp_path / "dense")
    config = FP8Config(dequantize=True) if backend == "dequantize" else FP8Config(backend=backend)
    loaded = type(model).from_pretrained(path, quantization_config=config, dtype=dtype)
    assert error(causal(loaded), wanted) < (1e-5 if dtype == torch.float32 else 0.05)
    loaded.save_pretrained(tmp_path / "saved")
    if backend != "weight_only":
        again = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert torch.equal(causal(again), causal(loaded)) and not hasattr(again.config, "quantization_config")
        return
    saved = tensors(tmp_path / "saved")
    quantized = {name for name in written if "weight_" in name or written[name].dtype == FP8}
    assert not quantized & set(differing(written, saved))
    again = type(model).from_pretrained(tmp_path / "saved", quantization_config=config, dtype=dtype)
    assert torch.equal(causal(again), causal(loaded))
    loaded.model.layers[0].mlp.experts.down_proj.data[1].mul_(1.5)
    edited = loaded.model.layers[0].mlp.experts.down_proj[1].float()
    loaded.save_pretrained(tmp_path / "edited")  # rounded to codes again
    again = type(model).from_pretrained(tmp_path / "edited", quantization_config=config, dtype=dtype)
    assert error(again.model.layers[0].mlp.experts.down_proj[1].float(), edited) < (0.12 if bits == 4 else 0.01)
