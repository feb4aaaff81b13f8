"""Where a model will compute, by the `device_map` it is loaded with."""

from __future__ import annotations

from typing import Any

import torch

_PLACED_BY_SIZE = ("auto", "balanced", "balanced_low_0", "sequential")


def compute_device(device_map: Any) -> torch.device:
    """Where the model will compute. Offloaded parts compute on the accelerator; without a map the model
    is loaded on CPU, from where users move it to the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device_map is None or device_map in _PLACED_BY_SIZE:
        return torch.device("cpu") if accelerator is None else accelerator
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    for device in devices:
        if device not in ("cpu", "disk", torch.device("cpu")):
            return torch.device(accelerator.type, device) if isinstance(device, int) and accelerator else torch.device(device)
    return torch.device("cpu")
