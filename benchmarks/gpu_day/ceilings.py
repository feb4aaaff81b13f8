"""What the card does at best: memory, a matmul in BF16 and in FP8, a launch; and all versions."""

from __future__ import annotations

from pathlib import Path

import torch

from ..common.provenance import version
from .machine import Machine, Rows


def run(out: Path, machine: Machine) -> None:
    device = machine.device
    rows = Rows(out / "ceilings.csv", "what", "value")
    rows.add(what="device", value="CPU, dry" if machine.dry else torch.cuda.get_device_name())
    for package in ("torch", "triton", "transformers"):
        rows.add(what=package, value=version(package))
    size = 2**10 if machine.dry else 2**30
    a, b = (torch.randint(0, 255, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    rows.add(what="copy, TB/s read and written", value=2 * size / machine.seconds(lambda: b.copy_(a)) / 1e12)
    n = 64 if machine.dry else 8192
    x, y = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    rows.add(what=f"bf16 {n}^3, TFLOP/s", value=2 * n**3 / machine.seconds(lambda: x @ y.t()) / 1e12)
    q, w = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn)
    ones = torch.ones(n, 1, device=device)
    for fast in (False, True)[: 1 if machine.dry else 2]:  # CPUs have no fast accumulation

        def call(fast: bool = fast) -> torch.Tensor:
            return torch._scaled_mm(q, w.t(), ones, ones.t(), out_dtype=torch.bfloat16, use_fast_accum=fast)

        rows.add(what=f"fp8 row-wise {n}^3, fast_accum={fast}, TFLOP/s", value=2 * n**3 / machine.seconds(call) / 1e12)
    tiny = torch.ones(8, device=device)
    launch = machine.seconds(lambda: [tiny.add_(1) for _ in range(1000)]) / 1000
    rows.add(what="CPU time of one small launch, us", value=launch * 1e6)
