"""Steps of the working folder beside those of a commit, `scripts/bench against_commit COMMIT`, in turns.

Medians of a decode and of a training step of a small Llama on a CPU, one thread each, and of the ratio of each pair.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial

from . import ROOT
from .common.worker import Worker, serve

# How often a step is run for one number.
TIMES = {"decode": 6, "train": 3}


def steps(folder: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name, with the package in `folder`."""
    sys.path.insert(0, folder)
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import hf_fp8

    assert hf_fp8.__file__ is not None and hf_fp8.__file__.startswith(folder)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
    )
    ids = torch.arange(5, 37)[None]
    found: dict[str, Callable[[], object]] = {}
    for backend in ("weight_only", "int8"):
        models = [LlamaForCausalLM(config).eval() for _ in range(2)]
        for model in models:
            hf_fp8.quantize_model(model, "INT8" if backend == "int8" else "FP8_DYNAMIC", backend=backend)
        tuned = get_peft_model(models[1], LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).train()
        found[f"{backend} decode"] = torch.no_grad()(lambda model=models[0]: model(input_ids=ids[:, :1], use_cache=False))
        found[f"{backend} train"] = lambda tuned=tuned: tuned(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return found


def work(folder: str) -> None:
    """In the process: answer the name of a step with its milliseconds."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    found = steps(folder)
    for step in found.values():
        step()
    serve("ready", {name: partial(milliseconds, step, TIMES[name.split()[1]]) for name, step in found.items()})


def milliseconds(step: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - start) / times * 1e3


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", help="the one that the working folder is held against")
    parser.add_argument("--pairs", type=int, default=24, help="how often each step is timed")
    return parser


def main() -> None:
    options = arguments().parse_args()
    commit, pairs = options.commit, options.pairs
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", ROOT, "archive", commit, "hf_fp8"], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        workers = [Worker(commit, work, folder), Worker("the working folder", work, str(ROOT))]
        for worker in workers:
            if worker.error:
                raise SystemExit(f"the steps do not run with {worker.name}: {worker.error}")
        for name in (f"{backend} {step}" for backend in ("weight_only", "int8") for step in TIMES):
            each: list[list[float]] = [[], []]
            for pair in range(pairs):
                for at in (0, 1) if pair % 2 else (1, 0):
                    each[at].append(workers[at].ask(name))
            ratio = statistics.median(now / before for before, now in zip(*each, strict=True))
            before, now = (statistics.median(times) for times in each)
            print(f"{name}: {commit} {before:.2f} ms, now {now:.2f} ms, median ratio {ratio:.3f}", flush=True)
        for worker in workers:
            worker.stop()


if __name__ == "__main__":
    main()
