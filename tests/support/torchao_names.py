"""Records the public names of torchao's quantization API and the fields of its configs, when it is run.

Run with another torchao than `tests/data/torchao_names.json` names, the difference of the file shows what has changed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

WRITTEN = Path(__file__).parents[1] / "data" / "torchao_names.json"
MODULES = ("torchao.quantization", "torchao.quantization.quant_api", "torchao.quantization.qat")
# Public, but made of types of torch and of Python, which do not tell where they come from.
PLAIN = {"FP8Granularity", "e4m3_dtype"}


def public(module: ModuleType) -> list[str]:
    """Names of a module that are torchao's: those of `__all__`, and others without an underscore, but no modules."""
    listed = set(getattr(module, "__all__", ()))
    for name, value in vars(module).items():
        own = str(getattr(value, "__module__", "")).startswith("torchao") or name in PLAIN
        if own and not name.startswith("_") and not isinstance(value, ModuleType):
            listed.add(name)
    return sorted(listed)


def fields(kind: Any) -> dict[str, str]:
    """Field -> default, as text, of a config class."""
    missing = dataclasses.MISSING
    found = {}
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is missing else field.default_factory()
        found[field.name] = "required" if default is missing else repr(default)
    return found


def recorded() -> dict[str, Any]:
    import torchao

    modules = {name: importlib.import_module(name) for name in MODULES}
    configs = {
        name: fields(getattr(module, name))
        for module in modules.values()
        for name in public(module)
        if name.endswith("Config") and dataclasses.is_dataclass(getattr(module, name))
    }
    return {"version": torchao.__version__, "names": {name: public(m) for name, m in modules.items()}, "configs": configs}


if __name__ == "__main__":
    WRITTEN.write_text(json.dumps(recorded(), indent=1) + "\n")
