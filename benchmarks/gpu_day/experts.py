"""Layers of experts: `scripts/bench experts` for Qwen3-30B-A3B and Mixtral."""

from __future__ import annotations

from pathlib import Path

from .. import experts
from .machine import Machine


def run(out: Path, machine: Machine) -> None:
    path = out / "experts.csv"
    path.unlink(missing_ok=True)
    cases = [("qwen3-30b-a3b", "channel"), ("qwen3-30b-a3b", "block"), ("mixtral-8x7b", "channel")]
    how = ["--tokens", "1", "8", "64", "512", "4096", "--rounds", "5"]
    if machine.dry:
        cases, how = [("tiny", "channel"), ("tiny", "block")], ["--tokens", "1", "3", "--rounds", "1", "--slow"]
    for shape, scheme in cases:
        common = ["--csv", str(path), "--device", machine.device, "--dtype", "bfloat16"]
        experts.main(["--shapes", shape, "--scheme", scheme, *how, *common])
