"""Runs models for `quality`, in evaluation mode, on batches of any form, on any device; and measures `perplexity`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..nn.base import QuantizedModule

# Called with (name of the step, amount done, total or None if unknown).
Progress = Callable[[str, int, "int | None"], Any]


_running: list[Any] = []  # the stance, once for each `evaluating` block that is active
_stances = threading.Lock()


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Run nothing compiled, in any thread: the first block that enters sets torch's stance, the last that exits resets it."""
    with _stances:
        _running.append(_running[0] if _running else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _stances:
            stance = _running.pop()
            if not _running:
                stance.__exit__(None, None, None)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, nothing compiled (compiled code may not call hooks); restores all at the end."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad(), _eager():
            yield
    finally:
        for module, training in flags:
            module.training = training


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes; accelerate moves offloaded weights there for the call."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    tensors = (*module.parameters(), *module.buffers())
    return next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of the first float parameter that is neither codes (8-bit values) nor scales; None if there is none."""
    for module in model.modules():
        coded = module.quantized if isinstance(module, QuantizedModule) else ()
        for name, parameter in module.named_parameters(recurse=False):
            if name not in coded and parameter.is_floating_point() and parameter.element_size() > 1:
                return parameter.dtype
    return None


def moved(values: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """`values` with its tensors on `device`, float tensors in `dtype` (None: unchanged)."""

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    return tree_map(move, values)


def call(model: nn.Module, batch: Any) -> Any:
    """model(batch), model(*batch) or model(**batch), moved to the device and dtype of the model."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    batch = moved(batch, device_of(model), dtype_of(model))
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def first_tensor(output: Any) -> torch.Tensor | None:
    """The first tensor in what a module returned."""
    if isinstance(output, torch.Tensor):
        return output
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        output = vars(output)
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def check_text(ids: torch.Tensor, window: int) -> None:
    """Raise ValueError if `perplexity` cannot be measured on the text."""
    if ids.ndim != 1 or len(ids) < 2 or window < 2:
        raise ValueError(
            f"perplexity needs a text of two or more tokens, ids (L,), and windows of two or more; got ids "
            f"{tuple(ids.shape)} and window={window}"
        )


def perplexity(model: nn.Module, ids: torch.Tensor, window: int = 512, progress: Progress | None = None) -> float:
    """exp of the mean negative log-likelihood of a token, given those before it in its window.

    model: a causal language model, `model(ids (1, T)).logits` (1, T, V) or those as the first tensor. ids: (L,) int64,
    cut into windows of `window` tokens; a last window of one token is left out. Computed on the model's device, in
    evaluation mode, from logits in float32. Raises ValueError for ids that are not 1-D, or fewer than two.
    """
    check_text(ids, window)
    total, count, device = 0.0, 0, device_of(model)
    with evaluating(model):
        for start in range(0, len(ids) - 1, window):
            part = ids[start : start + window].to(device)
            logits = logits_of(model(part[None]))
            if logits is None or logits.ndim != 3:
                raise ValueError(f"{type(model).__name__} gives no logits (1, T, V): it is not a causal language model")
            losses = nn.functional.cross_entropy(logits[0, :-1].float(), part[1:].to(logits.device), reduction="sum")
            total, count = total + losses.item(), count + len(part) - 1
            if progress is not None:
                progress("perplexity", min(start + window, len(ids)), len(ids))
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf if not math.isnan(mean) else math.nan


def logits_of(output: Any) -> torch.Tensor | None:
    """The logits of what a model returned: `.logits`, or else its first tensor."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, torch.Tensor) else first_tensor(output)
