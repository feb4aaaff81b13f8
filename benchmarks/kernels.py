"""Single linears, `scripts/bench kernels`: each kernel, hf_fp8 as users get it, and peers, against the dense linear.

Each contender cycles over copies of its weight that together exceed the last cache, all contenders take turns
round by round, and the median of the rounds counts. Quantizing the input is always part of the time. "CPU ms" are of all
threads together: with one thread they are the work, also on a busy machine; with more they count threads that wait for others.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from hf_fp8 import QuantizedLinear, kernels
from hf_fp8.formats import native, numerics
from hf_fp8.formats.scheme import FP8_DYNAMIC, INT8_DYNAMIC, Scheme
from hf_fp8.kernels import KERNELS, WEIGHT_ONLY, Problem
from hf_fp8.kernels.probing import int_mm_is_slow

from .common import peers, results, shapes
from .common.contenders import SCHEMES, Contender, Peak, peaks
from .common.results import ON_GPU, Line, Results
from .common.timing import cost_of, first_line

# What is cycled through: more than the last-level cache of a GPU (50 MB of an H100), a good part of a server CPU's.
COLD_BYTES = {"cuda": 400e6, "cpu": 300e6}


def quantized(scheme: Scheme, weight: torch.Tensor, backend: str, device: str) -> QuantizedLinear:
    n, k = weight.shape
    layer = QuantizedLinear(k, n, scheme, backend=backend, device=device)
    scale = numerics.compute_scale(weight, scheme.weight.granularity)
    layer.weight.data = numerics.quantize(weight, scale, scheme.weight.granularity)
    layer.weight_scale.data = scale.reshape(layer.weight_scale.shape)
    if layer.input_scale is not None:
        layer.input_scale.data.fill_(4 / 448)
    return layer


def contenders(
    scheme: Scheme, n: int, k: int, dtype: torch.dtype, device: str, slow: bool, cold_bytes: float | None = None
) -> list[Contender]:
    """Dense first. slow: also those that are there for correctness on a CPU. cold_bytes: for copies, if not `COLD_BYTES`."""
    copies = max(2, int((cold_bytes or COLD_BYTES[device]) / (n * k)))
    weights = [torch.randn(n, k, device=device) * 0.02 for _ in range(2)]
    dense = [weights[i % 2].to(dtype).clone() for i in range(max(2, copies // dtype.itemsize))]
    found = [Contender("dense", [lambda x, w=w: F.linear(x, w) for w in dense], n * k * dtype.itemsize)]
    layers = [quantized(scheme, weights[i % 2], "auto", device) for i in range(copies)]
    int8 = [quantized(scheme, weights[i % 2], "auto", device) for i in range(copies)]
    for layer in int8:
        layer.requantize_int8()
    native_runs = native.why_not() is None
    if device != "cpu" or slow or native_runs:
        found.append(Contender("hf_fp8 auto", list(layers), n * k, True))  # type: ignore[arg-type]
    found.append(Contender("hf_fp8 int8", list(int8), n * k, True))  # type: ignore[arg-type]
    for given, held in ((scheme, layers), (INT8_DYNAMIC, int8)):
        problem = Problem(torch.device(device), given, n, k, dtype)
        for kernel in KERNELS:
            reference = kernel.name in ("dequantize", "weight_only")
            is_native = kernel.name.startswith("native")
            if (reference or (given is not INT8_DYNAMIC and not is_native)) and device == "cpu" and not slow:
                continue
            if kernel.name.startswith("int8_mm") and device == "cpu" and not slow and int_mm_is_slow():
                continue  # ten times as slow as the others
            if kernels.why_not(kernel, problem) or (given is INT8_DYNAMIC and reference):
                continue
            prefix = "int8: " if given is INT8_DYNAMIC and "int8" not in kernel.name else ""
            eight_bit = kernel not in WEIGHT_ONLY
            found.append(Contender(prefix + kernel.name, list(held), n * k, eight_bit, kernel.name))  # type: ignore[arg-type]
    if scheme is FP8_DYNAMIC and (device != "cpu" or slow):
        found.append(Contender("stock FP8 linear", [stock_linear(layer) for layer in layers], n * k, True))
    return found + _torchao(layers, n, k, dtype, device)


def stock_linear(layer: QuantizedLinear) -> torch.nn.Module:
    """The host's own FP8 linear over the same codes, as its `use_optimized_inference` runs it."""
    from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

    with torch.device("meta"):
        stock = CompressedTensorsFP8Linear(layer.in_features, layer.out_features)
    stock.weight = torch.nn.Parameter(layer.weight.codes, requires_grad=False)
    stock.weight_scale = torch.nn.Parameter(layer.weight_scale.float().reshape(1, -1), requires_grad=False)
    return stock  # type: ignore[no-any-return]


def _torchao(layers: list[QuantizedLinear], n: int, k: int, dtype: torch.dtype, device: str) -> list[Contender]:
    try:
        from torchao import quantization
    except ImportError as error:
        return [Contender("torchao", [], 0, error=peers.why_not(error))]
    configs = {"torchao int8": quantization.Int8DynamicActivationInt8WeightConfig()}
    if device != "cpu":
        rows = quantization.PerRow()
        configs["torchao per-row"] = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=rows)
        configs["torchao weight-only"] = quantization.Float8WeightOnlyConfig()
    found = []
    for name, config in configs.items():
        for compiled in (False,) if device == "cpu" else (False, True):
            calls = []
            try:
                for layer in layers[: 4 if compiled else None]:
                    dense = torch.nn.Sequential(layer.to_linear(dtype))
                    quantization.quantize_(dense, config)
                    calls.append(torch.compile(dense) if compiled else dense)
            except Exception as error:  # it asserts what it wants of the device
                found.append(Contender(name, [], n * k, error=first_line(error)))
                break
            found.append(Contender(f"{name}{', compiled' if compiled else ''}", calls, n * k, "only" not in name))
    return found


@torch.no_grad()
def measure(them: list[Contender], m: int, k: int, dtype: torch.dtype, device: str, rounds: int) -> None:
    """Fill in `times`, `cpu_times` and `error`, by `rounds` rounds after one that does not count."""
    x = torch.randn(m, k, device=device, dtype=dtype)
    longest = 0.02 if device == "cpu" else 0.005  # seconds a turn
    turn = 0
    for number in range(rounds + 1):
        for contender in them:
            if contender.error:
                continue
            calls = contender.calls
            repeat = max(1, min(200, int(longest / contender.seconds))) if contender.times else 1
            turns = [calls[(turn + i) % len(calls)] for i in range(repeat)]
            try:
                with contender.chosen():
                    if number == 0:
                        calls[0](x)  # compiles, probes
                    for call in turns:  # a layer prepares its next call, and other contenders chose another kernel for it
                        call(x)
                    cost = cost_of(lambda turns=turns: [call(x) for call in turns], device)  # type: ignore[misc]
            except Exception as error:  # a peer that does not take M = 1, say: reported, not hidden
                contender.error = first_line(error)
                continue
            contender.times.append(cost.wall / repeat)
            contender.cpu_times.append(cost.cpu / repeat)
            turn += repeat
    for contender in them:
        contender.times, contender.cpu_times = contender.times[1:], contender.cpu_times[1:]


def line(contender: Contender, dense: Contender, stock: Contender | None, size: tuple[int, int, int], peak: Peak) -> Line:
    """size: M, N, K."""
    m, n, k = size
    if contender.error:
        return Line(contender.name, error=contender.error)
    to_dense, to_stock = (other.seconds / contender.seconds if other else float("nan") for other in (dense, stock))
    itemsize = dense.weight_bytes // (n * k)
    best = peak.roofline(contender, 2 * m * n * k, contender.weight_bytes + (m * k + m * n) * itemsize)
    row = {
        "benchmark": "kernel", "m": m, "n": n, "k": k, "ms": contender.seconds * 1e3, "ratio_to_dense": to_dense,
        "ratio_to_stock": to_stock, **best, "note": f"CPU {contender.cpu_seconds * 1e3:.4g} ms",
    }  # fmt: skip
    cells = [contender.seconds * 1e3, contender.cpu_seconds * 1e3, to_dense, to_stock, *best.values()]
    return Line(contender.name, cells, row)


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=shapes.LINEARS, default=["llama-3-8b" if ON_GPU else "smollm2-135m"])
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64, 256, 2048] + ([8192] if ON_GPU else []))
    parser.add_argument("--scheme", choices=SCHEMES, default="channel")
    parser.add_argument("--slow", action="store_true", help="on a CPU, also what has no fast FP8 there")
    results.add_threads(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    for threads in args.threads:
        torch.set_num_threads(threads)
        run(args)


def run(args: argparse.Namespace) -> None:
    """With the number of threads that torch has now."""
    dtype = getattr(torch, args.dtype)
    peak = peaks(args.device, dtype)
    threads = torch.get_num_threads()
    results.console.print(
        f"{results.device_name(args.device)}: {peak.bandwidth / 1e9:.0f} GB/s, {peak.flops / 1e12:.2f} TFLOP/s {args.dtype}, "
        f"{peak.flops_8bit / 1e12:.2f} with 8 bits ({peak.source}, {threads} thread{'s' * (threads > 1)})"
    )
    log = Results(args.device, args.csv)
    for model in args.shapes:
        for n, k in shapes.LINEARS[model]:
            every = contenders(SCHEMES[args.scheme], n, k, dtype, args.device, args.slow)
            for m in args.m:
                them = [contender.again() for contender in every]
                measure(them, m, k, dtype, args.device, args.rounds)
                stock = next((c for c in them if c.name == "stock FP8 linear"), None)
                lines = [line(contender, them[0], stock, (m, n, k), peak) for contender in them]
                for each in lines:
                    each.row |= {"case": model, "scheme": args.scheme, "dtype": args.dtype}
                columns = ("ms", "CPU ms", "x dense", "x stock", "TFLOP/s", "GB/s", "% of roofline")
                log.add(f"M={m} N={n} K={k}", columns, lines)
            del every, them


if __name__ == "__main__":
    main()
