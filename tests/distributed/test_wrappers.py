"""Models with codes in several processes: DistributedDataParallel, and FSDP2's `fully_shard`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from support.build import stock_transformers
from support.ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import hf_fp8
from hf_fp8.integrations.ddp import IGNORED, quantized_names

pytestmark = pytest.mark.hostless

SCHEMES = ("FP8_DYNAMIC", "FP8_BLOCK", "INT8")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.lm_head = nn.Linear(48, 64), nn.Linear(64, 48, bias=False), nn.Linear(48, 40, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.b(self.a(x).relu()))

    def by_hand(self, x: torch.Tensor) -> torch.Tensor:
        """As fused losses do it."""
        return self.b(self.a(x).relu()) @ self.lm_head.weight.to(x.dtype).T


def adapted(scheme: str) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    hf_fp8.quantize_model(net, scheme, backend="int8" if scheme == "INT8" else "weight_only")
    torch.manual_seed(1)
    return get_peft_model(net, LoraConfig(r=4, target_modules=["a", "b"], init_lora_weights=False))


def batch(rank: int) -> torch.Tensor:
    return torch.randn(6, 48, generator=torch.Generator().manual_seed(rank))


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model(x).square().mean().backward()
    return {n.removeprefix("module."): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def data_parallel(model: nn.Module) -> nn.Module:
    if dist.get_rank():
        with torch.no_grad():  # so that there is something to send
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    net = model.base_model.model
    for part in (net.a, net.b, net.lm_head):
        fully_shard(part)
    return fully_shard(model)


def work(name: str, folder: Path) -> tuple[Any, ...]:
    way, scheme = name.split(".")
    rank = dist.get_rank()
    if way == "sent":
        return sent(scheme, rank)
    model = (data_parallel if way == "replicated" else sharded)(adapted(scheme))
    net = model.module.base_model.model if hasattr(model, "module") else model.base_model.model
    by_hand = None
    if way == "sharded":
        fused = fully_shard(Fused(adapted(scheme)))
        head = whole(net.lm_head.weight)  # between two forwards, as a fused loss of trl's reads it
        saved = whole(net.state_dict()["lm_head.weight"])
        by_hand = fused(batch(rank)).detach(), head.to(torch.float32), head.codes, saved.codes
    found = gradients(model, batch(rank))
    return found, {n: str(p.dtype) for n, p in net.named_parameters()}, by_hand


def sent(scheme: str, rank: int) -> tuple[torch.Tensor, str]:
    """Parameters are sent as scripts do it that know no DDP."""
    model = adapted(scheme)
    net = model.base_model.model
    with torch.no_grad():
        for parameter in model.parameters():
            if rank and parameter.is_floating_point() and parameter.itemsize > 1:
                parameter.data *= 3
        if rank:
            net.lm_head.weight.codes.copy_(net.lm_head.weight.codes.roll(1, 0))
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
    refused = ""
    try:
        dist.all_reduce(net.lm_head.weight)
    except hf_fp8.errors.UnsupportedError as error:
        refused = str(error)
    return net.lm_head.dequantized_weight(), refused


class Fused(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.base_model.model.by_hand(x)


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    ways = ("replicated", "sharded")
    results = run(2, work, [f"{way}.{scheme}" for way in (*ways, "sent") for scheme in SCHEMES], tmp_path)
    for scheme in SCHEMES:
        each = [gradients(adapted(scheme), batch(rank)) for rank in (0, 1)]
        wanted = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
        codes = {f"{name}.weight" for name in ("a.base_layer", "b.base_layer", "lm_head")}
        for name in ways:
            for rank in (0, 1):
                found, kinds, by_hand = results[f"{name}.{scheme}"][rank]
                assert found.keys() == wanted.keys()
                for key, gradient in wanted.items():
                    assert (found[key] - gradient).norm() <= 1e-5 * gradient.norm(), (name, scheme, key)
                assert {n for n, kind in kinds.items() if kind in ("torch.int8", "torch.float8_e4m3fn")} == codes
                if by_hand is not None:
                    net, (logits, values, *codes_read) = adapted(scheme).base_model.model, by_hand
                    wanted_logits = net.b(net.a(batch(rank)).relu()) @ net.lm_head.dequantized_weight().T
                    assert (logits - wanted_logits).norm() <= 1e-5 * wanted_logits.norm()
                    assert torch.equal(values, net.lm_head.dequantized_weight())
                    assert all(torch.equal(read, net.lm_head.weight) for read in codes_read)

    for scheme in SCHEMES:
        received, refused = results[f"sent.{scheme}"][1]
        assert torch.equal(received, adapted(scheme).base_model.model.lm_head.dequantized_weight())
        assert "lm_head.weight holds codes" in refused and "all_reduce" in refused


def test_names_for_any_wrapping() -> None:
    model = adapted("FP8_DYNAMIC")
    names = quantized_names(model)
    parameters = dict(model.named_parameters())
    assert "base_model.model.a.base_layer.weight" in names and "base_model.model.lm_head.weight_scale" in names
    assert set(names) <= parameters.keys() and len(names) == 6
    assert quantized_names(nn.Linear(2, 2)) == []
    shared = hf_fp8.quantize_model(Net())
    both = nn.ModuleDict({"one": shared, "two": copy.copy(shared)})
    assert len(quantized_names(both)) == 12


def test_what_a_user_leaves_out_stays_out(tmp_path: Path) -> None:
    model = adapted("FP8_DYNAMIC")
    setattr(model, IGNORED, ["mine"])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        found = nn.parallel.DistributedDataParallel(model)
        names = set(quantized_names(model))
        hf_fp8.dequantize_model(model)
        again = nn.parallel.DistributedDataParallel(model)  # now the weights are trained with the others
    finally:
        dist.destroy_process_group()
    assert found.parameters_to_ignore == {"mine", *names} and getattr(model, IGNORED) == ["mine"]
    assert again.parameters_to_ignore == {"mine"}


def test_a_model_without_codes_is_left_alone(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        assert nn.parallel.DistributedDataParallel(model)(torch.ones(1, 4)).shape == (1, 4)
    finally:
        dist.destroy_process_group()
    assert not hasattr(model, IGNORED)
    with stock_transformers():
        assert nn.parallel.DistributedDataParallel.__init__.__module__.startswith("torch")
