"""The small checkpoints that mutations start from, each made once per process and held in memory."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support.build import DYNAMIC_TENSOR, STATIC_TENSOR, TOKEN, State, group_input, is_linear, tiny_llama, weights_json, write
from support.moe import deepseek_v3, mixtral, qwen3_moe, write_transposed
from support.moe import is_linear as is_moe_linear

from hf_fp8.formats.scheme import ROW, TENSOR, Granularity

DATA = Path(__file__).parents[2] / "data"
SINGLE, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
BLOCK = Granularity(24, 40)  # divides no axis of the models


@dataclass(frozen=True)
class Base:
    """config: `config.json`. shards: file -> tensors. index: of the shards, None for a single file."""

    config: dict[str, Any]
    shards: dict[str, State]
    index: dict[str, Any] | None = None


def _llama(path: Path, **scheme: Any) -> None:
    write(tiny_llama(), path, **scheme)


def _tied(path: Path) -> None:
    write(tiny_llama(tie_word_embeddings=True), path)


def _fp8_head(path: Path) -> None:
    write(tiny_llama(), path, quantized=lambda name: is_linear(name) or name == "lm_head.weight", ignore=[])


def _biased(path: Path) -> None:
    def fill(state: State) -> State:
        torch.manual_seed(1)
        return {name: torch.randn_like(t) * 0.1 if name.endswith("bias") else t for name, t in state.items()}

    write(tiny_llama(attention_bias=True), path, edit=fill)


def _two_groups(path: Path) -> None:
    """Attention per channel, the rest in blocks, each under a scheme of its own."""
    blocks, _ = write(tiny_llama(), path / "blocks", weight=BLOCK, inputs=group_input(), scale_dtype=torch.float32)

    def join(state: State) -> State:
        return {name: t for name, t in state.items() if ".mlp." not in name} | {n: t for n, t in blocks.items() if ".mlp." in n}

    def groups(config: dict[str, Any]) -> None:
        attention = config["quantization_config"]["config_groups"]["group_0"]
        mlp = {**attention, "weights": weights_json(BLOCK), "input_activations": group_input(), "targets": ["re:.*mlp.*"]}
        config["quantization_config"]["config_groups"] = {"group_0": {**attention, "targets": ["Linear"]}, "group_1": mlp}

    write(tiny_llama(), path, edit=join, config_edit=groups)


def _moe(make: Callable[[], Any], ignore: str, **scheme: Any) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        write(make(), path, quantized=is_moe_linear, ignore=["lm_head", ignore], **scheme)

    return build


def _transposed(form: str, **scheme: Any) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        write_transposed("gpt_oss", form, path, **scheme)

    return build


def _stored(name: str) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        for file in ("config.json", SINGLE):
            shutil.copyfile(DATA / name / file, path / file)

    return build


STATIC = {"weight": TENSOR, "inputs": STATIC_TENSOR}
IN_BLOCKS = {"weight": BLOCK, "inputs": group_input(), "scale_dtype": torch.float32}
GATE, ROUTER = r"re:.*(\.|_)gate$", "re:.*router"
# How each is built, into how many shards it is split (0: a pickle).
BASES: dict[str, tuple[Callable[[Path], None], int]] = {
    "llama-channel": (_llama, 1),
    "llama-tensor-static": (lambda path: _llama(path, **STATIC), 1),
    "llama-tensor-dynamic": (lambda path: _llama(path, weight=TENSOR, inputs=DYNAMIC_TENSOR), 1),
    "llama-block": (lambda path: _llama(path, **IN_BLOCKS), 1),
    "llama-group": (lambda path: _llama(path, weight=Granularity(1, 24), inputs=TOKEN), 1),
    "llama-w8a16": (lambda path: _llama(path, inputs=None), 1),
    "llama-tied": (_tied, 1),
    "llama-fp8-head": (_fp8_head, 1),
    "llama-bias": (_biased, 1),
    "llama-two-groups": (_two_groups, 1),
    "llama-sharded": (_llama, 3),
    "llama-static-sharded": (lambda path: _llama(path, **STATIC), 2),
    "llama-bin": (_llama, 0),
    "mixtral": (_moe(mixtral, GATE), 1),
    "mixtral-static-sharded": (_moe(mixtral, GATE, **STATIC), 3),
    "mixtral-renamed": (_stored("mixtral-dyn"), 1),
    "qwen3-moe": (_moe(qwen3_moe, GATE, weight=ROW), 1),
    "qwen3-moe-block": (_moe(qwen3_moe, GATE, **IN_BLOCKS), 1),
    "gpt-oss-split": (_transposed("split"), 1),
    "gpt-oss-stacked": (_transposed("stacked"), 1),
    "gpt-oss-stacked-block": (_transposed("stacked", **IN_BLOCKS), 1),
    "deepseek-v3": (_moe(deepseek_v3, GATE), 1),
    "deepseek-v3-block-sharded": (_moe(deepseek_v3, GATE, **IN_BLOCKS), 4),
    "mixed-int4": (_stored("llama-mixed"), 1),
    "static-kv": (_stored("llama-static-kv"), 1),
}


def split(tensors: State, count: int) -> tuple[dict[str, State], dict[str, Any]]:
    """Tensors over `count` files, taking turns, and their index."""
    names = sorted(tensors)
    files = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    shards = {file: {name: tensors[name] for name in names[number::count]} for number, file in enumerate(files)}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    where = {name: file for file, state in shards.items() for name in state}
    return shards, {"metadata": {"total_size": size}, "weight_map": where}


@cache
def base(name: str) -> Base:
    build, count = BASES[name]
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = {name: tensor.clone() for name, tensor in load_file(Path(folder) / SINGLE).items()}
    if count > 1:
        return Base(config, *split(tensors, count))
    return Base(config, {SINGLE if count else PICKLE: tensors})
