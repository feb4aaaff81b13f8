"""Puts hf_fp8 in the host's place for compressed-tensors checkpoints with FP8 groups, and takes it out again."""

from __future__ import annotations

import copy
from functools import wraps
from typing import Any

from transformers import CompressedTensorsConfig, PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from . import adapters
from .candidates import adapters as adapters_on
from .config import FP8Config, remembered
from .errors import ConfigError, UnsupportedError
from .groups import concerns_fp8
from .quantized_module import QuantizedModule
from .quantizer import FP8HfQuantizer

METHOD = "compressed-tensors"
OUR_METHOD = "hf_fp8"  # what a plain dict may say to mean FP8Config

_host_door = modeling_utils.get_hf_quantizer
_host_save = PreTrainedModel.save_pretrained
_CONFIG_KEYS = ("quantization_config", "compression_config")
_OPTIONS = {"scheme", "targets", "ignore", "backend", "experts", "backward"}
_HOST_OPTIONS = ("dequantize", "run_compressed", "use_optimized_inference")


def register() -> None:
    """Take over checkpoints with FP8 groups in `from_pretrained`. Called on import; harmless when repeated."""
    # register_quantizer refuses a method that the host has, so its entry is replaced.
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = quantizer_for
    auto.AUTO_QUANTIZER_MAPPING[OUR_METHOD] = quantizer_for
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[OUR_METHOD] = FP8Config
    modeling_utils.get_hf_quantizer = get_hf_quantizer
    PreTrainedModel.save_pretrained = save_pretrained
    adapters.install()


def unregister() -> None:
    """Give the host its own behaviour back."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = CompressedTensorsHfQuantizer
    auto.AUTO_QUANTIZER_MAPPING.pop(OUR_METHOD, None)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(OUR_METHOD, None)
    modeling_utils.get_hf_quantizer = _host_door
    PreTrainedModel.save_pretrained = _host_save
    adapters.uninstall()


def quantizer_for(quantization_config: Any, **kwargs: Any) -> HfQuantizer:
    """Ours for a config with FP8 groups, the host's for any other."""
    if not isinstance(quantization_config, FP8Config):
        written = quantization_config.to_dict()
        if not concerns_fp8(written):
            return CompressedTensorsHfQuantizer(quantization_config, **kwargs)
        quantization_config = merge(written, quantization_config)
    return FP8HfQuantizer(quantization_config, **kwargs)


def get_hf_quantizer(config: PreTrainedConfig, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's function, with the checkpoint's config and the user's merged by us where FP8 is concerned.

    The host's own merge demands that both are of one class, and so refuses an FP8Config, or a dict,
    for a checkpoint whose config it reads as its own class.
    """
    written = checkpoint_config(config) or _dropped_config(config)
    note = remembered(config)
    if note is not None and (written is None or not concerns_fp8(written)):
        # The config of a model that was loaded from FP8 and made dense, or int8: the files will tell which they are.
        config.quantization_config = merge(note, quantization_config)
        config.quantization_config.of_another_load = True
        return _host_door(config, None, *args, **kwargs)
    if written is not None and concerns_fp8(written):
        config.quantization_config = merge(written, quantization_config)
        for part in (config, config.get_text_config(decoder=True)):
            for key in _CONFIG_KEYS:
                if hasattr(part, key) and not (part is config and key == "quantization_config"):
                    delattr(part, key)  # else a model saved dense would still say that it is quantized
        return _host_door(config, None, *args, **kwargs)
    if isinstance(quantization_config, dict) and (
        quantization_config.get("quant_method") == OUR_METHOD
        or "scheme" in quantization_config
        or set(quantization_config) <= _OPTIONS
    ):
        quantization_config = FP8Config(**quantization_config)
    if isinstance(quantization_config, FP8Config):
        if quantization_config.scheme is not None:
            return _host_door(config, _for_quantizing(config, quantization_config), *args, **kwargs)
        if written is None:
            raise ConfigError(
                "FP8Config was passed, but the checkpoint's config.json has no compressed-tensors `quantization_config`. Pass "
                "FP8Config(scheme='FP8_DYNAMIC'), or another scheme, to quantize it while loading; or load it without FP8Config"
            )
        if quantization_config.backend != "auto":
            raise ConfigError(
                f"FP8Config(backend={quantization_config.backend!r}) was passed, but no config group of the checkpoint is FP8 "
                f"({', '.join(written.get('config_groups') or ['none'])}): there is nothing for that backend to run. "
                "Checkpoints that hold int8 or int4 already are run by transformers itself: load them without a backend"
            )
        quantization_config = CompressedTensorsConfig(dequantize=quantization_config.dequantize)
    return _host_door(config, quantization_config, *args, **kwargs)


def _for_quantizing(config: PreTrainedConfig, passed: FP8Config) -> FP8Config:
    """A copy of its own for this load, which a plan fills. Raises ConfigError for checkpoints that are quantized already."""
    for part in (config, config.get_text_config(decoder=True)):
        found = next((found for key in _CONFIG_KEYS if (found := getattr(part, key, None)) is not None), None)
        if found is not None:
            written = found if isinstance(found, dict) else found.to_dict()
            method = written.get("quant_method", "compressed-tensors")
            raise ConfigError(
                f"scheme={passed.scheme!r} quantizes dense checkpoints, and this one is quantized already "
                f"({getattr(method, 'value', method)}): leave the scheme out to load it as it is"
            )
    return copy.copy(passed)


@wraps(_host_save)
def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """The host's method, but not for a model of which a part was quantized by itself, as nothing would say what its codes
    are; nor for one with adapters on it, whose layers go by other names then."""
    if getattr(self, "hf_quantizer", None) is None and any(isinstance(module, QuantizedModule) for module in self.modules()):
        raise UnsupportedError(
            f"{type(self).__name__} holds FP8 layers that it does not know of (a part of it was quantized by itself, or "
            "loaded by load_quantized): saved, their codes would be taken for values. Quantize the whole model, with targets "
            "or a filter_fn that choose the part; or call hf_fp8.dequantize_model first"
        )
    adapter = adapters_on(self)
    if adapter is not None and getattr(self, "hf_quantizer", None) and not getattr(self, "_hf_peft_config_loaded", False):
        raise UnsupportedError(
            f"{adapter} has an adapter on it, which a checkpoint of the model has no place for: save the adapters "
            "(PeftModel.save_pretrained), or save what merge_and_unload() returns"
        )
    return _host_save(self, *args, **kwargs)


def checkpoint_config(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The compressed-tensors config of a model, as JSON; None if it has none, or one of another method.

    Looks where the host does, and under `compression_config`, the key that writers used in 2024.
    """
    for part in (config, config.get_text_config(decoder=True)):
        for key in _CONFIG_KEYS:
            found = getattr(part, key, None)
            if found is None:
                continue
            written = found if isinstance(found, dict) else found.to_dict()
            method = written.get("quant_method", METHOD if key == "compression_config" or "config_groups" in written else None)
            return written if getattr(method, "value", method) in (METHOD, "sparseml") else None
    return None


def _dropped_config(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The checkpoint's own config, where ``quantization_config=None`` made the host's Auto classes overwrite it.

    They take the argument for a setting of the model's config; the codes would be loaded as values.
    """
    if vars(config).get("quantization_config", ...) is not None or not config.name_or_path:
        return None
    try:
        on_disk, _ = PreTrainedConfig.get_config_dict(config.name_or_path, local_files_only=True)
    except OSError:  # not in the default cache: nothing to hold against
        return None
    return checkpoint_config(PreTrainedConfig(**{key: on_disk.get(key) for key in _CONFIG_KEYS}))


def merge(written: dict[str, Any], passed: Any) -> FP8Config:
    """The checkpoint's config with the user's loading options; the rest of what the user passed has no say."""
    if passed is None:
        return FP8Config(checkpoint=written)
    if isinstance(passed, FP8Config):
        if passed.scheme is not None:
            raise ConfigError(
                f"scheme={passed.scheme!r} quantizes dense checkpoints, and this one is FP8 already: leave the scheme out"
            )
        return FP8Config(**passed.get_loading_attributes(), checkpoint=written)
    if isinstance(passed, CompressedTensorsConfig):
        # `use_optimized_inference` asks for what "auto" does anyway where the hardware can.
        return FP8Config(dequantize=passed.dequantize, checkpoint=written)
    if isinstance(passed, dict):
        method = passed.get("quant_method", OUR_METHOD)
        if getattr(method, "value", method) not in (METHOD, OUR_METHOD):
            raise ConfigError(f"quantization_config says {method!r}, but the checkpoint is compressed-tensors FP8")
        options = {k: v for k, v in passed.items() if k in ("dequantize", "backend", "experts", "backward")}
        if passed.get("run_compressed") is not None:
            options["dequantize"] = options.get("dequantize", False) or not passed["run_compressed"]
        unknown = set(passed) - set(options) - set(_HOST_OPTIONS) - {"quant_method"} - set(written)
        if unknown:
            raise ConfigError(
                f"quantization_config has no option {', '.join(sorted(map(repr, unknown)))}; "
                "a dict may set dequantize, backend, experts and backward"
            )
        return FP8Config(**options, checkpoint=written)
    raise ConfigError(
        f"the checkpoint is compressed-tensors FP8, but a {type(passed).__name__} was passed: "
        "pass FP8Config, CompressedTensorsConfig, a dict, or nothing"
    )
