"""What is loaded is written back as it was read: names, dtypes and bytes; dense tensors, too, and those without a module."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.build import KEEP, OFFLOAD, State, differing, error, load, logits, tensors, tiny_llama, write
from support.commands import run
from support.moe import BASE, MOE, causal, dense_logits, is_linear, make, qwen3_moe
from support.other_floats import write_beside
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    LlamaForCausalLM,
    NomicBertConfig,
    NomicBertForMaskedLM,
    PreTrainedModel,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

import hf_fp8
from hf_fp8 import FP8Config
from hf_fp8.formats import numerics
from hf_fp8.formats.scheme import ROW
from hf_fp8.loading.ops import as_read

EXPERTS = FP8Config(backend="weight_only", experts="fp8")


# -- dtypes --


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("config", [KEEP, EXPERTS], ids=["experts dense", "experts fp8"])
def test_routers_that_the_host_widens(family: str, config: FP8Config, tmp_path: Path) -> None:
    """transformers keeps some parameters in float32, from 5.24 on the routers of most families."""
    model = MOE[family]()
    model._keep_in_fp32_modules_strict = type(model)._keep_in_fp32_modules_strict
    written, _ = write(model, tmp_path / "fp8", quantized=is_linear)
    loaded = load(tmp_path / "fp8", config, dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []


@pytest.mark.parametrize("how", ["plain", "tied", "offloaded", "sharded"])
def test_a_model_that_was_loaded_wider(how: str, tmp_path: Path) -> None:
    written, _ = write(tiny_llama(tie_word_embeddings=how == "tied"), tmp_path / "fp8")
    options: dict[str, Any] = {"device_map": OFFLOAD, "offload_folder": tmp_path / "offload"} if how == "offloaded" else {}
    loaded = load(tmp_path / "fp8", dtype=torch.float32, **options)
    loaded.save_pretrained(tmp_path / "saved", max_shard_size="20KB" if how == "sharded" else "5GB")
    assert differing(written, tensors(tmp_path / "saved")) == []


def test_what_was_changed_stays_wide(tmp_path: Path) -> None:
    written, _ = write(tiny_llama(), tmp_path / "fp8")
    loaded = load(tmp_path / "fp8")
    with torch.no_grad():
        loaded.model.norm.weight.add_(1e-6)
        loaded.model.layers[0].input_layernorm.weight[0] = torch.nan
    loaded.save_pretrained(tmp_path / "saved")
    saved = tensors(tmp_path / "saved")
    assert saved["model.norm.weight"].dtype == torch.float32
    assert torch.equal(saved["model.norm.weight"], loaded.model.norm.weight.detach())
    assert set(differing(written, saved)) <= {"model.norm.weight", "model.layers.0.input_layernorm.weight"}


@pytest.mark.parametrize("way", ["loaded dense", "dequantized later"])
def test_a_dense_model_in_one_dtype_is_saved_in_it(way: str, tmp_path: Path) -> None:
    """Only what the host holds wider than the model goes back: a model that somebody loads in float32 is saved so."""
    model = MOE["deepseek_v3"]()
    written, _ = write(model, tmp_path / "fp8", quantized=is_linear)
    for dtype in (torch.bfloat16, torch.float32):
        config = FP8Config(dequantize=True) if way == "loaded dense" else KEEP
        loaded = load(tmp_path / "fp8", config, dtype=dtype)
        if way != "loaded dense":
            loaded.dequantize()
        loaded.save_pretrained(tmp_path / f"{dtype}")
        found = {name: tensor.dtype for name, tensor in tensors(tmp_path / f"{dtype}").items()}
        assert {name: d for name, d in found.items() if d != dtype} == (
            {} if dtype == torch.float32 else {n: t.dtype for n, t in written.items() if t.dtype == torch.float32}
        )


class Odd(LlamaForCausalLM):
    """A class that wants its first parameter in float32, builds a Linear in float32, and counts something."""

    _keep_in_fp32_modules_strict = ("embed_tokens",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[0].mlp.up_proj.to(torch.float32)
        self.model.norm.register_buffer("batches", torch.tensor(5))
        self.post_init()


def write_odd(path: Path) -> State:
    return write(tiny_llama(), path, edit=lambda state: {**state, "model.norm.batches": torch.tensor(1000)})[0]


def test_dtypes_that_a_class_chooses(tmp_path: Path) -> None:
    """`PreTrainedModel.dtype`, that of the first parameter, is none of the model's here."""
    written = write_odd(tmp_path / "fp8")
    dtypes = {}
    for name, config in {"kept": KEEP, "dense": FP8Config(dequantize=True)}.items():
        model = Odd.from_pretrained(tmp_path / "fp8", quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        if name == "kept":
            assert differing(written, tensors(tmp_path / "kept")) == []
            model.dequantize()
        dtypes[name] = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["kept"] == dtypes["dense"]
    wide = {name for name, dtype in dtypes["dense"].items() if dtype != torch.bfloat16}
    assert wide == {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}


@pytest.mark.parametrize(
    ("held", "read", "same"),
    [
        (torch.tensor([3.0, 7.0]), torch.int64, True), (torch.tensor([3.5]), torch.int64, False),
        (torch.tensor([2.0**25]), torch.int64, False), (torch.tensor([torch.nan]), torch.int32, False),
        (torch.tensor([torch.inf]), torch.int32, False), (torch.tensor([300.0]), torch.uint8, False),
        (torch.tensor([200.0]).bfloat16(), torch.int64, False), (torch.tensor([100.0]).bfloat16(), torch.int64, True),
        (torch.tensor([1.0]), torch.bfloat16, True), (torch.tensor([1 + 2.0**-20]), torch.bfloat16, False),
        (torch.tensor([]), torch.bfloat16, True), (torch.tensor([], dtype=torch.float32), torch.int64, True),
    ],
)  # fmt: skip
def test_what_is_written_back_in_its_dtype(held: torch.Tensor, read: torch.dtype, same: bool) -> None:
    found = as_read(held, read)
    assert found.dtype == (read if same else held.dtype)
    assert torch.equal(found.to(held.dtype).nan_to_num(7.0), held.nan_to_num(7.0))


# -- names --


def kimi() -> PreTrainedModel:
    config = KimiLinearConfig(
        **{**BASE, "num_key_value_heads": 4}, intermediate_size=96, moe_intermediate_size=32, head_dim=16, num_experts=4,
        num_experts_per_token=2, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        first_k_dense_replace=1, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    return make(KimiLinearForCausalLM, config)


def deepseek_v4() -> PreTrainedModel:
    config = DeepseekV4Config(
        **{**BASE, "num_key_value_heads": 1, "num_hidden_layers": 2}, moe_intermediate_size=32, n_routed_experts=4,
        num_experts_per_tok=2, q_lora_rank=32, o_lora_rank=16, o_groups=2, head_dim=32, qk_rope_head_dim=16,
        index_head_dim=16, index_n_heads=2, index_topk=8,
    )  # fmt: skip
    return make(DeepseekV4ForCausalLM, config)


def granite(kind: Any = GraniteMoeForCausalLM, config: Any = GraniteMoeConfig, **more: Any) -> PreTrainedModel:
    return make(kind, config(**BASE, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, **more))


def granite_shared() -> PreTrainedModel:
    return granite(GraniteMoeSharedForCausalLM, GraniteMoeSharedConfig, shared_intermediate_size=32)


FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[str], bool]]] = {
    "names with escapes": (kimi, lambda name: ".experts." in name and name.endswith(".weight")),
    "names with escapes, many": (
        deepseek_v4, lambda name: (".experts." in name or ".wq_b." in name or ".wo_b." in name) and name.endswith(".weight"),
    ),
    "renamed stacks": (granite, lambda name: name.endswith(("_proj.weight", "put_linear.weight"))),
    "renamed stacks, shared": (granite_shared, lambda name: name.endswith(("_proj.weight", "put_linear.weight"))),
}  # fmt: skip


def write_any(model: PreTrainedModel, path: Path, chosen: Callable[[str], bool]) -> State:
    """Channel-wise FP8 of the matrices, and of the stacks of matrices, that are chosen."""
    model.save_pretrained(path)
    state = load_file(path / "model.safetensors")
    out: State = {}
    for name, tensor in state.items():
        if not chosen(name) or tensor.ndim < 2:
            out[name] = tensor
            continue
        flat = tensor.reshape(-1, tensor.shape[-1])
        scale = numerics.compute_scale(flat, ROW).bfloat16()
        out[name] = numerics.quantize(flat, scale, ROW).view(tensor.shape)
        out[f"{name}_scale"] = scale.view(*tensor.shape[:-1], 1)
    dense = sorted({n.removesuffix(".weight") for n in out if n.endswith(".weight") and out[n].dtype == torch.bfloat16})
    config = json.loads((path / "config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear", "re:.*_linear$"], "weights": weights}}, "ignore": dense,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.thinned(4)
@pytest.mark.parametrize("config", [KEEP, EXPERTS], ids=["experts dense", "experts fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_come_back_under_their_names(family: str, config: FP8Config, tmp_path: Path) -> None:
    build, chosen = FAMILIES[family]
    written = write_any(build(), tmp_path / "fp8", chosen)
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in written.values()) >= 2
    loaded = load(tmp_path / "fp8", config, dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []
    again = load(tmp_path / "saved", config, dtype=torch.bfloat16)
    assert torch.equal(causal(again), causal(loaded))


def ernie_vl() -> PreTrainedModel:
    """Its files number the experts through: the first half goes into the text's stack, the second into the images', which is
    narrower."""
    text = {
        **BASE, "intermediate_size": 96, "moe_intermediate_size": [64, 32], "moe_num_experts": 4, "moe_k": 2,
        "moe_num_shared_experts": 1, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96}
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, dtype="bfloat16")
    return make(Ernie4_5_VLMoeForConditionalGeneration, config)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("config", [KEEP, EXPERTS, FP8Config(dequantize=True)], ids=["dense experts", "fp8 experts", "dense"])
@pytest.mark.parametrize("what", ["experts", "projections"])
def test_one_list_of_experts_in_two_parameters(what: str, config: FP8Config, tmp_path: Path) -> None:
    def chosen(name: str) -> bool:
        return name.endswith("_proj.weight") and "language" not in name and (".experts." in name) == (what == "experts")

    path = tmp_path / "fp8"
    written = write_any(ernie_vl(), path, chosen)
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in written.values()) >= 4
    dense = {
        name: numerics.dequantize(tensor, written[f"{name}_scale"], ROW, torch.bfloat16)
        if f"{name}_scale" in written
        else tensor
        for name, tensor in written.items()
        if not name.endswith("_scale")
    }
    kind = Ernie4_5_VLMoeForConditionalGeneration
    ernie_vl().save_pretrained(tmp_path / "dense")
    save_file(dense, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    wanted = kind.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    loaded = kind.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "saved")
    assert differing(dense if config.dequantize else written, tensors(tmp_path / "saved")) == []
    if not config.dequantize:
        loaded.dequantize()
    assert differing(dict(wanted.named_parameters()), dict(loaded.named_parameters())) == []


# What one matrix of the files is called in each of two layers -> the converters of the host that take it apart.
FUSED: dict[str, tuple[tuple[str, str], list[tuple[str, str]]]] = {
    "its weight": (("self_attn.w_qkv", "self_attn.w_qkv"), [(r"self_attn\.w_qkv\.weight", "self_attn.{}_proj.weight")]),
    "all that it has": (("self_attn.w_qkv", "self_attn.w_qkv"), [("self_attn.w_qkv", "self_attn.{}_proj")]),
    "two converters that make the same name": (
        ("self_attn.w_qkv", "attn.w_qkv"),
        [("self_attn.w_qkv.weight", "self_attn.{}_proj.weight"), (".attn.w_qkv.weight", ".self_attn.{}_proj.weight")],
    ),
}


@pytest.mark.parametrize("config", [KEEP, FP8Config(dequantize=True)], ids=["kept", "dense"])
@pytest.mark.parametrize("how", FUSED)
def test_fused_projections_that_the_model_holds_apart(how: str, config: FP8Config, tmp_path: Path) -> None:
    """One FP8 matrix in the files, three parameters in the model: they are put together again in the file's order."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    model = tiny_llama(num_key_value_heads=4, attention_bias=how == "all that it has")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    names, patterns = FUSED[how]
    conversion = [
        WeightConverter(source_patterns=[found], target_patterns=[made.format(x) for x in "qkv"], operations=[Chunk(dim=0)])
        for found, made in patterns
    ]

    def fuse(state: State) -> State:
        out = {name: t for name, t in state.items() if not any(f".{x}_proj." in name for x in "qkv")}
        for layer in range(2):
            stem = f"model.layers.{layer}"
            for role in (role for role in ("weight", "weight_scale", "bias") if f"{stem}.self_attn.q_proj.{role}" in state):
                parts = [state[f"{stem}.self_attn.{x}_proj.{role}"].view(torch.uint8) for x in "qkv"]
                fused = torch.cat(parts).view(state[f"{stem}.self_attn.q_proj.{role}"].dtype)
                out[f"{stem}.{names[layer]}.{role}"] = fused
        return out

    written, dense = write(model, tmp_path / "fp8", edit=fuse)
    wanted = dense_logits(model, dense, tmp_path / "dense")
    conversion_mapping.register_checkpoint_conversion_mapping("llama", conversion)
    try:
        loaded = load(tmp_path / "fp8", config)
        assert error(logits(loaded), wanted) <= 1e-5
        loaded.save_pretrained(tmp_path / "saved")
        if not config.dequantize:
            assert differing(written, tensors(tmp_path / "saved")) == []
            written_config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
            assert written_config["ignore"] == ["lm_head"]
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache.pop("llama", None)


def nomic_bert() -> PreTrainedModel:
    return make(NomicBertForMaskedLM, NomicBertConfig(**BASE, intermediate_size=96))


def qwen3_vl_moe() -> PreTrainedModel:
    text = {**BASE, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    text |= {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 64}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}, dtype="bfloat16")
    return make(Qwen3VLMoeForConditionalGeneration, config)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("config", [KEEP, EXPERTS, FP8Config(dequantize=True)], ids=["dense experts", "fp8 experts", "dense"])
@pytest.mark.parametrize("kind", ["fused, with a bias in the same pattern", "stacks", "stacks that the host transposes"])
def test_families_whose_patterns_end_in_no_weight(kind: str, config: FP8Config, tmp_path: Path) -> None:
    path, model = tmp_path / "fp8", nomic_bert() if kind.startswith("fused") else qwen3_vl_moe()
    chosen = {"Wqkv.weight"} if kind.startswith("fused") else {"gate_up_proj", "down_proj"}
    written = write_any(model, path, lambda name: any(name.endswith(end) for end in chosen))
    if kind == "stacks that the host transposes":
        turned = {name: t.transpose(1, 2).contiguous() for name, t in written.items() if t.ndim == 3}
        # The host takes a square for one that lies as the model's does.
        written |= {name: t for name, t in turned.items() if "down_proj" in name}
        save_file(written, path / "model.safetensors", metadata={"format": "pt"})
    scaled = [name for name in written if name.endswith("_scale")]
    assert scaled
    dense = {name: tensor for name, tensor in written.items() if name not in scaled}
    for scale in scaled:
        name = scale.removesuffix("_scale")
        dense[name] = (written[name].float() * written[scale].float()).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    save_file(dense, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    wanted = type(model).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    loaded = type(model).from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "saved")
    if not config.dequantize:
        assert differing(written, tensors(tmp_path / "saved")) == []
        loaded.dequantize()
    assert differing(dict(wanted.named_parameters()), dict(loaded.named_parameters())) == []


@pytest.mark.parametrize("way", ["while loading", "on disk"])
def test_quantizing_what_the_host_takes_apart(way: str, tmp_path: Path) -> None:
    """Fused projections stay dense, and are said to; stacks that go into their parameters as they are become FP8."""
    for family in (nomic_bert, qwen3_vl_moe):
        model, path = family(), tmp_path / family.__name__
        model.save_pretrained(path / "dense")
        if way == "on disk":
            run("quantize", path / "dense", path / "fp8", "--scheme", "FP8_DYNAMIC")
        else:
            made = type(model).from_pretrained(path / "dense", quantization_config=FP8Config("FP8_DYNAMIC"))
            made.save_pretrained(path / "fp8")
        state, ignore = (
            tensors(path / "fp8"),
            json.loads((path / "fp8" / "config.json").read_text())["quantization_config"]["ignore"],
        )
        codes = {name for name, tensor in state.items() if tensor.dtype == torch.float8_e4m3fn}
        if family is nomic_bert:
            assert codes and not any("Wqkv" in name for name in codes)
            assert any("Wqkv" in entry for entry in ignore) or all(any(f"{x}_proj" in e for e in ignore) for x in "qkv")
        else:
            assert {f"model.language_model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(4)} < codes
        loaded = type(model).from_pretrained(path / "fp8", quantization_config=KEEP, dtype=torch.bfloat16)
        loaded.save_pretrained(path / "saved")
        assert differing(state, tensors(path / "saved")) == []


@pytest.mark.parametrize("scales", ["of columns", "of columns, flat"])
def test_square_stacks_that_the_host_always_turns(scales: str, tmp_path: Path) -> None:
    """Nothing but the converter says which way they lie."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    model, path = qwen3_vl_moe(), tmp_path / "fp8"
    written = write_any(model, path, lambda name: name.endswith("gate_up_proj"))
    stacks = [name for name in written if name.endswith("gate_up_proj")]
    dense = {name: t for name, t in written.items() if not name.endswith("_scale")}
    for name in stacks:
        assert written[name].shape[1] == written[name].shape[2]
        dense[name] = (written[name].float() * written[f"{name}_scale"].float()).bfloat16()
        written[name] = written[name].transpose(1, 2).contiguous()
        scale = written[f"{name}_scale"].transpose(1, 2).contiguous()
        written[f"{name}_scale"] = scale.squeeze(1) if scales.endswith("flat") else scale
    save_file(written, path / "model.safetensors", metadata={"format": "pt"})
    old = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_vl_moe")
    turn = [WeightConverter("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", operations=[Transpose(1, 2)])]
    conversion_mapping.register_checkpoint_conversion_mapping("qwen3_vl_moe", turn, overwrite=True)
    try:
        loaded = type(model).from_pretrained(path, quantization_config=KEEP, dtype=torch.bfloat16)
        loaded.save_pretrained(tmp_path / "saved")
        assert differing(written, tensors(tmp_path / "saved")) == []
        found = dict(loaded.named_parameters())
        assert all(torch.equal(found[name], dense[name]) for name in stacks)
    finally:
        conversion_mapping.register_checkpoint_conversion_mapping("qwen3_vl_moe", old, overwrite=True)


def test_names_of_a_key_mapping_after_dequantizing(tmp_path: Path) -> None:
    """transformers 5.24 drops the conversions of a model with its quantization config."""
    write(tiny_llama(), tmp_path / "fp8", edit=lambda s: {k.replace("self_attn", "attention"): v for k, v in s.items()})
    mapping = {r"\.attention\.": ".self_attn."}
    for config in (KEEP, FP8Config(dequantize=True)):
        loaded = load(tmp_path / "fp8", config, key_mapping=mapping)
        if config is KEEP:
            loaded.dequantize()
        loaded.save_pretrained(tmp_path / "dense")
        assert not any("self_attn" in name for name in tensors(tmp_path / "dense"))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32, key_mapping=mapping)
        assert torch.equal(logits(again), logits(loaded))


# -- tensors without a place --


def glm_with_a_further_layer(path: Path) -> State:
    """A GLM-4 MoE of two layers whose files hold a third, which predicts a second token."""
    config = Glm4MoeConfig(
        **{**BASE, "num_hidden_layers": 3}, intermediate_size=96, moe_intermediate_size=32, head_dim=16, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1,
    )  # fmt: skip

    def further(state: State) -> State:
        made = {
            "model.layers.2.eh_proj.weight": torch.randn(64, 128).bfloat16(),
            "model.layers.2.enorm.weight": torch.ones(64).bfloat16(),
            "model.layers.2.shared_head.norm.weight": torch.ones(64, dtype=torch.float32),
            "model.rotary_emb.inv_freq": torch.ones(8),
        }
        return {**state, **made}

    ignore = ["lm_head", "model.layers.2.eh_proj", "re:.*mlp.gate$"]
    written, _ = write(
        make(Glm4MoeForCausalLM, config), path, ignore=ignore, edit=further,
        config_edit=lambda c: c.update(num_hidden_layers=2, num_nextn_predict_layers=1),
    )  # fmt: skip
    return written


@pytest.mark.parametrize("config", [KEEP, EXPERTS], ids=["experts dense", "experts fp8"])
@pytest.mark.parametrize("again", [1, 2])
def test_a_layer_that_the_class_lacks_is_written_back(config: FP8Config, again: int, tmp_path: Path) -> None:
    written, path = glm_with_a_further_layer(tmp_path / "fp8"), tmp_path / "fp8"
    for turn in range(again):
        loaded = load(path, config, dtype=torch.bfloat16)
        loaded.save_pretrained(tmp_path / f"saved{turn}")
        path = tmp_path / f"saved{turn}"
    assert differing(written, tensors(path)) == []
    config_of = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (tmp_path / "fp8", path)]
    assert config_of[0]["config_groups"].keys() == config_of[1]["config_groups"].keys()


def test_a_layer_that_the_class_lacks_is_dequantized_too(tmp_path: Path) -> None:
    """By the command line, which makes no model: the file's own experts, as there is no parameter that they go into."""
    written, dense = glm_with_a_further_layer(tmp_path / "fp8"), tmp_path / "dense"
    run("dequantize", tmp_path / "fp8", dense)
    found = tensors(dense)
    assert not [name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn]
    expert = "model.layers.2.mlp.experts.1.down_proj.weight"
    wanted = numerics.dequantize(written[expert], written[f"{expert}_scale"], ROW, torch.bfloat16)
    assert torch.equal(found[expert], wanted)
    fp8 = load(tmp_path / "fp8", FP8Config(dequantize=True), dtype=torch.bfloat16)
    assert torch.equal(causal(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)), causal(fp8))


def test_what_is_dropped_is_named(tmp_path: Path, propagated: Any, caplog: pytest.LogCaptureFixture) -> None:
    glm_with_a_further_layer(tmp_path / "fp8")
    cases: list[tuple[Any, FP8Config | None, dict[str, Any], str]] = [
        (AutoModelForCausalLM, FP8Config(dequantize=True), {}, "eh_proj"),
        (AutoModelForCausalLM, FP8Config(backend="int8"), {}, "eh_proj"),
        (AutoModel, KEEP, {}, "lm_head"),  # of another class, of which the head is no part
        (AutoModelForCausalLM, KEEP, {"num_hidden_layers": 1}, "layers.*.input_layernorm"),  # somebody wants fewer layers
    ]
    for kind, config, options, name in cases:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model = kind.from_pretrained(tmp_path / "fp8", quantization_config=config, dtype=torch.bfloat16, **options)
        said = [r.getMessage() for r in caplog.records if "no place" in r.getMessage()]
        assert len(said) == 1 and name in said[0] and "dropped" in said[0]
        model.save_pretrained(tmp_path / "saved")
        assert not any("eh_proj" in key for key in tensors(tmp_path / "saved"))


def test_files_that_are_gone_when_it_is_saved(tmp_path: Path, propagated: Any, caplog: pytest.LogCaptureFixture) -> None:
    glm_with_a_further_layer(tmp_path / "fp8")
    loaded = load(tmp_path / "fp8", EXPERTS, dtype=torch.bfloat16)
    before = causal(loaded)
    (tmp_path / "fp8" / "model.safetensors").rename(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        loaded.save_pretrained(tmp_path / "saved")
    assert any("eh_proj" in record.getMessage() and "not saved" in record.getMessage() for record in caplog.records)
    assert torch.equal(causal(load(tmp_path / "saved", EXPERTS, dtype=torch.bfloat16)), before)


def test_saving_over_the_files_that_were_loaded(tmp_path: Path) -> None:
    written = glm_with_a_further_layer(tmp_path / "fp8")
    load(tmp_path / "fp8", EXPERTS, dtype=torch.bfloat16).save_pretrained(tmp_path / "fp8")
    assert differing(written, tensors(tmp_path / "fp8")) == []


# -- the folder --


def test_one_file_over_several_leaves_no_index(tmp_path: Path) -> None:
    written, _ = write(tiny_llama(), tmp_path / "fp8")
    model = load(tmp_path / "fp8", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    model.save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []
    assert torch.equal(logits(load(tmp_path / "saved")), logits(load(tmp_path / "fp8")))


def test_the_models_own_form_is_saved_where_it_is_that_of_the_files(fp8: Path, tmp_path: Path) -> None:
    model = load(fp8)
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_the_models_own_form_is_refused_where_it_would_be_misread(tmp_path: Path) -> None:
    write(MOE["mixtral"](), tmp_path / "fp8", quantized=is_linear)
    model = load(tmp_path / "fp8")
    with pytest.raises(hf_fp8.errors.UnsupportedError, match="save_original_format"):
        model.save_pretrained(tmp_path / "saved", save_original_format=False)


@pytest.mark.parametrize("name", ["int4", "int8", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("backend", ["auto", "weight_only"])
def test_linears_that_the_host_runs_are_the_files_after_a_forward(name: str, backend: str, tmp_path: Path) -> None:
    """Not computed again from what the host dequantized: the sign of a zero, and scales in FP8, would be lost."""
    model = tiny_llama()
    written = write_beside(
        model, tmp_path / "fp8", name, lambda n: "self_attn" in n and n.endswith("_proj.weight"),
        lambda n: ".mlp." in n and n.endswith("_proj.weight"), ["re:.*mlp.*_proj"], targets=["re:.*self_attn.*_proj"],
    )  # fmt: skip
    loaded = load(tmp_path / "fp8", FP8Config(backend=backend), dtype=torch.bfloat16)
    wanted = logits(loaded)
    loaded.save_pretrained(tmp_path / "saved")
    theirs = {key for key in written if ".mlp." in key}
    assert not (set(written) if backend == "weight_only" else theirs) & set(differing(written, tensors(tmp_path / "saved")))
    assert torch.equal(logits(load(tmp_path / "saved", FP8Config(backend=backend), dtype=torch.bfloat16)), wanted)


@pytest.mark.parametrize("name", ["int4", "int4 asymmetric", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_of_other_formats_are_the_files(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Dense in the model, and in 16 bits, where several codes may be one number."""
    model = qwen3_moe()
    for key, parameter in model.named_parameters():
        if "experts" in key:
            parameter.data.mul_(0.01)
    written = write_beside(
        model, tmp_path / "fp8", name, lambda n: is_linear(n) and ("experts" not in n or "down" in n),
        lambda n: ".experts." in n and "down" not in n, ["re:.*experts.*(gate|up)_proj"],
        targets=["re:.*self_attn.*_proj", "re:.*down_proj"], ignore=["lm_head", "re:.*mlp.gate$"],
    )  # fmt: skip
    loaded = load(tmp_path / "fp8", FP8Config(backend="weight_only"), dtype=dtype)
    loaded.save_pretrained(tmp_path / "saved")
    changed = differing(written, tensors(tmp_path / "saved"))
    assert not [key for key in changed if "experts" in key or "_proj" in key]


def test_saving_over_the_files_that_tensors_are_read_from(tmp_path: Path) -> None:
    """Twice, and then elsewhere: layers that the class lacks are read again each time."""
    extra = {"model.layers.2.mtp.weight": torch.ones(4, 4).bfloat16()}
    written, _ = write(qwen3_moe(), tmp_path / "fp8", quantized=is_linear, edit=lambda state: {**state, **extra})
    for backend in ("weight_only", "scaled_mm"):
        model = load(tmp_path / "fp8", FP8Config(backend=backend), dtype=torch.bfloat16)
        for folder in ("fp8", "fp8", "other"):
            model.save_pretrained(tmp_path / folder)
            assert differing(written, tensors(tmp_path / folder)) == [], folder


def test_layers_that_were_removed(tmp_path: Path) -> None:
    write(qwen3_moe(), tmp_path / "fp8", quantized=is_linear)
    for experts in ("auto", "fp8"):
        model = load(tmp_path / "fp8", FP8Config(backend="weight_only", experts=experts))
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
        model.save_pretrained(tmp_path / experts)
        again = load(tmp_path / experts, FP8Config(backend="weight_only", experts=experts))
        assert torch.equal(logits(again), logits(model))
