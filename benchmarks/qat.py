"""Trains SmolLM2 for int4, `scripts/qat`: its perplexity when it is quantized after training, and with prepare_qat before.

All weights are trained, on prose of the Python reference, the same steps from the same seed: once as they are, and quantized
afterwards, and once for each scheme with quantization in each forward. Writes a table, and the losses meanwhile to
DIR/losses.json; --plot FILE draws them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import hf_fp8
from hf_fp8 import Scheme
from hf_fp8.kernels.base import has_bfloat16_units

from . import CHECKPOINTS
from .common import smollm2
from .finetune import HELD_OUT

WARMUP = 10  # steps


def texts(tokenizer: Any) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(windows to train on, ids to look at meanwhile, ids to judge by in the end)."""
    ids = smollm2.prose(tokenizer)
    first = smollm2.CALIBRATION_TOKENS + smollm2.EVALUATION_TOKENS
    return list(smollm2.windows(ids[first + HELD_OUT :])), ids[first : first + HELD_OUT], smollm2.evaluation(ids)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def scheme_of(name: str, group: int) -> Scheme:
    """A scheme of int4 weights with other groups: 128 columns do not divide the rows of SmolLM2, 576."""
    found = hf_fp8.SCHEMES[name]
    return replace(found, weight=replace(found.weight, granularity=hf_fp8.Granularity(1, group)))


def quantized(model: Any, scheme: Scheme) -> Any:
    """A quantized copy of a float model."""
    return hf_fp8.quantize_model(copy.deepcopy(model), scheme, backend="scaled_mm")


def train(model: Any, windows: list[torch.Tensor], steps: int, rate: float, look: Any) -> None:
    """AdamW with a cosine schedule; on CPUs with units for bfloat16 products are in bfloat16 (autocast)."""
    set_seed(0)
    order = torch.randperm(len(windows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * min(s / steps, 1.0))))
    )
    model.train()
    for step in range(steps):
        ids = windows[int(order[step % len(windows)])]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16_units()):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        look(step + 1, model)
    model.eval()


class Look:
    """Notes the loss on text that is held out: at first, and after each `every` steps."""

    def __init__(self, name: str, ids: torch.Tensor, every: int, schemes: Mapping[str, Scheme] = MappingProxyType({})) -> None:
        self.name, self.ids, self.every, self.schemes = name, ids, every, schemes
        self.losses: dict[str, list[tuple[int, float]]] = {}
        self.started = time.monotonic()

    def __call__(self, step: int, model: Any) -> None:
        if step % self.every:
            return
        model.eval()
        self._note(self.name, step, model)
        for name, scheme in self.schemes.items():
            self._note(f"{self.name}, then {name}", step, quantized(model, scheme))
        model.train()

    def _note(self, name: str, step: int, model: Any) -> None:
        loss = math.log(hf_fp8.perplexity(model, self.ids))
        self.losses.setdefault(name, []).append((step, loss))
        print(f"{name}: step {step}: loss {loss:.4f} on the text held out, {time.monotonic() - self.started:.0f} s", flush=True)


def table(found: dict[str, float], schemes: list[str]) -> str:
    """What was found, as a table in Markdown."""
    rows = ["| | before | trained as it is | trained for it | recovered |", "|---|---|---|---|---|"]
    rows.append(f"| BF16 | {found['before']:.2f} | {found['trained']:.2f} | | |")
    for scheme in schemes:
        after, aware = found[f"trained, then {scheme}"], found[f"qat {scheme}"]
        share = (after - aware) / (after - found["trained"])
        rows.append(f"| {scheme} | {found[f'before, {scheme}']:.2f} | {after:.2f} | {aware:.2f} | {share:.0%} |")
    return "\n".join(rows)


def plot(losses: dict[str, list[tuple[int, float]]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, points in losses.items():
        axes.plot(*zip(*points, strict=True), label=name, linestyle="--" if "then" in name else "-", marker=".")
    axes.set(xlabel="steps of 512 tokens", ylabel="loss on text held out")
    axes.legend()
    figure.savefig(file, metadata={"Date": None})


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "W4AFP8"], help="of hf_fp8.prepare_qat")
    parser.add_argument("--group", type=int, default=64, help="columns of a scale")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=5e-5, help="the highest learning rate")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS / "qat", help="for losses.json and the trained models")
    parser.add_argument("--plot", type=Path, help="an SVG of the losses")
    return parser


def main() -> None:
    args = arguments().parse_args()
    smollm2.quiet()
    dense = smollm2.write_dense(CHECKPOINTS / "dense")
    windows, meanwhile, judged = texts(AutoTokenizer.from_pretrained(dense))
    every = max(args.steps // 5, 1)
    schemes = {name: scheme_of(name, args.group) for name in args.schemes}
    model = load(dense)
    found = {"before": hf_fp8.perplexity(model, judged)}
    for name, scheme in schemes.items():
        found[f"before, {name}"] = hf_fp8.perplexity(quantized(model, scheme), judged)
    look = Look("trained", meanwhile, every, schemes)
    look(0, model)
    train(model, windows, args.steps, args.rate, look)
    found["trained"], losses = hf_fp8.perplexity(model, judged), look.losses
    for name, scheme in schemes.items():
        found[f"trained, then {name}"] = hf_fp8.perplexity(quantized(model, scheme), judged)
    for name, scheme in schemes.items():
        model = hf_fp8.prepare_qat(load(dense), scheme)
        look = Look(f"trained for {name}", meanwhile, every)
        look(0, model)
        train(model, windows, args.steps, args.rate, look)
        model = hf_fp8.convert_qat(model)
        found[f"qat {name}"] = hf_fp8.perplexity(model, judged)
        losses |= look.losses
        model.save_pretrained(args.out / name)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "losses.json").write_text(json.dumps({"perplexity": found, "losses": losses}, indent=1) + "\n")
    print(table(found, args.schemes))
    if args.plot is not None:
        plot(losses, args.plot)


if __name__ == "__main__":
    main()
