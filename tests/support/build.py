"""Makes small FP8 checkpoints (any model class, any scheme, the names and shapes that files have), and loads them."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_fp8
from hf_fp8 import FP8Config
from hf_fp8.formats import numerics
from hf_fp8.formats.exponents import EXPONENTS, exponents_of
from hf_fp8.formats.scheme import ROW, TENSOR, Granularity
from hf_fp8.nn.base import QuantizedModule

State = dict[str, torch.Tensor]

TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
DYNAMIC_TENSOR = {**TOKEN, "strategy": "tensor"}
STATIC_TENSOR = {**TOKEN, "strategy": "tensor", "dynamic": False}


def group_input(size: int = 128) -> dict[str, Any]:
    return {**TOKEN, "strategy": "group", "group_size": size}


def weights_json(granularity: Granularity) -> dict[str, Any]:
    base: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    if granularity == TENSOR:
        return {**base, "strategy": "tensor"}
    if granularity == ROW:
        return {**base, "strategy": "channel"}
    if granularity.rows == 1:
        return {**base, "strategy": "group", "group_size": granularity.cols}
    return {**base, "strategy": "block", "block_structure": [granularity.rows, granularity.cols]}


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    config = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False, "dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
    } | changes  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16).eval()


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def write(
    model: PreTrainedModel,
    path: Path,
    *,
    weight: Granularity = ROW,
    inputs: dict[str, Any] | None = TOKEN,
    scale_dtype: torch.dtype = torch.bfloat16,
    quantized: Callable[[str], bool] = is_linear,
    targets: list[str] | None = None,
    ignore: list[str] | None = None,
    scale_shape: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
    edit: Callable[[State], State] = lambda state: state,
    config_edit: Callable[[dict[str, Any]], Any] = lambda config: None,
) -> tuple[State, State]:
    """Save `model` dense, then quantize the files. Returns (tensors written, tensors of the dequantized model)."""
    model.save_pretrained(path)
    state = load_file(path / "model.safetensors")
    out: State = {}
    dense: State = {}
    for name, tensor in state.items():
        dense[name] = tensor
        if not quantized(name) or tensor.ndim != 2:
            out[name] = tensor
            continue
        scale = numerics.compute_scale(tensor, weight)
        scale = exponents_of(scale, scale_dtype) if scale_dtype in EXPONENTS else scale.to(scale_dtype)
        q = numerics.quantize(tensor, scale, weight)
        stem = name.removesuffix("weight")
        out[name] = q
        out[stem + "weight_scale"] = scale_shape(scale.reshape(1) if weight == TENSOR else scale)
        if inputs is not None and not inputs["dynamic"]:
            out[stem + "input_scale"] = torch.tensor([3.0 / 448], dtype=scale_dtype)
        dense[name] = numerics.dequantize(q, scale, weight, torch.float32)
    out = edit(out)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "config_groups": {
            "group_0": {
                "targets": targets or ["Linear"],
                "weights": weights_json(weight),
                "input_activations": copy.deepcopy(inputs),  # callers edit it
                "output_activations": None,
            }
        },
        "format": "float-quantized",
        "ignore": ["lm_head"] if ignore is None else ignore,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    config_edit(config)
    (path / "config.json").write_text(json.dumps(config))
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    return out, dense


def tensors(path: Path) -> State:
    """Every tensor of a checkpoint folder."""
    found: State = {}
    for file in path.glob("model*.safetensors"):
        found.update(load_file(file))
    return found


def differing(a: State, b: State) -> list[str]:
    """Names that are not equal in presence, dtype, shape and bytes."""

    def same(x: torch.Tensor, y: torch.Tensor) -> bool:
        if x.dtype != y.dtype or x.shape != y.shape:
            return False
        return torch.equal(x.reshape(-1).contiguous().view(torch.uint8), y.reshape(-1).contiguous().view(torch.uint8))

    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name]))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def sqnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal to quantization noise in dB."""
    found, expected = found.double(), expected.double()
    return float(20 * torch.log10(expected.norm() / (found - expected).norm()))


IDS = torch.arange(24).reshape(2, 12)
KEEP = FP8Config(backend="weight_only")
# A small Llama in three places; "disk" needs an offload_folder.
OFFLOAD = {
    "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


def load(path: Path, config: Any = KEEP, **kwargs: Any) -> PreTrainedModel:
    """By default kept in FP8 and computing in float32."""
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, **{"dtype": torch.float32} | kwargs)


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """The argument by which `model` takes a cache: transformers 5.24 has renamed it."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@contextmanager
def stock_transformers() -> Iterator[None]:
    """transformers as it is without hf_fp8."""
    hf_fp8.unregister()
    try:
        yield
    finally:
        hf_fp8.register()


def moved(model: Any) -> Any:
    """`model`, whose quantized modules have been to another device, meta, and come back without values."""
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            module.to("meta").to_empty(device="cpu")
    return model


def copies(model: Any, fresh: Callable[[], Any], folder: Path) -> dict[str, Any]:
    """What has to be `model` again, by how it was made. fresh: loads what `model` was loaded from."""
    torch.save(model, folder / "whole.pt")
    made = {
        "deepcopy": copy.deepcopy(model),
        "torch.save": torch.load(folder / "whole.pt", weights_only=False),
        "moved": moved(fresh()),
        "state_dict": fresh(),
    }
    for name in ("moved", "state_dict"):
        made[name].load_state_dict(model.state_dict())
    return made
