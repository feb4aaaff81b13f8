"""Mutations of what else config.json says: of the model, and of its text."""

from __future__ import annotations

import math
from random import Random

from .config_faults import ODD, Fault, short
from .drafts import Change, Draft, some

SIZES = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_routed_experts",
    "n_shared_experts", "first_k_dense_replace", "q_lora_rank", "kv_lora_rank", "max_position_embeddings",
]  # fmt: skip
SWITCHES = [
    "tie_word_embeddings", "attention_bias", "mlp_bias", "rms_norm_eps", "rope_parameters", "hidden_act", "layer_types",
    "dtype", "torch_dtype", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "sliding_window", "use_cache",
    "initializer_range", "pad_token_id", "bos_token_id", "transformers_version", "is_encoder_decoder", "auto_map",
]  # fmt: skip


def model_key(draft: Draft, rng: Random) -> Change | None:
    """A key of the model itself."""
    if not isinstance(draft.config, dict):
        return None
    key = some(rng, [key for key in SIZES + SWITCHES if key in draft.config])
    if rng.random() < 0.15:
        key = rng.choice(SIZES + SWITCHES)
    if key is None:
        return None
    old = draft.config.get(key)
    what = rng.random()
    if what < 0.15:
        draft.config.pop(key, None)
        return Change(f"{key} deleted")
    if isinstance(old, bool) and what < 0.7:
        draft.config[key] = not old
    elif isinstance(old, int) and what < 0.8:
        draft.config[key] = rng.choice([old + 1, old - 1, old * 2, old // 2, 0, -old, float(old), str(old), 1])
    elif isinstance(old, int) and what < 0.83:
        draft.config[key] = 10**9
    elif key in ("dtype", "torch_dtype") and what < 0.7:
        draft.config[key] = rng.choice(["float32", "float16", "float8_e4m3fn", "int8", "auto", "torch.bfloat16", "nonsense"])
    else:
        # A number as large as these makes the host build for hours; 10**9 above is enough of that.
        draft.config[key] = rng.choice([odd for odd in ODD if odd() not in (2**31, 10**30, 1e308, math.inf)])()
    return Change(f"{key} is {short(draft.config[key])}, was {short(old)}")


MODELS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "gemma2",
    "gpt2",
    "bert",
    "t5",
]


def model_type(draft: Draft, rng: Random) -> Change | None:
    if not isinstance(draft.config, dict):
        return None
    key = rng.choice(["model_type", "architectures"])
    values = [*MODELS, "nonsense", "", None, 3, []] if key == "model_type" else [
        [], None, ["MistralForCausalLM"], ["Nonsense"], [3], "LlamaForCausalLM", ["LlamaForSequenceClassification"],
    ]  # fmt: skip
    draft.config[key] = rng.choice(values)
    return Change(f"{key} is {draft.config[key]!r}")


def broken_text(draft: Draft, rng: Random) -> Change | None:
    what = rng.choice(["cut", "bom", "tail", "empty", "list", "comment", "nan"])
    draft.text.append({
        "cut": lambda text: text[: len(text) // 2], "bom": lambda text: "\ufeff" + text, "tail": lambda text: text + "}",
        "empty": lambda text: "", "list": lambda text: f"[{text}]", "comment": lambda text: "// a comment\n" + text,
        "nan": lambda text: text.replace("{", '{"hidden_dropout": NaN, ', 1),
    }[what])  # fmt: skip
    return Change(f"text of config.json: {what}")


MODEL: dict[Fault, float] = {model_key: 8, model_type: 2, broken_text: 1}
