"""Small mixtures of experts of several families, in the forms that files have; and what is asked of any loaded model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.build import STATIC_TENSOR, State, differing, error, group_input, stock_transformers, tensors, write
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_fp8 import FP8Config
from hf_fp8.formats import native, numerics
from hf_fp8.formats.scheme import ROW, TENSOR, Granularity

IDS = torch.arange(24).reshape(2, 12)
BASE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "dtype": "bfloat16",
}  # fmt: skip


def make(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cls(config).to(torch.bfloat16).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def mixtral() -> PreTrainedModel:
    return make(MixtralForCausalLM, MixtralConfig(**BASE, intermediate_size=96, num_local_experts=4))


def qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        **BASE, intermediate_size=96, moe_intermediate_size=40, num_experts=4, num_experts_per_tok=2, head_dim=16
    )
    return make(Qwen3MoeForCausalLM, config)


def deepseek_v3() -> PreTrainedModel:
    config = DeepseekV3Config(
        **{**BASE, "num_key_value_heads": 4}, intermediate_size=96, moe_intermediate_size=48, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32,
        qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, n_shared_experts=1,
    )  # fmt: skip
    return make(DeepseekV3ForCausalLM, config)


def gemma4() -> PreTrainedModel:
    """Its experts are in the layers themselves, without a module between."""
    config = Gemma4TextConfig(
        **BASE, intermediate_size=96, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=40,
        head_dim=16, global_head_dim=16, vocab_size_per_layer_input=128, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
    )  # fmt: skip
    return make(Gemma4ForCausalLM, config)


def gpt_oss() -> PreTrainedModel:
    config = GptOssConfig(
        **BASE, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, head_dim=16, eos_token_id=2,
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    return make(GptOssForCausalLM, config)


def llama4() -> PreTrainedModel:
    config = Llama4TextConfig(
        **BASE, intermediate_size=48, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1, head_dim=16,
        interleave_moe_layer_step=1, use_qk_norm=False, attn_temperature_tuning=False, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    return make(Llama4ForCausalLM, config)


def is_linear(name: str) -> bool:
    return bool(re.search(r"(_proj|_proj_with_mqa|\bw[123]|[qk]v?_[ab]_proj|kv_b_proj|fc[12])\.weight$", name))


Call = Callable[[PreTrainedModel], torch.Tensor]


def causal(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def dense_logits(model: PreTrainedModel, dense: State, path: Path, call: Call = causal) -> torch.Tensor:
    """What stock transformers computes in float32 from the dequantized tensors, under the names of a dense checkpoint."""
    model.save_pretrained(path)
    state = {name: tensor.float().contiguous() for name, tensor in dense.items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with stock_transformers():
        return call(type(model).from_pretrained(path, dtype=torch.float32))


def check(model: PreTrainedModel, path: Path, written: State, dense: State, tmp_path: Path, call: Call = causal) -> None:
    """Right logits on all routes; FP8 saved as it was read; dense saved so that stock transformers reads it."""
    wanted = dense_logits(model, dense, tmp_path / "dense", call)
    options: dict[str, Any] = {"dtype": torch.float32}
    with native.use(None):
        default = type(model).from_pretrained(path, **options)
        assert error(call(default), wanted) <= 1e-5
        default.save_pretrained(tmp_path / "default")
    with stock_transformers():
        assert error(call(type(model).from_pretrained(tmp_path / "default", **options)), wanted) <= 1e-5
    if native.why_not() is None:
        by_default = type(model).from_pretrained(path, **options)
        assert error(call(by_default), wanted) <= 1e-5
        type(model).from_pretrained(path, dtype=torch.bfloat16).save_pretrained(tmp_path / "by default")
        rest = [n for n in differing(written, tensors(tmp_path / "by default")) if "e_score_correction_bias" not in n]
        assert rest == [], rest
    kept = type(model).from_pretrained(path, quantization_config=FP8Config(backend="weight_only"), **options)
    assert error(call(kept), wanted) <= 1e-5
    in_bf16 = type(model).from_pretrained(path, quantization_config=FP8Config(backend="weight_only"), dtype=torch.bfloat16)
    in_bf16.save_pretrained(tmp_path / "kept")
    again = type(model).from_pretrained(
        tmp_path / "kept", quantization_config=FP8Config(backend="weight_only"), dtype=torch.bfloat16
    )
    assert torch.equal(call(again), call(in_bf16))
    # DeepSeek keeps this one in float32 whatever the file has
    assert [n for n in differing(written, tensors(tmp_path / "kept")) if "e_score_correction_bias" not in n] == []


MOE = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3}
SCHEMES: dict[str, dict[str, Any]] = {
    "channel": {},
    "tensor static": {"weight": TENSOR, "inputs": STATIC_TENSOR},
    "block 24x40": {"weight": Granularity(24, 40), "inputs": group_input(), "scale_dtype": torch.float32},
}


def split_experts(
    state: State, interleaved: bool, weight: Granularity = ROW, inputs: Any = None, **_: Any
) -> tuple[State, State]:
    """Merged, transposed experts taken apart and quantized as llm-compressor does: (file, its dequantized merged form)."""
    file, dense = {}, dict(state)
    for name, tensor in state.items():
        found = re.match(r"(.*experts)\.(gate_up_proj|down_proj)(_bias)?$", name)
        if found is None:
            file[name] = tensor
            continue
        dense[name] = tensor.float().clone()
        columns = {"down_proj": slice(None)}
        if found[2] == "gate_up_proj":
            half = tensor.shape[-1] // 2
            columns = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
            if not interleaved:
                columns = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
        for expert in range(tensor.shape[0]):
            for number, (projection, where) in enumerate(columns.items()):
                stem = f"{found[1]}.{expert}.{projection}"
                if found[3]:
                    file[f"{stem}.bias"] = tensor[expert][where].clone()
                    continue
                w = tensor[expert][:, where].t().contiguous()
                scale = numerics.compute_scale(w, weight).bfloat16()
                file[f"{stem}.weight"] = numerics.quantize(w, scale, weight)
                file[f"{stem}.weight_scale"] = scale.reshape(1) if weight == TENSOR else scale
                if inputs is not None and not inputs["dynamic"]:
                    file[f"{stem}.input_scale"] = torch.tensor([(3 + expert + number) / 448]).bfloat16()
                dense[name][expert][:, where] = numerics.dequantize(file[f"{stem}.weight"], scale, weight).t()
    return file, dense


def stack_experts(state: State, weight: Granularity = ROW, inputs: Any = None, **_: Any) -> tuple[State, State]:
    """Merged, transposed experts quantized as they are: (file, its dequantized form)."""
    file, dense = dict(state), dict(state)
    for name, tensor in state.items():
        if re.search(r"experts\.(gate_up_proj|down_proj)$", name):
            scales = [numerics.compute_scale(w.t(), weight).bfloat16() for w in tensor]
            codes = [numerics.quantize(w.t(), scale, weight) for w, scale in zip(tensor, scales, strict=True)]
            dense[name] = torch.stack(
                [numerics.dequantize(q, scale, weight).t() for q, scale in zip(codes, scales, strict=True)]
            )
            file[name] = torch.stack([q.t() for q in codes])
            stacked = torch.stack([scale.t() for scale in scales])
            file[f"{name}_scale"] = stacked.reshape(-1) if weight == TENSOR else stacked
            if inputs is not None and not inputs["dynamic"]:
                file[f"{name}_input_scale"] = torch.tensor([(3 + expert) / 448 for expert in range(len(tensor))]).bfloat16()
    return file, dense


TRANSPOSED = {"gpt_oss": gpt_oss, "llama4": llama4}


def write_transposed(family: str, form: str, path: Path, **scheme: Any) -> tuple[PreTrainedModel, State, State]:
    """(model, tensors written, dequantized tensors) of a family whose experts are transposed; form: "split" or "stacked"."""
    model = TRANSPOSED[family]()
    state, dense = write(model, path, quantized=is_linear, ignore=["lm_head", "re:.*router"], **scheme)
    file, merged = split_experts(state, family == "gpt_oss", **scheme) if form == "split" else stack_experts(state, **scheme)
    dense |= {name: tensor for name, tensor in merged.items() if ".experts." in name and not name.endswith("_scale")}
    save_file({k: v.contiguous() for k, v in file.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return model, file, dense
