"""Quantization-aware training in several processes: DistributedDataParallel, and FSDP2's `fully_shard`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from support.ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_fp8 import convert_qat, dequantize_model, prepare_qat
from hf_fp8.errors import UnsupportedError

pytestmark = pytest.mark.hostless

SCHEMES = ("W4A16", "W4AFP8", "FP8")
STEPS = 3


def prepared(scheme: str, adapters: bool) -> nn.Module:
    torch.manual_seed(0)
    model = prepare_qat(nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64, bias=False)), scheme)
    if adapters:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    return model.train()


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(6, 128, generator=torch.Generator().manual_seed(10 * step + rank))


def train(model: nn.Module, ranks: list[int]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for step in range(STEPS):
        for rank in ranks:
            (model(batch(rank, step)).square().mean() / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone() for name, tensor in found.items()}


def work(name: str, folder: Path) -> tuple[Any, ...]:
    way, scheme = name.split(".")
    inner = prepared(scheme, adapters=way == "adapters")
    if way == "sharded":
        for layer in (inner[0], inner[2]):
            fully_shard(layer)
        model = fully_shard(inner)
    else:
        model = nn.parallel.DistributedDataParallel(inner)
    train(model, [dist.get_rank()])
    trained = values(inner)
    if way == "sharded":
        with pytest.raises(UnsupportedError, match="sharded over processes"):
            convert_qat(inner)
        return trained, None
    wanted = inner.eval()(batch(7, 0))
    found = convert_qat(inner)
    assert torch.equal(found(batch(7, 0)), wanted)
    return trained, values(dequantize_model(found))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The processes have half of each batch, and end with the same weights: those of one process with all of it."""
    names = [f"{way}.{scheme}" for way in ("replicated", "adapters", "sharded") for scheme in SCHEMES]
    for name, results in run(2, work, names, tmp_path).items():
        way, scheme = name.split(".")
        one = prepared(scheme, adapters=way == "adapters")
        before = values(one)
        train(one, [0, 1])
        (first, converted), (second, other) = results
        for key, wanted in values(one).items():
            if key.endswith("input_amax"):  # of the inputs of each process; DDP sends that of the first in each forward
                assert 0 < first[key] != second[key]
                continue
            assert torch.equal(first[key], second[key]), (name, key)
            if scheme != "FP8":
                assert (first[key] - wanted).norm() <= 1e-4 * (wanted - before[key]).norm(), (name, key)
        if converted is not None:
            assert all(torch.equal(converted[key], other[key]) for key in converted), name
