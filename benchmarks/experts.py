"""Layers of experts, `scripts/bench experts`: FP8 beside what the host does in the dense dtype and in its own FP8.

Tokens are routed at random anew in each round, to distinct experts as routers do. All contenders take turns, the median
of the rounds counts; quantizing inputs and routing are part of the time.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_fp8 import QuantizedExperts, kernels
from hf_fp8.formats import numerics
from hf_fp8.formats.scheme import Scheme
from hf_fp8.kernels import GROUPED_KERNELS, Problem
from hf_fp8.nn.experts_layout import Projection

from .common import results
from .common.contenders import SCHEMES, Contender, Peak, peaks
from .common.results import ON_GPU, Line, Results
from .common.timing import first_line, time_of

# (hidden size, intermediate size of an expert, experts, experts per token)
SHAPES = {
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "deepseek-v3": (7168, 2048, 256, 8),
    "small": (1024, 512, 16, 2),
    "tiny": (128, 128, 4, 2),  # for Triton's interpreter
}


def dense_experts(name: str, dtype: torch.dtype, device: str) -> Qwen3MoeExperts:
    hidden, inner, experts, k = SHAPES[name]
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config).to(dtype)
    module = module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        for expert in parameter:  # one by one: no float32 copy of the whole
            expert.normal_(std=0.02)
    return module.eval()


def fp8_experts(dense: Qwen3MoeExperts, scheme: Scheme, device: str) -> QuantizedExperts:
    first, second = (
        Projection(name, tuple(getattr(dense, name).shape), scheme, parts)  # type: ignore[arg-type]
        for name, parts in (("gate_up_proj", 2), ("down_proj", 1))
    )
    module = QuantizedExperts(dense, first, second, device=device)
    granularity = scheme.weight.granularity
    for projection in (first, second):
        codes, scales = getattr(module, projection.name).codes, getattr(module, projection.scale)
        height, grid = codes.shape[1] // projection.parts, scales.shape[1] // projection.parts
        for expert, w in enumerate(getattr(dense, projection.name)):
            for part in range(projection.parts):
                rows = w[part * height : (part + 1) * height]
                scale = numerics.compute_scale(rows, granularity)
                codes[expert, part * height : (part + 1) * height] = numerics.quantize(rows, scale, granularity)
                scales[expert, part * grid : (part + 1) * grid] = scale.reshape(scales[expert, :grid].shape)
        if (static := getattr(module, projection.input_scale)) is not None:
            static.fill_(4 / 448)
    return module.eval()


def contenders(name: str, scheme: Scheme, dtype: torch.dtype, device: str, slow: bool) -> list[Contender]:
    """The host's dense experts first; then ours as users get them, and by kernel. slow: on a CPU, too."""
    dense = dense_experts(name, dtype, device)
    with torch.no_grad():
        fp8 = fp8_experts(dense, scheme, device)
    size = sum(p.numel() for p in dense.parameters()) // dense.num_experts

    def host(implementation: str) -> Any:
        def call(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            dense.config._experts_implementation = implementation
            return dense(x, ids, weights)  # type: ignore[no-any-return]

        return call

    # `batched_mm`, which copies the weights of each token's experts, is what `generate` switches to, but not on CPUs.
    ways = ("grouped_mm",) if device == "cpu" else ("grouped_mm", "batched_mm")
    found = [Contender(f"dense {way}", [host(way)], size * dtype.itemsize) for way in ways]
    found.append(Contender("hf_fp8 auto", [fp8], size, True))
    problem = Problem(torch.device(device), scheme, fp8.first.shape[1], fp8.first.shape[2], dtype)
    for kernel in GROUPED_KERNELS:
        # On a CPU one expert at a time is all there is, and what "auto" takes.
        if (device != "cpu" or slow) and kernels.why_not(kernel, problem) is None:
            found.append(Contender(kernel.name, [fp8], size, kernel.quantizes, kernel.name))
    found.append(_host_fp8(name, dense, fp8, size))
    return found


def _host_fp8(name: str, dense: Qwen3MoeExperts, fp8: QuantizedExperts, size: int) -> Contender:
    """The host's fine-grained FP8 experts, whose kernels come from the Hub; only for blocks of 128."""
    found = Contender("host's fine-grained FP8", [], size, True)
    if fp8.first.scheme.weight.granularity != SCHEMES["block"].weight.granularity:
        found.error = "block schemes only"
        return found
    try:
        from transformers.integrations import finegrained_fp8

        finegrained_fp8.load_finegrained_fp8_kernel()
        made = finegrained_fp8.use_experts_implementation(
            finegrained_fp8.FP8Experts, experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
        )
        with torch.device("meta"):
            host = made(dense.config, block_size=(128, 128))
        for projection in fp8.projections:
            setattr(host, projection.name, getattr(fp8, projection.name))
            setattr(host, f"{projection.name}_scale_inv", getattr(fp8, projection.scale))
        found.calls = [host]
    except Exception as error:
        found.error = first_line(error)
    return found


def measure(them: list[Contender], name: str, tokens: int, dtype: torch.dtype, device: str, rounds: int) -> int:
    """Fill in `times`; returns how many experts had rows, on average."""
    hidden, _, experts, k = SHAPES[name]
    distinct = []
    for number in range(rounds + 1):
        x = torch.randn(tokens, hidden, device=device, dtype=dtype)
        weights, ids = torch.rand(tokens, experts, device=device).softmax(-1).topk(k)
        distinct.append(ids.unique().numel())
        for contender in them:
            if contender.error:
                continue
            try:
                call = partial(contender.calls[0], x, ids, weights.to(dtype))
                with torch.no_grad(), contender.chosen():
                    if number == 0:
                        call()
                    seconds = time_of(call, device)
            except Exception as error:
                contender.error = first_line(error)
                continue
            if number:
                contender.times.append(seconds)
    return round(sum(distinct) / len(distinct))


def lines(them: list[Contender], name: str, tokens: int, distinct: int, itemsize: int, peak: Peak) -> list[Line]:
    """Of the table; weights are read once for each of the `distinct` experts that have rows."""
    hidden, inner, _, k = SHAPES[name]
    fastest = min((c.seconds for c in them if c.name.startswith("dense") and not c.error), default=float("nan"))
    found = []
    for contender in them:
        if contender.error:
            found.append(Line(contender.name, error=contender.error))
            continue
        flops, moved = 2 * tokens * k * 3 * hidden * inner, distinct * contender.weight_bytes + 2 * tokens * hidden * itemsize
        best = peak.roofline(contender, flops, moved)
        to_dense, to_fastest = (seconds / contender.seconds for seconds in (them[0].seconds, fastest))
        cells = [contender.seconds * 1e3, to_dense, to_fastest, *best.values()]
        row = {"benchmark": "experts", "case": name, "m": tokens, "ms": cells[0], "ratio_to_dense": to_dense, **best}
        found.append(Line(contender.name, cells, row))
    return found


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    real = ["qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=real if ON_GPU else ["small", "qwen3-30b-a3b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512] + ([4096] if ON_GPU else []))
    parser.add_argument("--scheme", choices=SCHEMES, default="channel")
    parser.add_argument("--slow", action="store_true", help="on a CPU, also each kernel by itself")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    dtype = getattr(torch, args.dtype)
    peak = peaks(args.device, dtype)
    log = Results(args.device, args.csv)
    columns = ("ms", "x dense grouped_mm", "x dense, the faster", "TFLOP/s", "GB/s", "% of roofline")
    for name in args.shapes:
        every = contenders(name, SCHEMES[args.scheme], dtype, args.device, args.slow)
        for tokens in args.tokens:
            them = [contender.again() for contender in every]
            distinct = measure(them, name, tokens, dtype, args.device, args.rounds)
            found = lines(them, name, tokens, distinct, dtype.itemsize, peak)
            for line in found:
                line.row |= {"scheme": args.scheme, "dtype": args.dtype}
            log.add(f"{name} {args.scheme} {args.dtype}, {tokens} tokens, {distinct} experts", columns, found)
        del every, them


if __name__ == "__main__":
    main()
