"""Experts that stay in FP8: every family and scheme, loaded, run, saved; and those that cannot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.build import differing, error, stock_transformers, tensors, write
from support.experts import FAMILIES, KEEP, SCHEMES, experts_of, load, reference, write_family
from support.moe import causal, dense_logits, is_linear, make
from transformers import (
    CompressedTensorsConfig,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.models.deepseek_v2 import DeepseekV2Config, DeepseekV2ForCausalLM

from hf_fp8 import FP8Config
from hf_fp8.formats import numerics
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.scheme import ROW


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_loaded_run_and_saved(family: str, scheme: str, tmp_path: Path) -> None:
    path = tmp_path / "fp8"
    model, written, dense = write_family(family, path, **SCHEMES[scheme])
    wanted = dense_logits(model, dense, tmp_path / "dense")
    for config in (KEEP, FP8Config(experts="fp8")):
        kept = load(model, path, config)
        assert {p.dtype for n, p in kept.named_parameters() if p.ndim == 3 and "scale" not in n and "conv" not in n} == {FP8}
        assert error(causal(kept), wanted) <= 1e-5
        in_bf16 = load(model, path, config, torch.bfloat16)
        in_bf16.save_pretrained(tmp_path / "saved")
        # DeepSeek keeps this one in float32 whatever the file has
        assert [n for n in differing(written, tensors(tmp_path / "saved")) if "e_score_correction_bias" not in n] == []
    quantized = load(model, path, FP8Config(experts="fp8", backend="scaled_mm"))
    assert error(causal(quantized), wanted) < (1e-5 if SCHEMES[scheme].get("inputs", 1) is None else 0.5)
    for module in experts_of(quantized):
        torch.manual_seed(0)
        x, ids = torch.randn(17, 64), torch.randint(0, 4, (17, 2))  # an expert may be chosen twice
        given = (torch.cat([x, x, 0 * x, x]),) if module.layout.is_prerouted else (x, ids, torch.rand(17, 2))
        assert error(module(*given), reference(module, *given)) < 1e-5
    dequantized = load(model, path).dequantize()
    assert not experts_of(dequantized) and error(causal(dequantized), wanted) <= 1e-5
    assert {type(m) for m in dequantized.modules()} == {type(m) for m in model.modules()}
    dequantized.save_pretrained(tmp_path / "plain")
    with stock_transformers():
        assert error(causal(type(model).from_pretrained(tmp_path / "plain", dtype=torch.float32)), wanted) <= 1e-5


# Mixtral's experts under llm-compressor's names, and merged experts with block scales, stock does not load at all.
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("scheme", ["channel", "tensor static"])
def test_stock_transformers_loads_what_was_saved(family: str, scheme: str, tmp_path: Path) -> None:
    model, _, dense = write_family(family, tmp_path / "fp8", **SCHEMES[scheme])
    load(model, tmp_path / "fp8", dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    wanted = dense_logits(model, dense, tmp_path / "dense")
    with stock_transformers():
        found = [causal(load(model, tmp_path / n, CompressedTensorsConfig(dequantize=True))) for n in ("fp8", "saved")]
    assert torch.equal(*found)
    assert error(found[0], wanted) < 0.2  # it rounds weights to bfloat16, which changes which expert is taken


SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "dtype": "bfloat16", "intermediate_size": 96, "num_experts_per_tok": 2,
}  # fmt: skip
GROUPED = {"n_routed_experts": 4, "moe_intermediate_size": 40, "n_group": 1, "topk_group": 1}
OTHERS: dict[str, tuple[Any, Any]] = {
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=40, shared_expert_intermediate_size=32),
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**SMALL, num_experts=4)),
    "phimoe": (PhimoeForCausalLM, PhimoeConfig(**SMALL, num_local_experts=4)),
    "glm4_moe": (Glm4MoeForCausalLM, Glm4MoeConfig(**SMALL, **GROUPED, first_k_dense_replace=1, head_dim=16)),
    "ernie": (
        Ernie4_5_MoeForCausalLM,
        Ernie4_5_MoeConfig(
            **SMALL, moe_num_experts=4, moe_k=2, moe_intermediate_size=40, moe_layer_start_index=1, moe_layer_interval=1,
            moe_num_shared_experts=1,
        ),
    ),
    "deepseek_v2": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config(
            **SMALL | GROUPED | {"num_key_value_heads": 4}, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32,
            qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, n_shared_experts=1, topk_method="greedy",
        ),
    ),
    "nemotron_h": (
        NemotronHForCausalLM,
        NemotronHConfig(
            **SMALL | GROUPED | {"num_hidden_layers": 3}, hybrid_override_pattern="M*E", head_dim=16, n_groups=1,
            moe_shared_expert_intermediate_size=40, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16,
        ),
    ),
}  # fmt: skip


def test_stacks_that_are_not_transposed(tmp_path: Path) -> None:
    """Granite's, under names of their own: FP8 stacks with one scale per row."""
    model, path = make(GraniteMoeForCausalLM, GraniteMoeConfig(**SMALL, num_local_experts=4)), tmp_path / "fp8"
    written, dense = write(model, path, quantized=is_linear, ignore=["lm_head", "re:.*router.*"])
    for name in [name for name in written if re.search("(input|output)_linear", name)]:
        scale = torch.stack([numerics.compute_scale(w, ROW) for w in dense[name]]).bfloat16()
        q = torch.stack([numerics.quantize(w, s, ROW) for w, s in zip(dense[name], scale, strict=True)])
        written |= {name: q, f"{name}_scale": scale}
        dense[name] = q.float() * scale.float()
    save_file(written, path / "model.safetensors", metadata={"format": "pt"})
    kept = load(model, path)
    assert len(experts_of(kept)) == 2 and error(causal(kept), dense_logits(model, dense, tmp_path / "dense")) <= 1e-5
    load(model, path, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert not differing(written, tensors(tmp_path / "saved"))


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str, tmp_path: Path) -> None:
    """By the host's flags, not by their names."""
    cls, config = OTHERS[name]
    model, path = make(cls, config), tmp_path / name
    mamba = re.compile(r"mixer\.(in|out)_proj")
    ignore = ["lm_head", "re:.*(gate|router)$", rf"re:.*{mamba.pattern}"]
    written, dense = write(model, path, quantized=lambda n: is_linear(n) and not mamba.search(n), ignore=ignore)
    kept = load(model, path)
    assert experts_of(kept)
    assert error(causal(kept), dense_logits(model, dense, tmp_path / "dense")) <= 1e-5
    load(model, path, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    quantized = {n for n in written if written[n].dtype == FP8 or n.endswith("_scale")}
    assert any("experts.3" in n for n in quantized)
    assert not quantized & set(differing(written, tensors(tmp_path / "saved")))
