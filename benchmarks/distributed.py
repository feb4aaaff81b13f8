"""One model in several processes, `scripts/bench distributed`: what each holds, reads and needs, and how long it takes.

Writes an FP8 mixture of experts (0.8 GB, random codes; that of `load_memory`) to a temporary folder, and loads it in each
layout with gloo on a CPU: kept in FP8, and dequantized to bfloat16 (`dense`). "stock" is transformers without hf_fp8. Each
process has one thread: two cores are enough for two of them. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from .common.results import Line, Results, console, parser
from .load_memory import write

# name -> (processes, sizes)
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one process": (1, {}),
    "tp 2": (2, {"tp_size": 2}),
    "ep 2": (2, {"tp_size": 2, "ep_size": 2}),
    "fsdp 2": (2, {"fsdp_size": 2}),
    "pp 2": (2, {"pp_size": 2}),
    "tp 2, fsdp 2": (4, {"tp_size": 2, "fsdp_size": 2}),
}
CONTENDERS = ("hf_fp8", "dense", "stock")
TOKENS = 64
PORT = 29611


def process(rank: int, n: int, path: str, sizes: dict[str, int], contender: str, rounds: int, out: str) -> None:
    """Measure in one of `n` processes, and write what was found to the folder `out`."""
    import torch
    from transformers import AutoModelForCausalLM, logging
    from transformers.distributed import DistributedConfig

    import hf_fp8

    from .common.memory import watched

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=str(PORT))
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if contender == "stock":
        hf_fp8.unregister()
    else:
        dense = contender == "dense"
        options["quantization_config"] = hf_fp8.FP8Config(dequantize=True) if dense else hf_fp8.FP8Config(experts="fp8")
    if sizes:
        torch.distributed.init_process_group("gloo")
        options["distributed_config"] = DistributedConfig(**sizes)
    found: dict[str, Any] = {}
    try:
        read = count_reading()
        with watched() as memory:
            model = AutoModelForCausalLM.from_pretrained(path, **options)
        found = {"held": held(model), "peak": memory.used, "read": read[0] / 1e9, "load": memory.seconds}
        with torch.no_grad():
            for name, ids in (("prefill", torch.arange(TOKENS).unsqueeze(0)), ("token", torch.tensor([[1]]))):
                found[name] = timed(lambda ids=ids: model(ids, use_cache=False), rounds)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # others may wait in a collective for a process that failed


def train(rank: int, n: int, path: str, out: str) -> None:
    """LoRA steps over weights that FSDP2 has sharded: what a process holds, and takes at most beside it in a step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, logging
    from transformers.distributed import DistributedConfig

    import hf_fp8

    from .common.memory import watched

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=str(PORT))
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    torch.distributed.init_process_group("gloo")
    layout = DistributedConfig(fsdp_size=n)
    config = hf_fp8.FP8Config(backend="weight_only")
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=config, distributed_config=layout
    )
    layers = model.model.layers
    block = sum(parameter.numel() * parameter.element_size() for parameter in layers[0].parameters()) / 1e9
    found = {"whole": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9, "held": held(model), "block": block}
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    model.base_model.model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.arange(TOKENS).unsqueeze(0)
    for _ in range(2):
        with watched() as memory:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found |= {"peak": memory.used, "s": memory.seconds}
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def held(model: Any) -> float:
    """GB of parameters and buffers in this process."""
    parts = [getattr(t, "_local_tensor", t) for t in (*model.parameters(), *model.buffers())]
    return float(sum(t.nbytes for t in {id(t): t for t in parts}.values()) / 1e9)


def count_reading() -> list[int]:
    """From now on, the bytes of tensors that are read from the files, by transformers' loader or ours: in the first entry."""
    from transformers import core_model_loading as host

    from hf_fp8.checkpoint.lazy import LazyCheckpoint, LazyTensor

    found = [0]
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}

    def counting(owner: Any, name: str, source_at: int) -> None:
        before = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor, source = before(*args, **kwargs), args[source_at]
            if name == "_part":
                found[0] += tensor.nbytes
            elif tensor is not None and not isinstance(source, LazyTensor):
                found[0] += tensor.numel() * sizes[source.get_dtype()]
            return tensor

        setattr(owner, name, call)

    counting(host.DtensorShardOperation, "shard_tensor", 1)
    counting(host, "_materialize_copy", 0)
    counting(LazyCheckpoint, "_part", 0)
    return found


def timed(call: Any, rounds: int) -> float:
    """The median in ms; all processes call it equally often."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measured(path: Path, layout: str, contender: str, rounds: int) -> dict[str, Any]:
    """The largest of each number over the processes, or what the first that failed said."""
    import torch

    n, sizes = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as out:
        context = torch.multiprocessing.spawn(
            process, (n, str(path), sizes, contender, rounds, out), nprocs=n, join=False
        )  # each a fresh process
        deadline = time.monotonic() + 300
        while any(worker.is_alive() for worker in context.processes) and time.monotonic() < deadline:
            files = [json.loads(file.read_text() or "{}") for file in Path(out).glob("*.json")]
            if any("error" in found for found in files):
                break
            time.sleep(0.2)
        for worker in context.processes:
            worker.kill()
            worker.join()
        found = [json.loads(file.read_text()) for file in sorted(Path(out).glob("*.json"))]
    failed = next((one["error"] for one in found if "error" in one), "" if len(found) == n else "no answer within 300 s")
    return {"error": failed} if failed else {key: max(one[key] for one in found) for key in found[0]}


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    made.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    made.add_argument("--train", action="store_true", help="memory of LoRA steps under FSDP2 instead")
    return made


def main() -> None:
    options = arguments().parse_args()
    if options.train:
        print_training()
        return
    results = Results(options.device, options.csv)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e9
        console.print(f"the checkpoint has {size:.3f} GB")
        for layout in options.layouts:
            lines = []
            for contender in options.contenders:
                found = measured(Path(folder), layout, contender, options.rounds)
                if "error" in found:
                    lines.append(Line(contender, error=found["error"]))
                    continue
                cells = tuple(found[key] for key in ("held", "peak", "read", "load", "prefill", "token"))
                lines.append(Line(contender, cells, row(layout, found)))
            columns = ("GB held", "GB at most", "GB read", "s to load", f"ms for {TOKENS} tokens", "ms for 1 token")
            results.add(f"{layout}: of the process with most", columns, lines)


def print_training() -> None:
    """Of the 1.1B shape in two processes; not written to the CSV file, as there is no time to compare."""
    import torch

    from .common.shapes import write as write_dense

    with tempfile.TemporaryDirectory() as folder:
        write_dense("tinyllama-1.1b", Path(folder, "model"))
        torch.multiprocessing.spawn(train, (2, str(Path(folder, "model")), folder), nprocs=2)
        found = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
        most = {key: max(one[key] for one in found) for key in found[0]}
    console.print(
        f"LoRA, fsdp 2, tinyllama-1.1b in FP8 ({most['whole']:.3f} GB, a layer {most['block']:.3f}): a process holds "
        f"{most['held']:.3f} GB, and takes at most {most['peak']:.3f} GB more in a step of {TOKENS} tokens with gradient "
        f"checkpointing ({most['s']:.1f} s)"
    )


def row(layout: str, found: dict[str, Any]) -> dict[str, Any]:
    note = f"held by one process; at most {found['peak']:.3f} GB, {found['read']:.3f} read, 1 token {found['token']:.4g} ms"
    return {
        "benchmark": "distributed", "case": f"qwen3-moe 0.8 GB, {layout}", "scheme": "channel", "dtype": "bfloat16",
        "m": TOKENS, "ms": found["prefill"], "gb": found["held"], "note": note,
    }  # fmt: skip


if __name__ == "__main__":
    main()
