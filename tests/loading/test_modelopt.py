"""Checkpoints that NVIDIA's ModelOpt itself has exported; where it is installed (it is in no extra: 0.47 was tried)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.build import IDS, differing, error, load, tensors, tiny_llama
from support.moe import causal
from transformers import AutoModelForCausalLM

from hf_fp8 import FP8Config, QuantizedLinear

mtq = pytest.importorskip("modelopt.torch.quantization")


def exported(config: str, path: Path) -> Any:
    """The model with ModelOpt's fake quantization, and its checkpoint in `path`."""
    from modelopt.torch.export import export_hf_checkpoint

    tiny_llama(hidden_size=256, intermediate_size=384).save_pretrained(path / "dense")
    kept, model = (AutoModelForCausalLM.from_pretrained(path / "dense", dtype=torch.float32) for _ in range(2))
    for each in (kept, model):  # what is exported is changed
        mtq.quantize(each, getattr(mtq, config), lambda model: model(IDS))
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=str(path / "fp8"))
    return kept


@pytest.mark.parametrize("config", ["FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_exported(config: str, tmp_path: Path) -> None:
    fake = exported(config, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert error(causal(load(tmp_path / "fp8", FP8Config(dequantize=True))), causal(load(tmp_path / "fp8"))) <= 1e-5
    load(tmp_path / "fp8").save_pretrained(tmp_path / "saved")
    assert differing(tensors(tmp_path / "fp8"), tensors(tmp_path / "saved")) == []
    for file in ("hf_quant_config.json", "model.safetensors"):
        assert (tmp_path / "saved" / file).exists()
    assert (tmp_path / "saved" / "hf_quant_config.json").read_bytes() == (
        tmp_path / "fp8" / "hf_quant_config.json"
    ).read_bytes()
    if config != "FP8_DEFAULT_CFG":
        return  # exported from the weights in bfloat16, where its fake quantization is of those in float32
    quantized = load(tmp_path / "fp8", FP8Config(backend="scaled_mm"))
    seen: dict[str, torch.Tensor] = {}
    layer = fake.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0].detach()))
    causal(fake)
    with torch.no_grad():
        assert torch.equal(quantized.model.layers[0].mlp.up_proj(seen["x"]), layer(seen["x"]))
