"""Names of earlier versions, for scripts and pickled layers: they work, with a DeprecationWarning, until 1.0.

Pickles of whole transformers models hold more than layers (how they are saved), and are read by the version that wrote them.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .. import errors

# hf_fp8.<key> is now hf_fp8.<value>.
MODULES = {
    "calibration": "quantization.calibration",
    "config": "integrations.config",
    "convert": "nn.swap",
    "experts": "nn.experts",
    "fidelity": "evaluation",
    "fidelity.run": "evaluation.running",
    "functional": "nn.functional",
    "grouped": "nn.grouped",
    "held": "nn.parameters",
    "in_place": "quantization.model",
    "inspection": "evaluation.inspection",
    "linear": "nn.linear",
    "numerics": "formats.numerics",
    "observers": "quantization.observers",
    "pointwise": "nn.conv",
    "portable": "quantization.portable",
    "quantized_module": "nn.base",
    "quantized_weight": "formats.quantized_weight.tensor",
    "quantizer": "integrations.quantizer",
    "registration": "integrations.register",
    "rewrite": "quantization.files",
    "scheme": "formats.scheme",
    "source": "quantization.source",
    "weight_source": "formats.quantized_weight.source",
}
# Attributes that a module of `MODULES` had under its old name, and where they are now.
ATTRIBUTES = {
    "nn.linear.FP8Linear": "nn.linear.QuantizedLinear",
    "nn.experts.FP8Experts": "nn.experts.QuantizedExperts",
    "nn.conv.FP8PointwiseConv": "nn.conv.QuantizedConv1x1",
    "evaluation.inspection.verify_source": "evaluation.verify.verify_source",
    **{
        f"formats.numerics.{name}": f"formats.weights.{name}"
        for name in ("least_scale", "quantize_weight", "requantize", "scale_dtype_of", "weight_scale_of")
    },
}
# hf_fp8.<key> is now <the last part of value> in hf_fp8.<the rest>.
NAMES = {
    "FP8Linear": "nn.linear.QuantizedLinear",
    "FP8Experts": "nn.experts.QuantizedExperts",
    "FP8PointwiseConv": "nn.conv.QuantizedConv1x1",
    **{name: f"errors.{name}" for name in errors.__dict__ if name.endswith("Error") and name != "FP8Error"},
    **{name: f"quantization.observers.{name}" for name in ("Amax", "Mse", "Observer", "Percentile")},
    **{name: f"recipes.{name}" for name in ("FP8GemmOptions", "enable_fp8_gemm", "quantize_")},
    **{name: f"integrations.peft.merge_policy.{name}" for name in ("MergeReport", "MergedLayer")},
    "FP8HfQuantizer": "integrations.quantizer.FP8HfQuantizer",
    "QualityReport": "evaluation.report.QualityReport",
    "scaled_grouped_linear": "nn.grouped.scaled_grouped_linear",
    "scaled_linear": "nn.functional.scaled_linear",
}


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of `MODULES` under their old names: the same module objects, so that their classes are the same."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if _new_name(fullname) is None else ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> None:
        """A default, empty module: `exec_module` replaces it."""

    def exec_module(self, alias: ModuleType) -> None:
        _warn(alias.__name__, str(_new_name(alias.__name__)), above=2)  # frames of importlib are not counted
        _find(alias.__name__)


def _new_name(fullname: str) -> str | None:
    """The present name of a module; None if `fullname` is not an old one."""
    package, _, name = fullname.partition(".")
    if package != "hf_fp8":
        return None
    first, dot, rest = name.partition(".")
    new = MODULES.get(name) or (f"{MODULES[first]}{dot}{rest}" if first in MODULES else None)
    return new and f"hf_fp8.{new}"


def _find(old: str) -> ModuleType:
    """The module that had the name `old`, under that name too."""
    new = str(_new_name(old))
    sys.modules[old] = found = importlib.import_module(new)
    for old_place, place in ATTRIBUTES.items():  # a pickle stores the name of a class together with its module
        module, name = f"hf_fp8.{old_place}".rpartition(".")[::2]
        if module == new:
            setattr(found, name, _at(place))
    return found


def install() -> None:
    """Make `import hf_fp8.<old name>` work."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # First: an old package has the path of the new one, where others would find its modules a second time.
        sys.meta_path.insert(0, _Finder())


def found(name: str) -> Any:
    """The object that was called hf_fp8.<name>. Raises AttributeError if there was none."""
    if name in MODULES:
        _warn(f"hf_fp8.{name}", f"hf_fp8.{MODULES[name]}", above=3)
        return _find(f"hf_fp8.{name}")
    if name not in NAMES:
        raise AttributeError(f"module 'hf_fp8' has no attribute {name!r}")
    leaf = NAMES[name].rpartition(".")[2]
    new = leaf if name != leaf and leaf.startswith("Quantized") else NAMES[name]
    _warn(f"hf_fp8.{name}", f"hf_fp8.{new}", above=3)
    return _at(NAMES[name])


def _at(place: str) -> Any:
    """The object at hf_fp8.<place>."""
    module, _, leaf = f"hf_fp8.{place}".rpartition(".")
    return getattr(importlib.import_module(module), leaf)


def _warn(old: str, new: str, above: int) -> None:
    """Warn about the line that has the old name. above: how many calls lie between it and this one."""
    warnings.warn(f"{old} is {new} now; the old name is removed in 1.0", DeprecationWarning, stacklevel=above + 1)
