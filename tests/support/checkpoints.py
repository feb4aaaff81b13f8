"""The checkpoints of `tests/data`, with what they must give."""

from __future__ import annotations

import shutil
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
FOLDERS = sorted(path.name for path in DATA.iterdir() if path.is_dir())


def checkpoint(name: str, tmp_path: Path) -> Path:
    """A copy of a checkpoint, with its reference beside it, not in it."""
    path = tmp_path / name
    shutil.copytree(DATA / name, path)
    (path / "reference.safetensors").rename(tmp_path / "reference.safetensors")
    return path
