"""FP8_DYNAMIC checkpoints with the shapes of real models and random codes, written shard by shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

LLAMAS = {
    "tinyllama-1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
# (N, K) of the linears of a layer, q and k/v, o, gate/up, down; fused where serving engines fuse them.
LINEARS = {
    "smollm2-135m": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "tinyllama-1.1b": [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)],
    "llama-3-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "llama-3-70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
}


def config(name: str) -> LlamaConfig:
    return LlamaConfig(
        **LLAMAS[name], tie_word_embeddings=False, dtype="bfloat16", max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def quantization_config(*ignore: str) -> dict[str, Any]:
    """FP8_DYNAMIC, as compressed-tensors writes it."""
    return {
        "config_groups": {"FP8_DYNAMIC": ["Linear"]}, "format": "float-quantized", "ignore": list(ignore),
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
    }  # fmt: skip


def codes(n: int, k: int, device: str = "cpu") -> torch.Tensor:
    """Random E4M3 codes of either sign, without NaN."""
    random = torch.randint(0, 256, (n, k), dtype=torch.uint8, device=device)
    return torch.where(random & 0x7F == 0x7F, random - 1, random).view(torch.float8_e4m3fn)


def write(name: str, path: Path) -> Path:
    """The checkpoint `name` in `path`, written once."""
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    shape = LLAMAS[name]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    torch.manual_seed(0)
    index: dict[str, str] = {}

    def save(file: str, state: dict[str, torch.Tensor]) -> None:
        save_file(state, path / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(state, file))

    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        state = {
            f"{prefix}.{norm}.weight": torch.ones(hidden).bfloat16() for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for part, n, k in (
            ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", kv, hidden), ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            state[f"{prefix}.{part}.weight"] = codes(n, k)
            # A weight of about 1/sqrt(K), as an initialised one: the RMS of uniformly drawn codes is about 130.
            state[f"{prefix}.{part}.weight_scale"] = torch.full((n, 1), 1 / 130 / k**0.5).bfloat16()
        save(f"model-{layer:05d}.safetensors", state)
    ends = {
        name: (torch.randn(shape["vocab_size"], hidden) * 0.02).bfloat16()
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    save("model-ends.safetensors", {**ends, "model.norm.weight": torch.ones(hidden).bfloat16()})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    written = config(name).to_dict()
    written["quantization_config"] = quantization_config("lm_head")
    (path / "config.json").write_text(json.dumps(written))
    return path
