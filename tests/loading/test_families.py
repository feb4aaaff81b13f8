"""Model families: names that differ between file and module, ties, heads, and code that reads weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.build import differing, error, tensors, tiny_llama, write
from support.moe import IDS, Call, causal, check, is_linear, make
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_fp8
from hf_fp8 import FP8Config, QuantizedLinear
from hf_fp8.formats.code_types import FP8

HEADS: dict[str, tuple[bool, Callable[[str], bool], list[str], list[str]]] = {
    "tied": (True, lambda n: is_linear(n), ["Linear"], []),
    "quantized lm_head": (False, lambda n: is_linear(n) or "lm_head" in n, ["Linear"], []),
    "quantized embedding": (False, lambda n: is_linear(n) or "embed" in n, ["Linear", "Embedding"], ["lm_head"]),
    "quantized embedding, tied": (True, lambda n: is_linear(n) or "embed" in n, ["Linear", "Embedding"], []),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_embeddings(name: str, tmp_path: Path) -> None:
    tied, quantized, targets, ignore = HEADS[name]
    model, path = tiny_llama(tie_word_embeddings=tied), tmp_path / "fp8"
    written, dense = write(model, path, quantized=quantized, targets=targets, ignore=ignore)
    check(model, path, written, dense, tmp_path)


def test_a_head_of_its_own_under_a_config_that_ties(tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "fp8"
    written, dense = write(
        model, path, quantized=lambda n: is_linear(n) or "lm_head" in n, ignore=[],
        config_edit=lambda c: c.update(tie_word_embeddings=True),
    )  # fmt: skip
    check(model, path, written, dense, tmp_path)
    kept = type(model).from_pretrained(path, quantization_config=FP8Config(backend="weight_only"))
    kept.tie_weights()
    assert isinstance(kept.lm_head, QuantizedLinear) and kept.lm_head.weight.dtype == FP8


class TiedBody(LlamaForCausalLM):  # type: ignore[misc]
    """Two layers that share a Linear, of which the files hold one."""

    _tied_weights_keys = {  # noqa: RUF012
        "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight": "model.embed_tokens.weight",
    }


@pytest.mark.parametrize("backend", ["weight_only", "scaled_mm"])
def test_linears_tied_to_each_other(backend: str, tmp_path: Path) -> None:
    model = TiedBody(tiny_llama(tie_word_embeddings=True).config).to(torch.bfloat16).eval()
    model.tie_weights()
    written, _ = write(model, tmp_path / "fp8")
    assert "model.layers.1.mlp.up_proj.weight" not in written
    dense = TiedBody.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    kept = TiedBody.from_pretrained(tmp_path / "fp8", dtype=torch.float32, quantization_config=FP8Config(backend=backend))
    assert error(causal(kept), causal(dense)) < (1e-5 if backend == "weight_only" else 0.1)
    assert kept.model.layers[1].mlp.up_proj.weight is kept.model.layers[0].mlp.up_proj.weight
    in_bf16 = TiedBody.from_pretrained(tmp_path / "fp8", quantization_config=FP8Config(backend=backend))
    in_bf16.save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []


def test_a_tie_of_which_the_file_holds_the_other_end(tmp_path: Path) -> None:
    """An FP8 lm_head, and no embedding: the embedding is the head."""
    written, dense = write(
        tiny_llama(), tmp_path / "fp8", quantized=lambda n: is_linear(n) or "lm_head" in n, ignore=[],
        edit=lambda s: {k: v for k, v in s.items() if "embed_tokens" not in k},
        config_edit=lambda c: c.update(tie_word_embeddings=True),
    )  # fmt: skip
    head = dense["lm_head.weight"]
    for backend in ("auto", "weight_only"):
        model = LlamaForCausalLM.from_pretrained(
            tmp_path / "fp8", dtype=torch.float32, quantization_config=FP8Config(backend=backend)
        )
        assert torch.equal(model.model.embed_tokens.weight, head) and torch.equal(model.lm_head.weight, head)
    assert written["lm_head.weight"].dtype == FP8


def t5(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, decoder_input_ids=IDS).logits


def test_code_that_reads_a_weight(tmp_path: Path) -> None:
    """T5 casts its hidden states to `wo.weight.dtype`: wo must not hold codes."""
    config = T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=128, dtype="bfloat16", decoder_start_token_id=0
    )
    model, path = make(T5ForConditionalGeneration, config), tmp_path / "fp8"
    written, dense = write(model, path, quantized=lambda n: bool(re.search(r"\.(q|k|v|o|wi|wo)\.weight$", n)))
    check(model, path, written, dense, tmp_path, t5)
    kept = type(model).from_pretrained(path, quantization_config=FP8Config(backend="weight_only"))
    reasons = {row.name: row.reason for row in hf_fp8.explain(kept) if row.kernel == "dense"}
    assert set(reasons) == {name for name, _ in kept.named_modules() if name.endswith(".wo")}
    assert all("T5" in reason or "float32" in reason for reason in reasons.values())


OTHERS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[str], bool], dict[str, Any]]] = {
    "opt": (
        lambda: make(
            OPTForCausalLM,
            OPTConfig(
                hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, dtype="bfloat16",
                max_position_embeddings=64, word_embed_proj_dim=64, bos_token_id=1, eos_token_id=2,
            ),
        ),
        is_linear, {},
    ),
    "gpt2, no nn.Linear": (
        lambda: make(
            GPT2LMHeadModel,
            GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, dtype="bfloat16", bos_token_id=1, eos_token_id=2),
        ),
        lambda n: n.endswith(("c_attn.weight", "c_fc.weight")), {"targets": ["re:.*c_attn", "re:.*c_fc"]},
    ),
    "bert": (
        lambda: make(
            BertForMaskedLM,
            BertConfig(
                hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
                dtype="bfloat16",
            ),
        ),
        lambda n: n.endswith(("query.weight", "key.weight", "value.weight", "dense.weight")) and "cls" not in n,
        {"ignore": ["re:cls.*"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    build, quantized, options = OTHERS[name]
    model, path = build(), tmp_path / "fp8"
    written, dense = write(model, path, quantized=quantized, **options)
    call: Call = causal
    if name == "bert":

        def call(model: PreTrainedModel) -> torch.Tensor:
            with torch.no_grad():
                return model(IDS).logits

    check(model, path, written, dense, tmp_path, call)


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("backend", ["auto", "weight_only"])
def test_new_head(backend: str, tmp_path: Path) -> None:
    """It is dense, in the model and in what is saved."""
    write(tiny_llama(pad_token_id=0), tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, quantization_config=FP8Config(backend=backend)
    )
    assert type(model.score) is torch.nn.Linear
    assert model(IDS).logits.shape == (2, 3)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == (14 if backend == "weight_only" else 0)
    model.save_pretrained(tmp_path / "saved")
    options = {} if backend == "auto" else {"quantization_config": FP8Config(backend=backend)}
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", **options)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_base_model_and_back(tmp_path: Path) -> None:
    """A prefix that one class of model has and the other lacks."""
    write(tiny_llama(), tmp_path / "causal", scale_shape=lambda s: s.reshape(-1))
    options: dict[str, Any] = {"quantization_config": FP8Config(backend="weight_only"), "dtype": torch.float32}
    causal_lm = type(tiny_llama()).from_pretrained(tmp_path / "causal", **options)
    base = AutoModel.from_pretrained(tmp_path / "causal", **options)
    hidden = base(IDS).last_hidden_state
    assert torch.equal(hidden, causal_lm.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert AutoModel.from_pretrained(tmp_path / "base", **options)(IDS).last_hidden_state.equal(hidden)
    headless = type(tiny_llama()).from_pretrained(tmp_path / "base", **options)
    assert torch.equal(headless.model(IDS).last_hidden_state, hidden)
