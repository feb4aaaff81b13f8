"""Peak memory of loading a checkpoint with merged experts, `scripts/bench load_memory`, against the size of the loaded model.

Writes an FP8 mixture of experts (0.8 GB, random codes) to a temporary folder and loads it in a process of its own for each
way to hold it. Linux: anonymous memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from . import ROOT
from .common.memory import held_bytes, watched
from .common.worker import command

LAYERS, EXPERTS, HIDDEN = 8, 32, 1024


def write(path: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    from .common.shapes import quantization_config

    Qwen3MoeConfig(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        vocab_size=1000, intermediate_size=HIDDEN, moe_intermediate_size=HIDDEN, num_experts=EXPERTS,
        num_experts_per_tok=2, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(path)  # fmt: skip
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = quantization_config("lm_head", "re:.*mlp.gate$")
    (path / "config.json").write_text(json.dumps(config))
    state = {name: torch.randn(1000, HIDDEN).bfloat16() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    state["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()

    def quantized(name: str, rows: int, cols: int) -> None:
        state[f"{name}.weight"] = torch.randint(0, 120, (rows, cols), dtype=torch.uint8).view(torch.float8_e4m3fn)
        state[f"{name}.weight_scale"] = torch.full((rows, 1), 1e-3).bfloat16()

    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        for norm, size in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN), ("self_attn.q_norm", 64)):
            state[f"{layer}.{norm}.weight"] = torch.ones(size).bfloat16()
        state[f"{layer}.self_attn.k_norm.weight"] = torch.ones(64).bfloat16()
        for name, rows, cols in (("q", 512, HIDDEN), ("k", 128, HIDDEN), ("v", 128, HIDDEN), ("o", HIDDEN, 512)):
            quantized(f"{layer}.self_attn.{name}_proj", rows, cols)
        state[f"{layer}.mlp.gate.weight"] = torch.randn(EXPERTS, HIDDEN).bfloat16()
        for expert in range(EXPERTS):
            for name in ("gate", "up", "down"):
                quantized(f"{layer}.mlp.experts.{expert}.{name}_proj", HIDDEN, HIDDEN)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def load(path: str, backend: str, experts: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import hf_fp8

    config = hf_fp8.FP8Config(backend=backend, experts=experts)
    with watched(0.005) as memory:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)
    size, layer = held_bytes(model) / 1e9, held_bytes(model.model.layers[0]) / 1e9
    held = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." in n) / 1e9
    print(
        f"backend={backend:<12} experts={experts:<10} model {size:.2f} GB (experts {held:.3f}, a layer {layer:.2f}), "
        f"peak {memory.used:.2f} GB = {memory.used / size:.2f}x, {memory.seconds:.1f} s",
        flush=True,
    )


def arguments() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def main() -> None:
    arguments().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        from safetensors import safe_open

        with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
            names = [name for name in file.keys() if ".experts." in name]  # noqa: SIM118 (no mapping)
            print(f"experts in the file: {sum(file.get_tensor(name).nbytes for name in names) / 1e9:.3f} GB", flush=True)
        for options in (("auto", "auto"), ("weight_only", "dequantize"), ("auto", "fp8"), ("weight_only", "fp8")):
            subprocess.run(command(load, folder, *options), cwd=ROOT, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
