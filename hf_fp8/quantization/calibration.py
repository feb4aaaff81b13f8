"""Measuring the input scales of static schemes: `calibrate`, and `apply_scales` for what it measured elsewhere."""

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

from ..errors import CalibrationError, UnsupportedError
from ..formats.scheme import CODE_MAX
from ..kernels import Routing
from ..nn.base import QuantizedModule
from ..nn.experts import Projection, QuantizedExperts
from ..nn.linear import QuantizedLinear
from .observers import Observer, over_ranks, prototype_of

logger = logging.getLogger(__name__)
# How many names a message holds.
NAMED = 5


class Calibration:
    """What `calibrate` gives: `batches`, the forward passes of the model so far, and, after the block, `scales`.

    scales: name of a layer -> its input scale as a float; name of a stack of experts (`...experts.down_proj`) -> a list of
    one float for each expert. JSON can hold it, `apply_scales` takes it. Layers that saw no input are not in it.
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
    observer: str | Observer | Callable[[], Observer] = "mse",
    tie: bool = True,
    progress: bool | None = None,
) -> Iterator[Calibration]:
    """Measure the input scales of all layers of `model` with a static scheme from what is run through it in the block.

        with calibrate(model) as run, torch.no_grad():
            for batch in data:
                model(**batch)

    Inputs are not quantized meanwhile, so that no layer is measured behind the rounding of those before it. Scales are
    written, in the dtype in which they are held, when the block ends without an exception; after one nothing has changed.
    Experts are measured each for itself; one that no token reached takes the largest scale of the others. A layer that saw
    no input stays as it was. Both are logged as warnings. Under torch.distributed all processes must run the block, and get
    the scales of what all of them saw.

    observer: "mse" minimises the squared error; "amax" clips nothing; "percentile", or `Percentile(99.9)`, clips what is
        larger. Or an `Observer` of your own, or a callable that makes one.
    tie: layers of one parent that were given the very same tensors (q, k and v; gate and up) get one input scale, the
        largest of theirs.
    progress: whether to show the passes and the time on stderr; None: if it is a terminal.

    Raises CalibrationError if the model has no layer to calibrate, or is being calibrated already; and, at the end of the
    block, if no layer saw an input, or one saw NaN or infinity. UnsupportedError if layers are offloaded, ConfigError for
    another `observer`.
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
    """Give layers of `model` the input scales that `calibrate` measured, perhaps in another process (`Calibration.scales`).

    Layers that are not named stay as they are. Raises CalibrationError, with nothing changed, for names of no layer with a
    static scheme, for another number of experts, and for values that are not finite and positive.
    """
    targets = {t.name: t for t in _targets(model)}
    unknown = [name for name in scales if name not in targets]
    if unknown:
        raise CalibrationError(
            f"scales for {_some(unknown)}, which the model has not, or not with a static input scheme; it has "
            f"{_some(list(targets))}"
        )
    _refuse_offloaded([targets[name] for name in scales])
    given = {}
    for name, value in scales.items():
        scale = torch.as_tensor(value, dtype=torch.float64).reshape(-1)
        if len(scale) != targets[name].streams:
            raise CalibrationError(f"{len(scale)} scales for {name}, which takes {targets[name].streams}")
        rounded = _rounded(scale, targets[name].scale.dtype)
        if not bool((scale.isfinite() & (scale > 0) & rounded.isfinite()).all()):
            raise CalibrationError(
                f"the scale of {name} is {scale.tolist()}: it must be positive and finite, in {rounded.dtype}, too"
            )
        given[name] = rounded
    _write(list(targets.values()), given)


@dataclass(frozen=True)
class _Target:
    """An input scale that is to be measured: of an QuantizedLinear, or of one projection of QuantizedExperts."""

    name: str
    layer: QuantizedModule
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
        if isinstance(self.layer, QuantizedLinear):
            scheme = self.layer.scheme
        else:
            assert isinstance(self.layer, QuantizedExperts)
            scheme = next(p.scheme for p in self.layer.projections if p.name == self.projection)
        assert scheme.input is not None
        return scheme.input.dtype


def _targets(model: nn.Module) -> list[_Target]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.scheme.has_static_input:
            if module.input_scale is None:
                module.await_scale("input_scale", (1,), module.weight_scale)
            found.append(_Target(name, module))
        elif isinstance(module, QuantizedExperts):
            for p in module.projections:
                if p.scheme.has_static_input:
                    if getattr(module, p.input_scale) is None:
                        module.await_scale(p.input_scale, (p.shape[0], p.parts), getattr(module, p.scale))
                    found.append(_Target(f"{name}.{p.name}".lstrip("."), module, p.name))
    return found


def _check(model: nn.Module, targets: list[_Target]) -> None:
    if not targets:
        schemes = {m.scheme.describe() for m in model.modules() if isinstance(m, QuantizedLinear)}
        schemes |= {p.scheme.describe() for m in model.modules() if isinstance(m, QuantizedExperts) for p in m.projections}
        found = f"its FP8 layers have {_some(sorted(schemes))}" if schemes else "it has no FP8 layers at all"
        raise CalibrationError(
            f"{type(model).__name__} has no layer with a static input scheme, and only those are calibrated: {found}. Other "
            "schemes need no calibration; to have static inputs, quantize with FP8_STATIC"
        )
    _refuse_offloaded(targets)
    busy = [t.name for t in targets if t.layer.observer is not None]
    if busy:
        raise CalibrationError(f"{_some(busy)} are being calibrated already: end that block first")


def _refuse_offloaded(targets: list[_Target]) -> None:
    away = [t.name for t in targets if t.layer.is_offloaded or t.scale.is_meta]
    if away:
        raise UnsupportedError(
            f"{_some(away)} are offloaded or on the meta device, where a scale cannot be written: load the model onto devices"
        )


class _Inputs:
    """Numbers tensors: the same number for the same object as long as it lives and is not written to. Holds none of them."""

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
    """The observer of an QuantizedLinear; remembers which tensors it was given, as a hash of their numbers."""

    def __init__(self, layer: QuantizedLinear, observer: Observer, inputs: _Inputs) -> None:
        self.layer, self.observer, self.inputs = layer, observer, inputs
        self.history = 0
        self.given: int | None = None

    def hook(self) -> Any:
        """Sees what the layer is called with: autocast gives each of several siblings a cast of its own."""

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
    """The observer of QuantizedExperts: one for each projection with static inputs, with a stream for each expert."""

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
    """Names of layers of one parent that were given the same tensors, on every rank; sets of two or more."""
    by_parent: dict[str, list[str]] = {}
    for name in watches:
        by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    pairs = [pair for names in by_parent.values() for pair in itertools.combinations(names, 2)]
    if not pairs:
        return []
    same = over_ranks(torch.tensor([watches[a].history == watches[b].history for a, b in pairs], dtype=torch.int32), "MIN")
    sets: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for (a, b), are_same in zip(pairs, same.tolist(), strict=True):
        if are_same and b not in first:
            first[b] = first.get(a, a)
            sets.setdefault(first[b], [first[b]]).append(b)
    return list(sets.values())


def _measured(targets: list[_Target], observers: dict[str, Observer], siblings: list[list[str]]) -> dict[str, torch.Tensor]:
    """Name of a target -> its scales (streams,), for those that saw an input."""
    for observer in observers.values():
        observer.merge_ranks()
    amax = {name: observer.amax.cpu() for name, observer in observers.items()}
    broken = [name for name, found in amax.items() if not bool(found.isfinite().all())]
    if broken:
        raise CalibrationError(
            f"{len(broken)} layer(s) were given NaN or infinity, and nothing was changed: {_some(broken)}. Look at "
            "the first one in the order of the model: an overflow of float16, or broken data"
        )
    seen = [t for t in targets if bool((amax[t.name] >= 0).any())]
    if not seen:
        raise CalibrationError(
            f"none of {len(targets)} layers saw an input: run data through the model inside of the `with` block"
        )
    if len(seen) < len(targets):
        unseen = [t.name for t in targets if t not in seen]
        logger.warning("%d of %d layers saw no input and stay as they were: %s", len(unseen), len(targets), _some(unseen))
    thresholds, filled = {}, []
    for target in seen:
        found = observers[target.name].threshold(target.codes).cpu()
        empty = amax[target.name] < 0
        if bool(empty.any()):
            found = torch.where(empty, found.max(), found)
            filled.append(f"{target.name} {int(empty.sum())} of {len(empty)}")
        thresholds[target.name] = found
    if filled:
        logger.warning("experts that saw no token take the largest input scale of their layer's others: %s", _some(filled))
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
        raise CalibrationError(f"input scales of {_some(too_large)} are too large for the dtype in which they are held")
    return scales


def _rounded(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` in `dtype`; what is positive stays so."""
    info = torch.finfo(dtype)
    # As in `weight_scale_of`: kernels may flush what is below `tiny`, but for float16.
    return scale.to(dtype).clamp(min=info.tiny * info.eps if dtype == torch.float16 else info.tiny)


def _write(targets: list[_Target], scales: dict[str, torch.Tensor]) -> None:
    """Into the parameters, in place: version counters notice, and whatever refers to them."""
    for target in targets:
        if target.name in scales:
            scale = scales[target.name]
            target.scale.copy_(scale.unsqueeze(1) if target.scale.ndim == 2 else scale)
            target.layer.see_calibration()


@contextmanager
def _shown(progress: bool | None) -> Iterator[Callable[[], None]]:
    """A line on stderr; call what is given for each pass."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("calibrating: {task.completed} forward passes")
    with Progress(text, TimeElapsedColumn(), console=Console(stderr=True)) as line:
        task = line.add_task("", total=None)
        yield lambda: line.advance(task)


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
