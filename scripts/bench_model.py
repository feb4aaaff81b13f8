"""Whole models: load time, memory, prefill and decode, each contender in a process of its own, timed in turn.

The processes are all loaded first and then asked one after the other, round by round: what the machine does
meanwhile hits them alike. Memory is that of a process without any other contender in it.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import watched

os.environ.setdefault("TQDM_DISABLE", "1")

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
ON_CPU = ("stock", "stock dequantize=True", "hf_fp8 dequantize=True", "hf_fp8 int8")
ON_GPU = ("stock", "stock dequantize=True", "stock optimized", "hf_fp8 auto", "hf_fp8 weight_only", "hf_fp8 int8")
DECODED = 24


def load(path: str, name: str, dtype: str, device: str) -> tuple[Any, dict[str, float]]:
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    import hf_fp8

    ours, options = CONTENDERS[name]
    if not ours:
        hf_fp8.unregister()
    config = (hf_fp8.FP8Config if ours else CompressedTensorsConfig)(**options) if options or ours else None
    given = {} if config is None else {"quantization_config": config}
    with watched() as memory:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), device_map=device, **given).eval()
    held = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else memory.used
    return model, {"load_s": memory.seconds, "load_peak_gb": peak_gb, "held_gb": sum(held.values()) / 1e9}


def held_now(model: Any) -> float:
    """GB of parameters and buffers: stock's default grows at the first forward."""
    held = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(held.values()) / 1e9


def serve(path: str, name: str, dtype: str, device: str, tokens: int, compiled: bool) -> None:
    """Load, then answer "prefill" and "decode" with seconds, line by line."""
    import torch

    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", torch.get_num_threads())))
    model, loaded = load(path, name, dtype, device)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device, generator=None)
    step = model.forward
    if compiled:
        step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def sync() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    @torch.no_grad()
    def prefill() -> list[float]:
        sync()
        start = time.perf_counter()
        model(ids, use_cache=False)
        sync()
        return [time.perf_counter() - start]

    @torch.no_grad()
    def decode() -> list[float]:
        from transformers import DynamicCache, StaticCache

        limit = 64 + DECODED + 8
        cache = StaticCache(config=model.config, max_cache_len=limit) if compiled else DynamicCache(config=model.config)
        renamed = "cache" in inspect.signature(model.forward).parameters  # from transformers 5.24 on
        cached = {"cache" if renamed else "past_key_values": cache}
        model(ids[:, :64], **cached, use_cache=True)
        times = []
        for i in range(DECODED):
            sync()
            start = time.perf_counter()
            step(ids[:, i : i + 1].contiguous(), **cached, use_cache=True)
            sync()
            times.append(time.perf_counter() - start)
        return times[2:]

    prefill()
    print(json.dumps({**loaded, "held_gb": max(loaded["held_gb"], held_now(model))}), flush=True)
    jobs: dict[str, Callable[[], list[float]]] = {"prefill": prefill, "decode": decode}
    for line in sys.stdin:
        print(json.dumps(jobs[line.strip()]()), flush=True)


class Worker:
    """A contender in its process. `error` says why there is none."""

    def __init__(self, path: Path, name: str, dtype: str, device: str, tokens: int, compiled: bool) -> None:
        command = [sys.executable, __file__, str(path), name, dtype, device, str(tokens), str(int(compiled))]
        self.name, self.times = name, {"prefill": list[float](), "decode": list[float]()}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        # stderr is read while the process runs, or a full pipe would stop it.
        self._said: list[str] = []
        threading.Thread(target=lambda: self._said.extend(self.process.stderr), daemon=True).start()  # type: ignore[arg-type]
        line = self.process.stdout.readline()
        self.loaded: dict[str, float] = json.loads(line) if line else {}
        self.error = "" if line else self._last_words()

    def _last_words(self) -> str:
        self.process.wait()
        time.sleep(0.2)
        return next((line.strip() for line in reversed(self._said) if line.strip()), "no output")[:160]

    def ask(self, job: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(job + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if line:
            self.times[job] += json.loads(line)
        else:
            self.error = self._last_words()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(
    path: Path, names: tuple[str, ...], dtype: str, device: str, tokens: int, rounds: int, compiled: bool = False
) -> list[Worker]:
    workers = [Worker(path, name, dtype, device, tokens, compiled) for name in names]
    for _ in range(rounds):
        for job in ("prefill", "decode"):
            for worker in workers:
                if not worker.error:
                    worker.ask(job)
    for worker in workers:
        worker.stop()
    return workers


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


if __name__ == "__main__":
    path, name, dtype, device, tokens, compiled = sys.argv[1:]
    serve(path, name, dtype, device, int(tokens), bool(int(compiled)))
