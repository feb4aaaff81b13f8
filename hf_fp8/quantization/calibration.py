"""Calibrates the input scales of static schemes: `calibrate`, and `apply_scales` to set scales calibrated elsewhere."""

from __future__ import annotations

import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError, UnsupportedError, first
from ..formats.scheme import CODE_MAX, Scheme
from ..formats.weights import least_scale
from ..kernels import Routing
from ..nn.base import QuantizedModule
from ..nn.dtensors import sharded_like
from ..nn.experts import QuantizedExperts
from ..nn.experts_layout import Projection
from ..nn.linear import QuantizedLinear
from .observers import DEFAULT, Observer, over_ranks, prototype_of

logger = logging.getLogger(__name__)


class Calibration:
    """The result of `calibrate`: `batches`, the number of forward passes so far, and, after the block, `scales`.

    scales: name of a layer -> its input scale as a float; name of a stack of experts (`...experts.down_proj`) -> a list of
    one float per expert. It can be stored as JSON and passed to `apply_scales`. Layers without any input are left out.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.batches = 0
        self.scales: dict[str, float | list[float]] = {}

    def to_dict(self) -> dict[str, Any]:
        """{"observer", "batches", "scales"} in plain types: a record of the run."""
        settings = ", ".join(f"{name}={value}" for name, value in sorted(vars(self.observer).items()))
        return {"observer": f"{type(self.observer).__name__}({settings})", "batches": self.batches, "scales": dict(self.scales)}


@contextmanager
def calibrate(
    model: nn.Module,
    observer: str | Observer | Callable[[], Observer] = DEFAULT,
    tie: bool = True,
    progress: bool | None = None,
) -> Iterator[Calibration]:
    """Context manager: calibrate the input scales of all layers of `model` with a static scheme on the inputs in the block.

        with calibrate(model) as run, torch.no_grad():
            for batch in data:
                model(**batch)

    Inputs are not quantized meanwhile, so that no layer is calibrated on inputs rounded by earlier layers. Scales are written,
    in the dtype of the parameter, when the block ends without an exception; after an exception nothing has changed. Each expert
    is calibrated separately; one without tokens gets the largest scale of the others. A layer without any input stays
    unchanged. Both are logged as warnings. Under torch.distributed all processes must run the block, and get the scales of the
    inputs of all of them.

    observer: "mse" minimises the squared error; "amax" clips nothing; "percentile", or `Percentile(99.9)`, clips larger
        values. Or your own `Observer`, or a callable that makes one.
    tie: layers of one parent that receive the same tensors (q, k and v; gate and up) get one input scale, the largest of
        theirs.
    progress: whether to show the number of passes and the time on stderr; None: if it is a terminal.

    Raises CalibrationError if the model has no layer to calibrate, or is being calibrated already; and, at the end of the
    block, if no layer had an input, or one had NaN or infinity. UnsupportedError if layers are offloaded, or split over
    processes by pipeline or expert parallelism; ConfigError for another `observer`.
    """
    prototype = prototype_of(observer)
    targets = _targets(model)
    _check(model, targets)
    run, inputs = Calibration(prototype), _Inputs()
    observers = {t.name: prototype.started(t.streams, t.scale.device) for t in targets}
    watches: dict[str, _LinearWatch] = {}
    with ExitStack() as stack:
        advance = stack.enter_context(_shown(progress))

        def count(module: nn.Module, *_: Any) -> None:
            if module is model:  # not a copy of it
                run.batches += 1
                advance()

        stack.callback(model.register_forward_hook(count).remove)
        for layer in dict.fromkeys(t.layer for t in targets):
            own = [t for t in targets if t.layer is layer]
            if isinstance(layer, QuantizedLinear):
                watches[own[0].name] = _LinearWatch(layer, observers[own[0].name], inputs)
                stack.callback(layer.register_forward_pre_hook(watches[own[0].name].hook(), with_kwargs=True).remove)
                layer.observer = watches[own[0].name]
            else:
                assert isinstance(layer, QuantizedExperts)
                layer.observer = _ExpertsWatch({t.projection: observers[t.name] for t in own})
            stack.callback(setattr, layer, "observer", None)
        yield run
    with torch.no_grad():
        scales = _measured(targets, observers, _siblings(watches) if tie else [])
        _write(targets, scales)
    measured = [t for t in targets if t.name in scales]
    run.scales = {t.name: scales[t.name].tolist() if t.projection else scales[t.name].item() for t in measured}


@torch.no_grad()
def apply_scales(model: nn.Module, scales: Mapping[str, float | Sequence[float] | torch.Tensor]) -> None:
    """Set input scales of `model` that `calibrate` found, perhaps in another process (`Calibration.scales`).

    Layers that are not named stay unchanged. Raises CalibrationError, before anything is changed, for names that are not layers
    with a static scheme, for a different number of experts, and for values that are not finite and positive.
    """
    targets = {t.name: t for t in _targets(model)}
    unknown = [name for name in scales if name not in targets]
    if unknown:
        raise CalibrationError(
            f"scales for {first(unknown)}, which are not layers of the model with a static input scheme; it has "
            f"{first(list(targets))}"
        )
    _refuse_offloaded([targets[name] for name in scales])
    given = {}
    for name, value in scales.items():
        scale = torch.as_tensor(value, dtype=torch.float64).reshape(-1)
        if len(scale) != targets[name].streams:
            raise CalibrationError(f"{name} needs {targets[name].streams} scales, but {len(scale)} are given")
        rounded = _rounded(scale, targets[name].scale.dtype)
        if not bool((scale.isfinite() & (scale > 0) & rounded.isfinite()).all()):
            raise CalibrationError(
                f"{name} is given the scale {scale.tolist()}: it must be positive and finite, in {rounded.dtype}, too"
            )
        given[name] = rounded
    _write(list(targets.values()), given)


@dataclass(frozen=True)
class _Target:
    """An input scale to calibrate: of a QuantizedLinear, or of one projection of QuantizedExperts."""

    name: str
    layer: QuantizedModule
    scheme: Scheme
    projection: str | None = None

    @property
    def scale(self) -> torch.Tensor:
        found: torch.Tensor = getattr(self.layer, f"{self.projection}_input_scale" if self.projection else "input_scale")
        return found

    @property
    def streams(self) -> int:
        return self.scale.shape[0]

    @property
    def codes(self) -> torch.dtype:
        """The dtype to which inputs will be quantized."""
        assert self.scheme.input is not None
        return self.scheme.input.dtype


def _targets(model: nn.Module) -> list[_Target]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.scheme.has_static_input:
            if module.input_scale is None:
                module.await_scale("input_scale", (1,), module.weight_scale)
            found.append(_Target(name, module, module.scheme))
        elif isinstance(module, QuantizedExperts):
            for p in module.projections:
                if p.scheme.has_static_input:
                    if getattr(module, p.input_scale) is None:
                        module.await_scale(p.input_scale, (p.shape[0], p.parts), getattr(module, p.scale))
                    found.append(_Target(f"{name}.{p.name}".lstrip("."), module, p.scheme, p.name))
    return found


def _check(model: nn.Module, targets: list[_Target]) -> None:
    if not targets:
        schemes = {m.scheme.describe() for m in model.modules() if isinstance(m, QuantizedLinear)}
        schemes |= {p.scheme.describe() for m in model.modules() if isinstance(m, QuantizedExperts) for p in m.projections}
        found = f"its quantized layers have {first(sorted(schemes))}" if schemes else "it has no quantized layers"
        raise CalibrationError(
            f"{type(model).__name__} has no layer with a static input scheme, and only those are calibrated: {found}. Other "
            "schemes need no calibration; for static input scales quantize with FP8_STATIC"
        )
    _refuse_offloaded(targets)
    _refuse_split(model, targets)
    busy = [t.name for t in targets if t.layer.observer is not None]
    if busy:
        raise CalibrationError(f"{first(busy)} are being calibrated already: end that block first")


def _refuse_offloaded(targets: list[_Target]) -> None:
    away = [t.name for t in targets if t.layer.is_offloaded or t.scale.is_meta]
    if away:
        raise UnsupportedError(
            f"{first(away)} are offloaded or on the meta device, where scales cannot be set: load the model without offloading"
        )


def _refuse_split(model: nn.Module, targets: list[_Target]) -> None:
    """Raise UnsupportedError if processes hold different layers or experts: their inputs would be taken for those of one."""
    how = None
    if any(getattr(module, "_pp_stage", None) is not None for module in model.modules()):
        how = "pipeline parallelism (pp_size), which gives each process other layers"
    elif any(shard.experts is not None for target in targets for shard in target.layer.shards.values()):
        how = "expert parallelism (ep_size), which gives each process other experts"
    if how is not None:
        raise UnsupportedError(
            f"the model is loaded with {how}, and input scales are calibrated over all processes: load it for calibration with "
            "tensor parallelism (tp_size), FSDP or a device_map; scales can be set elsewhere with apply_scales"
        )


class _Inputs:
    """Numbers tensors: the same number for the same object while it is alive and unmodified. Holds weak references only."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[weakref.ref[torch.Tensor], int | None, int]] = {}
        self.numbers = itertools.count()

    def number(self, x: torch.Tensor) -> int:
        key, held, version = id(x), self.held, None if x.is_inference() else x._version
        found = held.get(key)
        if found is None or found[0]() is not x or found[1] != version:
            found = weakref.ref(x, lambda _: held.pop(key, None)), version, next(self.numbers)
            held[key] = found
        return found[2]


class _LinearWatch:
    """The observer of a QuantizedLinear; also hashes the numbers of its input tensors, to find layers with the same inputs."""

    def __init__(self, layer: QuantizedLinear, observer: Observer, inputs: _Inputs) -> None:
        self.layer, self.observer, self.inputs = layer, observer, inputs
        self.history = 0
        self.given: int | None = None

    def hook(self) -> Any:
        """A pre-hook that numbers the input before autocast, which gives each sibling a separate cast."""

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is self.layer:  # not a copy of it
                self.given = self.inputs.number(args[0] if args else next(iter(kwargs.values())))

        return given

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: torch.Tensor) -> None:
        number = self.inputs.number(x) if self.given is None else self.given
        self.given = None
        self.history = hash((self.history, number))
        self.observer.observe(x)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a layer is not being calibrated."""


class _ExpertsWatch:
    """The observer of QuantizedExperts: has one for each projection with static inputs, with one stream per expert."""

    def __init__(self, observers: dict[str | None, Observer]) -> None:
        self.observers = observers

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def __call__(self, projection: Projection, x: torch.Tensor, routing: Routing) -> None:
        if projection.name in self.observers:
            somebodys = (routing.experts < projection.shape[0]).nonzero().squeeze(1)
            rows = routing.row_numbers()
            x = x.detach()[somebodys if rows is None else rows[somebodys]]
            self.observers[projection.name].observe(x, routing.experts[somebodys])

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a layer is not being calibrated."""


def _siblings(watches: dict[str, _LinearWatch]) -> list[list[str]]:
    """Groups of two or more layers, by name, of one parent that received the same tensors on every rank."""
    by_parent: dict[str, list[str]] = {}
    for name in watches:
        by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    pairs = [pair for names in by_parent.values() for pair in itertools.combinations(names, 2)]
    if not pairs:
        return []
    same = over_ranks(torch.tensor([watches[a].history == watches[b].history for a, b in pairs], dtype=torch.int32), "MIN")
    sets: dict[str, list[str]] = {}
    eldest: dict[str, str] = {}
    for (a, b), are_same in zip(pairs, same.tolist(), strict=True):
        if are_same and b not in eldest:
            eldest[b] = eldest.get(a, a)
            sets.setdefault(eldest[b], [eldest[b]]).append(b)
    return list(sets.values())


def _measured(targets: list[_Target], observers: dict[str, Observer], siblings: list[list[str]]) -> dict[str, torch.Tensor]:
    """Name of a target -> its scales (streams,), for targets that had an input."""
    for observer in observers.values():
        observer.merge_ranks()
    amax = {name: observer.amax.cpu() for name, observer in observers.items()}
    broken = [name for name, found in amax.items() if not bool(found.isfinite().all())]
    if broken:
        raise CalibrationError(
            f"{len(broken)} layer(s) had NaN or infinity in their inputs, and nothing was changed: {first(broken)}. Look at "
            "the first of them: possible causes are an overflow of float16 and broken data"
        )
    seen = [t for t in targets if bool((amax[t.name] >= 0).any())]
    if not seen:
        raise CalibrationError(
            f"none of {len(targets)} layers had an input: run data through the model inside the `with` block"
        )
    if len(seen) < len(targets):
        unseen = [t.name for t in targets if t not in seen]
        logger.warning("%d of %d layers had no input and stay unchanged: %s", len(unseen), len(targets), first(unseen))
    thresholds, filled = {}, []
    for target in seen:
        found = observers[target.name].threshold(target.codes).cpu()
        empty = amax[target.name] < 0
        if bool(empty.any()):
            found = torch.where(empty, found.max(), found)
            filled.append(f"{target.name} {int(empty.sum())} of {len(empty)}")
        thresholds[target.name] = found
    if filled:
        logger.warning("experts without tokens get the largest input scale of the other experts: %s", first(filled))
    for names in siblings:
        if names[0] in thresholds:
            largest = torch.stack([thresholds[name] for name in names]).max()
            thresholds |= {name: largest.reshape(1) for name in names}
    scales = {}
    for target in seen:
        threshold, dtype = thresholds[target.name].double(), target.scale.dtype
        scale = torch.where(threshold == 0, torch.finfo(dtype).eps, _rounded(threshold / CODE_MAX[target.codes], dtype))
        scales[target.name] = scale.to(dtype)
    too_large = [name for name, scale in scales.items() if not bool(scale.isfinite().all())]
    if too_large:
        raise CalibrationError(f"input scales of {first(too_large)} are too large for the dtype in which they are stored")
    return scales


def _rounded(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` in `dtype`; positive values stay positive."""
    return scale.to(dtype).clamp(min=least_scale(dtype))


def _write(targets: list[_Target], scales: dict[str, torch.Tensor]) -> None:
    """Write scales into the parameters in place, so that version counters and references see the change."""
    for target in targets:
        if target.name in scales:
            scale = scales[target.name]
            scale = scale.unsqueeze(1).expand(target.scale.shape) if target.scale.ndim == 2 else scale
            target.scale.copy_(sharded_like(scale, target.scale))
            target.layer.see_calibration()


@contextmanager
def _shown(progress: bool | None) -> Iterator[Callable[[], None]]:
    """Show a progress line on stderr; gives a function to call after each pass."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("calibrating: {task.completed} forward passes")
    with Progress(text, TimeElapsedColumn(), console=Console(stderr=True)) as line:
        task = line.add_task("", total=None)
        yield lambda: line.advance(task)
