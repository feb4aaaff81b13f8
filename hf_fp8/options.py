"""The options of FP8Config: which there are, what they may be, and how they are written as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch

from .errors import ConfigError
from .gradients import BACKWARDS
from .kernels import BACKENDS
from .scheme import SCHEMES, Scheme, scheme_named

EXPERTS = ("auto", "fp8", "dequantize")
DEFAULTS: dict[str, Any] = {
    "scheme": None, "targets": ["Linear"], "ignore": None,
    "dequantize": False, "backend": "auto", "experts": "auto", "backward": "exact",
}  # fmt: skip
# How to load a checkpoint; the others say what to quantize while loading.
LOADING = ("dequantize", "backend", "experts", "backward")


def settled(options: Mapping[str, Any]) -> dict[str, Any]:
    """All of DEFAULTS with `options` in them, in one form each: names in capitals, lists of names, copies.

    Raises ConfigError for unknown names and values, and for options that contradict each other.
    """
    if unknown := [name for name in options if name not in DEFAULTS]:
        raise ConfigError(
            f"FP8Config has no option {', '.join(map(repr, unknown))}; it has {', '.join(list(DEFAULTS)[:-1])} and "
            f"{list(DEFAULTS)[-1]}"
        )
    found = {**DEFAULTS, **options}
    for name, allowed in {"backend": BACKENDS, "experts": EXPERTS, "backward": BACKWARDS}.items():
        if found[name] not in allowed:
            raise ConfigError(f"FP8Config({name}={found[name]!r}): it is one of {', '.join(allowed)}")
    if found["dequantize"] not in (False, True):
        raise ConfigError(f"FP8Config(dequantize={found['dequantize']!r}): it is True or False")
    found["dequantize"] = bool(found["dequantize"])
    found["targets"] = names("targets", found["targets"])
    if found["ignore"] is not None:
        found["ignore"] = names("ignore", found["ignore"])
    if found["scheme"] is not None:
        found["scheme"] = given_scheme(found["scheme"])
    _refuse_contradictions(found)
    return found


def _refuse_contradictions(found: Mapping[str, Any]) -> None:
    scheme, backend, dequantize = found["scheme"], found["backend"], found["dequantize"]
    if found["experts"] == "fp8" and (dequantize or backend == "int8"):
        given = "dequantize=True multiplies everything out" if dequantize else "backend='int8' re-quantizes Linears alone"
        raise ConfigError(f"experts='fp8' was asked for, but {given}: pass one of them")
    if dequantize and backend != "auto":
        raise ConfigError(f"dequantize=True leaves nothing for backend={backend!r} to run on: pass one of them")
    if scheme is not None and (dequantize or backend == "int8"):
        given = "dequantize=True" if dequantize else "backend='int8'"
        hint = "" if dequantize else "; for int8 weights use hf_fp8.quantize_model(model, 'INT8')"
        raise ConfigError(f"scheme={scheme!r} quantizes weights to FP8, which {given} would undo: pass one of them{hint}")
    if scheme is None and (found["ignore"] is not None or found["targets"] != DEFAULTS["targets"]):
        raise ConfigError("targets and ignore say what to quantize while loading: pass a scheme with them")
    refuse_two_targets(scheme, found["targets"])


def refuse_two_targets(scheme: Any, targets: str | Sequence[str]) -> None:
    """Raise ConfigError for targets beside a scheme that says its own."""
    if isinstance(scheme, Mapping) and names("targets", targets) != DEFAULTS["targets"]:
        raise ConfigError(f"targets={targets!r}: with several groups each says its own targets, as in {{scheme: targets, ...}}")


def names(option: str, given: Any) -> list[str]:
    """A list of names, patterns and classes, of one of them or several. Raises ConfigError."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence | set | frozenset) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"{option}={given!r}: it is a list of names, classes and re: patterns")
    return list(given)


def given_scheme(given: Any) -> str | Scheme | dict[Any, Any]:
    """A scheme as a user passes it, or as `plain` wrote it: a name of SCHEMES, a Scheme, or a dict, of one of them to its
    targets or of a group's name to that group in compressed-tensors' words (JSON, or the library's own class).

    Raises ConfigError for what is none of them.
    """
    if not isinstance(given, Mapping):
        return _one_scheme(given)
    if "config_groups" in given or "quant_method" in given:
        raise ConfigError("scheme is a whole quantization_config: pass that itself, or its config_groups as scheme")
    found: dict[Any, Any] = {}
    for key, value in given.items():
        if isinstance(value, Mapping) or hasattr(value, "model_dump_json"):
            found[str(plain(key))] = plain(value)
        else:
            found[_one_scheme(key)] = names(f"scheme[{str(key)!r}]", value)
    return found


def _one_scheme(given: Any) -> str | Scheme:
    if isinstance(given, str) and "|" in given:
        try:
            return Scheme.parse(given)
        except (ValueError, IndexError):
            pass  # the error below says what there is
    found = scheme_named(given)
    if isinstance(given, str):
        return next(name for name in SCHEMES if name == given.upper())
    return found


def plain(value: Any) -> Any:
    """A copy of `value` in JSON's words: enums by their values, a Scheme by its `text`, the library's classes as dicts."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Scheme | torch.dtype):
        return str(value)
    if hasattr(value, "model_dump_json"):
        return json.loads(value.model_dump_json())
    if isinstance(value, Mapping):
        return {plain(key): plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value))
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value
