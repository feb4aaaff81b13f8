"""What stock transformers does where the README says that it differs, `scripts/bench against_stock`: a line each, a minute."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from support.build import STATIC_TENSOR, differing, error, group_input, tensors, tiny_llama, write
from support.moe import gpt_oss, is_linear, llama4, mixtral, qwen3_moe
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import hf_fp8
from hf_fp8.formats.scheme import TENSOR, Granularity

from .common import smollm2
from .common.provenance import version
from .common.references import copied, logits

IDS = torch.arange(24).reshape(2, 12)
DEQUANTIZE = CompressedTensorsConfig(dequantize=True)


def both(path: Path, **options: Any) -> str:
    """The error of stock against hf_fp8 on what stock computes: inputs rounded as the checkpoint says."""
    hf_fp8.register()
    config = hf_fp8.FP8Config(dequantize=True) if options else hf_fp8.FP8Config(backend="scaled_mm")
    wanted = logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config), IDS)
    hf_fp8.unregister()
    found = logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options), IDS)
    return f"error {error(found, wanted):.2g}"


def checkpoint(path: Path, **options: Any) -> Path:
    write(tiny_llama(hidden_size=96, num_attention_heads=4, head_dim=24), path, **options)
    return path


def after_forward(path: Path, work: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(path))
    model.save_pretrained(work / "before")
    logits(model, IDS)
    model.save_pretrained(work / "after")
    read = tensors(path)
    return f"{len(differing(read, tensors(work / 'before')))} before, {len(differing(read, tensors(work / 'after')))} after"


def stays_fp8(path: Path, work: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(path))
    before = model.model.layers[0].mlp.up_proj.weight.dtype
    logits(model, IDS)
    return f"{before} before the first forward, {model.model.layers[0].mlp.up_proj.weight.dtype} after"


def fullgraph(path: Path, work: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(path))
    return f"{torch.compile(model, fullgraph=True, backend='aot_eager')(IDS).logits.shape}"


def saved_whole(path: Path, work: Path) -> str:
    torch.save(AutoModelForCausalLM.from_pretrained(checkpoint(path)), work / "whole.pt")
    return "saved"


def offloaded(path: Path, work: Path) -> str:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(checkpoint(path), device_map=places, offload_folder=work / "offload")
    return f"{logits(model, IDS).shape}"


def experts(path: Path, work: Path, edit: Callable[[dict[str, Any]], dict[str, Any]] = lambda s: s) -> str:
    _, _ = write(mixtral(), path, quantized=is_linear, edit=edit)
    return both(path, quantization_config=DEQUANTIZE)


def experts_saved(path: Path, work: Path, **options: Any) -> str:
    write(mixtral(), path, quantized=is_linear)
    return saved(path, work, **options)


def saved(path: Path, work: Path, **options: Any) -> str:
    AutoModelForCausalLM.from_pretrained(path, **options).save_pretrained(work / "saved")
    return f"saved, as {', '.join(sorted({str(tensor.dtype) for tensor in tensors(work / 'saved').values()}))}"


def one_by_one(family: Callable[[], Any]) -> Callable[[Path, Path], str]:
    """Experts that files stack, quantized: one tensor per expert, as llm-compressor writes them."""

    def case(path: Path, work: Path) -> str:
        family().save_pretrained(work / "dense")
        hf_fp8.register()
        config = hf_fp8.FP8Config("FP8_DYNAMIC")
        AutoModelForCausalLM.from_pretrained(work / "dense", quantization_config=config).save_pretrained(path)
        return both(path, quantization_config=DEQUANTIZE)

    return case


def int4_experts_saved(path: Path, work: Path) -> str:
    """Experts in int4 beside attention in FP8."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
    group = {"targets": ["re:.*experts.*"], "weights": weights, "format": "pack-quantized"}
    compressor, scheme = BaseCompressor.get_value_from_registry("pack-quantized"), QuantizationScheme(**group)

    def pack(state: dict[str, Any]) -> dict[str, Any]:
        packed = {}
        for name, tensor in state.items():
            parts = {"weight": tensor}
            if ".experts." in name:
                scale = (tensor.float().view(len(tensor), -1, 8).abs().amax(-1) / 7.5).bfloat16()
                parts = compressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
            packed |= {name.removesuffix("weight") + role: part for role, part in parts.items()}
        return packed

    def two_groups(config: dict[str, Any]) -> None:
        config["quantization_config"]["format"] = "mixed-precision"
        config["quantization_config"]["config_groups"]["experts"] = group

    attention = {"quantized": lambda name: "self_attn" in name and is_linear(name), "targets": ["re:.*self_attn.*"]}
    write(qwen3_moe(), path, **attention, edit=pack, config_edit=two_groups)
    return saved(path, work)


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        state = {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in state.items()}
    return state


def broken(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path, Path], str]:
    def case(path: Path, work: Path) -> str:
        found = logits(AutoModelForCausalLM.from_pretrained(checkpoint(path, edit=change)), IDS)
        return f"loads, logits {'finite' if found.isfinite().all() else 'NaN'}"

    return case


Q = "model.layers.0.self_attn.q_proj"
CASES: dict[str, Callable[[Path, Path], str]] = {
    "weights after the first forward": stays_fp8,
    "block 40x40 on 96 columns, default": lambda p, w: both(checkpoint(p, weight=Granularity(40, 40), inputs=group_input(32))),
    "block 40x40 on 96 columns, dequantize=True": lambda p, w: both(
        checkpoint(p, weight=Granularity(40, 40), inputs=group_input(32)), quantization_config=DEQUANTIZE
    ),
    "static inputs": lambda p, w: both(checkpoint(p, weight=TENSOR, inputs=STATIC_TENSOR)),
    "quantization_status frozen": lambda p, w: both(
        checkpoint(p, config_edit=lambda c: c["quantization_config"].update(quantization_status="frozen"))
    ),
    "quantization_status absent": lambda p, w: both(
        checkpoint(p, config_edit=lambda c: c["quantization_config"].pop("quantization_status"))
    ),
    "compression_config": lambda p, w: both(
        checkpoint(p, config_edit=lambda c: c.update(compression_config=c.pop("quantization_config")))
    ),
    "weight_scale_inv": lambda p, w: both(
        checkpoint(p, edit=lambda s: {k.replace("weight_scale", "weight_scale_inv"): v for k, v in s.items()})
    ),
    "scales of shape (N,)": lambda p, w: both(checkpoint(p, scale_shape=lambda s: s.reshape(-1))),
    "scales of shape ()": lambda p, w: both(
        checkpoint(p, weight=TENSOR, inputs=STATIC_TENSOR, scale_shape=lambda s: s.reshape(()))
    ),
    "tensors that a save changes": after_forward,
    "torch.compile(fullgraph=True)": fullgraph,
    "torch.save(model)": saved_whole,
    "disk offload": offloaded,
    "experts under the Hub's names, dequantize=True": experts,
    "experts under llm-compressor's names, dequantize=True": lambda p, w: experts(p, w, renamed),
    "experts of gpt-oss one by one, dequantize=True": one_by_one(gpt_oss),
    "experts of Llama-4 one by one, dequantize=True": one_by_one(llama4),
    "saving experts": experts_saved,
    "saving experts after dequantize=True": lambda p, w: experts_saved(p, w, quantization_config=DEQUANTIZE),
    "saving int4 experts beside FP8": int4_experts_saved,
    "FP8 beside int4, dequantize=True": lambda p, w: both(copied("llama-mixed", p), quantization_config=DEQUANTIZE),
    "a missing weight_scale": broken(lambda s: {k: v for k, v in s.items() if k != f"{Q}.weight_scale"}),
    "a NaN scale": broken(lambda s: {**s, f"{Q}.weight_scale": s[f"{Q}.weight_scale"] * float("nan")}),
    "a negative scale": broken(lambda s: {**s, f"{Q}.weight_scale": -s[f"{Q}.weight_scale"]}),
    "an unused scale": broken(lambda s: {**s, "model.norm.weight_scale": torch.ones(1)}),
    "a weight stored as int8": broken(lambda s: {**s, f"{Q}.weight": s[f"{Q}.weight"].view(torch.int8)}),
    "a dequantized weight with its scale": broken(lambda s: {**s, f"{Q}.weight": s[f"{Q}.weight"].bfloat16()}),
}


def arguments() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__)


def main() -> None:
    arguments().parse_args()
    smollm2.quiet()
    warnings.simplefilter("ignore")
    print(", ".join(f"{name} {version(name)}" for name in ("transformers", "compressed-tensors", "torch")))
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as work:
            hf_fp8.unregister()
            try:
                print(f"{name:<55} {case(Path(work) / 'model', Path(work))}", flush=True)
            except Exception as caught:
                print(f"{name:<55} {type(caught).__name__}: {str(caught).strip().splitlines()[0][:90]}", flush=True)


if __name__ == "__main__":
    main()
