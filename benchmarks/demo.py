"""The demo, `scripts/demo`: quantize SmolLM2-135M-Instruct, load it with hf_fp8, generate, and compare it with BF16."""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fp8
from hf_fp8 import FP8Config

from . import CHECKPOINTS
from .common import smollm2
from .common.memory import held_bytes

console = Console()
PROMPT = "What is gravity? Answer in one sentence."
NEW_TOKENS = 12
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
# (row of the table, checkpoint, how it is loaded)
ROUTES: list[tuple[str, str, FP8Config | None]] = [
    ("BF16", "dense", None),
    ("FP8, default", "dynamic", FP8Config()),
    ("weight_only", "dynamic", FP8Config(backend="weight_only")),
    ("scaled_mm", "dynamic", FP8Config(backend="scaled_mm")),
]


def load(path: Path, config: FP8Config | None) -> Any:
    options = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map=DEVICE, **options)


def generate(model: Any, tokenizer: Any, new_tokens: int = NEW_TOKENS) -> tuple[str, float]:
    """(text, tokens per second), greedy."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    start = time.perf_counter()
    out = model.generate(**chat, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    made = out[0, chat["input_ids"].shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True).strip(), len(made) / (time.perf_counter() - start)


def kernel(model: Any) -> str:
    return ", ".join(sorted({row.kernel for row in hf_fp8.explain(model)})) or "F.linear"


def measure(name: str, path: Path, config: FP8Config | None, progress: Progress) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = smollm2.evaluation(smollm2.prose(tokenizer))
    task = progress.add_task(f"{name}: perplexity on {len(text):,} tokens", total=len(text) // smollm2.WINDOW)
    model = load(path, config)
    perplexity = hf_fp8.perplexity(model, text, progress=lambda *_: progress.advance(task))
    progress.update(task, description=f"{name}: generating")
    said, speed = generate(model, tokenizer)
    progress.update(task, description=f"{name}: done")
    return {
        "name": name, "disk": smollm2.file_bytes(path), "memory": held_bytes(model), "perplexity": perplexity,
        "speed": speed, "kernel": kernel(model), "said": said,
    }  # fmt: skip


def say(line: str) -> None:
    """For logs, where there are no bars."""
    if not console.is_terminal:
        print(line, flush=True)


def prepare(folder: Path, progress: Progress) -> dict[str, Path]:
    say("SmolLM2 in BF16 from its GGUF, then as an FP8 checkpoint")
    task = progress.add_task("SmolLM2 in BF16, from its GGUF", total=1)
    dense = smollm2.write_dense(folder / "dense")
    progress.advance(task)
    task = progress.add_task("FP8_DYNAMIC checkpoint, by compressed-tensors", total=None)
    dynamic = smollm2.write_fp8(dense, folder / "dynamic", "dynamic", lambda: progress.advance(task))
    progress.update(task, total=1, completed=1)
    return {"dense": dense, "dynamic": dynamic}


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    shown = Table(title="SmolLM2-135M-Instruct: BF16 against FP8 (channel weights, per-token inputs)")
    for column in ("", "disk", "memory", "perplexity", "tok/s", "kernel"):
        shown.add_column(column, justify="left" if column in ("", "kernel") else "right", no_wrap=True)
    for row in rows:
        change = "" if row is first else f" ({100 * (row['perplexity'] / first['perplexity'] - 1):+.2f}%)"
        shown.add_row(
            row["name"], f"{row['disk'] / 1e6:.0f} MB", f"{row['memory'] / 1e6:.0f} MB", f"{row['perplexity']:.2f}{change}",
            f"{row['speed']:.1f}", row["kernel"],
        )  # fmt: skip
    return shown


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--again", action="store_true", help="measure anew instead of showing what the last run measured")
    parser.add_argument("--folder", type=Path, default=CHECKPOINTS, help="where checkpoints go (default: .demo)")
    return parser


def main() -> None:
    options = arguments().parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    smollm2.quiet()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")

    start = time.perf_counter()
    kept = options.folder / f"rows-{hf_fp8.__version__}-torch-{torch.__version__}.json"
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        paths = prepare(options.folder, progress)
        measured = json.loads(kept.read_text()) if kept.exists() and not options.again else {}
        for name, which, config in ROUTES:
            if name not in measured:
                say(f"{name}: perplexity on {smollm2.EVALUATION_TOKENS:,} tokens, then {NEW_TOKENS} new ones")
                measured[name] = measure(name, paths[which], config, progress)
                kept.write_text(json.dumps(measured, indent=1))  # an interrupted run goes on from here
        rows = [measured[name] for name, *_ in ROUTES]
        say("one FP8 model, kept in FP8")
        task = progress.add_task("one FP8 model, kept in FP8", total=1)
        model = load(paths["dynamic"], FP8Config(backend="weight_only"))
        said, speed = generate(model, AutoTokenizer.from_pretrained(paths["dynamic"]), 8)
        progress.advance(task)

    console.print(f"\n[bold]asked[/]         {PROMPT}")
    for row in rows:
        console.print(f"[bold]{row['name']:<13}[/] {row['said']} ...", highlight=False)
    console.print(f"[bold]{'just now':<13}[/] {said} ... ({speed:.1f} tokens/s, weight_only)\n", highlight=False)
    console.print(hf_fp8.explain(model), highlight=False, soft_wrap=True)
    console.print()
    console.print(table(rows))
    if not torch.accelerator.is_available():
        because = hf_fp8.kernels.why_not_kept(DEVICE, torch.bfloat16)
        console.print(
            "A CPU has no FP8 units: by default weights stay in FP8, and inputs are not quantized."
            if because is None
            else f"The default dequantizes the weights while loading ({because}). Keeping them in FP8 saves memory, "
            "and is slower.",
            highlight=False,
        )
    console.print(
        f"The tied embedding (57 MB) is BF16 in all of them. Took {time.perf_counter() - start:.0f} s; checkpoints are in "
        f"{options.folder.name}/, and --again measures anew.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
