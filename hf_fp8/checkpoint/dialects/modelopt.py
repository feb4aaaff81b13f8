"""NVIDIA ModelOpt: `quant_method: modelopt` in config.json, or `hf_quant_config.json` beside it. transformers reads neither.

`quant_algo` names the scheme of all layers; with MIXED_PRECISION, `quantized_layers` names that of each. `exclude_modules` (in
config.json: `ignore`) has names with wildcards. Tensors: `weight` (E4M3), `weight_scale`, `input_scale`, and in `k_proj` and
`v_proj` `k_scale` and `v_scale` of the KV cache. Sources: https://github.com/NVIDIA/Model-Optimizer, modelopt/torch/export
(convert_hf_config.py, quant_utils.py), and vLLM's model_executor/layers/quantization/modelopt.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError, UnsupportedError
from ...formats.scheme import FP8_DYNAMIC, FP8_STATIC, MXFP8, Granularity, Scheme, TensorScheme
from .base import CACHE, Dialect, Meaning, Sidecar, Target, always, any_of, module_or_inside, names_in

METHOD = "modelopt"
# Name of the file in which older versions describe the quantization, and newer ones, too.
FILE = "hf_quant_config.json"
SCHEMES = {
    "FP8": FP8_STATIC,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8_DYNAMIC,
    "FP8_PB_WO": Scheme(TensorScheme(Granularity(128, 128))),
    "MXFP8": MXFP8,
}


def read(config: Mapping[str, Any]) -> Meaning:
    """What such a config says, in the form of either file. Raises ConfigError, UnsupportedError."""
    said = _details(config)
    algorithm = said.get("quant_algo")
    if not isinstance(algorithm, str):
        raise ConfigError(f"quantization_config.quant_algo is {algorithm!r}: ModelOpt's configs name the algorithm there")
    if algorithm.upper() == "MIXED_PRECISION":
        groups = _mixed(said.get("quantized_layers"))
    else:
        groups = {"group_0": Target(_scheme(algorithm, said, "quantization_config"))}
    listed = names_in(said, "exclude_modules", "ignore")
    return Meaning(groups, any_of(map(_wildcards, listed)), listed, _cache(said))


def _details(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the quantization: the older form has it under "quantization"."""
    found = config.get("quantization", config)
    if not isinstance(found, Mapping):
        raise ConfigError(f"{FILE}: quantization is {found!r}, not an object")
    return found


def _scheme(algorithm: str, said: Mapping[str, Any], where: str) -> Scheme:
    if algorithm.upper() not in SCHEMES:
        raise UnsupportedError(
            f"{where} has ModelOpt's quant_algo {algorithm!r}; hf_fp8 reads {', '.join(SCHEMES)}. Serve this checkpoint with "
            "TensorRT-LLM, vLLM or SGLang, or take one in FP8"
        )
    return SCHEMES[algorithm.upper()]


def _mixed(layers: Any) -> dict[str, Target]:
    """The groups of MIXED_PRECISION."""
    if not isinstance(layers, Mapping) or not layers:
        raise ConfigError("quantization_config.quantized_layers is missing or empty, but quant_algo is MIXED_PRECISION")
    by_scheme: dict[Scheme, list[str]] = {}
    for name, said in layers.items():
        algorithm = said.get("quant_algo") if isinstance(said, Mapping) else said
        where = f"quantization_config.quantized_layers[{name!r}]"
        if not isinstance(algorithm, str):
            raise ConfigError(f"{where} is {said!r}: it must name a quant_algo")
        by_scheme.setdefault(_scheme(algorithm, said, where), []).append(str(name))
    return {
        f"group_{number}": Target(scheme, any_of(map(module_or_inside, names)))
        for number, (scheme, names) in enumerate(by_scheme.items())
    }


def _cache(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `kv_cache_scheme`. hf_fp8 carries its scales, whatever they are for."""
    found = said.get("kv_cache_scheme") or said.get("kv_cache_quant_algo")
    is_fp8 = (isinstance(found, str) and found.upper() == "FP8") or (isinstance(found, Mapping) and found.get("num_bits") == 8)
    return dict(CACHE) if is_fp8 else None


def _wildcards(name: str) -> str:
    """A regular expression for a name with the wildcards of a shell, and for what is inside of such modules."""
    return module_or_inside(name).replace(r"\*", ".*").replace(r"\?", ".")


def ignoring(config: Mapping[str, Any], new: Sequence[str], every: Sequence[str]) -> dict[str, Any]:
    """The config with more dense modules."""
    said = dict(_details(config))
    key = "exclude_modules" if "exclude_modules" in said or "quantization" in config else "ignore"
    said[key] = list(dict.fromkeys([*names_in(said, key), *map(_as_wildcards, new)]))
    return {**config, "quantization": said} if "quantization" in config else said


def _as_wildcards(name: str) -> str:
    """A name, or a regular expression with numbers of any layer and expert, with wildcards."""
    if not name.startswith("re:"):
        return name
    return re.sub(r"\\(.)", r"\1", name.removeprefix("re:").removesuffix("$").replace(r"\d+", "*"))


def read_sidecar(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config that `hf_quant_config.json` stands for; None if it is about the KV cache only. Raises ConfigError."""
    if _details({"quantization": None, **content}).get("quant_algo") is None:
        return None
    return {"quant_method": METHOD, **content}


def write_sidecar(config: Mapping[str, Any]) -> str:
    """The contents of `hf_quant_config.json` that say the same as a config, in the form in which ModelOpt writes it."""
    if "quantization" in config:
        found = {key: part for key, part in config.items() if key != "quant_method"}
    else:
        keys = ("quant_algo", "quantized_layers", "group_size")
        about = {key: config[key] for key in keys if key in config}
        about["kv_cache_quant_algo"] = "FP8" if _cache(config) else None
        about["exclude_modules"] = names_in(config, "ignore")
        found = {"producer": config.get("producer", {"name": METHOD}), "quantization": about}
    return json.dumps(found, indent=4)


MODELOPT = Dialect(
    name="ModelOpt",
    methods=(METHOD, "modelopt_fp8", "modelopt_mixed"),
    by_default=always,
    read=read,
    ignoring=ignoring,
    sidecar=Sidecar(FILE, read_sidecar, write_sidecar),
)
