"""Writes docs/quality.md and its picture, `scripts/page quality`: what FP8 costs SmolLM2, layer by layer."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fp8 import FP8Config
from hf_fp8.evaluation import QualityReport, quality
from hf_fp8.evaluation.rows import median, minimum, shown

from .. import CHECKPOINTS, ROOT
from ..common import smollm2
from ..common.provenance import measured_with
from .page import Page


@dataclass(frozen=True)
class Quality(Page):
    name = "quality"
    versions: str
    windows: str
    window: str
    tokens: str
    worst: str
    footer: str
    schemes: str


def measure(kind: str, reference: Any, path: Path, ids: torch.Tensor, windows: int) -> QualityReport:
    config = FP8Config(backend="scaled_mm")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    data = [{"input_ids": window, "use_cache": False} for window in smollm2.windows(ids[: windows * smollm2.WINDOW])]
    start = time.time()

    def tell(what: str, done: int, total: int | None) -> None:
        if what != "weights":
            print(f"{kind}: {what} {done} of {total}, {time.time() - start:.0f} s", file=sys.stderr, flush=True)

    return quality(reference, model, data, text=ids, window=smollm2.WINDOW, progress=tell)


def line(kind: str, report: QualityReport) -> str:
    """A line of the table of schemes."""
    values = [report.rows.values(measure) for measure in ("weight_sqnr", "output_sqnr", "accumulated_sqnr")]
    cells = [f"{shown(median(each))} / {shown(minimum(each))}" for each in values]
    kl = f"{report.kl_divergence:.4f}"
    return f"| {kind} | {'; '.join(report.schemes)} | {' | '.join(cells)} | {kl} | {report.perplexity_text()} |"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=smollm2.EVALUATION_TOKENS, help="how much prose to measure perplexity on")
    parser.add_argument("--windows", type=int, default=4, help="how many windows of it to compare outputs on")
    parser.add_argument("--folder", type=Path, default=CHECKPOINTS, help="where SmolLM2's checkpoints are kept")
    parser.add_argument("--target", type=Path, default=ROOT / "docs", help="where quality.md and quality.svg are written")
    return parser


def main() -> None:
    options = arguments().parse_args()
    Quality.check()
    for folder in (options.folder, options.target):
        folder.mkdir(parents=True, exist_ok=True)
    smollm2.quiet()
    dense = smollm2.write_dense(options.folder / "dense")
    ids = smollm2.evaluation(smollm2.prose(AutoTokenizer.from_pretrained(dense)), options.tokens)
    reference = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    reports = {}
    for kind in smollm2.KINDS:
        path = smollm2.write_fp8(dense, options.folder / kind, kind)
        reports[kind] = measure(kind, reference, path, ids, options.windows)
    report = reports["dynamic"]
    title = f"SmolLM2-135M, FP8_DYNAMIC: {'; '.join(report.schemes)}\nperplexity {report.perplexity_text()}"
    print(f"{report.worst(10)}\n\n{report.footer()}\n")
    lines = [line(kind, found) for kind, found in reports.items()]
    print("\n".join(lines))
    page = Quality(
        versions=measured_with(), windows=str(options.windows), window=str(smollm2.WINDOW), tokens=f"{len(ids):,}",
        worst=str(report.worst(10)), footer=report.footer(), schemes="\n".join(lines),
    )  # fmt: skip
    page.write(options.target, {"quality.svg": lambda path: report.plot(path, title)})


if __name__ == "__main__":
    main()
