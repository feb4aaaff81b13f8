"""Registers hf_fp8 in the host (transformers) for compressed-tensors checkpoints with FP8 groups, and unregisters it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import CompressedTensorsConfig, PreTrainedConfig, modeling_utils
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.hub import cached_file

from ..checkpoint.config_groups import concerns_fp8, runs_here
from ..checkpoint.dialects.registry import CONFIG_FILES, check_beside, config_in, dialect_of
from ..checkpoint.files import is_there, read_json
from ..checkpoint.quantization_spec import CONFIG_KEYS, METHOD, is_known, is_ours, plain
from ..errors import ConfigError
from ..formats import plain_pickle
from ..loading.options import current
from . import ddp, diffusers, fsdp, patches, pretrained, zero3
from .config import OUR_METHOD, FP8Config
from .peft import install as peft
from .quantizer import FP8HfQuantizer
from .requests import asked_for, asks_to_quantize, for_quantizing, is_for_us, is_request, is_stock, refuse_other_groups

logger = logging.getLogger(__name__)


def register() -> None:
    """Make `from_pretrained` load checkpoints with FP8 groups through hf_fp8. Called on import; harmless when repeated."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = quantizer_for  # `register_quantizer` refuses methods that the host has
    if OUR_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(OUR_METHOD)(FP8HfQuantizer)
        auto.register_quantization_config(OUR_METHOD)(FP8Config)
    patches.wrap(modeling_utils, "get_hf_quantizer", get_hf_quantizer)
    pretrained.install()
    ddp.install()
    fsdp.install()
    zero3.install()
    peft.install()
    diffusers.install(merge)
    plain_pickle.install()
    patches.wrap_again()


def unregister() -> None:
    """Restore the original behaviour of the host and other libraries.

    Plain pickles of FP8 tensors stay readable, and adapters that are on quantized layers still merge on float copies.
    """
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = CompressedTensorsHfQuantizer
    auto.AUTO_QUANTIZER_MAPPING.pop(OUR_METHOD, None)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(OUR_METHOD, None)
    peft.uninstall()
    diffusers.uninstall()
    zero3.uninstall()
    patches.restore()


def quantizer_for(quantization_config: Any, **kwargs: Any) -> HfQuantizer:
    """An FP8HfQuantizer for a config with FP8 groups, the host's quantizer for any other."""
    if not isinstance(quantization_config, FP8Config):
        written = quantization_config.to_dict()
        if not concerns_fp8(written):
            return CompressedTensorsHfQuantizer(quantization_config, **kwargs)
        quantization_config = merge(written, quantization_config)
    return FP8HfQuantizer(quantization_config, **kwargs)


def get_hf_quantizer(host: Any, config: PreTrainedConfig, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's function; for FP8, the checkpoint's config and the user's are merged here (`merge`).

    The host's own merge requires that both are of one class, so it refuses an FP8Config, or a dict,
    for a checkpoint whose config it reads as its own class.
    """
    if is_request(found := getattr(config, "quantization_config", None)):
        quantization_config = found if quantization_config is None else quantization_config
        config.quantization_config = None  # so that config.json is read
    written, before = _written((config, config.get_text_config(decoder=True))), _earlier_config(config)
    other = _other_file(config, written or before)
    is_beside = written is None and before is None and other is not None
    if is_beside and other is not None:
        written = config_in(*other)
    if written is None and before is not None and not is_ours(before):
        config.quantization_config = written = before  # codes that transformers runs, which it would take for values
    if vars(config).get("quantization_config", ...) is None:
        # The host's Auto classes treat ``quantization_config=None`` as a setting of the model's config, and overwrite it.
        written, before = written or before, None
    if written is not None and is_ours(written, asked=_is_asked(quantization_config)):
        if other is not None and not is_beside and (lists := check_beside(written, other[1])):
            logger.warning(f"hf_fp8: {other[0]} lists other dense modules than config.json, whose list is used: {lists}")
        config.quantization_config = merge(written, quantization_config, None if other is None else other[1])
        config.quantization_config.of_another_load = is_beside  # the files decide whether they are dense by now
        for part in (config, config.get_text_config(decoder=True)):
            for key in CONFIG_KEYS:
                if hasattr(part, key) and not (part is config and key == "quantization_config"):
                    delattr(part, key)  # else a model saved dense would still say that it is quantized
        return host(config, None, *args, **kwargs)
    if before is not None and is_ours(before):
        # The config of a model that was loaded from FP8 and then dequantized, or made int8: the files decide.
        if asks_to_quantize(quantization_config):
            raise ConfigError(
                "the `config` that was passed is of a model loaded from an FP8 checkpoint, but quantization_config requests to "
                "quantize a dense one: leave `config` out, or the scheme (config_groups)"
            )
        config.quantization_config = merge(before, quantization_config)
        config.quantization_config.of_another_load = True
        return host(config, None, *args, **kwargs)
    if written is not None and quantization_config is None and runs_here(written):
        logger.warning(
            "hf_fp8: the checkpoint has int4 or int8 weights and none in FP8, so transformers runs it, dequantized in the "
            "first forward. To run it with hf_fp8, as it is stored, pass quantization_config=hf_fp8.FP8Config()"
        )
    if is_for_us(quantization_config) and not (written is not None and is_stock(quantization_config)):
        quantization_config = _for_another_kind(config, written, asked_for(quantization_config))
    return host(config, quantization_config, *args, **kwargs)


def _is_asked(passed: Any) -> bool:
    """Whether hf_fp8 is asked for by name, so that it also runs checkpoints without FP8 (int4, int8)."""
    return isinstance(passed, FP8Config) or (isinstance(passed, Mapping) and is_for_us(passed))


def _for_another_kind(config: PreTrainedConfig, written: dict[str, Any] | None, asked: FP8Config) -> CompressedTensorsConfig:
    """The config with which the host loads a checkpoint that hf_fp8 does not run: dense, or in its own formats (`written`)."""
    if asked.scheme is not None or asked.spec.our_groups:
        return _for_quantizing(config, asked)
    if written is None:
        raise ConfigError(
            "FP8Config was passed, but the checkpoint's config.json has no `quantization_config` that hf_fp8 reads. Pass "
            "FP8Config(scheme='FP8_DYNAMIC'), or another scheme, to quantize it while loading; or load it without FP8Config"
        )
    if asked.backend != "auto":
        raise ConfigError(
            f"FP8Config(backend={asked.backend!r}) was passed, but hf_fp8 runs no config group of the checkpoint "
            f"({', '.join(written.get('config_groups') or ['none'])}): that backend has nothing to run. "
            "transformers runs this checkpoint: load it without a backend"
        )
    return CompressedTensorsConfig(dequantize=asked.dequantize)


def _for_quantizing(config: PreTrainedConfig, asked: FP8Config) -> FP8Config:
    """A new config for this load, which the plan completes. Raises ConfigError for checkpoints that are quantized already."""
    new = for_quantizing(asked)
    for part in (config, config.get_text_config(decoder=True)):
        found = next((found for key in CONFIG_KEYS if (found := getattr(part, key, None)) is not None), None)
        if found is not None:
            written = found if isinstance(found, dict) else found.to_dict()
            method = plain(written.get("quant_method", METHOD))
            raise ConfigError(
                f"scheme={new.scheme!r} quantizes dense checkpoints, and this one is quantized already ({method}): leave the "
                "scheme out to load it unchanged"
            )
    return new


def _written(parts: Iterable[Any]) -> dict[str, Any] | None:
    """The first quantization config in `parts` (configs, or their JSON), as JSON; None if hf_fp8 does not know its dialect."""
    for part in parts:
        for key in CONFIG_KEYS:
            found = (part if isinstance(part, dict) else vars(part)).get(key)
            if found is None:
                continue
            written: dict[str, Any] = plain(found if isinstance(found, dict) else found.to_dict())
            if key == "compression_config":
                written.setdefault("quant_method", METHOD)
            return written if is_known(written) else None
    return None


def _earlier_config(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The quantization config in the checkpoint's files if `config` lacks it; None if there is none.

    Users pass on the config of a loaded model: ``from_pretrained(same_checkpoint, config=model.config)``. If that model was
    dequantized, its config no longer mentions FP8, and the host would load codes as values.
    """
    found = getattr(config, "quantization_config", None)
    if isinstance(found, FP8Config) and found.spec.origin is not None:
        return found.spec.origin.to_json()  # the model was made int8
    load = current()
    if found is not None or load.name is None:
        return None
    try:
        on_disk, _ = PreTrainedConfig.get_config_dict(load.name, local_files_only=True, **load.where)
    except OSError:  # not in the default cache: there is nothing to compare with
        return None
    return _written(part for part in (on_disk, on_disk.get("text_config")) if isinstance(part, dict))


def _other_file(config: PreTrainedConfig, written: dict[str, Any] | None) -> tuple[str, dict[str, Any]] | None:
    """(name, contents) of another file of the checkpoint than config.json that describes the quantization; None without one.

    Not looked for if the config in config.json is in a dialect that has no such file.
    """
    load = current()
    if load.name is None or (written is None and getattr(config, "quantization_config", None) is not None):
        return None
    dialect = None if written is None else dialect_of(written)
    for name in (name for name, one in CONFIG_FILES.items() if written is None or one is dialect):
        path = load.folder and load.folder / name
        if path is None:
            found = cached_file(
                load.name, name, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False, _commit_hash=getattr(config, "_commit_hash", None), **load.where,
            )  # fmt: skip
            path = found and Path(found)
        if path and is_there(path):
            return name, read_json(path)
    return None


def merge(written: dict[str, Any], passed: Any, other: Mapping[str, Any] | None = None) -> FP8Config:
    """The checkpoint's config with the user's loading options. Other options that the user passed have no effect, so they must
    agree with the checkpoint. other: the contents of the other file of its dialect, None without one.

    Raises ConfigError if they do not agree, and for configs that are not valid.
    """
    asked = asked_for(passed)
    found = FP8Config(**asked.get_loading_attributes(), checkpoint=written)
    found.spec = found.spec.with_file(other)
    if asked.checkpoint is not None:
        refuse_other_groups(asked.spec, found.spec)
    elif asked.scheme is not None:
        method = written.get("quant_method", METHOD)
        raise ConfigError(
            f"scheme={asked.scheme!r} quantizes dense checkpoints, and this one is quantized already ({method}): leave the "
            "scheme out"
        )
    return found
