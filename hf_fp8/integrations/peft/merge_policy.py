"""How adapters are merged into quantized layers (`merging`), and the report of how much of them is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import nn

from ...errors import ConfigError, ScaleError
from ...formats.weights import Change
from ...nn.base import QuantizedModule
from ...nn.swap import copy_hooks

logger = logging.getLogger(__name__)

INTO = ("quantized", "dense")
ROUNDING = ("stochastic", "nearest")
# If a smaller share of the adapters' change is kept, the report says that the rest is lost. SmolLM2, all layers together:
# stochastic rounding keeps 1.00, a weight in bfloat16 0.94, rounding to the nearest code (stored 8-bit value) 0.05 (after 10
# steps of training) to 0.25 (100).
KEPT = 0.9


@dataclass(frozen=True)
class MergedLayer:
    """A layer that adapters were merged into. dense: whether it is dense now. change: how much of the change was kept."""

    name: str
    dense: bool
    change: Change


@dataclass
class MergeReport:
    """The layers that adapters are merged into now, by name."""

    layers: dict[str, MergedLayer] = field(default_factory=dict)

    @property
    def kept(self) -> float:
        """The share of the adapters' change that the weights contain after they were rounded again: 1 is all, 0 nothing."""
        rounded = [layer.change for layer in self.layers.values() if not layer.dense]
        delta = sum(change.delta for change in rounded)
        return sum(change.found for change in rounded) / delta if delta else 1.0

    def __str__(self) -> str:
        if not self.layers:
            return "no quantized layer was changed: PEFT itself merges adapters into dense layers, without a loss"
        quantized = [layer for layer in self.layers.values() if not layer.dense]
        dense = len(self.layers) - len(quantized)
        said = f"adapters have changed the weights of {len(self.layers)} quantized layers"
        if dense:
            said += f", {dense} of which are dense now"
        if not quantized:
            return said
        if not any(layer.change.delta for layer in quantized):
            return f"adapters that change nothing were merged into {len(self.layers)} quantized layers, which are unchanged"
        least = min(quantized, key=lambda layer: layer.change.kept)
        worst = max(quantized, key=lambda layer: layer.change.error)
        return (
            f"{said}; {len(quantized)} were rounded to codes again: {self.kept:.0%} of the adapters' change is kept "
            f"(least: {least.name} {least.change.kept:.0%} of a change of {least.change.size:.2%}), with noise of up to "
            f"{worst.change.error:.2%} of the weights ({worst.name}, where the adapters' change is {worst.change.size:.2%})"
            + ("" if self.kept >= KEPT else ". The rest is lost: rounding='stochastic', or merging('dense'), keeps it")
        )


@dataclass(frozen=True)
class _Merging:
    into: str
    rounding: str
    least_kept: float | None
    report: MergeReport
    seeds: torch.Generator


_current: ContextVar[_Merging | None] = ContextVar("hf_fp8_merging", default=None)


@contextmanager
def merging(
    into: str = "quantized", *, rounding: str = "stochastic", least_kept: float | None = None, seed: int | None = None
) -> Iterator[MergeReport]:
    """Set how adapters are merged inside the block: ``with hf_fp8.merging("dense"): model.merge_and_unload()``.

    The weights of a quantized layer lie exactly on its codes, and most adapters change them by much less than half a step:
    rounding to the nearest code would undo the change. So they are rounded stochastically, which keeps the adapter's effect
    on average and adds a little noise, different in each merge; `torch.manual_seed` makes it repeatable. Processes that merge
    the same adapter into copies of one model need the same seed. docs/training.md has the numbers.

    Args:
        into: "quantized", also the default outside of such a block, rounds each merged weight to codes, with new scales where
            it exceeds the range of the old ones; "dense" makes the layer dense, in the dtype the model was loaded in.
        rounding: "stochastic", or "nearest" for adapters that change weights by more than the steps between codes.
        least_kept: with rounding="nearest": layers that would keep a smaller share of the change (`Change.kept`) become dense
            instead.
        seed: for the random numbers of this block; None: torch's generator, which `torch.manual_seed` sets for all threads.

    Yields the report, which is filled as layers are merged. Raises ConfigError for unknown options.
    """
    if into not in INTO:
        raise ConfigError(f"merging({into!r}): must be one of {', '.join(INTO)}")
    if rounding not in ROUNDING:
        raise ConfigError(f"merging(rounding={rounding!r}): must be one of {', '.join(ROUNDING)}")
    if least_kept is not None and rounding != "nearest":
        raise ConfigError("least_kept is for rounding='nearest': stochastic rounding keeps the whole change, plus noise")
    seeds = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
    token = _current.set(_Merging(into, rounding, least_kept, report := MergeReport(), seeds))
    try:
        yield report
    finally:
        _current.reset(token)


@contextmanager
def reporting() -> Iterator[None]:
    """Log what was merged inside the block, unless a user's own `merging` holds the report."""
    if _current.get() is not None:
        yield
        return
    with merging() as report:
        yield
    if report.layers:
        logger.warning(f"hf_fp8: {report}. `with hf_fp8.merging('dense'):` keeps merged layers dense, without a loss")


def _generator(seeds: torch.Generator, device: torch.device) -> torch.Generator:
    """A separate random generator for each layer of each merge, seeded from `seeds`.

    With the same random numbers in every merge, errors add up: of 12 merges of one small adapter 87% was kept, with noise of
    1.17 times the change; with new ones 100%, and 0.4. The user's seed is not used directly: weights or adapters may have
    been drawn with it, and rounding that correlates with them kept 0.6 of a change.
    """
    seed = torch.empty((), dtype=torch.int64, device="cpu").random_(generator=seeds)
    return torch.Generator(device).manual_seed(int(seed))


def forget(name: str) -> None:
    """Remove a layer from the report: its original weight is restored."""
    if (how := _current.get()) is not None:
        how.report.layers.pop(name, None)


def finalize_merge(name: str, base: QuantizedModule, merged: nn.Module, *, nearest: bool = False) -> nn.Module:
    """The layer that replaces `base`, from `merged`, its float copy with adapters merged into it.

    nearest: round to the nearest code whatever `merging` says, for changes that are larger than the steps between codes.

    Raises ScaleError for NaN or infinite weights.
    """
    with reporting():
        how = _current.get()
        assert how is not None
        new: nn.Module | None = None
        change = Change()
        if how.into == "quantized":
            try:
                generator = None
                if how.rounding == "stochastic" and not nearest:
                    generator = _generator(how.seeds, next(merged.parameters()).device)
                new, change = base.requantized(merged, generator)
            except ScaleError as error:
                raise ScaleError(f"{name}: with the adapter merged, {error}") from None
        dense = new is None or (how.least_kept is not None and change.kept < how.least_kept)
        if dense:
            new = merged.to(base.float_dtype).requires_grad_(False)
            if not all(bool(p.isfinite().all()) for p in new.parameters()):
                raise ScaleError(f"{name}: with the adapter merged, the weight has values that are NaN or infinite")
            change = Change()
        assert new is not None
        copy_hooks(base, new)
        how.report.layers[name] = MergedLayer(name, dense, change)
    return new
