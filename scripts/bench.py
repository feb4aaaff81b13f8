"""Benchmarks: `scripts/bench kernels`, `experts`, `model`, `training`, `plot`; -h says more.

Results are appended to docs/benchmarks.csv, with device, versions and commit; `plot` draws docs/performance.svg.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import bench_experts
import bench_kernels
import bench_model
import bench_training
import shapes
import torch
import transformers
from provenance import commit, cpu, version
from rich.console import Console
from rich.table import Table

import hf_fp8

CSV = ROOT / "docs" / "benchmarks.csv"
COLUMNS = [
    "date", "device", "threads", "torch", "transformers", "triton", "torchao", "hf_fp8", "commit",
    "benchmark", "case", "scheme", "dtype",
    "m", "n", "k", "contender", "ms", "ratio_to_dense", "ratio_to_stock", "tflops", "gbs", "roofline_pct", "gb", "note",
]  # fmt: skip
console = Console(width=150)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu()


class Log:
    """Rows for the CSV, each with where and with what it was measured."""

    def __init__(self, device: str) -> None:
        self.common: dict[str, Any] = {
            "date": datetime.date.today().isoformat(), "device": device_name(device), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": transformers.__version__, "triton": version("triton"),
            "torchao": version("torchao"), "hf_fp8": hf_fp8.__version__, "commit": commit(),
        }  # fmt: skip

    def add(self, rows: list[dict[str, Any]]) -> None:
        CSV.parent.mkdir(exist_ok=True)
        new = not CSV.exists()
        with CSV.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            for row in rows:
                rounded = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow(self.common | rounded)


def run_kernels(args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype)
    peak = bench_kernels.peaks(args.device, dtype)
    console.print(
        f"{device_name(args.device)}: {peak.bandwidth / 1e9:.0f} GB/s, {peak.flops / 1e12:.2f} TFLOP/s {args.dtype}, "
        f"{peak.flops_8bit / 1e12:.2f} with 8 bits ({peak.source})"
    )
    log = Log(args.device)
    scheme = bench_kernels.SCHEMES[args.scheme]
    for model in args.shapes:
        for n, k in shapes.LINEARS[model]:
            them = bench_kernels.contenders(scheme, n, k, dtype, args.device, args.slow)
            for m in args.m:
                for contender in them:
                    contender.times, contender.error = [], contender.error if not contender.calls else ""
                bench_kernels.measure(them, m, k, dtype, args.device, args.rounds)
                by_name = {contender.name: contender for contender in them}
                stock = by_name.get("stock FP8 linear")
                table = Table(
                    "contender", "ms", "x dense", "x stock", "TFLOP/s", "GB/s", "% of roofline", title=f"M={m} N={n} K={k}"
                )
                rows = []
                for contender in them:
                    if not contender.times:
                        table.add_row(contender.name, contender.error or "not measured", *[""] * 5)
                        continue
                    ratio = them[0].seconds / contender.seconds
                    to_stock = stock.seconds / contender.seconds if stock and stock.times else float("nan")
                    line = bench_kernels.roofline(contender, m, n, k, dtype, peak)
                    rows.append({
                        "benchmark": "kernel", "case": model, "scheme": args.scheme, "dtype": args.dtype,
                        "m": m, "n": n, "k": k,
                        "contender": contender.name, "ms": contender.seconds * 1e3, "ratio_to_dense": ratio,
                        "ratio_to_stock": to_stock, **line,
                    })  # fmt: skip
                    cells = [contender.seconds * 1e3, ratio, to_stock, line["tflops"], line["gbs"], line["roofline_pct"]]
                    table.add_row(contender.name, *[f"{cell:.3g}" for cell in cells])
                console.print(table)
                log.add(rows)
            del them


def run_experts(args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype)
    peak = bench_kernels.peaks(args.device, dtype)
    log = Log(args.device)
    for name in args.shapes:
        them = bench_experts.contenders(name, bench_kernels.SCHEMES[args.scheme], dtype, args.device)
        errors = {contender.name: contender.error for contender in them}
        for tokens in args.tokens:
            for contender in them:
                contender.times, contender.error = [], errors[contender.name]
            distinct = bench_experts.measure(them, name, tokens, dtype, args.device, args.rounds)
            table = Table("contender", "ms", "x dense grouped_mm", "x dense, the faster", "TFLOP/s", "GB/s", "% of roofline",
                          title=f"{name} {args.scheme} {args.dtype}, {tokens} tokens, {distinct} experts")  # fmt: skip
            fastest = min(c.seconds for c in them if c.name.startswith("dense") and c.times)
            rows = []
            for contender in them:
                if not contender.times:
                    table.add_row(contender.name, f"not measured: {contender.error}", *[""] * 5)
                    continue
                line = bench_experts.roofline(contender, name, tokens, distinct, dtype, peak)
                ratios = [seconds / contender.seconds for seconds in (them[0].seconds, fastest)]
                cells = [contender.seconds * 1e3, *ratios, line["tflops"], line["gbs"], line["roofline_pct"]]
                table.add_row(contender.name, *[f"{cell:.3g}" for cell in cells])
                rows.append({
                    "benchmark": "experts", "case": name, "scheme": args.scheme, "dtype": args.dtype, "m": tokens,
                    "contender": contender.name, "ms": contender.seconds * 1e3, "ratio_to_dense": ratios[0], **line,
                })  # fmt: skip
            console.print(table)
            log.add(rows)
        del them


def run_model(args: argparse.Namespace) -> None:
    log = Log(args.device)
    path = checkpoint(args.model)
    names = tuple(args.contenders or (bench_model.ON_CPU if args.device == "cpu" else bench_model.ON_GPU))
    workers = bench_model.compare(path, names, args.dtype, args.device, args.tokens, args.rounds, args.compile)
    by_name = {worker.name: worker for worker in workers}
    for job in ("load", "prefill", "decode"):
        table = Table(
            "contender", "ms", "x stock dequantize=True", "x stock", "GB held" if job != "load" else "GB at the peak",
            title=f"{args.model}, {args.dtype}, {job}" + (f" of {args.tokens} tokens" if job == "prefill" else ""),
        )  # fmt: skip
        rows = []

        def seconds(worker: bench_model.Worker | None, job: str = job) -> float:
            if worker is None or not worker.loaded:
                return float("nan")
            return worker.loaded["load_s"] if job == "load" else bench_model.median(worker.times[job])

        for worker in workers:
            if worker.error:
                table.add_row(worker.name, f"not measured: {worker.error}")
                continue
            mine = seconds(worker)
            ratios = [seconds(by_name.get(name)) / mine for name in ("stock dequantize=True", "stock")]
            held = worker.loaded["load_peak_gb" if job == "load" else "held_gb"]
            table.add_row(worker.name, f"{mine * 1e3:.4g}", *[f"{ratio:.2f}" for ratio in ratios], f"{held:.2f}")
            rows.append({
                "benchmark": job, "case": args.model, "scheme": "channel", "dtype": args.dtype, "contender": worker.name,
                "m": args.tokens if job == "prefill" else 1, "ms": mine * 1e3, "ratio_to_dense": ratios[0],
                "ratio_to_stock": ratios[1], "gb": held, "note": "static cache, compiled" if args.compile else "",
            })  # fmt: skip
        console.print(table)
        log.add(rows)


def run_training(args: argparse.Namespace) -> None:
    log = Log(args.device)
    for case in args.cases:
        path = case if case.startswith("stack-") else checkpoint(case)
        names = [name for name in args.contenders if name in bench_training.CONTENDERS]
        workers = bench_training.compare(path, names, args.dtype, args.device, args.tokens, args.rounds)
        first = {name: next((w for w in workers if w.name == name and w.found), None) for name in names}
        table = Table(
            "contender", "ms a step", "x BF16", "x stock", "GB held", "GB at the peak", "of BF16",
            title=f"LoRA over {case}, {args.tokens} tokens, {args.dtype}",
        )  # fmt: skip
        rows = []
        for worker in workers:
            if worker.error:
                table.add_row(worker.name, f"not measured: {worker.error}")
                continue
            plain, stock = first.get("BF16"), first.get("stock dequantize=True")
            ratios = [other.seconds / worker.seconds if other else float("nan") for other in (plain, stock)]
            held, peak = worker.found["held_gb"], worker.found["peak_gb"]
            share = peak / plain.found["peak_gb"] if plain else float("nan")
            cells = [worker.seconds * 1e3, *ratios, held, peak, share]
            table.add_row(worker.name, *[f"{cell:.3g}" for cell in cells])
            rows.append({
                "benchmark": "training", "case": case, "scheme": "channel", "dtype": args.dtype, "m": args.tokens,
                "contender": worker.name, "ms": worker.seconds * 1e3, "ratio_to_dense": ratios[0],
                "ratio_to_stock": ratios[1], "gb": peak, "note": f"gb: peak of a step, {share:.3f} of BF16",
            })  # fmt: skip
        console.print(table)
        log.add(rows)


def checkpoint(model: str) -> Path:
    """The FP8 checkpoint of a model by name, made once; else a folder."""
    if model in shapes.LLAMAS:
        return shapes.write(model, ROOT / ".demo" / model)
    if model == "smollm2-135m":
        import smollm2

        dense = smollm2.write_dense(ROOT / ".demo" / "dense")
        return smollm2.write_fp8(dense, ROOT / ".demo" / "dynamic", "dynamic")
    return Path(model)


def run_plot(args: argparse.Namespace) -> None:
    import bench_plot

    console.print(f"wrote {bench_plot.draw(CSV, ROOT / 'docs' / 'performance.svg')}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default_dtype = "bfloat16" if device == "cuda" else "float32"

    kernels = commands.add_parser("kernels", help="one linear: shape x M x kernel x peer")
    kernels.add_argument(
        "--shapes", nargs="+", choices=shapes.LINEARS, default=["llama-3-8b" if device == "cuda" else "smollm2-135m"]
    )
    kernels.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64, 256, 2048] + ([8192] if device == "cuda" else []))
    kernels.add_argument("--scheme", choices=bench_kernels.SCHEMES, default="channel")
    kernels.add_argument("--slow", action="store_true", help="on a CPU, also what has no fast FP8 there")
    kernels.set_defaults(run=run_kernels)

    experts = commands.add_parser("experts", help="one layer of experts: shape x tokens x kernel x peer")
    experts.add_argument(
        "--shapes", nargs="+", choices=bench_experts.SHAPES,
        default=["qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3"] if device == "cuda" else ["small", "qwen3-30b-a3b"],
    )  # fmt: skip
    experts.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512] + ([4096] if device == "cuda" else []))
    experts.add_argument("--scheme", choices=bench_kernels.SCHEMES, default="channel")
    experts.set_defaults(run=run_experts)

    model = commands.add_parser("model", help="load time, memory, prefill, decode")
    model.add_argument(
        "model", nargs="?", default="smollm2-135m", help=f"smollm2-135m, {', '.join(shapes.LLAMAS)}, or a folder"
    )
    model.add_argument("--tokens", type=int, default=2048 if device == "cuda" else 512)
    model.add_argument("--contenders", nargs="+", choices=bench_model.CONTENDERS)
    model.add_argument("--compile", action="store_true", help="decode with a static cache and torch.compile")
    model.set_defaults(run=run_model)

    training = commands.add_parser("training", help="a step of LoRA: time and peak memory")
    training.add_argument(
        "cases", nargs="*", default=["stack-4096x16", "smollm2-135m"],
        help=f"stack-WIDTHxDEPTH, smollm2-135m, {', '.join(shapes.LLAMAS)}, or a folder",
    )  # fmt: skip
    training.add_argument("--tokens", type=int, default=2048 if device == "cuda" else 512)
    training.add_argument("--contenders", nargs="+", choices=bench_training.CONTENDERS, default=[*bench_training.CONTENDERS])
    training.set_defaults(run=run_training)

    for command in (kernels, experts, model, training):
        command.add_argument("--device", default=device)
        command.add_argument("--dtype", default=default_dtype, choices=["float32", "bfloat16", "float16"])
        command.add_argument("--rounds", type=int, default=7)
    plot = commands.add_parser("plot", help="draw docs/performance.svg from docs/benchmarks.csv")
    plot.set_defaults(run=run_plot)
    return parser


def main() -> None:
    args = arguments().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
