"""Times of the tiles that the tables of hf_fp8/kernels/triton could hold. Eight processes compile them all first."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_fp8 import kernels
from hf_fp8.kernels.triton import scaled_mm, weight_only

from .. import ROOT
from ..common.contenders import SCHEMES
from ..common.timing import first_line
from ..kernels import COLD_BYTES, quantized
from .machine import Machine, Rows

MODULES: dict[str, Any] = {"triton_weight_only": weight_only, "triton_scaled_mm": scaled_mm}
COLUMNS = ("kernel", "scheme", "m", "n", "k", "tile", "us", "tbs", "tflops", "error")
# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)
FEW = [(16, 32, 256, 4, 4), (16, 32, 256, 2, 4), (16, 64, 128, 4, 4), (16, 64, 256, 4, 3), (16, 128, 128, 4, 4),
       (16, 128, 128, 8, 4)]  # fmt: skip
SOME = [(32, 32, 256, 4, 4), (32, 64, 128, 4, 4), (32, 128, 128, 4, 4), (32, 128, 128, 8, 4)]
MORE = [(64, 64, 128, 4, 4), (64, 128, 64, 4, 4), (64, 128, 128, 8, 3)]
SCALED = [(64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (64, 256, 128, 8, 3), (128, 64, 128, 4, 4), (128, 128, 128, 8, 3),
          (128, 128, 128, 8, 4), (128, 128, 128, 4, 3), (128, 256, 128, 8, 3), (256, 128, 128, 8, 3)]  # fmt: skip


@dataclass(frozen=True)
class Case:
    kernel: str
    scheme: str
    m: int
    n: int
    k: int
    tile: tuple[int, ...]


def cases(machine: Machine) -> list[Case]:
    sizes = [(64, 128)] if machine.dry else [(4096, 4096), (28672, 4096), (4096, 14336)]
    found = [
        Case("triton_weight_only", "channel", m, n, k, tile)
        for m, tiles in ((1, FEW), (16, FEW), (32, SOME + MORE), (64, SOME + MORE))
        for n, k in sizes
        for tile in tiles
    ]
    found += [
        Case("triton_scaled_mm", scheme, m, n, k, tile)
        for scheme in ("block", "channel")
        for m in (64, 256, 2048)
        for n, k in sizes[:2]
        for tile in SCALED
        if m >= tile[0]
    ]
    if machine.dry:  # one for each kernel and scheme
        return list({(case.kernel, case.scheme): case for case in found if case.m <= 64}.values())
    return found


def measure(case: Case, layers: list[Any], machine: Machine, compile_only: bool) -> dict[str, Any]:
    x = torch.randn(case.m, case.k, device=machine.device, dtype=torch.bfloat16)
    MODULES[case.kernel].TILES = ((1 << 62, *case.tile),)
    try:
        with torch.no_grad(), kernels.use(case.kernel):
            layers[0](x)
            if compile_only:
                return {}
            taken = machine.in_graph(lambda: [layer(x) for layer in layers]) / len(layers)
    except Exception as error:
        return {"error": first_line(error)}
    flops = 2 * case.m * case.n * case.k
    return {"us": taken * 1e6, "tbs": case.n * case.k / taken / 1e12, "tflops": flops / taken / 1e12}


def probe(machine: Machine) -> None:
    """The kernels are probed with the tiles that the tables have."""
    n, k = (64, 128) if machine.dry else (256, 512)
    layer = quantized(SCHEMES["channel"], torch.randn(n, k, device=machine.device), "auto", machine.device)
    for name in MODULES:
        with torch.no_grad(), kernels.use(name):
            layer(torch.randn(4, k, device=machine.device, dtype=torch.bfloat16))


def run(out: Path, machine: Machine) -> None:
    part, parts = os.environ.get("DAY_PART"), 1 if machine.dry else 8
    todo, rows = cases(machine), None
    if part is None:
        command = [sys.executable, "-m", f"{__package__}.step", "sweep", str(out), *["--dry"][: machine.dry]]
        compiling = [
            subprocess.Popen(command, cwd=ROOT, env={**os.environ, "DAY_PART": str(number)}, stdout=subprocess.DEVNULL)
            for number in range(parts)
        ]
        for process in compiling:
            process.wait()
        rows = Rows(out / "sweep.csv", *COLUMNS)
    else:
        todo = todo[int(part) :: parts]
    probe(machine)
    layers: dict[tuple[str, int, int], list[Any]] = {}
    for case in todo:
        key = (case.scheme, case.n, case.k)
        if key not in layers:
            layers.clear()
            copies = 1 if part or machine.dry else max(2, int(COLD_BYTES["cuda"] / (case.n * case.k)))
            weight = torch.randn(case.n, case.k, device=machine.device) * 0.02
            layers[key] = [quantized(SCHEMES[case.scheme], weight, "auto", machine.device) for _ in range(copies)]
        found = measure(case, layers[key], machine, part is not None)
        if rows:
            rows.add(**{**vars(case), "tile": "x".join(map(str, case.tile))}, **found)
