"""Converts what users pass as `quantization_config` to an FP8Config, and checks that a checkpoint agrees with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compressed_tensors.quantization import QuantizationConfig
from transformers import CompressedTensorsConfig
from transformers.utils import logging

from ..checkpoint.config_groups import Group, concerns_fp8, with_presets
from ..checkpoint.quantization_spec import METHODS, QuantizationSpec, plain
from ..errors import ConfigError, UnsupportedError
from .config import OUR_METHOD, FP8Config, dequantize_of
from .options import DEFAULTS, LOADING

logger = logging.get_logger(__name__)

# The keys that a checkpoint's `quantization_config` may contain: files have more than compressed-tensors reads.
_OF_CHECKPOINTS = {*QuantizationConfig.model_fields, "version", "sparsity_config", "transform_config"}


def is_for_us(passed: Any) -> bool:
    """Whether `passed` stands for an FP8Config: it is one, a dict of its options, or a compressed-tensors config (object or
    dict) with FP8 groups."""
    if isinstance(passed, Mapping):
        return _are_options(passed) or (plain(passed.get("quant_method")) in (None, *METHODS) and concerns_fp8(plain(passed)))
    if isinstance(passed, FP8Config):
        return True
    return is_stock(passed) and concerns_fp8(plain(passed.to_dict()))


def is_stock(passed: Any) -> bool:
    """Whether it is transformers' own CompressedTensorsConfig."""
    return isinstance(passed, CompressedTensorsConfig) and not isinstance(passed, FP8Config)


def is_request(found: Any) -> bool:
    """Whether a model's `quantization_config` holds options that a user requested, instead of a checkpoint's config.

    ``AutoConfig.from_pretrained(name, quantization_config=...)`` replaces the config of config.json by such options.
    """
    if isinstance(found, Mapping):
        return bool(found) and _are_options(found)
    if isinstance(found, FP8Config):
        return found.checkpoint is None
    return is_stock(found) and found.quantization_config is None


def _are_options(passed: Mapping[str, Any]) -> bool:
    method = plain(passed.get("quant_method"))
    return method == OUR_METHOD or ("scheme" in passed and method in (None, *METHODS)) or set(passed) <= set(DEFAULTS)


def asked_for(passed: Any) -> FP8Config:
    """`passed` as an FP8Config, with a `checkpoint` if it has `config_groups` as in compressed-tensors. None: the defaults.

    Raises ConfigError for configs of other methods, and unknown options.
    """
    if passed is None:
        return FP8Config()
    if isinstance(passed, FP8Config):
        return passed
    if isinstance(passed, CompressedTensorsConfig):
        dequantize = dequantize_of({"dequantize": passed.dequantize, "use_optimized_inference": passed.use_optimized_inference})
        said = None if passed.quantization_config is None else plain(passed.to_dict())
        if said is not None and not said["config_groups"]:
            raise ConfigError("the quantization_config that was passed has no config_groups, which hf_fp8 needs")
        return FP8Config(dequantize=dequantize, checkpoint=said)
    if isinstance(passed, Mapping):
        found: FP8Config = FP8Config.from_dict(passed)
        is_own = found.checkpoint is not None and found.spec.in_dialect is None
        unknown = set(found.checkpoint or ()) - _OF_CHECKPOINTS if is_own else set()
        if unknown:
            raise ConfigError(
                f"quantization_config has no option {', '.join(map(repr, sorted(unknown)))}; in addition to config_groups a "
                f"dict may set {', '.join(LOADING)}"
            )
        return found
    raise ConfigError(
        f"a {type(passed).__name__} was passed as quantization_config: hf_fp8 reads this checkpoint: pass FP8Config, "
        "CompressedTensorsConfig, a dict, or nothing"
    )


def asks_to_quantize(passed: Any) -> bool:
    """Whether `passed` requests to quantize a dense checkpoint: it has a scheme, or FP8 groups that no loaded model has."""
    if isinstance(passed, FP8Config):
        return passed.scheme is not None and passed.checkpoint is None
    asked = asked_for(passed)
    return asked.scheme is not None or bool(asked.spec.our_groups)


def for_quantizing(asked: FP8Config) -> FP8Config:
    """A new config that quantizes a dense checkpoint as `asked` says: by its scheme, or by its groups as in
    compressed-tensors. Groups quantize all that they match and do not ignore, including the output embedding and routers.

    Raises ConfigError for groups that are not FP8, UnsupportedError for a `kv_cache_scheme`.
    """
    options, dense_by_default = asked.options, asked.spec.dense_by_default
    if asked.scheme is None and asked.checkpoint is not None:
        if asked.spec.kv_cache_scheme:
            raise UnsupportedError("kv_cache_scheme: hf_fp8 quantizes weights and their inputs, not KV caches; leave it out")
        assert asked.spec.json is not None
        options |= {"scheme": with_presets(asked.spec.json["config_groups"]), "ignore": list(asked.ignore)}
        dense_by_default = False
    new = FP8Config(**options)
    new.spec = replace(new.spec, dense_by_default=dense_by_default)
    return new


def refuse_other_groups(asked: QuantizationSpec, found: QuantizationSpec) -> None:
    """Compare the groups that a user has passed with those of the checkpoint, which are the ones that are run.

    Raises ConfigError if a group differs. Different names in `ignore` only log a warning, since one module can be named in
    several ways.
    """
    said = asked.origin or asked
    for group in said.groups:
        if _meaning(group) not in map(_meaning, found.groups):
            raise ConfigError(
                f"the quantization_config that was passed has {_describe(group)}, but the checkpoint is quantized already, "
                f"with {'; '.join(map(_describe, found.groups))}: leave config_groups out to load it unchanged, or quantize "
                "the dense checkpoint that it was quantized from"
            )
    if said.kv_cache_scheme is not None and found.kv_cache_scheme is None:
        raise ConfigError(
            "the quantization_config that was passed has a kv_cache_scheme, but the checkpoint has none: leave it out"
        )
    if other := [name for name in said.ignore if name not in found.ignore]:
        logger.warning(
            f"hf_fp8: {', '.join(other)}: in the `ignore` that was passed, but not in the checkpoint's `ignore`, which is used"
        )


def _meaning(group: Group) -> tuple[Any, ...]:
    """A key that is equal for two groups that mean the same, whatever their names and observers."""
    if group.scheme is not None:
        return frozenset(group.targets), group.scheme
    parts = (group.parsed.weights, group.parsed.input_activations, group.parsed.output_activations)
    return frozenset(group.targets), *(
        None if part is None else part.model_dump_json(exclude={"observer", "observer_kwargs"}) for part in parts
    )


def _describe(group: Group) -> str:
    weights = group.parsed.weights
    what = "no weights" if weights is None else f"{weights.num_bits}-bit {weights.type} weights"
    return f"{group.name!r} ({group.scheme.describe() if group.scheme is not None else what}) for {', '.join(group.targets)}"
