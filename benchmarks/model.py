"""Whole models, `scripts/bench model`: load time, memory, prefill and decode, each contender in a process of its own.

They are all loaded first and then asked one after the other, round by round: what the machine does meanwhile hits them
alike. Memory is that of a process without any other contender in it. "CPU ms" are of all threads together: with one thread they
are the work, also on a busy machine; with more they count threads that wait for others.

torchao (pip install torchao) and llama.cpp (CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python, which compiles it) take
part if they are installed in .venv. For llama.cpp the weights are written to a GGUF file first.
"""

from __future__ import annotations

import argparse
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import CHECKPOINTS
from .common import llamacpp, peers, results, shapes
from .common.memory import held_bytes, watched
from .common.results import ON_GPU, Line, Results
from .common.timing import Cost, cost_of, median
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
# Made of the dequantized model: name -> arguments of `quantize_model`.
MADE: dict[str, dict[str, Any]] = {
    "hf_fp8 W4A16": {"scheme": "W4A16"},
    "hf_fp8 W4A16, head too": {"scheme": "W4A16", "targets": ["Linear", "lm_head"]},
}
NAMES = (*CONTENDERS, *MADE, *peers.TORCHAO, *llamacpp.CONTENDERS)
ON_CPU_NAMES = (
    "stock", "stock dequantize=True", "hf_fp8 auto", "hf_fp8 dequantize=True", "hf_fp8 int8",
    "torchao int8 weight-only, bfloat16, compiled", "llama.cpp Q8_0", "llama.cpp Q8_0, not repacked",
)  # fmt: skip
ON_GPU_NAMES = ("stock", "stock dequantize=True", "stock optimized", "hf_fp8 auto", "hf_fp8 weight_only", "hf_fp8 int8")
# What the ratios of a table are to, if it takes part -> its column of the CSV file.
REFERENCES = {"stock dequantize=True": "ratio_to_dense", "stock": "ratio_to_stock", "llama.cpp Q8_0": ""}
PROMPT, DECODED = 64, 24

JOBS = ("prefill", "decode")
Found = list[tuple[Worker, dict[str, list[Cost]]]]


def load(path: str, name: str, dtype: str, device: str) -> tuple[Any, dict[str, Any]]:
    """The model, and what loading it took; a peer of torchao's is made of stock's dequantized model."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    import hf_fp8

    base = "hf_fp8 dequantize=True" if name in MADE else "stock dequantize=True"
    ours, options = CONTENDERS[name if name in CONTENDERS else base]
    if not ours:
        hf_fp8.unregister()
    config = (hf_fp8.FP8Config if ours else CompressedTensorsConfig)(**options) if options or ours else None
    given = {} if config is None else {"quantization_config": config}
    with watched() as memory:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), device_map=device, **given).eval()
        if name in peers.TORCHAO:
            peers.quantize(model, name)
        if name in MADE:
            hf_fp8.quantize_model(model, **MADE[name])
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else memory.used
    taken = {"load_s": memory.seconds, "load_cpu_s": memory.cpu_seconds, "load_peak_gb": peak_gb}
    return model, {**taken, "held_gb": held_bytes(model) / 1e9, "dtype": dtype, "note": ""}


def work(path: str, name: str, dtype: str, device: str, tokens: int, compiled: bool, threads: int) -> None:
    """In the process: load, then answer "prefill" and "decode" with lists of costs."""
    torch.set_num_threads(threads)
    if peer := peers.TORCHAO.get(name):
        try:
            import torchao  # noqa: F401  before a model is loaded for it
        except ImportError as error:
            raise SystemExit(peers.why_not(error)) from None
    model, loaded = load(path, name, peer.dtype if peer and peer.dtype else dtype, device)
    ids = torch.randint(0, model.config.vocab_size, (1, max(tokens, PROMPT)), device=device)
    step, whole = model.forward, model  # stock dequantizes in a hook of the module, at its first call
    static = compiled or bool(peer and peer.compiled)
    if static:
        step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        loaded["note"] = "static cache, compiled"
    if peer and peer.compiled:
        whole = torch.compile(model.forward, dynamic=False)

    @torch.no_grad()
    def prefill() -> list[Cost]:
        return [cost_of(lambda: whole(ids[:, :tokens], use_cache=False), device)]

    @torch.no_grad()
    def decode() -> list[Cost]:
        from transformers import DynamicCache, StaticCache

        limit = PROMPT + DECODED + 8
        cache = StaticCache(config=model.config, max_cache_len=limit) if static else DynamicCache(config=model.config)
        cached = {cache_argument(model): cache}
        model(ids[:, :PROMPT], **cached, use_cache=True)
        singles = [ids[:, i : i + 1].contiguous() for i in range(DECODED)]
        return [cost_of(partial(step, token, **cached, use_cache=True), device) for token in singles][2:]

    prefill()
    # Stock's default grows at the first forward.
    serve({**loaded, "held_gb": max(loaded["held_gb"], held_bytes(model) / 1e9)}, {"prefill": prefill, "decode": decode})


def cache_argument(model: Any) -> str:
    """What the forward calls its cache: "cache" from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def start(name: str, path: str, args: argparse.Namespace, threads: int) -> Worker:
    if name in llamacpp.CONTENDERS:
        return Worker(name, llamacpp.work, path, str(CHECKPOINTS / "gguf"), name, args.tokens, PROMPT, DECODED, threads)
    return Worker(name, work, path, name, args.dtype, args.device, args.tokens, args.compile, threads)


def compare(args: argparse.Namespace, names: list[str], threads: int) -> Found:
    """Each contender with its costs of each job."""
    path = str(checkpoint(args.model))
    # torchao's first: they need the most memory while they load, a dense copy and what the compiler takes.
    workers = {name: start(name, path, args, threads) for name in sorted(names, key=lambda name: name not in peers.TORCHAO)}
    found: Found = [(workers[name], {job: [] for job in JOBS}) for name in names]
    for _ in range(args.rounds):
        for job in JOBS:
            for worker, costs in found:
                costs[job] += [Cost(*each) for each in worker.ask(job) or []]
    for worker, _ in found:
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


def lines(job: str, found: Found) -> list[Line]:
    """Of the table of a job: ms that pass, ms of all threads, ratios to `REFERENCES`, memory."""
    there = {worker.name: (worker.found, costs) for worker, costs in found if not worker.error}
    medians = {
        name: Cost(first["load_s"], first["load_cpu_s"])
        if job == "load"
        else Cost(median([cost.wall for cost in costs[job]]), median([cost.cpu for cost in costs[job]]))
        for name, (first, costs) in there.items()
    }
    table = []
    for worker, _ in found:
        if worker.error:
            table.append(Line(worker.name, error=worker.error))
            continue
        mine, nowhere = medians[worker.name], Cost(float("nan"), float("nan"))
        ratios = {name: medians.get(name, nowhere).wall / mine.wall for name in REFERENCES}
        gb = worker.found["load_peak_gb" if job == "load" else "held_gb"]
        notes = [f"CPU {mine.cpu * 1e3:.4g} ms", *filter(None, [worker.found["note"]])]
        row = {"benchmark": job, "dtype": worker.found["dtype"], "ms": mine.wall * 1e3, "gb": gb, "note": ", ".join(notes)}
        row |= {column: ratios[name] for name, column in REFERENCES.items() if column}
        shown = [ratios[other.name] for other, _ in found if other.name in REFERENCES]
        table.append(Line(worker.name, [mine.wall * 1e3, mine.cpu * 1e3, *shown, gb], row))
    return table


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    names = f"smollm2-135m, {', '.join(shapes.LLAMAS)}, or a folder"
    parser.add_argument("model", nargs="?", default="smollm2-135m", help=names)
    parser.add_argument("--tokens", type=int, default=2048 if ON_GPU else 512)
    parser.add_argument("--contenders", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(map(repr, NAMES)))
    parser.add_argument("--compile", action="store_true", help="decode with a static cache and torch.compile")
    results.add_threads(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    names = args.contenders or list(ON_CPU_NAMES if args.device == "cpu" else ON_GPU_NAMES)
    for threads in args.threads:
        torch.set_num_threads(threads)  # what `Results` says
        log = Results(args.device, args.csv)
        found = compare(args, names, threads)
        for job in ("load", *JOBS):
            table = lines(job, found)
            for line in table:
                line.row |= {"case": args.model, "scheme": "channel", "m": args.tokens if job == "prefill" else 1}
            of = f" of {args.tokens} tokens" if job == "prefill" else ""
            title = f"{args.model}, {args.dtype}, {job}{of}, {threads} thread{'s' * (threads > 1)}"
            memory = "GB at the peak" if job == "load" else "GB held"
            log.add(title, ("ms", "CPU ms", *(f"x {name}" for name in names if name in REFERENCES), memory), table)
        for worker, _ in found:
            if not worker.error and worker.found["note"]:
                results.console.print(f"{worker.name}: {worker.found['note']}")


if __name__ == "__main__":
    main()
