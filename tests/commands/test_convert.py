"""`hf-fp8 convert`: other names for the same codes, both ways; and weights that are quantized anew."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.build import (
    STATIC_TENSOR,
    differing,
    error,
    group_input,
    is_linear,
    load,
    sqnr,
    stock_transformers,
    tensors,
    tiny_llama,
    write,
)
from support.commands import run
from support.dialects import VARIANTS, llava, per_tensor, write_in
from support.moe import MOE, causal, dense_logits, llama4, write_transposed
from support.moe import is_linear as is_linear_of_moe
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_fp8 import FP8Config, QuantizedLinear
from hf_fp8.formats.scheme import TENSOR, Granularity

Capture = pytest.CaptureFixture[str]
UNEVEN = {"hidden_size": 192, "intermediate_size": 320}
TO_FP8 = (
    "modelopt, mxfp8",
    "autofp8",
    "autofp8, old names",
    "modelopt",
    "modelopt, in its own file",
    "blocks of which nothing is said",
)


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "E5M2"])
def test_to_compressed_tensors(name: str, tmp_path: Path, capsys: Capture) -> None:
    model, path, new = tiny_llama(**UNEVEN), tmp_path / "fp8", tmp_path / "new"
    written, dense = write_in(name, model, path, is_linear)
    run("convert", path, new, "--to", "compressed-tensors")
    assert "14 weights converted" in capsys.readouterr().out
    config = config_of(new)
    assert config["quant_method"] == "compressed-tensors" and config["ignore"] == ["lm_head"]
    assert not (new / "hf_quant_config.json").exists()
    found = tensors(new)
    kinds = {key.rpartition(".")[2] for key in found}
    assert kinds <= {"weight", "weight_scale", "input_scale", "k_scale", "v_scale"}
    assert differing(
        {key: tensor for key, tensor in written.items() if key.endswith(".weight")},
        {key: tensor for key, tensor in found.items() if key.endswith(".weight")},
    ) == []  # fmt: skip
    kept = AutoModelForCausalLM.from_pretrained(new, quantization_config=FP8Config(backend="weight_only"), dtype=torch.float32)
    assert isinstance(kept.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert error(causal(kept), dense_logits(model, dense, tmp_path / "dense")) <= 1e-5
    run("verify", new)
    has_cache = bool(VARIANTS[name].cache)
    assert bool(config["kv_cache_scheme"]) == has_cache
    assert ("model.layers.0.self_attn.k_scale" in found) == ("model.layers.0.self_attn.v_scale" in found) == has_cache


@pytest.mark.parametrize("name", TO_FP8)
def test_to_fp8(name: str, tmp_path: Path) -> None:
    """transformers itself reads the result."""
    model, path, new = tiny_llama(hidden_size=128, intermediate_size=256), tmp_path / "fp8", tmp_path / "new"
    _, dense = write_in(name, model, path, is_linear)
    run("convert", path, new, "--to", "fp8")
    assert config_of(new)["modules_to_not_convert"] == ["lm_head"]
    wanted = dense_logits(model, dense, tmp_path / "dense")
    assert error(causal(load(new)), wanted) <= 1e-5
    with stock_transformers():
        # In bfloat16: transformers 5.23 leaves the rest of such a model in it, whatever is asked for.
        stock = AutoModelForCausalLM.from_pretrained(
            new, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
        )
        assert error(causal(stock).float(), wanted) <= 2e-2


@pytest.mark.parametrize("scheme", ["static", "token", "block"])
def test_there_and_back(scheme: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "static": {"weight": TENSOR, "inputs": STATIC_TENSOR},
        "token": {"weight": TENSOR},
        "block": {"weight": Granularity(128, 128), "inputs": group_input(), "scale_dtype": torch.float32},
    }[scheme]
    written, _ = write(tiny_llama(**UNEVEN), tmp_path / "ct", **options)
    run("convert", tmp_path / "ct", tmp_path / "fp8", "--to", "fp8")
    names = {"weight_scale_inv", *(["activation_scale"] if scheme == "static" else [])}
    assert {key.rpartition(".")[2] for key in tensors(tmp_path / "fp8")} == {"weight", *names}
    run("convert", tmp_path / "fp8", tmp_path / "back", "--to", "compressed-tensors")
    assert differing(written, tensors(tmp_path / "back")) == []
    before, after = config_of(tmp_path / "ct"), config_of(tmp_path / "back")
    assert FP8Config(checkpoint=before).groups[0].scheme == FP8Config(checkpoint=after).groups[0].scheme
    assert before["ignore"] == after["ignore"]


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("name", ["deepseek", "modelopt"])
def test_experts(name: str, family: str, tmp_path: Path) -> None:
    model, path = MOE[family](), tmp_path / "fp8"
    _, dense = write_in(name, model, path, is_linear_of_moe)
    wanted = dense_logits(model, dense, tmp_path / "dense")
    for number, to in enumerate(("compressed-tensors", "fp8", "compressed-tensors")):
        new = tmp_path / str(number)
        if to == "fp8" and name == "deepseek":
            path = tmp_path / "0"
        run("convert", path, new, "--to", to)
        assert error(causal(load(new, FP8Config(backend="weight_only", experts="fp8"))), wanted) <= 1e-5
        path = new if to == "fp8" else path
    assert any(name.endswith("gate") for name in config_of(tmp_path / "0")["ignore"])  # the routers


def skipped_by_transformers(path: Path, model: Any) -> set[str]:
    """The Linears and experts that transformers leaves dense when it reads the converted `fp8` config."""
    listed = config_of(path)["modules_to_not_convert"]
    kinds = (torch.nn.Linear,)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds) or name.endswith(".experts")]
    return {name for name in names if not should_convert_module(name, listed)}


@pytest.mark.parametrize("name", ["autofp8", "fbgemm"])
def test_stock_quantizes_nothing_that_is_dense(name: str, tmp_path: Path) -> None:
    """The new config has the names of the files and of the model, whose vision tower and head are dense."""
    model, path = llava(), tmp_path / "source"
    _, dense = write_in(name, model, path, lambda key: is_linear(key) and "language" in key, dense=())
    wanted = dense_logits(model, dense, tmp_path / "dense")
    run("convert", path, tmp_path / "new", "--to", "compressed-tensors")
    with stock_transformers():
        stock = causal(type(model).from_pretrained(tmp_path / "new", dtype=torch.float32))
    assert error(stock, wanted) <= 0.3  # its inputs are quantized; random scales gave 1 to 1e18
    if name == "autofp8":
        run("convert", path, tmp_path / "fp8", "--to", "fp8")
        linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        text = {name for name in linears if "language_model.layers" in name}
        assert skipped_by_transformers(tmp_path / "fp8", model) == linears - text


def test_a_tied_head_is_named(tmp_path: Path) -> None:
    """It is not in the files: other readers would take it for quantized, and make up a scale."""
    model, path = tiny_llama(tie_word_embeddings=True), tmp_path / "source"
    _, dense = write_in("autofp8", model, path, is_linear)
    run("convert", path, tmp_path / "new", "--to", "compressed-tensors")
    assert config_of(tmp_path / "new")["ignore"] == ["lm_head"]
    with stock_transformers():
        stock = causal(AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32))
    assert error(stock, dense_logits(model, dense, tmp_path / "dense")) <= 0.3  # its inputs are quantized


def test_dense_experts_are_named(tmp_path: Path) -> None:
    """The experts of one layer are dense: each by its name in the files, and the module that holds them."""
    model, path = MOE["qwen3_moe"](), tmp_path / "source"
    write_in(
        "autofp8", model, path, lambda key: is_linear_of_moe(key) and not ("layers.1." in key and "experts" in key), dense=()
    )
    run("convert", path, tmp_path / "ct", "--to", "compressed-tensors")
    ignore = config_of(tmp_path / "ct")["ignore"]
    assert {f"model.layers.1.mlp.experts.{i}.{p}_proj" for i in range(4) for p in ("gate", "up", "down")} <= set(ignore)
    run("convert", path, tmp_path / "fp8", "--to", "fp8")
    assert skipped_by_transformers(tmp_path / "fp8", model) >= {"model.layers.1.mlp.experts", "lm_head"}
    assert "model.layers.0.mlp.experts" not in skipped_by_transformers(tmp_path / "fp8", model)


def test_static_stacks_of_experts(tmp_path: Path) -> None:
    """As NVIDIA publishes Llama-4: one scale for a whole stack, and one for its inputs."""

    def stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {}
        for key, tensor in state.items():
            out[key] = tensor
            if tensor.ndim == 3:
                codes, scale, _ = per_tensor(tensor.flatten(1))
                out |= {
                    key: codes.reshape(tensor.shape),
                    f"{key}_weight_scale": scale,
                    f"{key}_input_scale": torch.tensor(0.01),
                }
        return out

    write_in(
        "modelopt, in its own file",
        llama4(),
        tmp_path / "fp8",
        lambda key: is_linear(key) and "experts" not in key,
        edit=stacked,
    )
    wanted = causal(load(tmp_path / "fp8", FP8Config(backend="weight_only", experts="fp8")))
    for to in ("fp8", "compressed-tensors"):
        new = tmp_path / f"new {to}"
        run("convert", tmp_path / "fp8", new, "--to", to)
        run("verify", new)
        assert error(causal(load(new, FP8Config(backend="weight_only", experts="fp8"))), wanted) <= 1e-5


@pytest.mark.parametrize("to", ["fp8", "compressed-tensors"])
def test_quantized_anew_to_mxfp8(to: str, tmp_path: Path) -> None:
    _, dense = write_in("deepseek", tiny_llama(), tmp_path / "fp8", is_linear)
    run("convert", tmp_path / "fp8", tmp_path / "new", "--to", to, "--scheme", "MXFP8")
    run("verify", tmp_path / "new")
    found = dict(load(tmp_path / "new", FP8Config(dequantize=True)).named_parameters())
    assert min(sqnr(found[key], value) for key, value in dense.items() if is_linear(key)) >= 25


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "W4A16"])
def test_quantized_anew(scheme: str, tmp_path: Path, capsys: Capture) -> None:
    """From the dequantized values, with the loss that is reported."""
    path = tmp_path / "fp8"
    _, dense = write_in("modelopt", tiny_llama(**UNEVEN), path, is_linear)
    run("convert", path, tmp_path / "new", "--to", "compressed-tensors", "--scheme", scheme)
    said = capsys.readouterr().out
    total, name, worst = re.search(r"SQNR ([\d.]+) dB; the worst is (\S+) with ([\d.]+) dB", said).groups()
    model = load(tmp_path / "new", FP8Config(dequantize=True))
    found = dict(model.named_parameters())
    weights = {key: value for key, value in dense.items() if is_linear(key)}
    whole = [torch.cat([part[key].detach().double().flatten() for key in weights]) for part in (found, weights)]
    assert abs(sqnr(*whole) - float(total)) <= 0.06
    each = {key: sqnr(found[key], weights[key]) for key in weights}
    assert min(each, key=each.get) == f"{name}.weight" and abs(min(each.values()) - float(worst)) <= 0.06
    assert "input_scale" not in {key.rpartition(".")[2] for key in tensors(tmp_path / "new")}


def test_quantized_anew_to_fp8(tmp_path: Path) -> None:
    write(tiny_llama(hidden_size=128, intermediate_size=256), tmp_path / "channel")
    run("convert", tmp_path / "channel", tmp_path / "new", "--to", "fp8", "--scheme", "FP8_BLOCK")
    assert config_of(tmp_path / "new")["weight_block_size"] == [128, 128]
    with stock_transformers():
        stock = AutoModelForCausalLM.from_pretrained(
            tmp_path / "new", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
        )
    assert error(causal(stock).float(), causal(load(tmp_path / "new"))) <= 2e-2


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "FP8_TENSOR"])
def test_stacks_of_experts_quantized_anew(scheme: str, tmp_path: Path) -> None:
    model, _, dense = write_transposed("llama4", "stacked", tmp_path / "fp8")
    run("convert", tmp_path / "fp8", tmp_path / "new", "--to", "compressed-tensors", "--scheme", scheme)
    wanted = dense_logits(model, dense, tmp_path / "dense")
    found = causal(load(tmp_path / "new", FP8Config(backend="weight_only", experts="fp8")))
    assert sqnr(found, wanted) >= 20  # two roundings to three bits of mantissa


def test_a_static_scheme_keeps_the_scales_of_inputs(tmp_path: Path, capsys: Capture) -> None:
    written, _ = write_in("modelopt", tiny_llama(), tmp_path / "fp8", is_linear)
    run("convert", tmp_path / "fp8", tmp_path / "new", "--to", "compressed-tensors", "--scheme", "FP8")
    found = tensors(tmp_path / "new")
    inputs = [key for key in written if key.endswith("input_scale")]
    assert inputs and all(torch.equal(found[key], written[key].reshape(1)) for key in inputs)
    write_in("deepseek", tiny_llama(), tmp_path / "blocks", is_linear)
    assert "static input scales" in refused(capsys, tmp_path / "blocks", tmp_path / "no", "--to", "fp8", "--scheme", "FP8")


def test_shards_stay_and_memory_is_that_of_a_tensor(tmp_path: Path) -> None:
    write_in("deepseek", tiny_llama(), tmp_path / "fp8", is_linear)
    model = load(tmp_path / "fp8", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    run("convert", tmp_path / "sharded", tmp_path / "new", "--to", "compressed-tensors")
    files = [sorted(file.name for file in path.glob("*.safetensors")) for path in (tmp_path / "sharded", tmp_path / "new")]
    assert files[0] == files[1] and len(files[0]) > 2
    assert torch.equal(causal(load(tmp_path / "new")), causal(load(tmp_path / "fp8")))


def refused(capsys: Capture, *arguments: object) -> str:
    capsys.readouterr()
    run("convert", *arguments, code=1)
    said = capsys.readouterr().err
    assert "error: " in said and "Traceback" not in said
    return said


def test_refused(tmp_path: Path, capsys: Capture) -> None:
    new = tmp_path / "new"
    write(tiny_llama(), tmp_path / "channel")
    write_in("autofp8, dynamic", tiny_llama(), tmp_path / "tensor", is_linear)
    write_in("deepseek", tiny_llama(), tmp_path / "blocks", is_linear)
    tiny_llama().save_pretrained(tmp_path / "dense")
    assert "in the compressed-tensors format already" in refused(
        capsys, tmp_path / "channel", new, "--to", "compressed-tensors"
    )
    assert "in the fine-grained fp8 format already" in refused(capsys, tmp_path / "blocks", new, "--to", "fp8")
    assert "cannot have channel x token (dynamic)" in refused(capsys, tmp_path / "channel", new, "--to", "fp8")
    assert "cannot have tensor x tensor (dynamic)" in refused(capsys, tmp_path / "tensor", new, "--to", "fp8")
    write_in("E5M2", tiny_llama(), tmp_path / "e5m2", is_linear)
    assert "in the fine-grained fp8 format already" in refused(capsys, tmp_path / "e5m2", new, "--to", "fp8")
    assert "cannot describe E5M2 weights" in refused(capsys, tmp_path / "e5m2", new, "--to", "compressed-tensors")
    run("convert", tmp_path / "e5m2", tmp_path / "e4m3", "--to", "fp8", "--scheme", "FP8_BLOCK")
    assert "is not quantized" in refused(capsys, tmp_path / "dense", new, "--to", "fp8")
    assert "scheme='FP9' is not known" in refused(capsys, tmp_path / "blocks", new, "--to", "fp8", "--scheme", "FP9")
    run("convert", tmp_path / "blocks", new, "--to", "gguf", code=2)
    state = load_file(tmp_path / "blocks" / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(state, tmp_path / "blocks" / "model.safetensors", metadata={"format": "pt"})
    said = refused(capsys, tmp_path / "blocks", new, "--to", "compressed-tensors")
    assert "model.layers.0.mlp.up_proj.weight_scale is not in the files" in said
    assert not new.exists()


def test_two_scales_of_one_cache(tmp_path: Path, capsys: Capture) -> None:
    also = {"model.layers.0.self_attn.k_scale": torch.tensor(0.5)}
    write_in("autofp8", tiny_llama(), tmp_path / "fp8", is_linear, edit=lambda state: state | also)
    said = refused(capsys, tmp_path / "fp8", tmp_path / "new", "--to", "compressed-tensors")
    assert "self_attn.k_scale and model.layers.0.self_attn.kv_scale" in said and "would both be" in said


def test_two_schemes_in_one_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    """compressed-tensors has groups; `fp8` has one scheme for all layers."""
    layers = {f"model.layers.{i}.mlp.{name}": {"quant_algo": algorithm} for i, algorithm in ((0, "FP8"), (1, "FP8_PB_WO"))
              for name in ("gate_proj", "up_proj", "down_proj")}  # fmt: skip
    about = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    parts = [write_in(name, tiny_llama(), tmp_path / name, lambda key, i=i: f"layers.{i}.mlp" in key)[0]
             for i, name in enumerate(("modelopt", "modelopt, blocks"))]  # fmt: skip
    state = {key: tensor for key, tensor in parts[0].items() if "layers.1.mlp" not in key}
    state |= {key: tensor for key, tensor in parts[1].items() if "layers.1.mlp" in key}
    path = tmp_path / "mixed"
    write_in("modelopt", tiny_llama(), path, is_linear, edit=lambda _: state, config_edit=lambda config: config.update(about))
    wanted = causal(load(path))
    run("convert", path, tmp_path / "new", "--to", "compressed-tensors")
    assert len(config_of(tmp_path / "new")["config_groups"]) == 2
    assert torch.equal(causal(load(tmp_path / "new")), wanted)
    assert "one scheme for all layers, and this one has 2" in refused(capsys, path, tmp_path / "no", "--to", "fp8")


@pytest.mark.parametrize("byte", [0x7C, 0xFC, 0x7D])
def test_verify_finds_codes_in_e5m2_that_are_not_finite(byte: int, tmp_path: Path, capsys: Capture) -> None:
    """It has infinity, which E4M3 lacks."""

    def damaged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[3, 5] = byte
        return state

    write_in("E5M2", tiny_llama(), tmp_path, is_linear, edit=damaged)
    run("verify", tmp_path, code=1)
    assert "model.layers.1.mlp.up_proj.weight has codes that are NaN or infinite" in capsys.readouterr().err


def test_inspect_and_verify_know_the_dialects(tmp_path: Path, capsys: Capture) -> None:
    for name, called in (("deepseek", "fine-grained fp8"), ("autofp8", "AutoFP8"), ("fbgemm", "FBGEMM"),
                         ("modelopt, in its own file", "ModelOpt")):  # fmt: skip
        write_in(name, tiny_llama(), tmp_path / name, is_linear)
        run("verify", tmp_path / name)
        run("inspect", tmp_path / name)
        said = capsys.readouterr().out
        assert f"FP8 in the {called} format" in said and "nothing wrong found" in said
        assert ("FP8Config()" in said) == (not VARIANTS[name].by_default)
        assert "dense: lm_head\n" in said
        run("dequantize", tmp_path / name, tmp_path / f"{name} dense")
        assert "quantization_config" not in json.loads((tmp_path / f"{name} dense" / "config.json").read_text())
