"""What `from_pretrained` does by default on a CPU where the library of CPU kernels runs: weights and experts stay in FP8."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.build import IDS, STATIC_TENSOR, TOKEN, differing, error, group_input, load, logits, tensors, tiny_llama, write
from support.moe import causal, dense_logits, is_linear, qwen3_moe
from transformers import AutoModelForCausalLM

import hf_fp8
from hf_fp8 import FP8Config, QuantizedExperts, QuantizedLinear
from hf_fp8.errors import ScaleError
from hf_fp8.formats import native
from hf_fp8.formats.scheme import ROW, TENSOR, Granularity

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

SCHEMES: dict[str, dict[str, Any]] = {
    "channel": {},
    "tensor, static inputs": {"weight": TENSOR, "inputs": STATIC_TENSOR},
    "block": {"weight": Granularity(32, 32), "inputs": group_input(32)},
    "group of 40": {"weight": Granularity(1, 40), "inputs": TOKEN},
    "weights only": {"weight": ROW, "inputs": None},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linears(scheme: str, tmp_path: Path) -> None:
    """Logits of the dequantized model, the bytes of the files held, loaded without copying them, and written back."""
    written, dense = write(tiny_llama(), tmp_path / "fp8", **SCHEMES[scheme])
    wanted = dense_logits(tiny_llama(), dense, tmp_path / "dense", logits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 14 and error(logits(model), wanted) < 1e-5
    assert sum(layer.weight.nbytes for layer in layers) == sum(t.numel() for n, t in written.items() if is_linear(n))
    rows = hf_fp8.explain(model)
    assert {row.kernel for row in rows} == {"native_weight_only"}
    assert all("CPUs have no FP8 units" in row.reason or "does not quantize inputs" in row.reason for row in rows)
    model.save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []
    assert error(logits(copy.deepcopy(model)), wanted) < 1e-5
    assert error(logits(model.dequantize()), wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_and_generation(dtype: torch.dtype, fp8: Path) -> None:
    """The layers' products are in float32 whatever the model's dtype, so they are nearer than the dense model's."""
    wanted = logits(load(fp8, FP8Config(dequantize=True)))
    model = AutoModelForCausalLM.from_pretrained(fp8, dtype=dtype)
    with native.use(None):
        dense = AutoModelForCausalLM.from_pretrained(fp8, dtype=dtype)
    assert error(logits(model), wanted) <= max(1e-5, 1.1 * error(logits(dense), wanted))
    out = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert out.shape == (2, IDS.shape[1] + 6)


def test_experts(tmp_path: Path) -> None:
    model = qwen3_moe()
    written, dense = write(model, tmp_path / "fp8", quantized=is_linear)
    wanted = dense_logits(model, dense, tmp_path / "dense")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    assert any(isinstance(module, QuantizedExperts) for module in kept.modules())
    assert error(causal(kept), wanted) < 1e-5
    assert {row.kernel for row in hf_fp8.explain(kept)} == {"native_weight_only", "native_grouped_weight_only"}
    kept.save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []
    for options in (FP8Config(experts="dequantize"), FP8Config(backend="int8")):
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32, quantization_config=options)
        assert not any(isinstance(module, QuantizedExperts) for module in other.modules())


def test_without_the_library_it_is_said_why(fp8: Path, propagated: None, caplog: pytest.LogCaptureFixture) -> None:
    with native.use(None), caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.float32)
        said = [record.message for record in caplog.records if "turned off" in record.message]
        assert len(said) == 1 and "14 FP8 weights are dequantized" in said[0]
        assert all("the library of CPU kernels is turned off" in row.reason for row in hf_fp8.explain(model))
        assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    kept = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.float32)
    with native.use(None):  # a model that was loaded before still runs
        found = logits(kept)
    assert error(found, logits(kept)) < 0.1


def test_float64_has_no_kernel(fp8: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.float64)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


@pytest.mark.parametrize("name", ["channel", "block"])
def test_gradients(name: str, tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path, **SCHEMES[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    dense = load(tmp_path, FP8Config(dequantize=True))
    found = []
    for each in (model, dense):
        embedded = each.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=embedded, labels=IDS).loss.backward()
        found.append(embedded.grad)
    assert error(found[0], found[1]) < 1e-5


def test_a_nan_scale_is_refused_and_a_nan_code_is_visible(tmp_path: Path) -> None:
    def nan_code(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[5, 7] = 0x7F
        return state

    def nan_scale(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state["model.layers.0.mlp.up_proj.weight_scale"][5] = torch.nan
        return state

    write(tiny_llama(), tmp_path / "code", edit=nan_code)
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "code", dtype=torch.float32)).isnan().all()
    write(tiny_llama(), tmp_path / "scale", edit=nan_scale)
    with pytest.raises(ScaleError, match="up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "scale", dtype=torch.float32)
