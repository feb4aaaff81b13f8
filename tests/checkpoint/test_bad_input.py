"""Whatever is wrong with a checkpoint is an error of ours that names the tensor or the config key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import build
from support.build import DYNAMIC_TENSOR, STATIC_TENSOR, TOKEN, State, group_input, tiny_llama, write
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_fp8
from hf_fp8 import FP8Config
from hf_fp8.errors import (
    CheckpointError,
    ConfigError,
    CorruptFileError,
    MismatchError,
    MissingTensorError,
    ScaleError,
    UnsupportedError,
    UnusedTensorError,
)
from hf_fp8.formats.scheme import TENSOR, Granularity

Q = "model.layers.1.self_attn.q_proj"
Edit = Callable[[State], State]


def drop(*names: str) -> Edit:
    return lambda state: {k: v for k, v in state.items() if k not in names}


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda state: {**state, name: change(state[name])}


def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


def dequantized(state: State) -> State:
    return {**state, f"{Q}.weight": (state[f"{Q}.weight"].float() * state[f"{Q}.weight_scale"].float()).bfloat16()}


SCALE = f"{Q}.weight_scale"
TENSORS: dict[str, tuple[Edit, type[CheckpointError], str, dict[str, Any]]] = {
    "missing weight_scale": (drop(SCALE), MissingTensorError, SCALE, {}),
    "missing input_scale": (
        drop(f"{Q}.input_scale"), MissingTensorError, f"{Q}.input_scale", {"weight": TENSOR, "inputs": STATIC_TENSOR},
    ),
    "missing weight": (drop(f"{Q}.weight"), UnusedTensorError, SCALE, {}),
    "missing weight and scale": (drop(f"{Q}.weight", SCALE), MissingTensorError, f"{Q}.weight", {}),
    "scale too long": (put(SCALE, lambda s: torch.cat([s, s])), ScaleError, SCALE, {}),
    "scale transposed": (put(SCALE, lambda s: s.t().contiguous()), ScaleError, SCALE, {}),
    "scale of another strategy": (put(SCALE, lambda s: s[:1, 0].clone()), ScaleError, SCALE, {}),
    "block scale of the wrong grid": (
        put(SCALE, lambda s: s[:-1].clone()), ScaleError, SCALE, {"weight": Granularity(16, 48), "inputs": group_input()},
    ),
    "scale in int32": (put(SCALE, lambda s: torch.ones_like(s, dtype=torch.int32)), ScaleError, SCALE, {}),
    "scale NaN": (put(SCALE, poke(float("nan"))), ScaleError, SCALE, {}),
    "scale inf": (put(SCALE, poke(float("inf"))), ScaleError, SCALE, {}),
    "scale zero": (put(SCALE, poke(0.0)), ScaleError, SCALE, {}),
    "scale negative": (put(SCALE, poke(-0.01)), ScaleError, SCALE, {}),
    "input scale zero": (
        put(f"{Q}.input_scale", poke(0.0)), ScaleError, f"{Q}.input_scale", {"weight": TENSOR, "inputs": STATIC_TENSOR},
    ),
    "input scale per channel": (
        put(f"{Q}.input_scale", lambda s: s.repeat(3)), ScaleError, f"{Q}.input_scale",
        {"weight": TENSOR, "inputs": STATIC_TENSOR},
    ),
    "FP8 where the config says dense": (lambda s: s, MismatchError, f"{Q}.weight", {"ignore": ["lm_head", Q]}),
    "dense where the config says FP8": (
        lambda s: {**drop(SCALE)(s), f"{Q}.weight": torch.randn(64, 64).bfloat16()}, MismatchError, f"{Q}.weight", {},
    ),
    "dequantized, scale left in": (dequantized, MismatchError, SCALE, {}),
    "stored as int8": (put(f"{Q}.weight", lambda w: w.view(torch.int8)), MismatchError, "I8", {}),
    "stored as uint8": (put(f"{Q}.weight", lambda w: w.view(torch.uint8)), MismatchError, "U8", {}),
    "stored as E5M2": (put(f"{Q}.weight", lambda w: w.float().to(torch.float8_e5m2)), MismatchError, "F8_E5M2", {}),
    "stored as E4M3FNUZ": (
        put(f"{Q}.weight", lambda w: w.float().clamp(-240, 240).to(torch.float8_e4m3fnuz)), MismatchError, "F8_E4M3FNUZ", {},
    ),
    "a scale beside a norm": (
        lambda s: {**s, "model.norm.weight_scale": torch.ones(1)}, MismatchError, "model.norm.weight_scale", {},
    ),
    "a scale beside nothing": (
        lambda s: {**s, "model.layers.0.mlp.ghost.weight_scale": torch.ones(1)}, UnusedTensorError, "ghost.weight_scale", {},
    ),
    "an input scale for dynamic inputs": (
        lambda s: {**s, f"{Q}.input_scale": torch.ones(1)}, UnusedTensorError, f"{Q}.input_scale", {},
    ),
    "two spellings of one scale": (
        lambda s: {**s, f"{SCALE}_inv": s[SCALE].clone()}, UnusedTensorError, f"{SCALE}_inv", {},
    ),
    "zero points": (
        lambda s: {**s, f"{Q}.weight_zero_point": torch.ones(64, 1)}, UnsupportedError, f"{Q}.weight_zero_point", {},
    ),
    "weight of another shape": (
        lambda s: {**s, f"{Q}.weight": s[f"{Q}.weight"][:, :32].contiguous()}, MismatchError, f"{Q}.weight", {},
    ),
}  # fmt: skip


# Elsewhere nothing uses them: tests/checkpoint/test_file_decides.py.
USED_BY_SCALED_MM = ("missing input_scale", "input scale zero")
BACKENDS = ("auto", "scaled_mm", "weight_only")


@pytest.mark.parametrize(
    ("backend", "name"),
    [(backend, name) for backend in BACKENDS for name in TENSORS if backend == "scaled_mm" or name not in USED_BY_SCALED_MM],
)
def test_tensors(name: str, backend: str, tmp_path: Path) -> None:
    edit, kind, words, options = TENSORS[name]
    write(tiny_llama(), tmp_path, edit=edit, **options)
    with pytest.raises(kind) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FP8Config(backend=backend))
    assert isinstance(caught.value, hf_fp8.FP8Error)
    assert words in str(caught.value)


def group(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["config_groups"]["group_0"]


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "unknown strategy": (lambda c: group(c)["weights"].update(strategy="diagonal"), ConfigError, "weights.strategy"),
    "unknown input strategy": (lambda c: group(c)["input_activations"].update(strategy="x"), ConfigError, "input_activations"),
    "unknown format": (lambda c: c["quantization_config"].update(format="zip"), ConfigError, "'zip'"),
    "unknown group format": (lambda c: group(c).update(format="zip"), ConfigError, "group_0.format"),
    "format of other weights": (lambda c: group(c).update(format="pack-quantized"), ConfigError, "pack-quantized"),
    "unknown status": (
        lambda c: c["quantization_config"].update(quantization_status="melted"), ConfigError, "quantization_status",
    ),
    "group without weights": (lambda c: group(c).update(weights=None), ConfigError, "'group_0'"),
    "second group without weights": (
        lambda c: c["quantization_config"]["config_groups"].update(g={"targets": ["re:.*x"], "input_activations": TOKEN}),
        ConfigError, "'g'",
    ),
    "no groups": (lambda c: c["quantization_config"].update(config_groups={}), ConfigError, "config_groups"),
    "no targets": (lambda c: group(c).update(targets=[]), ConfigError, "targets"),
    "targets that match nothing": (lambda c: group(c).update(targets=["re:.*nowhere.*"]), ConfigError, "nowhere"),
    "a target that is no regex": (lambda c: group(c).update(targets=["re:(("]), ConfigError, "re:(("),
    "an ignore that is no regex": (lambda c: c["quantization_config"].update(ignore=["re:["]), ConfigError, "re:["),
    "weights that are no dict": (lambda c: group(c).update(weights="fp8"), ConfigError, "'group_0'"),
    "sparsity that is no dict": (lambda c: c["quantization_config"].update(sparsity_config="x"), UnsupportedError, "sparsity"),
    "block without structure": (lambda c: group(c)["weights"].update(strategy="block"), ConfigError, "weights"),
    "asymmetric": (lambda c: group(c)["weights"].update(symmetric=False), UnsupportedError, "weights.symmetric"),
    "asymmetric inputs": (
        lambda c: group(c)["input_activations"].update(symmetric=False), UnsupportedError, "input_activations.symmetric",
    ),
    "dynamic weights": (lambda c: group(c)["weights"].update(dynamic=True, strategy="token"), UnsupportedError, "weights"),
    "output activations": (
        lambda c: group(c).update(output_activations=DYNAMIC_TENSOR), UnsupportedError, "output_activations",
    ),
    "int8 inputs": (lambda c: group(c)["input_activations"].update(type="int"), UnsupportedError, "8-bit int"),
    "static group inputs": (
        lambda c: group(c).update(input_activations={**group_input(), "dynamic": False}), UnsupportedError, "group (static)",
    ),
    "transforms": (
        lambda c: c["quantization_config"].update(transform_config={"config_groups": {"R1": {}}}), UnsupportedError,
        "transform_config",
    ),
    "sparsity": (
        lambda c: c["quantization_config"].update(sparsity_config={"format": "sparse-24-bitmask"}), UnsupportedError,
        "sparse-24-bitmask",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, tmp_path: Path) -> None:
    edit, kind, words = CONFIGS[name]
    write(tiny_llama(), tmp_path, config_edit=edit)
    with pytest.raises(kind) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(caught.value, hf_fp8.FP8Error)
    assert words in str(caught.value)


@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_truncated_file(tmp_path: Path, keep: float) -> None:
    write(tiny_llama(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_that_have_no_place_while_parameters_find_none(tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path, edit=lambda s: {k.replace("self_attn.", "attention."): v for k, v in s.items()})
    with pytest.raises(MissingTensorError, match="do not fit together"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("prefix", ["language_model.", "transformer.", "base_model.model."])
def test_names_under_a_prefix_that_the_model_lacks(prefix: str, tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path, edit=lambda s: {prefix + k: v for k, v in s.items()}, ignore=["re:.*lm_head"])
    with pytest.raises(MissingTensorError, match="do not fit together"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_projection_missing_from_every_layer(tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path, edit=lambda s: {k: v for k, v in s.items() if "q_proj" not in k})
    with pytest.raises(MissingTensorError, match="q_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("holds", [["a list"], {"step": 3}])
def test_pickles_of_something_else(holds: Any, tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(holds, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_pickles_execute_nothing(tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"model.norm.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(hf_fp8.FP8Error):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="weights_only"):
        AutoModelForCausalLM.from_pretrained(tmp_path, weights_only=False)
    assert not (tmp_path / "exploded").exists()


def test_a_layout_of_an_earlier_load_is_not_a_request(tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path)
    config = LlamaForCausalLM.config_class.from_pretrained(tmp_path)
    config.distributed_config = {"tp_size": 2}
    model = LlamaForCausalLM.from_pretrained(tmp_path, config=config)
    assert torch.equal(build.logits(model), build.logits(LlamaForCausalLM.from_pretrained(tmp_path)))


def test_state_dict_instead_of_files(tmp_path: Path) -> None:
    state, _ = write(tiny_llama(), tmp_path)
    config = LlamaForCausalLM.config_class.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="from files"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"backend": "fast"}, "backend='fast'"),
        ({"experts": "bf16"}, "experts='bf16'"),
        ({"experts": "fp8", "dequantize": True}, "experts='fp8'"),
        ({"dequantize": True, "backend": "weight_only"}, "nothing in FP8 for"),
        ({"run": 1}, "'run'"),
    ],
)
def test_options(option: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FP8Config(**option)


def test_config_for_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no `quantization_config`"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FP8Config())


def test_stacked_experts_with_a_bad_scale(tmp_path: Path) -> None:
    """A scale named in a merged parameter is checked like any other."""
    from support.moe import gpt_oss, stack_experts

    state, _ = write(gpt_oss(), tmp_path, ignore=["lm_head", "re:.*router"])
    stacked, _ = stack_experts(state)
    name = "model.layers.0.mlp.experts.down_proj_scale"
    stacked[name] = stacked[name][:, :, :-1].contiguous()
    save_file(stacked, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ScaleError, match=name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_config_json_is_left_alone(tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path, edit=drop(SCALE))
    before = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(MissingTensorError):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == before


@pytest.mark.parametrize("how", ["renamed", "lost", "one too many", "nested", "cut"])
def test_biases_of_experts_that_are_not_those_of_the_experts(how: str, tmp_path: Path) -> None:
    """They are dense, and the host stacks them in the order of their names, whatever numbers are missing."""
    from support.moe import write_transposed

    _, state, _ = write_transposed("gpt_oss", "split", tmp_path)
    stem = "model.layers.0.mlp.experts"
    name = f"{stem}.1.down_proj.bias"
    bias = state.pop(name)
    others = {"renamed": f"{stem}.7.down_proj.bias", "nested": f"{stem}.1.0.down_proj.bias", "cut": name}
    if how == "one too many":
        state |= {name: bias, f"{stem}.4.down_proj.bias": bias.clone()}
    elif how != "lost":
        state[others[how]] = bias[:-1].clone() if how == "cut" else bias
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for config in (FP8Config(), FP8Config(backend="weight_only", experts="fp8")):
        with pytest.raises(CheckpointError, match=r"down_proj\.?_?bias"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_spellings_of_numbers_that_compressed_tensors_takes(tmp_path: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        group(config)["weights"].update(num_bits=8.0, type="Float")
        config["quantization_config"]["transform_config"] = [1]

    write(tiny_llama(), tmp_path, config_edit=edit)
    with pytest.raises(UnsupportedError, match="transform_config"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
