"""Where a config says more, less or something else than the files hold: the files decide, or an error says what is wrong."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from support.build import KEEP, STATIC_TENSOR, State, differing, error, load, logits, tensors, tiny_llama, write
from support.moe import MOE, causal, dense_logits, is_linear, make, qwen3_moe
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import hf_fp8
from hf_fp8 import FP8Config
from hf_fp8.checkpoint import config_groups
from hf_fp8.errors import ConfigError, MismatchError, MissingTensorError, ScaleError, UnsupportedError
from hf_fp8.formats import numerics
from hf_fp8.formats.scheme import ROW, TENSOR, Granularity

SCALED = FP8Config(backend="scaled_mm")

# -- groups whose patterns overlap --


def scheme_of(preset: str) -> tuple[QuantizationScheme, str]:
    """A scheme of integers that compressed-tensors runs, and the format in which files hold it."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    assert scheme.weights is not None
    if scheme.weights.group_size is not None:
        scheme.weights.group_size = 32
    return scheme, "int-quantized" if preset == "W8A8" else "pack-quantized"


def write_mixed(
    path: Path, mine: list[str], theirs: list[str], first: str = "mine", preset: str = "W4A16"
) -> tuple[State, State]:
    """A Llama whose attention is FP8 and whose MLPs are integers, compressed by compressed-tensors."""
    scheme, form = scheme_of(preset)
    compressor = BaseCompressor.get_value_from_registry(form)

    def compress(state: State) -> State:
        out = {}
        for name, tensor in state.items():
            if ".mlp." not in name or not name.endswith("_proj.weight"):
                out[name] = tensor
                continue
            groups = tensor.view(tensor.shape[0], -1, scheme.weights.group_size or tensor.shape[1])
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
            parts = compressor.compress({"weight": tensor, "weight_scale": scale, "weight_zero_point": zero}, scheme)
            parts = {role: part for role, part in parts.items() if role != "weight_zero_point"}
            dense[name] = compressor.decompress(dict(parts), scheme)["weight"]
            out |= {name.removesuffix("weight") + role: part for role, part in parts.items()}
        return out

    def groups(config: dict[str, Any]) -> None:
        found = config["quantization_config"]
        fp8 = {**found["config_groups"]["group_0"], "targets": mine, "format": "float-quantized"}
        integers = {**json.loads(scheme.model_dump_json()), "targets": theirs, "format": form}
        found["config_groups"] = {"a": fp8, "b": integers} if first == "mine" else {"a": integers, "b": fp8}
        found["format"] = "mixed-precision"

    dense: State = {}
    model = tiny_llama(hidden_size=128, intermediate_size=128)
    state, real = write(model, path, quantized=lambda n: "self_attn" in n and n.endswith("_proj.weight"), config_edit=groups)
    written = compress(state)
    save_file(written, path / "model.safetensors", metadata={"format": "pt"})
    return written, {**real, **dense}


OVERLAPS = {
    "class": (["re:.*self_attn.*_proj$"], ["Linear"]),
    "class of both": (["Linear"], ["re:.*_proj$"]),
    "names": ([f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qkvo"], ["re:.*_proj$"]),
    "their names": (["re:.*_proj$"], [f"model.layers.{i}.mlp.{x}_proj" for i in (0, 1) for x in ("gate", "up", "down")]),
    "the same pattern": (["re:.*_proj$"], ["re:.*_proj$"]),
    "apart": (["re:.*self_attn.*_proj$"], ["re:.*mlp.*_proj$"]),
    "a pattern on which `re` never ends": (["re:.*self_attn.*_proj$"], ["re:.*mlp.*_proj$", r"re:((\w|\.)*)*[=]"]),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("first", ["mine", "theirs"])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_groups_that_speak_of_each_others_layers(overlap: str, first: str, tmp_path: Path) -> None:
    written, dense = write_mixed(tmp_path / "fp8", *OVERLAPS[overlap], first)
    wanted = dense_logits(tiny_llama(hidden_size=128, intermediate_size=128), dense, tmp_path / "dense")
    for name, config, bound in (("auto", None, 2e-2), ("kept", KEEP, 2e-2), ("scaled_mm", SCALED, 0.3)):
        options = {} if config is None else {"quantization_config": config}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16, **options)
        assert error(logits(model), wanted) <= bound
        if config is not None:
            model.save_pretrained(tmp_path / name)
            assert differing(written, tensors(tmp_path / name)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("preset", ["W4A16", "W8A16", "W8A8"])
def test_layers_that_the_host_runs_are_saved_after_a_forward(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """compressed-tensors dequantizes them in the model's dtype at the first forward: they are rounded back to their codes."""
    written, _ = write_mixed(tmp_path / "fp8", ["re:.*self_attn.*_proj$"], ["re:.*mlp.*_proj$"], preset=preset)
    model = load(tmp_path / "fp8", dtype=dtype)
    logits(model)
    model.save_pretrained(tmp_path / "saved")
    changed = differing(written, tensors(tmp_path / "saved"))
    # float16 is no wider than bfloat16: what is no code is saved in the dtype that was asked for.
    codes = (".weight_packed", "_proj.weight", ".weight_shape")
    assert [name for name in changed if dtype != torch.float16 or name.endswith(codes)] == []


def test_of_two_groups_with_one_target_the_last_is_meant(tmp_path: Path) -> None:
    """As in compressed-tensors, and as the config is written when the model is saved."""

    def groups(config: dict[str, Any]) -> None:
        found = config["quantization_config"]["config_groups"]
        found["group_1"] = {**found["group_0"], "input_activations": None}

    write(tiny_llama(), tmp_path / "fp8", config_edit=groups)
    model = load(tmp_path / "fp8", FP8Config(backend="scaled_mm"))
    assert {layer.scheme.input for layer in model.modules() if isinstance(layer, hf_fp8.QuantizedLinear)} == {None}
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", FP8Config(backend="scaled_mm"))), logits(model))


@pytest.mark.parametrize("first", ["rows", "blocks"])
@pytest.mark.parametrize("targets", [(["Linear"], ["Linear"]), (["re:.*_proj$"], ["Linear"])], ids=["same", "one more precise"])
def test_two_fp8_groups_that_speak_of_the_same_layers(targets: tuple[list[str], list[str]], first: str, tmp_path: Path) -> None:
    """The scales say which of them a layer was quantized by."""

    def groups(config: dict[str, Any]) -> None:
        found = config["quantization_config"]
        rows = {**found["config_groups"]["group_0"], "targets": targets[first == "blocks"]}
        blocks = copy.deepcopy({**rows, "targets": targets[first == "rows"]})
        blocks["weights"] |= {"strategy": "block", "block_structure": [32, 32]}
        both = {"rows": rows, "blocks": blocks}
        found["config_groups"] = both if first == "rows" else dict(reversed(both.items()))

    def by_blocks(state: State) -> State:
        for name in [name for name in state if ".mlp." in name and name.endswith("_proj.weight")]:
            dense = numerics.dequantize(state[name], state[f"{name}_scale"], ROW, torch.float32)
            state[f"{name}_scale"] = numerics.compute_scale(dense, Granularity(32, 32)).bfloat16()
            state[name] = numerics.quantize(dense, state[f"{name}_scale"], Granularity(32, 32))
        return state

    written, _ = write(tiny_llama(), tmp_path / "fp8", edit=by_blocks, config_edit=groups)
    model = load(tmp_path / "fp8", dtype=torch.bfloat16)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, hf_fp8.QuantizedLinear)]
    found = {(".mlp." in name, layer.scheme.weight.granularity) for name, layer in layers}
    assert found == {(True, Granularity(32, 32)), (False, ROW)}
    model.save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []
    load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("preset", "form"), [("W4A16", "int-quantized"), ("W4A16", "float-quantized"), ("W8A8", "pack-quantized")]
)
def test_integers_in_another_form_than_the_group_says(preset: str, form: str, tmp_path: Path) -> None:
    write_mixed(tmp_path / "fp8", ["re:.*self_attn.*_proj$"], ["re:.*mlp.*_proj$"], preset=preset)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["b"]["format"] = form
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=rf"layers\.0\.mlp\..*'b' has the format {form}"):
        load(tmp_path / "fp8")


def test_a_group_that_is_no_group(tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path, config_edit=lambda c: c["quantization_config"].pop("format"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] = "8 bits"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="group_0"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_fp8_codes_of_which_only_an_int4_group_speaks(tmp_path: Path) -> None:
    write_mixed(tmp_path / "fp8", ["re:.*q_proj$"], ["Linear"])
    with pytest.raises(MismatchError, match=r"k_proj.*'b'.*pack-quantized"):
        load(tmp_path / "fp8")


# -- patterns that take in what is dense --


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        (["Linear"], ["lm_head", "re:.*shared_expert_gate"]),
        (["re:.*self_attn.*", "re:.*mlp.*"], ["lm_head", "re:.*shared_expert_gate"]),
        (["re:.*self_attn.*", "re:.*mlp.*"], ["lm_head"]),
        (["re:.*"], ["lm_head"]),
    ],
)
@pytest.mark.parametrize("config", [FP8Config(), KEEP, FP8Config(backend="weight_only", experts="fp8")], ids=str)
def test_routers_embeddings_and_gates(config: FP8Config, targets: list[str], ignore: list[str], tmp_path: Path) -> None:
    model = make(
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            hidden_size=64, intermediate_size=96, moe_intermediate_size=32, shared_expert_intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128, num_experts=4,
            num_experts_per_tok=2, decoder_sparse_step=1, dtype="bfloat16",
        ),
    )  # fmt: skip
    _, dense = write(model, tmp_path / "fp8", targets=targets, ignore=ignore)
    found = causal(load(tmp_path / "fp8", config))
    assert error(found, dense_logits(model, dense, tmp_path / "dense")) <= 1e-5


def test_a_linear_that_ought_to_be_fp8_is_still_an_error(tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path, quantized=lambda name: name.endswith("_proj.weight") and "k_proj" not in name)
    with pytest.raises(MismatchError, match="k_proj"):
        load(tmp_path)


# -- a group about attention --


def attention(config: dict[str, Any], targets: list[str] | None = None) -> None:
    config["quantization_config"]["config_groups"]["attention"] = {
        "targets": targets or ["LlamaAttention"], "weights": None, "input_activations": STATIC_TENSOR,
        "output_activations": None,
    }  # fmt: skip


def with_scales(state: State) -> State:
    made = {f"model.layers.{i}.self_attn.{x}_scale": torch.tensor([0.5 + i]) for i in (0, 1) for x in "qkv"}
    return {**state, **made}


@pytest.mark.parametrize("targets", [["LlamaAttention"], ["re:.*self_attn$"], ["re:.*self_attn"]], ids=str)
def test_attention_quantization_is_carried(
    targets: list[str], tmp_path: Path, propagated: None, caplog: pytest.LogCaptureFixture
) -> None:
    written, dense = write(tiny_llama(), tmp_path / "fp8", edit=with_scales, config_edit=lambda c: attention(c, targets))
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path / "fp8")
    assert error(logits(model), dense_logits(tiny_llama(), dense, tmp_path / "dense")) <= 1e-5
    assert any("not applied" in record.getMessage() for record in caplog.records)
    model.save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []
    before, after = (json.loads((tmp_path / f / "config.json").read_text())["quantization_config"] for f in ("fp8", "saved"))
    assert before["config_groups"] == after["config_groups"]
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
    load(tmp_path / "fp8", FP8Config(backend="int8")).save_pretrained(tmp_path / "int8")
    assert load(tmp_path / "fp8", FP8Config(dequantize=True)).config.__dict__.get("quantization_config") is None


def test_a_group_that_quantizes_the_inputs_of_linears_alone(tmp_path: Path) -> None:
    def only_inputs(config: dict[str, Any]) -> None:
        attention(config, ["re:.*self_attn.*"])

    write(
        tiny_llama(), tmp_path, quantized=lambda n: "mlp" in n and n.endswith("_proj.weight"),
        targets=["re:.*mlp.*"], config_edit=only_inputs,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"'attention'.*_proj"):
        load(tmp_path)


def test_attention_alone_is_the_hosts(tmp_path: Path) -> None:
    def dense_weights(config: dict[str, Any]) -> None:
        attention(config)
        del config["quantization_config"]["config_groups"]["group_0"]

    write(tiny_llama(), tmp_path, quantized=lambda name: False, edit=with_scales, config_edit=dense_weights)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model.hf_quantizer).__module__.startswith("transformers.")


# -- heads of another size --


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("backend", ["weight_only", "scaled_mm", "int8", "auto"])
@pytest.mark.parametrize("size", [136, 96])
def test_resized_embeddings_with_a_head_in_fp8(
    size: int, backend: str, tmp_path: Path, propagated: None, caplog: pytest.LogCaptureFixture
) -> None:
    quantized = lambda name: name.endswith("_proj.weight") or name == "lm_head.weight"  # noqa: E731
    write(tiny_llama(), tmp_path / "fp8", quantized=quantized, ignore=[])
    model = load(tmp_path / "fp8", FP8Config(backend=backend))
    before = logits(model)[..., : min(size, 128)]
    with caplog.at_level(logging.WARNING):
        model.resize_token_embeddings(128)
        assert "lm_head" not in caplog.text
        model.resize_token_embeddings(size, mean_resizing=False)
    assert ("lm_head is made dense" in caplog.text) == (backend != "auto")
    found = logits(model)
    rounded = backend in ("scaled_mm", "int8")  # what goes into the head is not any more
    assert found.shape[-1] == size and error(found[..., : before.shape[-1]], before) <= (5e-2 if rounded else 1e-5)
    model.save_pretrained(tmp_path / "saved")
    options = {"quantization_config": FP8Config(backend=backend)} if backend in ("weight_only", "scaled_mm") else {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, **options)
    assert error(logits(again), found) <= (3e-2 if backend == "int8" else 1e-5)


@pytest.mark.parametrize("pad", [None, 64])
def test_resized_embeddings_that_are_fp8_themselves(pad: int | None, tmp_path: Path) -> None:
    quantized = lambda name: name.endswith(("_proj.weight", "embed_tokens.weight"))  # noqa: E731
    write(tiny_llama(), tmp_path / "fp8", quantized=quantized, targets=["Linear", "Embedding"])
    model = load(tmp_path / "fp8")
    before = logits(model)
    model.resize_token_embeddings(130, pad_to_multiple_of=pad, mean_resizing=False)
    found = logits(model)
    assert error(found[..., :128], before) <= 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), found)


@pytest.mark.parametrize("config", [KEEP, SCALED, FP8Config()], ids=str)
def test_a_new_head_of_another_size(config: FP8Config, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_llama().config).bfloat16().eval()
    quantized = lambda name: name.endswith(("_proj.weight", "score.weight"))  # noqa: E731
    write(model, tmp_path / "fp8", quantized=quantized, ignore=[])
    kind = AutoModelForSequenceClassification
    options: dict[str, Any] = {"quantization_config": config, "num_labels": 5, "dtype": torch.float32, "pad_token_id": 0}
    with pytest.raises(MismatchError, match=r"score\.weight"):
        kind.from_pretrained(tmp_path / "fp8", **options)
    loaded = kind.from_pretrained(tmp_path / "fp8", ignore_mismatched_sizes=True, **options)
    assert loaded.score.weight.shape == (5, 64) and loaded.score.weight.isfinite().all()
    loaded.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved", quantization_config=None if config.backend == "auto" else config)
    assert torch.equal(again.score.weight.float(), loaded.score.weight.float())


# -- static scales of inputs --

STATIC: dict[str, Any] = {"weight": TENSOR, "inputs": STATIC_TENSOR}
NAME = "model.layers.1.self_attn.q_proj.input_scale"


def broken_scale(state: State, name: str, how: str) -> State:
    if how == "missing":
        return {key: tensor for key, tensor in state.items() if key != name}
    return {**state, name: torch.full_like(state[name], float(how))}


@pytest.mark.parametrize("how", ["missing", "nan", "inf", "0", "-1"])
def test_input_scales_that_nothing_uses(how: str, tmp_path: Path, propagated: None, caplog: pytest.LogCaptureFixture) -> None:
    written, dense = write(tiny_llama(), tmp_path / "fp8", edit=lambda s: broken_scale(s, NAME, how), **STATIC)
    wanted = dense_logits(tiny_llama(), dense, tmp_path / "dense")
    for config in (FP8Config(), FP8Config(dequantize=True), KEEP, FP8Config(backend="int8")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model = load(tmp_path / "fp8", config)
        assert NAME in caplog.text and "Nothing that runs here uses them" in caplog.text
        assert error(logits(model), wanted) <= (1e-5 if config.backend != "int8" else 5e-2)
        model.save_pretrained(tmp_path / "saved")
        if config is KEEP:
            assert differing(written, tensors(tmp_path / "saved")) == []
    with pytest.raises(MissingTensorError if how == "missing" else ScaleError, match=NAME):
        load(tmp_path / "fp8", SCALED)


@pytest.mark.parametrize("how", ["missing", "nan", "0"])
def test_an_expert_that_was_never_routed(how: str, tmp_path: Path, propagated: None, caplog: pytest.LogCaptureFixture) -> None:
    """The scales of one expert's inputs were never measured: the others run, and it shows where a token comes to it."""
    lost = [f"model.layers.0.mlp.experts.2.{x}_proj.input_scale" for x in ("gate", "up", "down")]

    def edit(state: State) -> State:
        for name in lost:
            state = broken_scale(state, name, how)
        return state

    written, _ = write(qwen3_moe(), tmp_path / "fp8", edit=edit, ignore=["lm_head", "re:.*mlp.gate$"], **STATIC)
    kept, quantized = (FP8Config(backend=backend, experts="fp8") for backend in ("weight_only", "scaled_mm"))
    assert causal(load(tmp_path / "fp8", kept)).isfinite().all()
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path / "fp8", quantized, dtype=torch.bfloat16)
    assert all(name in caplog.text for name in lost) and "give NaN" in caplog.text
    model.save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []
    gate = model.model.layers[0].mlp.gate
    hidden = torch.randn(64, 64).bfloat16()
    _, _, chosen = gate(hidden)
    rows = model.model.layers[0].mlp(hidden.unsqueeze(0))
    rows = (rows[0] if isinstance(rows, tuple) else rows)[0]
    through = (chosen == 2).any(1)
    assert through.any() and not through.all()
    assert torch.equal(rows.isnan().any(1), through)


def test_experts_of_which_none_has_a_scale(tmp_path: Path) -> None:
    drop = lambda state: {k: v for k, v in state.items() if not (".experts." in k and k.endswith("input_scale"))}  # noqa: E731
    written, _ = write(qwen3_moe(), tmp_path / "fp8", edit=drop, ignore=["lm_head", "re:.*mlp.gate$"], **STATIC)
    with pytest.raises(MissingTensorError, match=r"experts\.0\..*input_scale"):
        load(tmp_path / "fp8", FP8Config(backend="scaled_mm", experts="fp8"))
    model = load(tmp_path / "fp8", FP8Config(backend="weight_only", experts="fp8"), dtype=torch.bfloat16)
    assert causal(model).isfinite().all()
    model.save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []


@pytest.mark.parametrize("lost", [".experts.1.", ".experts."], ids=["of one expert", "of all"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_calibrated_scales_of_experts_are_saved(family: str, lost: str, tmp_path: Path) -> None:
    """Those that the files lacked: under the names that they have beside the others."""
    drop = lambda state: {k: v for k, v in state.items() if not (lost in k and k.endswith("input_scale"))}  # noqa: E731
    write(
        MOE[family](), tmp_path / "fp8", quantized=is_linear, edit=drop, ignore=["lm_head", "re:.*(mlp.gate|router)$"], **STATIC
    )
    keep = FP8Config(backend="scaled_mm", experts="fp8")
    model = load(tmp_path / "fp8", keep if "1" in lost else FP8Config(backend="weight_only", experts="fp8"))
    with hf_fp8.calibrate(model):
        causal(model)
    model.save_pretrained(tmp_path / "saved")
    found = tensors(tmp_path / "saved")
    assert {name for name in found if lost in name and name.endswith("input_scale")}
    again = load(tmp_path / "saved", keep)
    held, read = (
        {name: p for name, p in each.named_parameters() if "experts" in name and name.endswith("input_scale")}
        for each in (model, again)
    )
    assert held.keys() == read.keys() and all(torch.equal(p.nan_to_num(), read[name].nan_to_num()) for name, p in held.items())
    assert causal(again).isfinite().all()


# -- FP8 that the config says nothing of --

UNDECLARED: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "no config": ({}, None),
    "unknown": ({}, {"quant_method": "nobody-knows"}),
    "compressed-tensors, int8": (
        {},
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}},
            },
        },
    ),
}


@pytest.mark.parametrize("case", UNDECLARED)
@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
def test_fp8_that_the_config_does_not_describe(case: str, form: str, tmp_path: Path) -> None:
    options, said = UNDECLARED[case]
    state, _ = write(tiny_llama(), tmp_path, **options)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config if said is None else {**config, "quantization_config": said}))
    if form != "safetensors":
        (tmp_path / "model.safetensors").unlink()
    if form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif form == "sharded":
        names = sorted(state)
        halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({name: state[name] for name in part}, tmp_path / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MismatchError, match=r"14 weights.*_proj\.weight.*weight_scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_the_host_reads_by_itself_is_left_to_it(tmp_path: Path) -> None:
    """DeepSeek-style files: the host has a place for their scales. And FP8 without scales is values."""
    rename = lambda state: {k.replace("weight_scale", "weight_scale_inv"): v for k, v in state.items()}  # noqa: E731
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    _, dense = write(
        tiny_llama(), tmp_path / "fp8", weight=Granularity(32, 32), scale_dtype=torch.float32, edit=rename,
        config_edit=lambda c: c.update(quantization_config=said),
    )  # fmt: skip
    # In bfloat16: transformers 5.23 leaves the rest of such a model in it, whatever is asked for.
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16))
    assert error(found, dense_logits(tiny_llama(), dense, tmp_path / "dense")) <= 2e-2
    state = load_file(tmp_path / "dense" / "model.safetensors")
    plain = {n: t.to(torch.float8_e4m3fn) if n.endswith("_proj.weight") else t for n, t in state.items()}
    save_file(plain, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)).isfinite().all()


# -- patterns --


@pytest.mark.parametrize("where", ["targets", "ignore"])
def test_a_pattern_that_takes_for_ever(where: str, tmp_path: Path) -> None:
    pattern = r"re:(.|..|...)*[^a-z_.\d]$"

    def edit(config: dict[str, Any]) -> None:
        found = config["quantization_config"]
        (found["config_groups"]["group_0"]["targets"] if where == "targets" else found["ignore"]).append(pattern)

    write(tiny_llama(), tmp_path, config_edit=edit)
    with pytest.raises(ConfigError, match="takes more than"):
        load(tmp_path)


def test_a_busy_machine_does_not_make_a_pattern_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    class Stalled:
        """The clock runs on while other programs run, and no time of this one passes."""

        def match(self, name: str, timeout: float) -> object:
            asked.append(timeout)
            if timeout < 1:
                raise TimeoutError
            return object()

    monkeypatch.setattr(config_groups, "_compiled", lambda pattern: Stalled())
    assert config_groups.fits(".*router", "embed_tokens") and len(asked) == 3


def test_scales_of_groups_with_a_dimension_of_one(tmp_path: Path) -> None:
    written, dense = write(
        tiny_llama(), tmp_path / "fp8", weight=Granularity(1, 32), inputs=None, scale_shape=lambda s: s.unsqueeze(-1)
    )
    model = load(tmp_path / "fp8")
    assert error(logits(model), dense_logits(tiny_llama(), dense, tmp_path / "dense")) <= 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert differing(written, tensors(tmp_path / "saved")) == []
    assert hf_fp8.explain(model) and ROW != TENSOR


def test_a_layer_that_the_class_lacks_is_no_undeclared_fp8(tmp_path: Path) -> None:
    """The host's own FP8, as DeepSeek's files have it, with a layer more than the model: it drops that one, scales and all."""
    rename = lambda state: {k.replace("weight_scale", "weight_scale_inv"): v for k, v in state.items()}  # noqa: E731
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    write(
        tiny_llama(num_hidden_layers=3), tmp_path, weight=Granularity(32, 32), scale_dtype=torch.float32, edit=rename,
        config_edit=lambda c: c.update(quantization_config=said, num_hidden_layers=2),
    )  # fmt: skip
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)).isfinite().all()
