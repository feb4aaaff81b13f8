"""LoRA training: time and peak memory of a step, each contender in a process of its own, timed in turn.

A case is a transformers checkpoint, or a stack of Linears, "stack-4096x16". Memory is what the process holds at most during a
step, beyond what it held before it had a model; weights that were mapped from files are copied first.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

from memory import anonymous, watched

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
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    import hf_fp8

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


def serve(case: str, name: str, dtype_name: str, device: str, tokens: int) -> None:
    """Build, then answer each line with the seconds of a step; the first answer is what is held and the peak, in GB."""
    import peft  # noqa: F401  before memory is looked at, as the other libraries are
    import torch
    import transformers  # noqa: F401

    import hf_fp8  # noqa: F401

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

    def sync() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    def step() -> float:
        sync()
        start = time.perf_counter()
        loss = model(x).float().square().mean() if is_stack else model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sync()
        return time.perf_counter() - start

    step()  # the optimizer's state, too
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    with watched() as memory:
        step()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else memory.peak - base
    print(json.dumps({"held_gb": sum(held.values()) / 1e9, "peak_gb": peak}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


class Worker:
    """A contender in its process. `error` says why there is none."""

    def __init__(self, *arguments: str) -> None:
        self.name, self.times = arguments[1], list[float]()
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stderr is not None
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(self.process.stderr), daemon=True)  # type: ignore[arg-type]
        reader.start()
        line = self.process.stdout.readline()
        self.found: dict[str, float] = json.loads(line) if line else {}
        self.error = ""
        if not line:
            self.process.wait()
            reader.join(1)
            self.error = next((text.strip() for text in reversed(said) if text.strip()), "no output")[:160]

    def step(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.times.append(json.loads(self.process.stdout.readline()))

    @property
    def seconds(self) -> float:
        return statistics.median(self.times) if self.times else float("nan")


def compare(case: str | Path, names: list[str], dtype: str, device: str, tokens: int, rounds: int) -> list[Worker]:
    workers = [Worker(str(case), name, dtype, device, str(tokens)) for name in names]
    there = [worker for worker in workers if not worker.error]
    for _ in range(rounds):
        for worker in there:
            worker.step()
    for worker in there:
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        worker.process.wait()
    return workers


if __name__ == "__main__":
    case, name, dtype, device, tokens = sys.argv[1:]
    serve(case, name, dtype, device, int(tokens))
