"""What steps are given: the machine, with its ways to time, and CSV files that are written row by row."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.timing import median, time_of


@dataclass(frozen=True)
class Machine:
    """dry: the steps run on a CPU with tiny sizes, Triton's kernels in its interpreter."""

    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def seconds(self, call: Callable[[], object], rounds: int = 7) -> float:
        """Median of single calls, each waited for, after two that do not count."""
        if self.dry:
            return time_of(call, self.device)
        return median([time_of(call, self.device) for _ in range(rounds + 2)][2:])

    def in_graph(self, call: Callable[[], object]) -> float:
        """Median seconds of a replay: what the GPU takes, without the CPU's part. Called once before, to compile and probe."""
        if self.dry:
            return self.seconds(call)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self.seconds(graph.replay)


class Rows:
    """A CSV file that is written row by row, so that a step that is stopped leaves what it had."""

    def __init__(self, path: Path, *columns: str) -> None:
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, columns, restval="")
        self.writer.writeheader()

    def add(self, **row: Any) -> None:
        self.writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
        self.file.flush()
