"""State dicts of sharded models: saved by torch.save and loaded again, filled from whole ones, and copies of models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.moe import causal
from support.ranks import load, make, run
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

pytestmark = pytest.mark.slow


def work(name: str, folder: Path) -> bool:
    layout, way = name.split(".")
    model = load(folder / "llama.block128", layout)
    wanted = causal(model)
    if way == "saved":
        state = folder / f"{name}-{dist.get_rank()}.state"
        torch.save(model.state_dict(), state)
        assert state.stat().st_size < 0.75 * sum(file.stat().st_size for file in (folder / "llama.block128").iterdir())
        emptied(model).load_state_dict(torch.load(state, weights_only=False))
    elif way == "copied":
        model = copy.deepcopy(model)
        layer = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
        assert torch.equal(layer.weight.full_tensor(), model.model.layers[0].self_attn.q_proj.weight.full_tensor())
    else:
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=way == "sent"))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=way == "sent")
        model = emptied(load(folder / "llama.block128", layout))  # FSDP fills it before its first call
        set_model_state_dict(model, whole, options=options)
    return torch.equal(causal(model), wanted)


def emptied(model: Any) -> Any:
    for parameter in model.parameters():
        getattr(parameter, "_local_tensor", parameter).detach().zero_()
    return model


def test_states(tmp_path: Path) -> None:
    make("llama", "block128", tmp_path / "llama.block128")
    # FSDP refuses to copy a model.
    names = [f"{layout}.{way}" for layout in ("tp2", "fsdp2") for way in ("saved", "sent", "given")]
    found = run(2, work, [*names, "tp2.copied"], tmp_path)
    assert all(all(ranks) for ranks in found.values()), found
