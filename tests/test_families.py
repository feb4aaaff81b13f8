"""Model families: names that differ between file and module, merged experts, ties, heads, and code that reads weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from build import STATIC_TENSOR, State, differing, error, group_input, tensors, tiny_llama, write
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_fp8
from hf_fp8 import FP8Config, FP8Linear, numerics
from hf_fp8.scheme import FP8, ROW, TENSOR, Granularity

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
    hf_fp8.unregister()
    try:
        return call(type(model).from_pretrained(path, dtype=torch.float32))
    finally:
        hf_fp8.register()


def check(model: PreTrainedModel, path: Path, written: State, dense: State, tmp_path: Path, call: Call = causal) -> None:
    """Right logits on both routes; FP8 saved as it was read; dense saved so that stock transformers reads it."""
    wanted = dense_logits(model, dense, tmp_path / "dense", call)
    options: dict[str, Any] = {"dtype": torch.float32}
    default = type(model).from_pretrained(path, **options)
    assert error(call(default), wanted) <= 1e-5
    default.save_pretrained(tmp_path / "default")
    hf_fp8.unregister()
    try:
        assert error(call(type(model).from_pretrained(tmp_path / "default", **options)), wanted) <= 1e-5
    finally:
        hf_fp8.register()
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


def split_experts(state: State, interleaved: bool) -> tuple[State, State]:
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
            for projection, where in columns.items():
                stem = f"{found[1]}.{expert}.{projection}"
                if found[3]:
                    file[f"{stem}.bias"] = tensor[expert][where].clone()
                    continue
                w = tensor[expert][:, where].t().contiguous()
                scale = numerics.compute_scale(w, ROW).bfloat16()
                file[f"{stem}.weight"] = numerics.quantize(w, scale, ROW)
                file[f"{stem}.weight_scale"] = scale
                dense[name][expert][:, where] = numerics.dequantize(file[f"{stem}.weight"], scale, ROW).t()
    return file, dense


def stack_experts(state: State) -> tuple[State, State]:
    """Merged experts quantized as they are, a scale per output column: (file, its dequantized form)."""
    file, dense = dict(state), dict(state)
    for name, tensor in state.items():
        if re.search(r"experts\.(gate_up_proj|down_proj)$", name):
            scale = (tensor.float().abs().amax(1, keepdim=True) / 448).bfloat16()
            file[name] = (tensor.float() / scale.float()).clamp(-448, 448).to(FP8)
            file[f"{name}_scale"] = scale
            dense[name] = file[name].float() * scale.float()
    return file, dense


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
@pytest.mark.parametrize("form", ["split", "stacked"])
def test_transposed_experts(family: str, form: str, tmp_path: Path) -> None:
    model, path = {"gpt_oss": gpt_oss, "llama4": llama4}[family](), tmp_path / "fp8"
    state, attention = write(model, path, quantized=is_linear, ignore=["lm_head", "re:.*router"])
    file, dense = split_experts(state, family == "gpt_oss") if form == "split" else stack_experts(state)
    merged = {name: tensor for name, tensor in dense.items() if ".experts." in name and not name.endswith("_scale")}
    save_file({k: v.contiguous() for k, v in file.items()}, path / "model.safetensors", metadata={"format": "pt"})
    check(model, path, file, {**attention, **merged}, tmp_path)


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


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_an_edited_expert_of_a_stack(family: str, tmp_path: Path) -> None:
    model = {"gpt_oss": gpt_oss, "llama4": llama4}[family]()
    state, _ = write(model, tmp_path, quantized=is_linear, ignore=["lm_head", "re:.*router"])
    save_file({k: v.contiguous() for k, v in stack_experts(state)[0].items()}, tmp_path / "model.safetensors", {"format": "pt"})
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


def test_experts_survive_a_cast_of_the_model(tmp_path: Path) -> None:
    written, _ = write(mixtral(), tmp_path / "fp8", quantized=is_linear)
    model = MixtralForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=FP8Config(backend="weight_only"), dtype=torch.bfloat16
    )
    model.to(torch.float32).save_pretrained(tmp_path / "saved")
    quantized = {name for name in written if written[name].dtype == FP8 or name.endswith("_scale")}
    assert not quantized & set(differing(written, tensors(tmp_path / "saved")))


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
    assert isinstance(kept.lm_head, FP8Linear) and kept.lm_head.weight.dtype == FP8


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


@pytest.mark.parametrize("backend", ["auto", "weight_only"])
def test_new_head(backend: str, tmp_path: Path) -> None:
    """It is dense, in the model and in what is saved."""
    write(tiny_llama(pad_token_id=0), tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, quantization_config=FP8Config(backend=backend)
    )
    assert type(model.score) is torch.nn.Linear
    assert model(IDS).logits.shape == (2, 3)
    assert sum(isinstance(m, FP8Linear) for m in model.modules()) == (14 if backend == "weight_only" else 0)
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


@pytest.mark.parametrize("backend", ["auto", "weight_only", "dequantize"])
def test_fp8_attention_beside_int4_experts(backend: str, tmp_path: Path) -> None:
    """Experts of another format, merged: multiplied out by that format's own rules, and packed again on saving."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    int4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
    scheme = QuantizationScheme(targets=["re:.*experts.*"], weights=int4, format="pack-quantized")
    compressor, unpacked = BaseCompressor.get_value_from_registry("pack-quantized"), {}

    def pack(state: State) -> State:
        packed = {}
        for name, tensor in state.items():
            if ".experts." not in name:
                packed[name] = tensor
                continue
            scale = (tensor.float().view(tensor.shape[0], -1, 8).abs().amax(-1) / 7.5).bfloat16()
            parts = compressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
            packed |= {name.removesuffix("weight") + role: part for role, part in parts.items()}
            unpacked[name] = compressor.decompress(parts, scheme)["weight"]
        return packed

    def two_groups(config: dict[str, Any]) -> None:
        config["quantization_config"]["format"] = "mixed-precision"
        experts = {"targets": ["re:.*experts.*"], "weights": int4, "format": "pack-quantized"}
        config["quantization_config"]["config_groups"]["experts"] = experts

    model, path = qwen3_moe(), tmp_path / "mixed"
    written, dense = write(
        model, path, quantized=lambda n: is_linear(n) and "experts" not in n, targets=["re:.*self_attn.*"], edit=pack,
        config_edit=two_groups,
    )  # fmt: skip
    wanted = dense_logits(model, {**dense, **unpacked}, tmp_path / "dense")
    config = FP8Config(dequantize=True) if backend == "dequantize" else FP8Config(backend=backend)
    loaded = type(model).from_pretrained(path, quantization_config=config, dtype=torch.float32)
    assert error(causal(loaded), wanted) < 1e-5
    loaded.save_pretrained(tmp_path / "saved")
    if backend != "weight_only":
        again = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert torch.equal(causal(again), causal(loaded)) and not hasattr(again.config, "quantization_config")
        return
    saved = tensors(tmp_path / "saved")
    quantized = {name for name in written if "weight_" in name or written[name].dtype == FP8}
    assert not quantized & set(differing(written, saved))
    again = type(model).from_pretrained(tmp_path / "saved", quantization_config=config, dtype=torch.float32)
    assert torch.equal(causal(again), causal(loaded))
    loaded.model.layers[0].mlp.experts.down_proj.data[1].mul_(1.5)
    with pytest.raises(hf_fp8.UnsupportedError, match=r"experts\.1\.down_proj"):
        loaded.save_pretrained(tmp_path / "edited")
