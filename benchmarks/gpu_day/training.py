"""Steps of LoRA: `scripts/bench training` for a stack of linears."""

from __future__ import annotations

from pathlib import Path

from .. import training
from .machine import Machine

CONTENDERS = ("BF16", "hf_fp8 scaled_mm", "hf_fp8 scaled_mm, backward quantized", "hf_fp8 weight_only")


def run(out: Path, machine: Machine) -> None:
    path = out / "training.csv"
    path.unlink(missing_ok=True)
    case, tokens, rounds = ("stack-64x2", "8", "1") if machine.dry else ("stack-4096x16", "2048", "7")
    how = ["--tokens", tokens, "--rounds", rounds, "--device", machine.device, "--dtype", "bfloat16", "--csv", str(path)]
    training.main([case, *how, "--contenders", *CONTENDERS])
