"""Writes docs/training.md and its picture, `scripts/page training`: SmolLM2 fine-tuned over BF16, FP8 and int8, and merged."""

from __future__ import annotations

import argparse
import io
import math
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

import hf_fp8

from .. import CHECKPOINTS, finetune
from ..common import smollm2
from ..common.provenance import measured_with
from .page import Page

# name -> (checkpoint, backend)
BASES: dict[str, tuple[str, str | None]] = {
    "BF16": ("dense", None),
    "FP8, inputs as they are (weight_only)": ("dynamic", "weight_only"),
    "FP8, inputs rounded (scaled_mm)": ("dynamic", "scaled_mm"),
    "int8 of FP8 (int8)": ("dynamic", "int8"),
}
SHOWN = "FP8, inputs as they are (weight_only)"  # what scripts/finetune does by itself
MERGES: dict[str, dict[str, Any]] = {
    "stochastic (the default)": {},
    "nearest": {"rounding": "nearest"},
    "dense": {"into": "dense"},
}


@dataclass(frozen=True)
class Training(Page):
    name = "training"
    versions: str
    steps: str
    bases: str
    merges: str
    said: str
    before: str
    after: str


def train(name: str, steps: int, folder: Path, tokenizer: Any, judged: torch.Tensor) -> dict[str, Any]:
    """One base: fine-tuned and judged; the adapter is left in the folder."""
    path, backend = BASES[name]
    model = finetune.load(CHECKPOINTS / path, backend)
    before = hf_fp8.perplexity(model, judged)
    said = io.StringIO()
    start = time.time()
    with redirect_stdout(said):
        model, seen = finetune.finetune(model, tokenizer, steps, folder)
    took = time.time() - start
    after = hf_fp8.perplexity(model, judged)
    model.save_pretrained(folder / "adapter")
    print(f"{name}: {before:.3f} to {after:.3f}, {took:.0f} s", file=sys.stderr, flush=True)
    return {
        "before": before, "after": after, "losses": seen.losses, "held_out": seen.held_out, "said": said.getvalue(),
        "seconds": took,
    }  # fmt: skip


def merge(name: str, folder: Path, judged: torch.Tensor, how: dict[str, Any]) -> tuple[str, float, bool]:
    """(the report, perplexity merged, whether the saved checkpoint agrees to the bit) of a base's adapter."""
    path, backend = BASES[name]
    model = PeftModel.from_pretrained(finetune.load(CHECKPOINTS / path, backend), folder / "adapter")
    with hf_fp8.merging(**how) as report:
        merged = model.merge_and_unload()
    found = hf_fp8.perplexity(merged, judged)
    same = False
    if backend != "int8":  # its checkpoint is int8, which transformers runs
        with tempfile.TemporaryDirectory() as work:
            merged.save_pretrained(work)
            again = finetune.load(Path(work), backend if how.get("into") != "dense" else None)
            ids = judged[None, :64]
            same = torch.equal(again(ids).logits, merged(ids).logits)
    return str(report), found, same


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "hf_fp8"}):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (name, run), marker in zip(runs.items(), "osD^", strict=False):
            smooth = torch.tensor(run["losses"]).unfold(0, min(9, len(run["losses"])), 1).mean(1)
            left.plot(range(1, len(smooth) + 1), smooth, linewidth=1.2, label=name)
            right.plot(*zip(*run["held_out"], strict=True), linewidth=1.2, marker=marker, markersize=4, label=name)
        left.set_title("trained on (mean of 9 steps)", fontsize=9, loc="left")
        right.set_title("held out", fontsize=9, loc="left")
        for axis in (left, right):
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        left.set_ylabel("loss, nats per token")
        right.legend(fontsize=7, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=CHECKPOINTS / "training", help="where adapters are left")
    return parser


def main() -> None:
    args = arguments().parse_args()
    Training.check()
    smollm2.write_fp8(smollm2.write_dense(CHECKPOINTS / "dense"), CHECKPOINTS / "dynamic", "dynamic")
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "dense")
    judged = finetune.texts(tokenizer)[2]
    runs = {name: train(name, args.steps, args.folder / str(number), tokenizer, judged) for number, name in enumerate(BASES)}
    plain = runs["BF16"]
    lines = [
        f"| {name} | {run['before']:.2f} | {run['after']:.2f} | {math.log(run['after']):.4f} "
        f"({math.log(run['after']) / math.log(plain['after']) - 1:+.2%}) |"
        for name, run in runs.items()
    ]
    merges = []
    for number, name in enumerate(BASES):
        if BASES[name][1] is None:
            continue
        for how, options in MERGES.items():
            report, found, same = merge(name, args.folder / str(number), judged, options)
            print(f"{name}, {how}: {report}: {found:.3f}", file=sys.stderr, flush=True)
            kept = report.partition("rounded to codes again: ")[2].partition("%")[0]
            merges.append(
                f"| {name} | {how} | {f'{kept}%' if kept else '-'} | {runs[name]['after']:.3f} | {found:.3f} | "
                f"{'yes' if same else 'not compared'} |"
            )
    of = runs[SHOWN]
    page = Training(
        versions=measured_with("peft"), steps=str(args.steps), bases="\n".join(lines), merges="\n".join(merges),
        said=of["said"].strip(), before=f"{of['before']:.3f}", after=f"{of['after']:.3f}",
    )  # fmt: skip
    page.write(pictures={"training.svg": lambda path: draw(runs, path)})


if __name__ == "__main__":
    main()
