"""Compares outputs: of each layer alone, of each layer within its model, and the models' logits."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..formats.numerics import CPU_CHUNK, GPU_CHUNK
from ..nn.experts import QuantizedExperts
from ..nn.linear import QuantizedLinear
from .running import Progress, call, device_of, dtype_of, first_tensor, logits_of, moved

Layer = QuantizedLinear | QuantizedExperts
Hook = Callable[..., None]
# Elements that are compared at a time on a CPU. Comparing 3 million float32 numbers on two cores takes 17 ms at 2**14, 9 at
# 2**16, 9 at 2**17, 26 at 2**19.
PIECE = 2**16


@dataclass
class Sums:
    """Sums over everything that was added: ||x||^2, ||x - x_hat||^2, the largest |x - x_hat|, and how many numbers.

    Differences, squares and sums are taken in float64 (float32 on MPS, which has no float64), a piece at a time.
    """

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    count: int = 0

    def add(self, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Two tensors of the same shape, any dtypes; compared on the device of `expected`."""
        device = expected.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        step = PIECE if device.type == "cpu" else GPU_CHUNK // 4
        pairs = zip(torch.split(expected.reshape(-1), step), torch.split(found.reshape(-1), step), strict=True)
        for x, y in pairs if expected.numel() else ():
            x = x.to(wide)
            difference = x - y.to(device).to(wide)
            self.noise += difference.square().sum().item()
            self.signal += x.square().sum().item()
            largest = difference.abs_().max().item()
            self.largest = largest if math.isnan(largest) else max(self.largest, largest)
        self.count += expected.numel()

    def merge(self, other: Sums) -> None:
        """Add another's sums."""
        largest = other.largest if math.isnan(other.largest) else max(self.largest, other.largest)
        self.signal, self.noise = self.signal + other.signal, self.noise + other.noise
        self.largest, self.count = largest, self.count + other.count

    @property
    def sqnr(self) -> float | None:
        """In dB. inf if nothing differs (also if all are zero), -inf if only x is all zero; None if nothing was added."""
        if self.count == 0:
            return None
        if math.isnan(self.noise) or math.isnan(self.signal) or math.isinf(self.noise):
            return math.nan
        if self.noise == 0:
            return math.inf
        return -math.inf if self.signal == 0 else 10 * (math.log10(self.signal) - math.log10(self.noise))

    @property
    def relative_error(self) -> float | None:
        """||x - x_hat|| / ||x||; 0 if both are all zero; None if nothing was added."""
        if self.count == 0:
            return None
        if self.signal == 0:
            return 0.0 if self.noise == 0 else math.inf if self.noise > 0 else math.nan
        return math.sqrt(self.noise) / math.sqrt(self.signal)


@dataclass(frozen=True)
class Pair:
    """A quantized layer with its float module, if there is one."""

    name: str
    layer: Layer
    reference: nn.Module | None


@dataclass
class Outputs:
    """Sums by name of a layer, for both kinds of outputs, and end to end.

    unpaired: layers that the two models did not call equally often and with as many rows, such as an expert that other
    tokens were routed to. kl: sum over `tokens` of the Kullback-Leibler divergence of the quantized model's
    distribution from the float one's, in nats.
    """

    alone: dict[str, Sums] = field(default_factory=lambda: defaultdict(Sums))
    accumulated: dict[str, Sums] = field(default_factory=lambda: defaultdict(Sums))
    unpaired: set[str] = field(default_factory=set)
    logits: Sums = field(default_factory=Sums)
    kl: float = 0.0
    tokens: int = 0
    batches: int = 0


def each(data: Any, outputs: Outputs, progress: Progress | None) -> Iterator[Any]:
    """The batches of `data`, counted and reported when they are done; a tensor or a dict is a single batch."""
    batches = [data] if isinstance(data, (torch.Tensor, Mapping)) else data
    total = len(batches) if isinstance(batches, Sized) else None
    for batch in batches:
        yield batch
        outputs.batches += 1
        if progress is not None:
            progress("outputs", outputs.batches, total)


@contextlib.contextmanager
def hooked(modules: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Register forward hooks (module, args, kwargs, output) on modules, for the duration of the block."""
    with contextlib.ExitStack() as stack:
        for module, hook in modules:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def compare_outputs(
    reference: nn.Module,
    quantized: nn.Module,
    pairs: list[Pair],
    data: Any,
    accumulated: bool,
    progress: Progress | None,
) -> Outputs:
    """Run both models on each batch. Holds the float layers' outputs of one batch at a time (if `accumulated`)."""
    outputs, dtype = Outputs(), dtype_of(quantized)
    captured: dict[str, deque[torch.Tensor]] = defaultdict(deque)

    def alone(pair: Pair) -> Hook:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            expected = first_tensor(output)
            if expected is None:
                return
            device = device_of(pair.layer)
            found = pair.layer(*moved(args, device, dtype), **moved(kwargs, device, dtype))
            outputs.alone[pair.name].add(expected, found)
            if accumulated:
                captured[pair.name].append(expected.detach().clone())  # later code may change it in place

        return hook

    def within(pair: Pair) -> Hook:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            expected = captured[pair.name].popleft() if captured[pair.name] else None
            found = first_tensor(output)
            if expected is None or found is None or expected.shape != found.shape:
                outputs.unpaired.add(pair.name)
            else:
                outputs.accumulated[pair.name].add(expected, found)

        return hook

    for batch in each(data, outputs, progress):
        with hooked((pair.reference, alone(pair)) for pair in pairs if pair.reference is not None):
            expected = call(reference, batch)
        # Keep only the logits: the rest, such as a cache, is freed before the other model runs.
        has_logits, expected = hasattr(expected, "logits"), logits_of(expected)
        with hooked((pair.layer, within(pair)) for pair in pairs) if accumulated else contextlib.nullcontext():
            found = logits_of(call(quantized, batch))
        outputs.unpaired.update(name for name, left in captured.items() if left)
        captured.clear()
        if expected is not None and found is not None and expected.shape == found.shape:
            _end_to_end(outputs, expected, found, _mask(batch, expected), has_logits)
    return outputs


def outputs_against_originals(quantized: nn.Module, pairs: list[Pair], data: Any, progress: Progress | None) -> Outputs:
    """Run only the quantized model: compare each layer with the float layer of its `original`, on the same input."""
    outputs = Outputs()

    def against_original(pair: Pair) -> Hook:
        def hook(layer: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            x = first_tensor((args, kwargs))
            assert x is not None
            outputs.alone[pair.name].add(layer.to_dense(x.dtype)(*args, **kwargs), output)

        return hook

    with hooked((pair.layer, against_original(pair)) for pair in pairs):
        for batch in each(data, outputs, progress):
            call(quantized, batch)
    return outputs


def _mask(batch: Any, logits: torch.Tensor) -> torch.Tensor | None:
    """Which tokens are not padding, by the batch's attention mask; None if it has none that fits."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    fits = isinstance(mask, torch.Tensor) and mask.shape == logits.shape[:-1]
    return mask.bool().to(logits.device) if fits and mask is not None else None


def _end_to_end(
    outputs: Outputs, expected: torch.Tensor, found: torch.Tensor, mask: torch.Tensor | None, has_logits: bool
) -> None:
    """Add logits (..., V) of the tokens where `mask` (...) is True, and their divergence if `has_logits`."""
    expected, found = expected.detach(), found.detach().to(expected.device)
    if mask is not None:
        expected, found = expected[mask], found[mask]
    outputs.logits.add(expected, found)
    if not has_logits or not expected.numel() or not expected.is_floating_point():
        return
    rows = max(CPU_CHUNK // expected.shape[-1], 1)  # float32 copies of a few rows at a time
    for p, q in zip(torch.split(expected.flatten(0, -2), rows), torch.split(found.flatten(0, -2), rows), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        each = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        outputs.kl += each.sum().item()
        outputs.tokens += len(p)
