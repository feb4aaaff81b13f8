"""What a model that was quantized while loading says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hf_fp8 import QuantizedLinear


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


def kept(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
