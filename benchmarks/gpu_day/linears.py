"""Linears of Llama-3-8B: kernels, dense, torch's raw matmuls, stock, torchao; eager and in a CUDA graph, weights cold."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_fp8.formats import numerics

from .. import kernels
from ..common import shapes
from ..common.contenders import SCHEMES, Contender
from ..common.timing import first_line
from .machine import Machine, Rows

COLUMNS = ("scheme", "m", "n", "k", "contender", "eager_us", "graph_us", "eager_x", "graph_x", "tbs", "error")
# What a user gets, each kernel, and peers.
KEPT = ("dense", "hf_fp8 auto", "scaled_mm", "triton_", "stock", "torchao per-row", "torchao weight-only")
# Compiling takes long: one peer, for the last shape and two numbers of rows.
COMPILED, COMPILED_AT = "torchao per-row, compiled", (1, 2048)
DTYPE = torch.bfloat16


def raw(scheme: str, layers: list[Any], m: int, machine: Machine) -> Iterator[Contender]:
    """torch's own matmuls on codes that are there already: how much of the time is not theirs."""
    n, k = layers[0].weight.shape
    given = layers[0].scheme.input
    q, scale = numerics.quantize_input(torch.randn(m, k, device=machine.device, dtype=DTYPE), given, None)
    if scheme == "channel":
        pairs = [(layer.weight.codes.t(), layer.weight_scale.float().reshape(1, -1)) for layer in layers]
        for fast in (False, True)[: 1 if machine.dry else 2]:  # CPUs have no fast accumulation
            how = {"out_dtype": DTYPE, "use_fast_accum": fast}
            calls: list[Callable[..., Any]]
            calls = [lambda _, w=w, s=s, how=how: torch._scaled_mm(q, w, scale, s, **how) for w, s in pairs]
            yield Contender(f"raw row-wise, fast_accum={fast}", calls, n * k, True)
    else:
        # cuBLAS wants rows in fours, and scales of weights with a multiple of four along K.
        q, scale = F.pad(q.view(torch.uint8), (0, 0, 0, -m % 4)).view(q.dtype), F.pad(scale, (0, 0, 0, -m % 4))
        scale, more, kinds = scale.t().contiguous().t(), (-k // 128) % 4, F.ScalingType
        pairs = [(layer.weight.codes.t(), F.pad(layer.weight_scale.float(), (0, more)).t()) for layer in layers]
        calls = [
            lambda _, w=w, s=s: F.scaled_mm(q, w, scale, kinds.BlockWise1x128, s, kinds.BlockWise128x128, output_dtype=DTYPE)
            for w, s in pairs
        ]
        yield Contender("raw block-wise", calls, n * k, True)


def measured(them: list[Contender], m: int, k: int, machine: Machine) -> Iterator[dict[str, Any]]:
    """Times and ratios of each, to the first of them."""
    kernels.measure(them, m, k, DTYPE, machine.device, 1 if machine.dry else 5)
    x = torch.randn(m, k, device=machine.device, dtype=DTYPE)
    eager = graph = float("nan")
    for contender in them:
        row: dict[str, Any] = {"contender": contender.name, "error": contender.error}
        if not contender.error:
            eager = contender.seconds if contender is them[0] else eager
            row |= {"eager_us": contender.seconds * 1e6, "eager_x": eager / contender.seconds}
            try:
                with torch.no_grad(), contender.chosen():
                    taken = machine.in_graph(lambda c=contender: [call(x) for call in c.calls]) / len(contender.calls)  # type: ignore[misc]
                graph = taken if contender is them[0] else graph
                row |= {"graph_us": taken * 1e6, "graph_x": graph / taken, "tbs": contender.weight_bytes / taken / 1e12}
            except Exception as error:
                row["error"] = f"in a graph: {first_line(error)}"
        yield row


def contenders(scheme: str, n: int, k: int, machine: Machine, last: bool) -> list[Contender]:
    """Those of `scripts/bench kernels` that count here. last: with the compiled one."""
    cold = 1 if machine.dry else None
    every = kernels.contenders(SCHEMES[scheme], n, k, DTYPE, machine.device, machine.dry, cold)
    wanted = [c for c in every if c.name.startswith(KEPT) or c.name == "torchao"]
    return [c for c in wanted if "compiled" not in c.name or (last and c.name == COMPILED)]


def run(out: Path, machine: Machine) -> None:
    sys.path += filter(None, [os.environ.get("DAY_PEERS")])
    rows = Rows(out / "linears.csv", *COLUMNS)
    sizes = sorted(shapes.LINEARS["llama-3-8b"], key=lambda nk: nk[0] * nk[1])
    ms = (1, 4, 16, 32, 64, 128, 256, 2048, 8192)
    if machine.dry:
        sizes, ms = [(64, 128), (128, 128)], (1, 17)
    for scheme, chosen in (("channel", sizes[:-1]), ("block", sizes[-2:]), ("channel", sizes[-1:])):
        for n, k in chosen:
            them = contenders(scheme, n, k, machine, scheme == "channel" and (n, k) == sizes[-1])
            layers: Any = next(c.calls for c in them if c.name == "hf_fp8 auto")
            for m in ms:
                now = [c.again() for c in them if c.name != COMPILED or m in COMPILED_AT]
                try:
                    now += raw(scheme, layers, m, machine)
                except Exception as error:
                    rows.add(scheme=scheme, m=m, n=n, k=k, contender="raw", error=first_line(error))
                for row in measured(now, m, k, machine):
                    rows.add(scheme=scheme, m=m, n=n, k=k, **row)
            del them, layers, now
