"""Peak memory of quantizing a checkpoint, `scripts/bench quantize_memory`, while loading and file by file, against its bounds.

Writes a bfloat16 Llama (2.2 GB, random weights, three files) and a mixture of experts (2.3 GB) to a temporary folder, and
quantizes each in processes of their own. Linux: anonymous memory is read from /proc, and the largest resident size (which
counts mapped files) from the kernel.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import ROOT
from .common.memory import watched
from .common.worker import command

SHARD = 800_000_000


def write(folder: str, kind: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    if kind == "dense":
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
                vocab_size=32000, tie_word_embeddings=False, dtype="bfloat16",
            )
        )  # fmt: skip
    else:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                hidden_size=1024, num_hidden_layers=11, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
                vocab_size=1000, intermediate_size=1024, moe_intermediate_size=1024, num_experts=32, num_experts_per_tok=2,
                dtype="bfloat16",
            )
        )  # fmt: skip
    model.save_pretrained(folder, max_shard_size=SHARD)


def quantize(folder: str, how: str, scheme: str) -> None:
    """In a process of its own: quantize `folder`, and print a line."""
    import torch
    from transformers import AutoModelForCausalLM

    import hf_fp8
    from hf_fp8.quantization.files import plan_source, quantize_checkpoint, total_bytes
    from hf_fp8.quantization.source import open_source

    source = open_source(folder)
    _, plan = plan_source(source, hf_fp8.FP8Config(scheme))
    checkpoint = source.checkpoint
    largest_bytes = max(2 * torch.Size(info.shape).numel() for info in checkpoint.tensors.values()) / 1e9
    fp8 = total_bytes(plan.written) / 1e9
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as out, watched() as memory:
        if how == "load":
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=hf_fp8.FP8Config(scheme))
            bound = fp8 + largest_bytes
        else:
            quantize_checkpoint(source, Path(out) / "fp8", hf_fp8.FP8Config(scheme))
            bound = largest_bytes
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"| {Path(folder).name} | {total_bytes(checkpoint) / 1e9:.2f} | {scheme} | {how} | {fp8:.2f} | {largest_bytes:.3f} | "
        f"{bound:.2f} | {memory.used:.2f} | {memory.before:.2f} | {resident:.2f} | {memory.seconds:.0f} |",
        flush=True,
    )


def table() -> Iterator[str]:
    """The lines of a table in Markdown, as they are measured."""
    yield "| checkpoint | GB | scheme | how | FP8 GB | largest tensor | bound | peak anonymous | before | max resident | s |"
    yield "|---" * 11 + "|"

    def run(words: list[str]) -> str:
        done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return done.stdout.rstrip()

    with tempfile.TemporaryDirectory() as folder:
        for kind in ("dense", "mixture"):
            path = f"{folder}/{kind}"
            run(command(write, path, kind))
            for how in ("load", "stream"):
                for scheme in ("FP8_DYNAMIC", "FP8_BLOCK"):
                    yield run(command(quantize, path, how, scheme))


def arguments() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def main() -> None:
    arguments().parse_args()
    for line in table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
