"""The options of FP8Config: their names, defaults, allowed values and valid combinations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.quantization_spec import LINEARS, given_scheme, names, refuse_two_targets
from ..errors import ConfigError
from ..kernels import BACKENDS
from ..nn.backward import BACKWARDS

EXPERTS = ("auto", "fp8", "dequantize")
DEFAULTS: dict[str, Any] = {
    "scheme": None, "targets": LINEARS, "ignore": None,
    "dequantize": False, "backend": "auto", "experts": "auto", "backward": "exact",
}  # fmt: skip
# How to load a checkpoint; the other options select what to quantize while loading.
LOADING = ("dequantize", "backend", "experts", "backward")


def settled(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` completed with DEFAULTS and normalised: scheme names in capitals, lists of names, copies.

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
            raise ConfigError(f"FP8Config({name}={found[name]!r}): must be one of {', '.join(allowed)}")
    if found["dequantize"] not in (False, True):
        raise ConfigError(f"FP8Config(dequantize={found['dequantize']!r}): must be True or False")
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
        given = "dequantize=True dequantizes all weights" if dequantize else "backend='int8' keeps only Linears quantized"
        raise ConfigError(f"experts='fp8' was passed, but {given}: pass only one of them")
    if dequantize and backend != "auto":
        raise ConfigError(f"dequantize=True leaves nothing in FP8 for backend={backend!r} to run: pass only one of them")
    if scheme is not None and (dequantize or backend == "int8"):
        given = "dequantize=True" if dequantize else "backend='int8'"
        hint = "" if dequantize else "; for int8 weights use hf_fp8.quantize_model(model, 'INT8')"
        raise ConfigError(f"scheme={scheme!r} quantizes weights to FP8, which {given} would undo: pass only one of them{hint}")
    if scheme is None and (found["ignore"] is not None or found["targets"] != DEFAULTS["targets"]):
        raise ConfigError("targets and ignore select what to quantize while loading: pass a scheme with them")
    refuse_two_targets(scheme, found["targets"])
