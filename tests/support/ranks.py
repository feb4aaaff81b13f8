"""Runs a function in several processes on CPUs, connected by gloo; and the models that they load."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from support import dialects, moe
from support.build import STATIC_TENSOR, group_input, tiny_llama, write
from support.kernels import limit_as_of_large_layers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.distributed import DistributedConfig

from hf_fp8 import FP8Config
from hf_fp8.checkpoint.lazy import LazyCheckpoint
from hf_fp8.formats.scheme import TENSOR, Granularity
from hf_fp8.kernels import thresholds

# (name of a result, folder) -> what a process found
Work = Callable[[str, Path], Any]


def run(n: int, work: Work, names: Sequence[str], folder: Path) -> dict[str, list[Any]]:
    """``work(name, folder)`` for each name in `n` processes at once: name -> the results by rank.

    Raises what a process raised. work: at the top level of a module. The processes live until `close`, or until another number
    of them is asked for, as they need many seconds to start.
    """
    if len(_connections) != n:
        close()
        _start(n)
    place = f"file://{folder}/{uuid4().hex}"
    for connection in _connections:
        connection.send((work, names, folder, place))
    waiting = list(_connections)
    while waiting:
        ready = wait(waiting)
        for connection in [one for one in waiting if one in ready]:
            waiting.remove(connection)
            try:
                failure = connection.recv()
            except (EOFError, OSError):
                failure = "it ended"
            if failure:
                rank = _connections.index(connection)
                close()  # the others may wait for this process
                raise RuntimeError(f"process {rank} of {n}: {failure}")
    return {name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(n)] for name in names}


_connections: list[Connection] = []
_processes: list[Any] = []


def _start(n: int) -> None:
    context = torch.multiprocessing.get_context("spawn")
    for rank in range(n):
        ours, theirs = context.Pipe()
        process = context.Process(target=_process, args=(rank, n, theirs), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen here
        _connections.append(ours)
        _processes.append(process)


def close() -> None:
    """End the processes of `run`."""
    for process in _processes:
        process.kill()
        process.join()
    _connections.clear()
    _processes.clear()


def _process(rank: int, n: int, connection: Connection) -> None:
    import transformers

    # What transformers and accelerate ask for; nothing listens at that port.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity(50)
    thresholds.Int8Cost.limit = limit_as_of_large_layers  # type: ignore[method-assign]  # as conftest does in the first process
    while True:
        failure = ""
        try:
            work, names, folder, place = connection.recv()
            for name in names:
                dist.init_process_group(
                    "gloo", init_method=f"{place}-{name}", rank=rank, world_size=n, timeout=timedelta(minutes=5)
                )
                torch.save(work(name, folder), folder / f"{name}-{rank}.pt")
                if dist.is_initialized():
                    dist.destroy_process_group()  # each load makes groups, and each of these threads
                AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps what it found
        except EOFError:  # the first process has ended
            return
        except BaseException:
            failure = traceback.format_exc()
        connection.send(failure)


def llama(**options: Any) -> PreTrainedModel:
    return tiny_llama(num_key_value_heads=4, hidden_size=128, intermediate_size=192, **options)


def biased() -> PreTrainedModel:
    model, generator = llama(attention_bias=True, mlp_bias=True), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, generator=generator)
    return model


def qwen3() -> PreTrainedModel:
    return moe.make(Qwen3ForCausalLM, Qwen3Config(**_HEADS, intermediate_size=96, head_dim=16))


def gemma3() -> PreTrainedModel:
    return moe.make(Gemma3ForCausalLM, Gemma3TextConfig(**_HEADS, intermediate_size=96, head_dim=16, sliding_window=8))


def phi3() -> PreTrainedModel:
    return moe.make(Phi3ForCausalLM, Phi3Config(**_HEADS, intermediate_size=96, pad_token_id=0))


def mixtral() -> PreTrainedModel:
    return moe.make(MixtralForCausalLM, MixtralConfig(**_HEADS, intermediate_size=96, num_local_experts=4))


def qwen3_moe() -> PreTrainedModel:
    sizes = {"intermediate_size": 96, "moe_intermediate_size": 40, "head_dim": 16}
    return moe.make(Qwen3MoeForCausalLM, Qwen3MoeConfig(**_HEADS, **sizes, num_experts=4, num_experts_per_tok=2))


_HEADS: dict[str, Any] = {**moe.BASE, "num_key_value_heads": 4}
FAMILIES = {
    "llama": llama, "biased": biased, "qwen3": qwen3, "gemma3": gemma3, "phi3": phi3,
    "mixtral": mixtral, "qwen3_moe": qwen3_moe, "deepseek_v3": moe.deepseek_v3, **moe.TRANSPOSED,
}  # fmt: skip


def _as_mx(config: dict[str, Any]) -> None:
    found = config["quantization_config"]
    found["config_groups"]["group_0"]["weights"]["scale_dtype"] = "torch.uint8"
    found["format"] = "mxfp8-quantized"


# Blocks of 32 divide the parts of most weights here, those of 128 none: they are cut.
SCHEMES: dict[str, dict[str, Any]] = {
    "channel": {},
    "static": {"weight": TENSOR, "inputs": STATIC_TENSOR},
    "dynamic": {"weight": TENSOR, "inputs": {**STATIC_TENSOR, "dynamic": True}},
    "group32": {"weight": Granularity(1, 32), "inputs": group_input(32)},
    "block32": {"weight": Granularity(32, 32), "inputs": group_input(32), "scale_dtype": torch.float32},
    "block128": {"weight": Granularity(128, 128), "inputs": group_input(), "scale_dtype": torch.float32},
    "e8m0": {"weight": Granularity(128, 128), "inputs": group_input(), "scale_dtype": torch.float8_e8m0fnu},
    "mx": {
        "weight": Granularity(1, 32),
        "inputs": {**group_input(32), "scale_dtype": "torch.uint8"},
        "scale_dtype": torch.uint8,
        "config_edit": _as_mx,
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "weight_only": {"backend": "weight_only", "experts": "fp8"},
    "scaled_mm": {"backend": "scaled_mm", "experts": "fp8"},
    "exact": {"backend": "scaled_mm", "experts": "fp8"},  # in float64, where the order of sums changes no code
    "int8": {"backend": "int8"},
    "dequantize": {"dequantize": True},
    "experts_dense": {"backend": "weight_only", "experts": "dequantize"},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tp_size": 2},
    "tp4": {"tp_size": 4},
    "pp2": {"pp_size": 2},
    "fsdp2": {"fsdp_size": 2},
    "ep2": {"tp_size": 2, "ep_size": 2},  # both processes have the same tokens: all-reduce
    "ep2_exchanged": {"fsdp_size": 2, "ep_size": 2},  # they have different ones: all-to-all
    "ep2_sliced": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "tp2_fsdp2": {"tp_size": 2, "fsdp_size": 2},
    "hsdp": {"fsdp_size": 2, "dp_replicate_size": 2},
    "ep4": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
}


def make(family: str, scheme: str, path: Path) -> PreTrainedModel:
    """Write a checkpoint of a small model, and return the dense model that it was made from."""
    if family in moe.TRANSPOSED:
        return moe.write_transposed(family, "split", path, **SCHEMES[scheme])[0]
    model = FAMILIES[family]()
    if scheme in dialects.VARIANTS:
        dialects.write_in(scheme, model, path, moe.is_linear)
        return model
    write(model, path, quantized=moe.is_linear, **SCHEMES[scheme])
    return model


def load(path: Path, layout: str, config: str | FP8Config | None = "weight_only", **options: Any) -> Any:
    """Load a checkpoint of `make` in one of `LAYOUTS`; in float32, or float64 if the config is "exact"."""
    from transformers import AutoModelForCausalLM

    asked = FP8Config(**CONFIGS[config]) if isinstance(config, str) else config
    dtype = torch.float64 if config == "exact" else torch.float32
    if LAYOUTS[layout]:
        options["distributed_config"] = DistributedConfig(**LAYOUTS[layout])
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=asked, **{"dtype": dtype} | options)


def held(parameter: Any) -> int:
    """Bytes of a parameter in this process."""
    return int(getattr(parameter, "_local_tensor", parameter).nbytes)


class Reading:
    """Context manager that counts the bytes of tensors that sharded loading reads, in `bytes`."""

    def __enter__(self) -> Reading:
        self.bytes, self._part = 0, LazyCheckpoint._part
        counting = self

        def part(self: LazyCheckpoint, *args: Any) -> torch.Tensor:
            tensor = counting._part(self, *args)
            counting.bytes += tensor.nbytes
            return tensor

        LazyCheckpoint._part = part  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: Any) -> None:
        LazyCheckpoint._part = self._part  # type: ignore[method-assign]
