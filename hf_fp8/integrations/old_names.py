"""Names of modules in earlier versions, which scripts and pickled models have: imported with a DeprecationWarning until 1.0."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# What was hf_fp8.<key> is hf_fp8.<value>.
MODULES = {
    "calibration": "quantization.calibration",
    "config": "integrations.config",
    "convert": "nn.swap",
    "experts": "nn.experts",
    "fidelity": "evaluation",
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


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of `MODULES` under their old names: the very modules, so that their classes are the same."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "hf_fp8" and name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> None:
        """An empty one: it is replaced at once."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"hf_fp8.{MODULES[old.partition('.')[2]]}"
        warnings.warn(f"{old} is {new} now; the old name goes with 1.0", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


def install() -> None:
    """Let `import hf_fp8.<old name>` find them."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # last: what is there under its name comes first


def module_named(name: str) -> ModuleType | None:
    """The module of an old name, for `hf_fp8.<name>` without an import of it; None if there was none."""
    return importlib.import_module(f"hf_fp8.{name}") if name in MODULES else None
