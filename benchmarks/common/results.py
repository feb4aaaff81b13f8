"""Results of a benchmark: a table on the screen, and rows of docs/benchmarks.csv with device, versions and commit."""

from __future__ import annotations

import argparse
import csv
import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import hf_fp8

from .. import ROOT
from .provenance import commit, cpu, version

CSV = ROOT / "docs" / "benchmarks.csv"
COLUMNS = [
    "date", "device", "threads", "torch", "transformers", "triton", "torchao", "hf_fp8", "commit",
    "benchmark", "case", "scheme", "dtype",
    "m", "n", "k", "contender", "ms", "ratio_to_dense", "ratio_to_stock", "tflops", "gbs", "roofline_pct", "gb", "note",
]  # fmt: skip
ON_GPU = torch.cuda.is_available()
console = Console(width=150)


def parser(about: str | None) -> argparse.ArgumentParser:
    """With the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if ON_GPU else "cpu")
    made.add_argument("--dtype", default="bfloat16" if ON_GPU else "float32", choices=["float32", "bfloat16", "float16"])
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--csv", type=Path, default=CSV, help="the file that rows are appended to (default: docs/benchmarks.csv)")
    return made


def add_threads(made: argparse.ArgumentParser) -> None:
    """--threads, for benchmarks that say CPU seconds, too."""
    given = int(os.environ.get("BENCH_THREADS", torch.get_num_threads()))
    about = f"of a CPU; everything is measured anew with each number (default: BENCH_THREADS, or all: {given})"
    made.add_argument("--threads", nargs="+", type=int, default=[given], help=about)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu()


@dataclass
class Line:
    """Of a table: the contender and its numbers, or the error in their place. row: its columns of the CSV file."""

    contender: str
    cells: Sequence[float] = ()
    row: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class Results:
    """Prints tables, and appends their rows to the CSV file, each with where and with what it was measured."""

    def __init__(self, device: str, path: Path) -> None:
        self.path = path
        self.common: dict[str, Any] = {
            "date": datetime.date.today().isoformat(), "device": device_name(device), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": transformers.__version__, "triton": version("triton"),
            "torchao": version("torchao"), "hf_fp8": hf_fp8.__version__, "commit": commit(),
        }  # fmt: skip

    def add(self, title: str, columns: Sequence[str], lines: Iterable[Line]) -> None:
        lines = list(lines)
        table = Table("contender", *columns, title=title)
        for line in lines:
            cells = [f"not measured: {line.error}"] if line.error else [f"{cell:.3g}" for cell in line.cells]
            table.add_row(line.contender, *cells)
        console.print(table)
        self._append({"contender": line.contender, **line.row} for line in lines if not line.error)

    def _append(self, rows: Iterable[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            for row in rows:
                rounded = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
                writer.writerow(self.common | rounded)
