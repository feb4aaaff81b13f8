"""Writes docs/accuracy.md, `scripts/page accuracy`: checkpoints against stored references, round trips, perplexity."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support import build
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import hf_fp8
from hf_fp8 import FP8Config

from .. import CHECKPOINTS, ROOT
from ..common import smollm2
from ..common.provenance import measured_with
from ..common.references import copied, logits
from .page import Page

BACKENDS = ("auto", "weight_only", "scaled_mm")


@dataclass(frozen=True)
class Accuracy(Page):
    name = "accuracy"
    versions: str
    references: str
    perplexity: str


def auto_class(path: Path) -> Any:
    return AutoModelForImageTextToText if "vl" in path.name else AutoModelForCausalLM


def load(path: Path, dtype: Any, backend: str) -> Any:
    return auto_class(path).from_pretrained(path, dtype=dtype, quantization_config=FP8Config(backend=backend))


def references(folder: Path, work: Path) -> list[str]:
    """One line of the first table for each backend."""
    path = copied(folder.name, work / folder.name)
    stored = load_file(folder / "reference.safetensors")
    lines = []
    for backend in BACKENDS:
        cells = []
        for dtype in (torch.float32, torch.bfloat16):
            found = logits(load(path, dtype, backend), stored["input_ids"])
            for name in ("logits", "logits_quantized_input"):
                cells.append(f"{build.error(found, stored[name]):.1e}" if name in stored else "-")
        first = load(path, "auto", backend)
        before = logits(first, stored["input_ids"])
        first.save_pretrained(work / "once" / folder.name)
        again = load(work / "once" / folder.name, "auto", backend) if backend != "auto" else None
        if again is None:
            cls = type(first)
            again = cls.from_pretrained(work / "once" / folder.name, dtype="auto")
        again.save_pretrained(work / "twice" / folder.name)
        once, twice = build.tensors(work / "once" / folder.name), build.tensors(work / "twice" / folder.name)
        lost = "-" if backend == "auto" else str(len(build.differing(build.tensors(path), once)))
        same = torch.equal(before, logits(again, stored["input_ids"]))
        with build.stock_transformers():
            host = auto_class(path).from_pretrained(work / "once" / folder.name, dtype=torch.float32)
            stock = logits(host, stored["input_ids"])
        wanted = stored.get("logits_quantized_input", stored["logits"]) if backend != "auto" else stored["logits"]
        read = f"{build.error(stock, wanted):.0e}" if "logits_quantized_input" in stored or backend == "auto" else "-"
        lines.append(
            f"| {folder.name} | {backend} | {' | '.join(cells)} | {lost} | {len(build.differing(once, twice))} "
            f"| {'equal' if same else 'DIFFER'} | {read} |"
        )
        shutil.rmtree(work / "once")
        shutil.rmtree(work / "twice")
    return lines


def perplexities(folder: Path, counts: list[int]) -> list[str]:
    dense = smollm2.write_dense(folder / "dense")
    ids = smollm2.prose(AutoTokenizer.from_pretrained(dense))
    lines = []
    for count in counts:
        text = smollm2.evaluation(ids, count)
        reference = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
        base = hf_fp8.perplexity(reference, text)
        lines.append(f"| BF16 | - | {len(text):,} | {base:.3f} | |")
        for kind in smollm2.KINDS:
            path = smollm2.write_fp8(dense, folder / kind, kind)
            for backend in (*BACKENDS, "int8"):
                found = hf_fp8.perplexity(load(path, torch.bfloat16, backend), text)
                lines.append(f"| {kind} | {backend} | {len(text):,} | {found:.3f} | {found / base - 1:+.2%} |")
                print(lines[-1], flush=True)
    return lines


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="how much prose to measure perplexity on")
    parser.add_argument("--folder", type=Path, default=CHECKPOINTS, help="where SmolLM2's checkpoints are kept")
    return parser


def main() -> None:
    options = arguments().parse_args()
    Accuracy.check()
    options.folder.mkdir(parents=True, exist_ok=True)
    smollm2.quiet()
    with tempfile.TemporaryDirectory() as work:
        folders = sorted(path.parent for path in (ROOT / "tests" / "data").glob("*/reference.safetensors"))
        table = [line for folder in folders for line in references(folder, Path(work))]
    print("\n".join(table), flush=True)
    perplexity = perplexities(options.folder, options.tokens)
    Accuracy(measured_with(), "\n".join(table), "\n".join(perplexity)).write()


if __name__ == "__main__":
    main()
