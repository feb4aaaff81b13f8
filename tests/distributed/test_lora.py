"""LoRA over FP8 weights in two processes: the losses of one process with the same global batch, and the adapters' files."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, PeftModel, get_peft_model
from support.build import error
from support.moe import causal
from support.ranks import held, load, make, run
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import hf_fp8
from hf_fp8.nn.experts import QuantizedExperts

STEPS, RATE = 20, 2e-3
# name -> (family, scheme, how the model is loaded)
WAYS = {
    "ddp": ("llama", "channel", "one"),
    "fully_shard": ("llama", "block128", "one"),
    "checkpointing": ("llama", "channel", "one"),
    "cpu_offload": ("llama", "channel", "one"),
    "experts": ("mixtral", "channel", "one"),
    "accelerate": ("llama", "channel", "one"),
    "ram_efficient": ("llama", "static", "one"),
    "transformers": ("llama", "channel", "fsdp2"),
}


def batch(step: int, rank: int | None) -> torch.Tensor:
    ids = torch.randint(3, 120, (4, 16), generator=torch.Generator().manual_seed(step))
    return ids if rank is None else ids[2 * rank : 2 * rank + 2]


def adapted(path: Path, layout: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj", "gate_proj"]
    model = load(path, layout)
    parameters = ["mlp.experts.down_proj"] if any(isinstance(m, QuantizedExperts) for m in model.modules()) else None
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, target_parameters=parameters))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def train(model: Any, rank: int | None, optimizer: Any = None, backward: Any = torch.Tensor.backward) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for step in range(STEPS):
        ids = batch(step, rank)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().clone()
        if rank is not None:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return losses


def sharded(model: Any, **options: Any) -> Any:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def prepared(model: Any, **options: Any) -> tuple[Any, Any, Any]:
    """As accelerate prepares a model for FSDP2. It does so only on accelerators: here it is told that it is on one."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **options,
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    return accelerator, *accelerator.prepare(model, optimizer)


def work(name: str, folder: Path) -> dict[str, Any]:
    family, scheme, layout = WAYS[name]
    rank = dist.get_rank()
    model = adapted(folder / f"{family}.{scheme}", layout)
    kept = model
    if name == "ddp":
        model = DistributedDataParallel(model)
    elif name == "checkpointing":
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable()
        model = sharded(model)
    elif name == "cpu_offload":
        model = sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    elif name in ("fully_shard", "experts"):
        model = sharded(model)
    if name in ("accelerate", "ram_efficient"):
        accelerator, model, optimizer = prepared(model, cpu_ram_efficient_loading=name == "ram_efficient")
        losses = train(model, rank, optimizer, accelerator.backward)
    else:
        losses = train(model, rank)
    codes = {n: held(p) for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    found = {"losses": losses, "codes": codes, "adapters": sum(held(p) for p in model.parameters() if p.requires_grad)}
    state = None
    if name != "ddp":
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=whole)  # as Trainer and accelerate do it: codes, too
    if rank == 0:
        kept.save_pretrained(folder / f"adapter-{name}", state_dict=state)
    dist.barrier()
    return found


def check(names: list[str], folder: Path) -> None:
    for family, scheme, _ in {WAYS[name] for name in names}:
        if not (folder / f"{family}.{scheme}").exists():
            make(family, scheme, folder / f"{family}.{scheme}")
    found = run(2, work, names, folder)
    for name in names:
        family, scheme, _ = WAYS[name]
        path = folder / f"{family}.{scheme}"
        alone = adapted(path, "one")
        wanted = train(alone, None)
        for rank in found[name]:
            assert max(abs(a - b) for a, b in zip(rank["losses"], wanted, strict=True)) <= 1e-4, name
            whole = {n: p.nbytes for n, p in alone.named_parameters() if p.dtype == torch.float8_e4m3fn}
            prefix = "module." if name == "ddp" else ""
            share = 1 if name == "ddp" else 2
            assert rank["codes"] == {prefix + n: size // share for n, size in whole.items()}, name
        # The adapters are loaded by one process, and merged there.
        again = PeftModel.from_pretrained(load(path, "one"), folder / f"adapter-{name}")
        assert error(causal(again), causal(alone)) <= 1e-4, name
        with hf_fp8.merging("dense"):
            merged = again.merge_and_unload()
        assert error(causal(merged), causal(alone)) <= 1e-4, name


def test_fsdp(tmp_path: Path) -> None:
    check(["fully_shard", "accelerate", "transformers"], tmp_path)


@pytest.mark.slow
def test_others(tmp_path: Path) -> None:
    check(["ddp", "checkpointing", "cpu_offload", "experts", "ram_efficient"], tmp_path)


def resume(name: str, folder: Path) -> list[float]:
    """Train, with adapters that were saved before; created on a model that is sharded already, with other random numbers in
    each process."""
    model = PeftModel.from_pretrained(load(folder / "llama.channel", "fsdp2"), folder / "adapter", is_trainable=True)
    return train(model, dist.get_rank())


def different(name: str, folder: Path) -> list[torch.Tensor]:
    model = adapted(folder / "llama.channel", "fsdp2", seed=dist.get_rank())
    train(model, dist.get_rank())
    return [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.mark.slow
def test_resuming(tmp_path: Path) -> None:
    make("llama", "channel", tmp_path / "llama.channel")
    first = adapted(tmp_path / "llama.channel", "one")
    train(first, None)
    first.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "llama.channel", "one"), tmp_path / "adapter", is_trainable=True)
    wanted = train(again, None)
    for losses in run(2, resume, ["resumed"], tmp_path)["resumed"]:
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) <= 1e-4
    one, other = run(2, different, ["different"], tmp_path)["different"]
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def half(name: str, folder: Path) -> tuple[list[float], set[torch.dtype]]:
    """Codes, scales, and adapters in float32 in one group, computed in bfloat16."""
    model = adapted(folder / "llama.block32", "one")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    seen: set[torch.dtype] = set()

    def look(layer: nn.Module, *_: Any) -> None:
        seen.update(p.dtype for p in layer.parameters())

    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.register_forward_pre_hook(look)
    return train(sharded(model, mp_policy=policy), dist.get_rank()), seen


@pytest.mark.slow
def test_mixed_precision(tmp_path: Path) -> None:
    """FSDP casts parameters for the computation: not codes, which would be rounded again."""
    make("llama", "block32", tmp_path / "llama.block32")
    wanted = train(adapted(tmp_path / "llama.block32", "one"), None)
    for losses, dtypes in run(2, half, ["half"], tmp_path)["half"]:
        assert torch.float8_e4m3fn in dtypes
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) <= 0.05


def trained(name: str, folder: Path) -> list[float]:
    """The losses of transformers' Trainer, which accelerate shards with FSDP2 in two processes: two steps, and two after the
    checkpoint."""
    batch_size = 4 // (dist.get_world_size() if dist.is_initialized() else 1)
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 120, (32, 16), generator=generator)]
    options: dict[str, Any] = {"logging_steps": 1, "save_steps": 2, "learning_rate": RATE, "report_to": [], "use_cpu": True}
    losses = []
    for max_steps in (2, 4):
        arguments = TrainingArguments(
            str(folder / name), per_device_train_batch_size=batch_size, max_steps=max_steps, lr_scheduler_type="constant",
            disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = Trainer(adapted(folder / "llama.channel", "one"), arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=max_steps > 2)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert trainer.is_fsdp_enabled is dist.is_initialized()
    trainer.save_model(str(folder / f"adapter-{name}"))
    return losses


def trained_sharded(name: str, folder: Path) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "true" if name == "ram_efficient" else "false",
        }.items():  # fmt: skip  # as `accelerate launch` sets them
            patch.setenv(key, value)
        patch.setattr(AcceleratorState, "__init__", partialmethod(_state, AcceleratorState.__init__))
        return trained(name, folder)


def _state(self: Any, host: Any, *args: Any, **kwargs: Any) -> None:
    """`AcceleratorState.__init__`, which uses FSDP only on accelerators: here it is told that it is on one."""
    plugin = kwargs.get("fsdp_plugin") or self._shared_state.get("fsdp_plugin")
    host(self, *args, **kwargs)
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


@pytest.mark.slow
def test_trainer(tmp_path: Path) -> None:
    """transformers' Trainer over FSDP2 of accelerate, resumed, and its adapters loaded by one process."""
    make("llama", "channel", tmp_path / "llama.channel")
    wanted = trained("alone", tmp_path)
    for name, ranks in run(2, trained_sharded, ["whole", "ram_efficient"], tmp_path).items():
        for losses in ranks:
            assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) <= 1e-4
        model, alone = (
            PeftModel.from_pretrained(load(tmp_path / "llama.channel", "one"), tmp_path / f"adapter-{which}")
            for which in (name, "alone")
        )
        assert error(causal(model), causal(alone)) <= 1e-4
