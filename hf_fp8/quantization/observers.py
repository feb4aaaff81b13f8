"""Observers: statistics of a layer's inputs during calibration, and the clipping threshold computed from them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ConfigError
from ..formats import numerics
from ..formats.code_types import FP8
from ..formats.scheme import ROW

# Bins of a histogram. For `Mse`, evenly spread over 0 .. 2**n, the upper half of which is in use. Measured on 2**20 values of
# six distributions (normal, a tenth normal and the rest zeros, log-normal, Student's t with 3 degrees of freedom, normal with
# 16 values 100 or 1000 times as large), with four seeds. In the worst case the squared error of `Mse` exceeds that of a search
# over the values themselves by 11%, 11%, 0.03%, 0.00%, 0.01% with 512, 1024, 2048, 4096, 8192 bins.
BINS = 2048
# The number of the first bin of `Percentile`: the bits of 2**-96 as float32, exponent and four bits of the fraction.
FIRST = (127 - 96) << 4
# Exponent of the range before the first input: below every relevant magnitude, so that the first input grows the range like
# any other.
LEAST = -100
# Values counted at a time: 16 MB of float32 in addition to the input.
CHUNK = 2**22
# Thresholds that `Mse` tries per halving (with 16 or 32 the errors in the measurement above are 11% above the best), and the
# maximum number of halvings: the range of E4M3 ends at 2**-17.
STEPS, OCTAVES = 64, 16
# `Mse` represents each of the first COARSE bins by SPLIT values. With one value each, the errors in the measurement above are
# up to 24% above the best.
COARSE, SPLIT = 64, 16


class Observer(ABC):
    """Statistics of one stream of inputs, or of several in parallel (the experts of a stack).

    An instance that is not started is a prototype: `hf_fp8.calibrate` starts a copy of it for each layer. A subclass defines
    which statistics it keeps (`see`, in addition to `amax`) and computes the threshold from them (`threshold`).

    Attributes: amax: (streams,) float32, the largest magnitude of each stream; -1 if it had no input, NaN or inf if the input
    had any.
    """

    amax: torch.Tensor

    def started(self, streams: int, device: torch.device) -> Observer:
        """A new observer with the settings of this prototype, for `streams` streams of inputs on `device`."""
        new = copy.copy(self)
        new._start(streams, device)
        return new

    def _start(self, streams: int, device: torch.device) -> None:
        self.amax = torch.full((streams,), -1.0, dtype=torch.float32, device=device)

    @torch.no_grad()
    def observe(self, x: torch.Tensor, stream: torch.Tensor | None = None) -> None:
        """Add x (..., K) in any float dtype, all of one stream; or x (S, K) with stream (S,), the stream number of each row."""
        # Nothing is changed in place: the tensors may have been created under inference mode.
        if x.numel() == 0:
            return
        x = x.detach()
        if stream is None:
            low, high = x.aminmax()
            amax = torch.maximum(-low, high).float().reshape(1)
        else:
            low, high = x.aminmax(dim=1)
            rows = torch.maximum(-low, high).float()
            amax = torch.full_like(self.amax, -1.0).scatter_reduce(0, stream, rows, "amax")
        self.amax = torch.maximum(self.amax, amax)
        self.see(x, stream, amax)

    @abstractmethod
    def see(self, x: torch.Tensor, stream: torch.Tensor | None, amax: torch.Tensor) -> None:
        """Update the statistics with x, whose largest magnitude per stream is `amax` (-1: no row of that stream)."""

    @torch.no_grad()
    def merge_ranks(self) -> None:
        """Combine with the observers of the other processes of torch.distributed; all of them must call it."""
        # MAX of NaN is not defined by all backends.
        self.amax = over_ranks(torch.where(self.amax.isnan(), torch.inf, self.amax), "MAX")

    @abstractmethod
    def threshold(self, dtype: torch.dtype = FP8) -> torch.Tensor:
        """(streams,) float32: the magnitude that maps to the largest code of `dtype`; at most `amax`, 0 only if `amax` is 0."""


class Amax(Observer):
    """The largest magnitude: nothing is clipped."""

    def see(self, x: torch.Tensor, stream: torch.Tensor | None, amax: torch.Tensor) -> None:
        """`amax` is enough."""

    def threshold(self, dtype: torch.dtype = FP8) -> torch.Tensor:
        return self.amax


class Counts(Observer):
    """Counts magnitudes in `BINS` bins. counts: (streams, BINS) int64: 16 KB per stream, for any number of inputs."""

    counts: torch.Tensor

    def _start(self, streams: int, device: torch.device) -> None:
        super()._start(streams, device)
        self.counts = torch.zeros((streams, BINS), dtype=torch.int64, device=device)

    @abstractmethod
    def bins(self, magnitude: torch.Tensor, of: torch.Tensor | None) -> torch.Tensor:
        """The bins, truncated to integers, of magnitudes (rows, K) float32. of: their streams (rows, 1), or None."""

    def see(self, x: torch.Tensor, stream: torch.Tensor | None, amax: torch.Tensor) -> None:
        if not bool(amax.isfinite().all()):
            return  # there will be no threshold
        x = x.reshape(-1, x.shape[-1])
        step = max(CHUNK // x.shape[1], 1)
        total = torch.zeros(self.counts.numel(), dtype=torch.int64, device=x.device)
        for start in range(0, len(x), step):
            of = None if stream is None else stream[start : start + step, None]
            index = self.bins(x[start : start + step].abs().float(), of).int()
            total = total + (index if of is None else index + of * BINS).flatten().bincount(minlength=len(total))
        self.counts = self.counts + total.view_as(self.counts)

    @torch.no_grad()
    def merge_ranks(self) -> None:
        super().merge_ranks()
        self.counts = over_ranks(self.counts, "SUM")


class Percentile(Counts):
    """The magnitude below which `percent` of all values lie (by default one in 10 000 is clipped), with an error up to 6%.

    Counts magnitudes in `BINS` bins, sixteen per doubling, from 2**-96 to 2**32: by exponent and four bits of the fraction, so
    that outliers do not reduce the resolution for other values. Smaller values are in the first bin, larger ones in the last.

    Not for language models: they have a few values that are far larger than all others and matter most. On SmolLM2 clipping
    one in 10 000 ruins the model (perplexity 57 instead of 17). Use it for models whose largest values are noise, and to
    compare with other tools; measure its effect on the output (`hf_fp8.quality`) before you keep its scales.

    Raises ConfigError for a percent that is not above 0 and at most 100.
    """

    def __init__(self, percent: float = 99.99) -> None:
        if not 0 < percent <= 100:
            raise ConfigError(f"Percentile({percent}): it must be above 0 and at most 100, such as 99.99")
        self.percent = percent

    def bins(self, magnitude: torch.Tensor, of: torch.Tensor | None) -> torch.Tensor:
        return ((magnitude.view(torch.int32) >> 19) - FIRST).clamp(0, BINS - 1)

    @torch.no_grad()
    def threshold(self, dtype: torch.dtype = FP8) -> torch.Tensor:
        below = self.counts.cumsum(1).double()
        rank = (below[:, -1:] * (self.percent / 100)).clamp(min=1)
        last = (below < rank).sum(1, keepdim=True).clamp(max=BINS - 1)
        count = self.counts.gather(1, last).clamp(min=1)
        # Assumes that values are evenly distributed within a bin.
        within = 1 - (below.gather(1, last) - rank) / count
        edges = ((torch.arange(BINS + 1, dtype=torch.int32, device=last.device) + FIRST) << 19).view(torch.float32)
        edges[0] = 0.0
        low, high = edges[last], edges[last + 1]
        found = (low + within.float() * (high - low)).squeeze(1)
        # Values above the last edge are in the last bin.
        found = torch.where((last.squeeze(1) == BINS - 1) & (self.amax > edges[-1]), self.amax, found)
        return torch.minimum(found, self.amax)


class Mse(Counts):
    """The threshold with the least mean squared error of quantizing all values; tries `STEPS` thresholds per halving.

    Counts magnitudes in even bins from 0 to 2**exponent. The range grows by doubling: bins are added up in pairs. Every
    magnitude is represented by the middle of its bin, or of its part of a bin, and rounded as in `numerics.quantize`.

    exponent: (streams,) int32.
    """

    exponent: torch.Tensor

    def _start(self, streams: int, device: torch.device) -> None:
        super()._start(streams, device)
        self.exponent = torch.full((streams,), LEAST, dtype=torch.int32, device=device)

    def see(self, x: torch.Tensor, stream: torch.Tensor | None, amax: torch.Tensor) -> None:
        # m * 2**e with m < 1: every magnitude is below 2**e.
        needed = torch.where((amax > 0) & amax.isfinite(), torch.frexp(amax).exponent, LEAST)
        self._grow(torch.maximum(self.exponent, needed))
        super().see(x, stream, amax)

    def bins(self, magnitude: torch.Tensor, of: torch.Tensor | None) -> torch.Tensor:
        width = self._width()
        return magnitude / (width if of is None else width[of])

    def _grow(self, exponent: torch.Tensor) -> None:
        """Widen the ranges to 2**exponent (streams,)."""
        shift = exponent - self.exponent
        if bool((shift > 0).any()):
            numbers = torch.arange(BINS, device=shift.device)
            # A shift by more than 63 is not defined; everything is in the first bin long before that.
            index = numbers >> shift.clamp(max=BINS.bit_length()).unsqueeze(1)
            self.counts = torch.zeros_like(self.counts).scatter_add(1, index, self.counts)
            self.exponent = exponent

    def _width(self) -> torch.Tensor:
        """(streams,) float32: the width of a bin, a power of two."""
        return torch.ldexp(torch.ones_like(self.amax), self.exponent) / BINS

    @torch.no_grad()
    def merge_ranks(self) -> None:
        self._grow(over_ranks(self.exponent, "MAX"))
        super().merge_ranks()

    @torch.no_grad()
    def threshold(self, dtype: torch.dtype = FP8) -> torch.Tensor:
        values, counts = self._values()
        best, least = self.amax, torch.full_like(counts[:, 0], torch.inf)
        for step in range(STEPS * OCTAVES):
            threshold = self.amax * 2 ** (-step / STEPS)
            beyond = (values - threshold.unsqueeze(1)).clamp(min=0).double()
            # The clipping error alone exceeds the best error, and grows with each step.
            if bool(((beyond.square() * counts).sum(1) >= least).all()):
                break
            scale = numerics.scale_of(threshold, dtype)
            rounded = numerics.dequantize(numerics.quantize(values, scale, ROW, dtype), scale, ROW)
            error = ((rounded - values).double().square() * counts).sum(1)
            best, least = torch.where(error < least, threshold, best), torch.minimum(error, least)
        return best

    def _values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(values (streams, V) float32, their counts (streams, V) float64) that represent all inputs."""
        amax, width = self.amax.unsqueeze(1), self._width().unsqueeze(1)
        edges = torch.arange(BINS + 1, dtype=torch.float32, device=amax.device) * width
        # The largest value is known exactly, and often alone in its bin: half a bin would be large compared to its clipping
        # error.
        values = torch.where(edges[:, 1:] > amax, amax, edges[:, :-1] + width / 2)
        # The first bins are wider than the steps of E4M3 there: the rounding error of one value per bin would be arbitrary.
        fine = ((torch.arange(COARSE * SPLIT, dtype=torch.float32, device=amax.device) + 0.5) * (width / SPLIT)).minimum(amax)
        counts = self.counts.double()
        split = (counts[:, :COARSE] / SPLIT).repeat_interleave(SPLIT, 1)
        return torch.cat([fine, values[:, COARSE:]], 1), torch.cat([split, counts[:, COARSE:]], 1)


OBSERVERS: dict[str, Callable[[], Observer]] = {"amax": Amax, "percentile": Percentile, "mse": Mse}
# SmolLM2's perplexity with scales of 2,048 and of 10,240 tokens: mse +1.7%, +1.6%; amax +2.7%, +2.2%; percentile 57.
DEFAULT = "mse"


def prototype_of(observer: str | Observer | Callable[[], Observer]) -> Observer:
    """The prototype for a name ("amax", "percentile", "mse"), a prototype, or a callable that makes one, such as a class.

    Raises ConfigError for anything else.
    """
    made: Any = OBSERVERS.get(observer) if isinstance(observer, str) else observer
    if not isinstance(made, Observer) and callable(made):
        made = made()
    if not isinstance(made, Observer):
        raise ConfigError(
            f"observer={observer!r}: it must be one of {', '.join(OBSERVERS)}, an Observer such as Percentile(99.9), or a "
            "callable that makes one"
        )
    return made


def over_ranks(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The elementwise "MAX", "MIN" or "SUM" of `tensor` over all processes of torch.distributed; `tensor` if there is one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    # NCCL and similar backends cannot reduce CPU tensors; gloo supports few operations on other devices.
    backend = dist.get_backend()
    device = torch.device("cpu") if backend in ("gloo", "mpi") else torch.accelerator.current_accelerator()
    reduced = tensor.detach().to(device, copy=True).contiguous()
    dist.all_reduce(reduced, getattr(dist.ReduceOp, how))
    return reduced.to(tensor.device)
