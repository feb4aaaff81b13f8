"""Pipeline parallelism of the host (transformers), which splits the layers of a model over processes: stages."""

from __future__ import annotations

from typing import Any

import torch

from ..loading.dtypes import float_parameter
from .patches import bind, original


def send_floats(model: Any) -> None:
    """Make the stages of `model`, if it has any, send hidden states and logits in the dtype of the model.

    The host sends them in the dtype of a stage's first parameter, which may be codes: they would be cast to FP8, and another
    stage would expect another size.
    """
    stage = getattr(model, "_pp_stage", None)
    if stage is not None:
        stage.hf_fp8_like = float_parameter(model)
        bind(stage, "communicate", _communicate)
        bind(stage, "broadcast_from_last", _broadcast)


def _communicate(stage: Any, *args: Any, dtype: torch.dtype, **kwargs: Any) -> Any:
    return original(stage, "communicate")(*args, dtype=_dtype(stage, dtype), **kwargs)


def _broadcast(stage: Any, *args: Any, dtype: torch.dtype, **kwargs: Any) -> Any:
    return original(stage, "broadcast_from_last")(*args, dtype=_dtype(stage, dtype), **kwargs)


def _dtype(stage: Any, dtype: torch.dtype) -> torch.dtype:
    return dtype if stage.hf_fp8_like is None else stage.hf_fp8_like.dtype


def collect(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of all stages, in the first one; `state` itself for a model without stages. All of them must call it."""
    stage = getattr(model, "_pp_stage", None)
    if stage is None:
        return state
    from torch.distributed import get_global_rank, recv, recv_object_list, send, send_object_list

    device = torch.device("cpu") if stage.comm_on_cpu else torch.accelerator.current_accelerator()
    first = get_global_rank(stage.pp_group, 0)
    if stage.pp_rank:
        # The host drops one name of tied tensors later, in the first stage, which does not hold them.
        held = dict(model.named_parameters(remove_duplicate=False))
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        state = {name: t for name, t in state.items() if name not in tied or held.get(name) is not held.get(tied[name])}
        headers = [(name, tensor.dtype, tensor.shape) for name, tensor in state.items()]
        send_object_list([headers], first, group=stage.pp_group, device=device)
        for tensor in state.values():
            send(_bytes(tensor).to(device), first, group=stage.pp_group)
        return {}
    for rank in range(1, stage.pp_size):
        there = get_global_rank(stage.pp_group, rank)
        received: list[Any] = [None]
        recv_object_list(received, there, group=stage.pp_group, device=device)
        for name, dtype, shape in received[0]:
            data = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8, device=device)
            recv(data, there, group=stage.pp_group)
            # A tied embedding is in the last stage, too.
            state.setdefault(name, data.cpu().view(dtype).view(shape))
    return state


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
