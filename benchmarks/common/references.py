"""Checkpoints of tests/data, which have stored references, and what models compute from tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from .. import ROOT


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """In float32, whatever the model computes in."""
    with torch.no_grad():
        out: torch.Tensor = model(ids, use_cache=False).logits.float()
    return out


def copied(name: str, path: Path) -> Path:
    """A copy, `path`, of a checkpoint of tests/data, without its reference."""
    shutil.copytree(ROOT / "tests" / "data" / name, path)
    (path / "reference.safetensors").unlink()
    return path
