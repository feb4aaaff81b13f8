"""Merging adapters into quantized layers: how the result is stored, and what that makes of the adapter."""

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
# Below this share of a change, the report speaks of loss. SmolLM2, all layers together: stochastically 1.00 stays, a weight in
# bfloat16 keeps 0.94, to the nearest code 0.05 (10 steps of training) to 0.25 (100).
KEPT = 0.9


@dataclass(frozen=True)
class MergedLayer:
    """A layer that adapters were merged into. dense: it is a plain one now. change: what became of the adapters' change."""

    name: str
    dense: bool
    change: Change


@dataclass
class MergeReport:
    """The layers that adapters were merged into, by name, as they are now."""

    layers: dict[str, MergedLayer] = field(default_factory=dict)

    @property
    def kept(self) -> float:
        """The share of what the adapters change that is in the weights that were rounded again: 1 is all, 0 nothing."""
        rounded = [layer.change for layer in self.layers.values() if not layer.dense]
        delta = sum(change.delta for change in rounded)
        return sum(change.found for change in rounded) / delta if delta else 1.0

    def __str__(self) -> str:
        if not self.layers:
            return "no quantized layer was changed: adapters on dense layers are merged by PEFT itself, without a loss"
        quantized = [layer for layer in self.layers.values() if not layer.dense]
        dense = len(self.layers) - len(quantized)
        said = f"adapters have changed the weights of {len(self.layers)} quantized layers"
        if dense:
            said += f", {dense} of which are dense now"
        if not quantized:
            return said
        if not any(layer.change.delta for layer in quantized):
            return f"adapters that change nothing were merged into {len(self.layers)} quantized layers, which are as they were"
        least = min(quantized, key=lambda layer: layer.change.kept)
        worst = max(quantized, key=lambda layer: layer.change.error)
        return (
            f"{said}; {len(quantized)} were rounded to codes again: {self.kept:.0%} of what the adapters change is there "
            f"(least: {least.name} {least.change.kept:.0%} of a change of {least.change.size:.2%}), with noise of up to "
            f"{worst.change.error:.2%} of the weights ({worst.name}, where the adapters' change is {worst.change.size:.2%})"
            + ("" if self.kept >= KEPT else ". The rest is gone: rounding='stochastic', or merging('dense'), keeps it")
        )


@dataclass(frozen=True)
class _Merging:
    into: str
    rounding: str
    least_kept: float | None
    report: MergeReport
    seeds: torch.Generator = torch.default_generator


_current: ContextVar[_Merging | None] = ContextVar("hf_fp8_merging", default=None)


@contextmanager
def merging(
    into: str = "quantized", *, rounding: str = "stochastic", least_kept: float | None = None, seed: int | None = None
) -> Iterator[MergeReport]:
    """How adapters are merged inside the block: ``with hf_fp8.merging("dense"): model.merge_and_unload()``.

    The weights of a quantized layer lie on its codes, and most adapters move them by much less than half a step: to the
    nearest code, they would all go back to where they were. So they are rounded stochastically, which keeps what the adapter
    does on the whole and adds a little noise, another one in each merge; `torch.manual_seed` repeats it. Processes that merge
    the same adapter into copies of one model need the same seed. docs/training.md has the numbers.

    Args:
        into: "quantized" rounds each merged weight to codes, with fresh scales where it has outgrown its own, which is the
            default outside of such a block, too; "dense" leaves the layer a plain one, in the dtype the model was loaded in.
        rounding: "stochastic", or "nearest" for adapters that change weights by more than the codes' steps.
        least_kept: with rounding="nearest": layers of which a smaller share of the change would be kept (`Change.kept`)
            become dense instead.
        seed: of the draws in this block; None: torch's generator, which `torch.manual_seed` sets for all threads.

    Yields the report, which fills as layers are merged. Raises ConfigError for unknown options.
    """
    if into not in INTO:
        raise ConfigError(f"merging({into!r}): it is one of {', '.join(INTO)}")
    if rounding not in ROUNDING:
        raise ConfigError(f"merging(rounding={rounding!r}): it is one of {', '.join(ROUNDING)}")
    if least_kept is not None and rounding != "nearest":
        raise ConfigError("least_kept is for rounding='nearest': stochastic rounding keeps all of a change, but for noise")
    seeds = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
    token = _current.set(_Merging(into, rounding, least_kept, report := MergeReport(), seeds))
    try:
        yield report
    finally:
        _current.reset(token)


@contextmanager
def reporting() -> Iterator[None]:
    """Say in the log what was merged inside the block, unless a user's own `merging` holds the report."""
    if _current.get() is not None:
        yield
        return
    with merging() as report:
        yield
    if report.layers:
        logger.warning(f"hf_fp8: {report}. `with hf_fp8.merging('dense'):` keeps merged layers dense, without a loss")


def _generator(seeds: torch.Generator, device: torch.device) -> torch.Generator:
    """Draws of its own for each layer of each merge, all of which go back to `seeds`.

    With the same draws in every merge, errors add up: of 12 merges of one small adapter 87% was kept, with noise of 1.17
    times the change; with new ones 100%, and 0.4. The user's seed itself would not do: weights or adapters may have
    been drawn with it, and rounding that goes with them kept 0.6 of a change.
    """
    seed = torch.empty((), dtype=torch.int64, device="cpu").random_(generator=seeds)
    return torch.Generator(device).manual_seed(int(seed))


def forget(name: str) -> None:
    """Take a layer out of the report: it is as it was before."""
    if (how := _current.get()) is not None:
        how.report.layers.pop(name, None)


def finalize_merge(name: str, base: QuantizedModule, merged: nn.Module, *, nearest: bool = False) -> nn.Module:
    """The layer that is to stand in the place of `base`, made of `merged`, its float copy with adapters in it.

    nearest: whatever the rounding that was asked for, for changes that are larger than the steps of codes.

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
            new = merged.to(base.original_dtype or torch.bfloat16).requires_grad_(False)
            if not all(bool(p.isfinite().all()) for p in new.parameters()):
                raise ScaleError(f"{name}: with the adapter merged, the weight has values that are NaN or infinite")
            change = Change()
        assert new is not None
        copy_hooks(base, new)
        how.report.layers[name] = MergedLayer(name, dense, change)
    return new
