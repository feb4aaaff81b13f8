"""NVIDIA ModelOpt: `quant_method: modelopt` in config.json, or `hf_quant_config.json` beside it. transformers reads neither.

`quant_algo` names the scheme of all layers; with MIXED_PRECISION, `quantized_layers` names that of each. `exclude_modules` (in
config.json: `ignore`) has names with wildcards. Tensors: `weight` (E4M3), `weight_scale`, `input_scale`, and in `k_proj` and
`v_proj` `k_scale` and `v_scale` of the KV cache. Sources: https://github.com/NVIDIA/Model-Optimizer, modelopt/torch/export
(convert_hf_config.py, quant_utils.py), and vLLM's model_executor/layers/quantization/modelopt.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError, UnsupportedError
from ...formats.scheme import FP8_DYNAMIC, FP8_STATIC, MXFP8, Granularity, Scheme, TensorScheme
from .base import CACHE, ConfigFile, Dialect, Target, Translation, any_of, module_or_inside, names_in

METHOD = "modelopt"
# Name of the file in which older versions describe the quantization, and newer ones, too.
FILE = "hf_quant_config.json"
SCHEMES = {
    "FP8": FP8_STATIC,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8_DYNAMIC,
    "FP8_PB_WO": Scheme(TensorScheme(Granularity(128, 128))),
    "MXFP8": MXFP8,
}


def read(config: Mapping[str, Any]) -> Translation:
    """What such a config says, in the form of either file. Raises ConfigError, UnsupportedError."""
    said = _details(config)
    algorithm = said.get("quant_algo")
    if not isinstance(algorithm, str):
        raise ConfigError(f"quantization_config.quant_algo is {algorithm!r}: ModelOpt's configs name the algorithm there")
    if algorithm.upper() == "MIXED_PRECISION":
        groups = _mixed(said.get("quantized_layers"))
    else:
        groups = {"group_0": Target(_scheme(algorithm, said, "quantization_config"))}
    _check_groups(said)
    listed = names_in(said, "exclude_modules", "ignore")
    return Translation(groups, any_of(map(_wildcards, listed)), listed, _cache(said))


def _details(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the quantization: the older form has it under "quantization"."""
    found = config.get("quantization", config)
    if not isinstance(found, Mapping):
        raise ConfigError(f"{FILE}: quantization is {found!r}, not an object")
    return found


def _check_groups(said: Mapping[str, Any]) -> None:
    """Raise for `config_groups`, which say the same as `quant_algo`, if they are not about FP8."""
    groups = said.get("config_groups") or {}
    for name, group in groups.items() if isinstance(groups, Mapping) else [("", groups)]:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise ConfigError(f"quantization_config.config_groups is {str(groups)[:120]!r}: it must say what `weights` are")
        if (weights.get("num_bits"), weights.get("type", "float")) != (8, "float"):
            raise UnsupportedError(
                f"quantization_config.config_groups[{name!r}] has {weights.get('num_bits')}-bit {weights.get('type')} weights: "
                f"of ModelOpt's checkpoints hf_fp8 reads those in FP8 ({', '.join(SCHEMES)})"
            )


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
    if not isinstance(found, str | Mapping | None):
        raise ConfigError(
            f"quantization_config.kv_cache_scheme is {found!r}: it must be an object, or the name of an algorithm"
        )
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


def read_file(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config that `hf_quant_config.json` stands for; None if it is about the KV cache only. Raises ConfigError."""
    if not isinstance(about := content.get("quantization"), Mapping):
        raise ConfigError(f"{FILE} has no object `quantization` (found {str(about)[:120]!r})")
    return None if about.get("quant_algo") is None else {**content, "quant_method": METHOD}


MODELOPT = Dialect(
    name="ModelOpt",
    words="ignore (in hf_quant_config.json: exclude_modules) lists dense modules, and quant_algo names the scheme",
    methods=(METHOD, "modelopt_fp8", "modelopt_mixed"),
    by_default=True,
    read=read,
    ignoring=ignoring,
    file=ConfigFile(FILE, read_file),
)
