"""LoRA training, `scripts/bench training`: time and peak memory of a step, each contender in a process of its own.

A case is a transformers checkpoint, or a stack of Linears, "stack-4096x16". Contenders take turns. Memory is what the process
holds at most during a step, beyond what it held before it had a model; weights that were mapped from files are copied first.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import peft  # noqa: F401  before memory is looked at, as the other libraries are
import torch
import transformers  # noqa: F401

import hf_fp8

from .common import results, shapes
from .common.memory import anonymous, held_bytes, watched
from .common.results import ON_GPU, Line, Results
from .common.timing import median, time_of
from .common.worker import Worker, serve
from .model import checkpoint

# name -> (whether hf_fp8 is registered, options of from_pretrained)
CONTENDERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "BF16": (True, {"dequantize": True}),
    "stock dequantize=True": (False, {"dequantize": True}),
    "hf_fp8 weight_only": (True, {"backend": "weight_only"}),
    "hf_fp8 scaled_mm": (True, {"backend": "scaled_mm"}),
    "hf_fp8 scaled_mm, backward quantized": (True, {"backend": "scaled_mm", "backward": "quantized"}),
    "hf_fp8 int8": (True, {"backend": "int8"}),
    "hf_fp8 int8, backward quantized": (True, {"backend": "int8", "backward": "quantized"}),
}
RANK = 16


def build(case: str, name: str, dtype: Any, device: str) -> Any:
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    ours, options = CONTENDERS[name]
    if not ours:
        hf_fp8.unregister()
    if case.startswith("stack-"):
        if not ours:
            raise ValueError("a stack is no transformers model")
        width, depth = map(int, case.removeprefix("stack-").split("x"))
        layers = []
        for _ in range(depth):  # quantized one by one: what is freed cannot come up as a peak later
            layer = nn.Sequential(nn.Linear(width, width, bias=False, dtype=dtype, device=device))
            if name != "BF16":
                how = {"backend": options["backend"], "backward": options.get("backward", "exact")}
                scheme = "INT8" if options["backend"] == "int8" else "FP8_DYNAMIC"
                layer = hf_fp8.quantize_model(layer, scheme, **how)
            layers.append(layer[0])
        model: Any = nn.Sequential(*layers)
        target: Any = [str(i) for i in range(depth)]
    else:
        config = (hf_fp8.FP8Config if ours else CompressedTensorsConfig)(**options)
        model = AutoModelForCausalLM.from_pretrained(case, dtype=dtype, device_map=device, quantization_config=config)
        target = "all-linear"
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=target)).train()


def work(case: str, name: str, dtype_name: str, device: str, tokens: int) -> None:
    """In the process: build, then answer "step" with its seconds. The first answer is what is held and the peak, in GB."""
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", torch.get_num_threads())))
    dtype, base = getattr(torch, dtype_name), anonymous()
    model = build(case, name, dtype, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    torch.manual_seed(0)
    is_stack = case.startswith("stack-")
    if is_stack:
        x = torch.randn(tokens, next(p for p in model.parameters() if p.ndim == 2).shape[1], dtype=dtype, device=device)
    else:
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)

    def step() -> None:
        loss = model(x).float().square().mean() if is_stack else model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimizer's state, too
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    with watched() as memory:
        time_of(step, device)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else memory.peak - base
    serve({"held_gb": held_bytes(model) / 1e9, "peak_gb": peak}, {"step": lambda: time_of(step, device)})


def compare(case: str, args: argparse.Namespace) -> list[tuple[Worker, float]]:
    """Each contender with the median seconds of a step."""
    path = case if case.startswith("stack-") else str(checkpoint(case))
    workers = [Worker(name, work, path, name, args.dtype, args.device, args.tokens) for name in args.contenders]
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(args.rounds):
        for worker, mine in zip(workers, times, strict=True):
            seconds = worker.ask("step")
            mine += [] if seconds is None else [seconds]
    for worker in workers:
        worker.stop()
    return [(worker, median(mine)) for worker, mine in zip(workers, times, strict=True)]


def lines(found: list[tuple[Worker, float]]) -> list[Line]:
    there = {worker.name: (worker.found, seconds) for worker, seconds in found if not worker.error}
    table = []
    for worker, seconds in found:
        if worker.error:
            table.append(Line(worker.name, error=worker.error))
            continue
        nowhere = ({"peak_gb": float("nan")}, float("nan"))
        (plain, plain_seconds), (_, stock_seconds) = (there.get(n, nowhere) for n in ("BF16", "stock dequantize=True"))
        to_dense, to_stock = plain_seconds / seconds, stock_seconds / seconds
        held, peak = worker.found["held_gb"], worker.found["peak_gb"]
        share = peak / plain["peak_gb"]
        row = {
            "benchmark": "training", "ms": seconds * 1e3, "ratio_to_dense": to_dense, "ratio_to_stock": to_stock, "gb": peak,
            "note": f"gb: peak of a step, {share:.3f} of BF16",
        }  # fmt: skip
        table.append(Line(worker.name, [seconds * 1e3, to_dense, to_stock, held, peak, share], row))
    return table


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    cases = f"stack-WIDTHxDEPTH, smollm2-135m, {', '.join(shapes.LLAMAS)}, or a folder"
    parser.add_argument("cases", nargs="*", default=["stack-4096x16", "smollm2-135m"], help=cases)
    parser.add_argument("--tokens", type=int, default=2048 if ON_GPU else 512)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    log = Results(args.device, args.csv)
    for case in args.cases:
        table = lines(compare(case, args))
        for line in table:
            line.row |= {"case": case, "scheme": "channel", "dtype": args.dtype, "m": args.tokens}
        columns = ("ms a step", "x BF16", "x stock", "GB held", "GB at the peak", "of BF16")
        log.add(f"LoRA over {case}, {args.tokens} tokens, {args.dtype}", columns, table)


if __name__ == "__main__":
    main()
