"""Whole models, `scripts/bench model`: load time, memory, prefill and decode, each contender in a process of its own.

They are all loaded first and then asked one after the other, round by round: what the machine does meanwhile hits them
alike. Memory is that of a process without any other contender in it.
"""

from __future__ import annotations

import argparse
import inspect
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import CHECKPOINTS
from .common import results, shapes
from .common.memory import held_bytes, watched
from .common.results import ON_GPU, Line, Results
from .common.timing import median, time_of
from .common.worker import Worker, serve

# name -> (whether hf_fp8 is registered, options of from_pretrained)
CONTENDERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "stock": (False, {}),
    "stock dequantize=True": (False, {"dequantize": True}),
    "stock optimized": (False, {"use_optimized_inference": True}),
    "hf_fp8 dequantize=True": (True, {"dequantize": True}),
    "hf_fp8 auto": (True, {}),
    "hf_fp8 scaled_mm": (True, {"backend": "scaled_mm"}),
    "hf_fp8 weight_only": (True, {"backend": "weight_only"}),
    "hf_fp8 int8": (True, {"backend": "int8"}),
}
ON_CPU_NAMES = ("stock", "stock dequantize=True", "hf_fp8 auto", "hf_fp8 dequantize=True", "hf_fp8 int8")
ON_GPU_NAMES = ("stock", "stock dequantize=True", "stock optimized", "hf_fp8 auto", "hf_fp8 weight_only", "hf_fp8 int8")
DECODED = 24


JOBS = ("prefill", "decode")


def load(path: str, name: str, dtype: str, device: str) -> tuple[Any, dict[str, float]]:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    import hf_fp8

    ours, options = CONTENDERS[name]
    if not ours:
        hf_fp8.unregister()
    config = (hf_fp8.FP8Config if ours else CompressedTensorsConfig)(**options) if options or ours else None
    given = {} if config is None else {"quantization_config": config}
    with watched() as memory:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), device_map=device, **given).eval()
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else memory.used
    return model, {"load_s": memory.seconds, "load_peak_gb": peak_gb, "held_gb": held_bytes(model) / 1e9}


def work(path: str, name: str, dtype: str, device: str, tokens: int, compiled: bool) -> None:
    """In the process: load, then answer "prefill" and "decode" with lists of seconds."""
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", torch.get_num_threads())))
    model, loaded = load(path, name, dtype, device)
    ids = torch.randint(0, model.config.vocab_size, (1, max(tokens, 64)), device=device)
    step = model.forward
    if compiled:
        step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def prefill() -> list[float]:
        return [time_of(lambda: model(ids[:, :tokens], use_cache=False), device)]

    @torch.no_grad()
    def decode() -> list[float]:
        from transformers import DynamicCache, StaticCache

        limit = 64 + DECODED + 8
        cache = StaticCache(config=model.config, max_cache_len=limit) if compiled else DynamicCache(config=model.config)
        cached = {cache_argument(model): cache}
        model(ids[:, :64], **cached, use_cache=True)
        singles = [ids[:, i : i + 1].contiguous() for i in range(DECODED)]
        return [time_of(partial(step, token, **cached, use_cache=True), device) for token in singles][2:]

    prefill()
    # Stock's default grows at the first forward.
    serve({**loaded, "held_gb": max(loaded["held_gb"], held_bytes(model) / 1e9)}, {"prefill": prefill, "decode": decode})


def cache_argument(model: Any) -> str:
    """What the forward calls its cache: "cache" from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def compare(args: argparse.Namespace, names: list[str]) -> list[tuple[Worker, dict[str, list[float]]]]:
    """Each contender with its seconds of each job."""
    path, common = str(checkpoint(args.model)), (args.dtype, args.device, args.tokens, args.compile)
    workers = [Worker(name, work, path, name, *common) for name in names]
    found = [(worker, {job: list[float]() for job in JOBS}) for worker in workers]
    for _ in range(args.rounds):
        for job in JOBS:
            for worker, times in found:
                times[job] += worker.ask(job) or []
    for worker in workers:
        worker.stop()
    return found


def checkpoint(model: str) -> Path:
    """The FP8 checkpoint of a model by name, made once; else a folder."""
    if model in shapes.LLAMAS:
        return shapes.write(model, CHECKPOINTS / model)
    if model == "smollm2-135m":
        from .common import smollm2

        return smollm2.write_fp8(smollm2.write_dense(CHECKPOINTS / "dense"), CHECKPOINTS / "dynamic", "dynamic")
    return Path(model)


def lines(job: str, found: list[tuple[Worker, dict[str, list[float]]]]) -> list[Line]:
    """Of the table of a job: ms, the ratios to both of stock's, memory."""
    seconds = {
        worker.name: worker.found["load_s"] if job == "load" else median(times[job])
        for worker, times in found if not worker.error
    }  # fmt: skip
    table = []
    for worker, _ in found:
        if worker.error:
            table.append(Line(worker.name, error=worker.error))
            continue
        mine, nan = seconds[worker.name], float("nan")
        to_dense, to_stock = (seconds.get(name, nan) / mine for name in ("stock dequantize=True", "stock"))
        gb = worker.found["load_peak_gb" if job == "load" else "held_gb"]
        row = {"benchmark": job, "ms": mine * 1e3, "ratio_to_dense": to_dense, "ratio_to_stock": to_stock, "gb": gb}
        table.append(Line(worker.name, [mine * 1e3, to_dense, to_stock, gb], row))
    return table


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    names = f"smollm2-135m, {', '.join(shapes.LLAMAS)}, or a folder"
    parser.add_argument("model", nargs="?", default="smollm2-135m", help=names)
    parser.add_argument("--tokens", type=int, default=2048 if ON_GPU else 512)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--compile", action="store_true", help="decode with a static cache and torch.compile")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    log = Results(args.device, args.csv)
    found = compare(args, args.contenders or list(ON_CPU_NAMES if args.device == "cpu" else ON_GPU_NAMES))
    for job in ("load", *JOBS):
        table = lines(job, found)
        for line in table:
            line.row |= {
                "case": args.model, "scheme": "channel", "dtype": args.dtype, "m": args.tokens if job == "prefill" else 1,
                "note": "static cache, compiled" if args.compile else "",
            }  # fmt: skip
        title = f"{args.model}, {args.dtype}, {job}" + (f" of {args.tokens} tokens" if job == "prefill" else "")
        memory = "GB at the peak" if job == "load" else "GB held"
        log.add(title, ("ms", "x stock dequantize=True", "x stock", memory), table)


if __name__ == "__main__":
    main()
