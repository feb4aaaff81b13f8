"""torchao's two steps of static quantization, and `insert_observers_`, by `hf_fp8.calibrate`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..errors import CalibrationError, ConfigError, UnsupportedError
from ..formats.code_types import FP8, INT8
from ..formats.scheme import ROW, TENSOR, Scheme, TensorScheme
from ..nn.linear import QuantizedLinear
from ..quantization.calibration import apply_scales, calibrate
from .markers import extent_of

# The attribute of a model that is being observed.
_ATTRIBUTE = "_hf_fp8_observing"
# torchao's observers, by class name -> those of `hf_fp8.calibrate`.
_OBSERVERS = {"AffineQuantizedMinMaxObserver": "amax", "AffineQuantizedMSEObserver": "mse"}


class Observing:
    """A calibration between its two steps. Copies and pickles of a model do not have it: they are not being observed.

    names: of the layers made for it. before: scales of other layers, which calibration would overwrite.
    """

    def __init__(self, model: nn.Module, scheme: Scheme, names: Iterable[str], observer: str) -> None:
        self.scheme, self.names = scheme, set(names)
        statics = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, QuantizedLinear) and layer.scheme.has_static_input and not layer.needs_calibration
        }
        self.before = {name: layer.input_scale.item() for name, layer in statics.items() if name not in self.names}
        self.block: AbstractContextManager[Any] = calibrate(model, observer)

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def observing(model: nn.Module) -> Observing | None:
    """The calibration of a model that is between the two steps, None if there is none."""
    return vars(model).get(_ATTRIBUTE)


def refuse_twice(model: nn.Module) -> None:
    """Raise CalibrationError if `model` is between the two steps."""
    if observing(model) is not None:
        raise CalibrationError('the model is being observed already: run data through it, then quantize_ with step="convert"')


def prepare(model: nn.Module, scheme: Scheme, names: Iterable[str], observer: str = "amax") -> None:
    """Start to observe the inputs of static layers, of which `names` have just been made."""
    found = Observing(model, scheme, names, observer)
    found.block.__enter__()
    setattr(model, _ATTRIBUTE, found)


def convert(model: nn.Module, scheme: Scheme) -> None:
    """Set the scales of the inputs that were observed. Raises ConfigError if `prepare` was not called, or for another scheme;
    CalibrationError if no layer had an input."""
    found = observing(model)
    if found is None:
        raise ConfigError(
            'step="convert" for a model that is not being observed: call quantize_ with the same config and step="prepare" (or '
            "insert_observers_), and run data through the model"
        )
    if found.scheme != scheme:
        raise ConfigError(
            f'step="convert" for {scheme.describe()}, but the model was prepared for {found.scheme.describe()}: use the config '
            "that it was prepared with"
        )
    delattr(model, _ATTRIBUTE)
    found.block.__exit__(None, None, None)
    apply_scales(model, found.before)


def observed_scheme(observer: Any, weight_observer: Any) -> tuple[Scheme, str]:
    """The static scheme, and the name of the observer of `calibrate`, for torchao's observers of inputs and of weights.

    observer: an AffineQuantizedMinMaxObserver, an AffineQuantizedMSEObserver, or what its `with_args` returns. Raises
    UnsupportedError for other ones.
    """
    given = _settings(observer)
    name = given["class"]
    if name not in _OBSERVERS:
        raise UnsupportedError(f"input_observer is a {name}: hf_fp8 supports {' and '.join(_OBSERVERS)}")
    dtype = given.get("target_dtype")
    if dtype not in (FP8, INT8):
        raise UnsupportedError(f"{name}(target_dtype={dtype!r}): hf_fp8 supports {FP8} and {INT8}")
    if extent_of(given.get("granularity")) != TENSOR:
        raise UnsupportedError(f"{name}(granularity={given.get('granularity')!r}): static inputs have one scale, PerTensor()")
    if getattr(given.get("mapping_type"), "name", "SYMMETRIC") != "SYMMETRIC":
        raise UnsupportedError(f"{name}(mapping_type={given['mapping_type']!r}): hf_fp8 supports SYMMETRIC")
    weight = TENSOR if dtype == FP8 else ROW
    if weight_observer is not None:
        of_weight = _settings(weight_observer)
        found = extent_of(of_weight.get("granularity"))
        if found not in (ROW, TENSOR) or of_weight.get("target_dtype") != dtype:
            raise UnsupportedError(
                f"weight_observer {of_weight}: hf_fp8 supports PerTensor(), PerRow() and PerAxis(0), with the dtype of inputs"
            )
        assert found is not None
        weight = found
    return Scheme(TensorScheme(weight, dtype=dtype), TensorScheme(TENSOR, dtype=dtype)), _OBSERVERS[name]


def _settings(observer: Any) -> dict[str, Any]:
    """The class and the arguments of an observer, or of a partial one (`with_args`)."""
    partial: Any = getattr(observer, "p", observer)
    if isinstance(getattr(partial, "func", None), type):
        names = ("mapping_type", "target_dtype", "granularity")
        return {"class": partial.func.__name__, **dict(zip(names, partial.args, strict=False)), **partial.keywords}
    known = {name: getattr(observer, name, None) for name in ("mapping_type", "target_dtype", "granularity")}
    return {"class": type(observer).__name__, **known}
