"""Draws docs/performance.svg from docs/benchmarks.csv, `scripts/bench plot`: speed-up over the dense linear against M."""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from . import ROOT
from .common.results import CSV

# Bytes of a dense weight over bytes of an 8-bit one; 8-bit units are twice as fast as those for bfloat16.
LIMIT = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


def draw(source: Path, target: Path) -> Path:
    """A panel for each device and dtype of the kernel benchmark; the newest rows of each count. Geometric mean over shapes."""
    with source.open() as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] == "kernel" and row["scheme"] == "channel"]
    newest: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        newest[tuple(row[key] for key in ("device", "dtype", "case", "m", "n", "k", "contender"))] = row
    panels: dict[tuple[str, str, str], dict[str, dict[int, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in newest.values():
        if row["contender"] != "dense":
            panel = panels[row["device"], row["dtype"], row["case"]]
            panel[row["contender"]][int(row["m"])].append(float(row["ratio_to_dense"]))
    if not panels:
        raise SystemExit(f"no kernel benchmark in {source}: run scripts/bench kernels")
    plt.rcParams["svg.hashsalt"] = "hf_fp8"  # the same rows, the same file
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False, sharey=False)
    for axis, ((device, dtype, case), lines) in zip(axes[0], sorted(panels.items()), strict=True):
        for name, points in sorted(lines.items()):
            ms = sorted(points)
            means = [math.exp(sum(map(math.log, points[m])) / len(points[m])) for m in ms]
            axis.plot(ms, means, marker="o", markersize=3, label=name, linewidth=2.2 if name.startswith("hf_fp8") else 1)
        axis.axhline(LIMIT[dtype], color="black", linestyle="--", linewidth=1)
        axis.text(1, LIMIT[dtype] * 1.02, f"limit of bytes: {LIMIT[dtype]:.0f}x", fontsize=7)
        axis.axhline(1, color="gray", linewidth=0.6)
        axis.set(xscale="log", yscale="log", xlabel="M (rows of input)", ylabel=f"x dense {dtype}")
        axis.set_yticks([0.1, 0.25, 0.5, 1, 2, 4, 8], ["0.1", "0.25", "0.5", "1", "2", "4", "8"])
        axis.set_xticks(ms, [str(m) for m in ms])
        axis.minorticks_off()
        axis.set_title(f"{device}\n{case}, {dtype}", fontsize=8)
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    return target


def arguments() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__)


def main() -> None:
    arguments().parse_args()
    print(f"wrote {draw(CSV, ROOT / 'docs' / 'performance.svg')}")


if __name__ == "__main__":
    main()
