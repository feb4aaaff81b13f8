"""One linear at a time: every kernel that takes it, as users get it, and peers; against the dense linear of the same dtype.

Each contender cycles over copies of its weight that together exceed the last cache, all contenders take turns
round by round, and the median of the rounds counts. Quantizing the input is always part of the time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from hf_fp8 import FP8Linear, kernels
from hf_fp8.formats import numerics
from hf_fp8.formats.scheme import FP8_BLOCK, FP8_DYNAMIC, FP8_STATIC, INT8_DYNAMIC, Scheme
from hf_fp8.kernels import KERNELS, WEIGHT_ONLY, Problem

SCHEMES = {"channel": FP8_DYNAMIC, "static": FP8_STATIC, "block": FP8_BLOCK}
# What is cycled through: more than the last-level cache of a GPU (50 MB of an H100), a good part of a server CPU's.
COLD_BYTES = {"cuda": 400e6, "cpu": 300e6}
# bytes/s and dense bfloat16 FLOP/s as the makers state them; 8-bit units do twice as many. What is not here is measured.
PEAKS = {
    "H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12), "B200": (8e12, 2250e12), "A100-SXM4-80GB": (2.04e12, 312e12),
    "L40S": (0.864e12, 362e12), "4090": (1.01e12, 165e12),
}  # fmt: skip


@dataclass
class Contender:
    """A way to compute the linear. `calls` are the same one over different copies of the weight."""

    name: str
    calls: list[Callable[[torch.Tensor], torch.Tensor]]
    weight_bytes: int
    eight_bit: bool = False
    forced: str | None = None
    times: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def seconds(self) -> float:
        return statistics.median(self.times) if self.times else float("nan")


@dataclass(frozen=True)
class Peak:
    """What the device can do: bytes/s, FLOP/s at the dtype and with 8-bit operands, and where the numbers are from."""

    bandwidth: float
    flops: float
    flops_8bit: float
    source: str


def peaks(device: str, dtype: torch.dtype) -> Peak:
    """As the maker states them, else measured now: the best of reading, of a dense matmul and of an int8 one."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for key, (bandwidth, flops) in PEAKS.items():
            if key in name:
                return Peak(bandwidth, flops, 2 * flops, "stated by the maker")
    wide = torch.randn(16384, 4096, device=device)
    vector = torch.randn(1, 4096, device=device)
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    c, d = (torch.randint(-9, 9, (n, n), device=device, dtype=torch.int8) for _ in range(2))
    read = min(time_of(lambda: F.linear(vector, wide), device) for _ in range(15))
    dense = min(time_of(lambda: a @ b, device) for _ in range(9))
    eight = min(time_of(lambda: torch._int_mm(c, d.t()), device) for _ in range(9))
    flops = 2 * n**3
    return Peak(wide.numel() * 4 / read, flops / dense, flops / eight, "the best measured here")


def time_of(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _layer(scheme: Scheme, weight: torch.Tensor, backend: str, device: str) -> FP8Linear:
    n, k = weight.shape
    layer = FP8Linear(k, n, scheme, backend=backend, device=device)
    scale = numerics.compute_scale(weight, scheme.weight.granularity)
    layer.weight.data = numerics.quantize(weight, scale, scheme.weight.granularity)
    layer.weight_scale.data = scale.reshape(layer.weight_scale.shape)
    if layer.input_scale is not None:
        layer.input_scale.data.fill_(4 / 448)
    return layer


def contenders(scheme: Scheme, n: int, k: int, dtype: torch.dtype, device: str, slow: bool) -> list[Contender]:
    """Dense first. slow: also those that are there for correctness on a CPU."""
    copies = max(2, int(COLD_BYTES[device] / (n * k)))
    weights = [torch.randn(n, k, device=device) * 0.02 for _ in range(2)]
    dense = [weights[i % 2].to(dtype).clone() for i in range(max(2, copies // dtype.itemsize))]
    found = [Contender("dense", [lambda x, w=w: F.linear(x, w) for w in dense], n * k * dtype.itemsize)]
    layers = [_layer(scheme, weights[i % 2], "auto", device) for i in range(copies)]
    int8 = [_layer(scheme, weights[i % 2], "auto", device) for i in range(copies)]
    for layer in int8:
        layer.requantize_int8()
    if device != "cpu" or slow:
        found.append(Contender("hf_fp8 auto", list(layers), n * k, True))  # type: ignore[arg-type]
    found.append(Contender("hf_fp8 int8", list(int8), n * k, True))  # type: ignore[arg-type]
    for given, held in ((scheme, layers), (INT8_DYNAMIC, int8)):
        problem = Problem(torch.device(device), given, n, k, dtype)
        for kernel in KERNELS:
            reference = kernel.name in ("dequantize", "weight_only")
            if (reference or given is not INT8_DYNAMIC) and device == "cpu" and not slow:
                continue
            if kernel.wrong_scheme(given) or kernel.wrong_device(problem) or (given is INT8_DYNAMIC and reference):
                continue
            prefix = "int8: " if given is INT8_DYNAMIC and not kernel.name.startswith("int8") else ""
            eight_bit = kernel not in WEIGHT_ONLY
            found.append(Contender(prefix + kernel.name, list(held), n * k, eight_bit, kernel.name))  # type: ignore[arg-type]
    found += _peers(layers, scheme, n, k, dtype, device, slow)
    return found


def _peers(
    layers: list[FP8Linear], scheme: Scheme, n: int, k: int, dtype: torch.dtype, device: str, slow: bool
) -> list[Contender]:
    found: list[Contender] = []
    if scheme is FP8_DYNAMIC and (device != "cpu" or slow):
        from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

        calls = []
        for layer in layers:
            with torch.device("meta"):
                stock = CompressedTensorsFP8Linear(k, n)
            stock.weight = torch.nn.Parameter(layer.weight.codes, requires_grad=False)
            stock.weight_scale = torch.nn.Parameter(layer.weight_scale.float().reshape(1, n), requires_grad=False)
            calls.append(stock)
        found.append(Contender("stock FP8 linear", calls, n * k, True))
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Float8WeightOnlyConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError:
        return found
    configs = {"torchao int8": Int8DynamicActivationInt8WeightConfig()}
    if device != "cpu":
        configs |= {
            "torchao per-row": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
            "torchao weight-only": Float8WeightOnlyConfig(),
        }
    for name, config in configs.items():
        for compiled in (False,) if device == "cpu" else (False, True):
            calls = []
            try:
                for layer in layers[: 4 if compiled else None]:
                    dense = torch.nn.Sequential(layer.to_linear(dtype))
                    quantize_(dense, config)
                    calls.append(torch.compile(dense) if compiled else dense)
            except Exception as error:  # it asserts what it wants of the device
                found.append(Contender(name, [], n * k, error=str(error).split("\n")[0][:100]))
                break
            found.append(Contender(f"{name}{', compiled' if compiled else ''}", calls, n * k, "only" not in name))
    return found


@torch.no_grad()
def measure(them: list[Contender], m: int, k: int, dtype: torch.dtype, device: str, rounds: int) -> None:
    x = torch.randn(m, k, device=device, dtype=dtype)
    turn = 0
    for number in range(rounds + 1):
        for contender in them:
            if not contender.calls or contender.error:
                continue
            # The longest that is still short: about 20 ms a turn on a CPU, 5 ms on a GPU.
            repeat = (
                1 if not contender.times else max(1, min(200, int((0.02 if device == "cpu" else 0.005) / contender.seconds)))
            )
            try:
                begun = turn

                def run(contender: Contender = contender, begun: int = begun, repeat: int = repeat) -> None:
                    for i in range(repeat):
                        contender.calls[(begun + i) % len(contender.calls)](x)

                with kernels.use(contender.forced) if contender.forced else nullcontext():
                    if number == 0:
                        contender.calls[0](x)  # compiles, probes
                    seconds = time_of(run, device) / repeat
            except Exception as error:  # a peer that does not take M = 1, say: reported, not hidden
                contender.error = str(error).split("\n")[0][:100]
                continue
            if number or repeat == 1:
                contender.times.append(seconds)
            turn += repeat
    for contender in them:
        contender.times = contender.times[1:] or contender.times


def roofline(contender: Contender, m: int, n: int, k: int, dtype: torch.dtype, peak: Peak) -> dict[str, float]:
    """TFLOP/s, GB/s, and the share of what memory and arithmetic units allow at best."""
    flops = 2 * m * n * k
    moved = contender.weight_bytes + (m * k + m * n) * dtype.itemsize
    least = max(moved / peak.bandwidth, flops / (peak.flops_8bit if contender.eight_bit else peak.flops))
    return {
        "tflops": flops / contender.seconds / 1e12,
        "gbs": moved / contender.seconds / 1e9,
        "roofline_pct": 100 * least / contender.seconds,
    }
