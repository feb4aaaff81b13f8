"""FP8Config: options for loading and quantizing, and the `quantization_config` of a checkpoint."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import CompressedTensorsConfig

from ..checkpoint.config_groups import Group
from ..checkpoint.dialects.registry import dialect_of
from ..checkpoint.quantization_spec import METHOD, METHODS, QuantizationSpec, plain, refuse_others
from ..errors import ConfigError
from ..formats.scheme import Scheme
from .options import DEFAULTS, LOADING, settled

OUR_METHOD = "hf_fp8"  # `quant_method` of an FP8Config that is written as a plain dict
STOCK_OPTIONS = ("run_compressed", "use_optimized_inference")  # of CompressedTensorsConfig, in addition to `dequantize`


class FP8Config(CompressedTensorsConfig):  # type: ignore[misc]
    """Options for loading a compressed-tensors checkpoint in FP8 (or int4, int8), or for quantizing a dense one while loading.

    Args:
        scheme: how to quantize a dense checkpoint while loading: "FP8_DYNAMIC", "FP8" (static input scales, to be measured
            with `hf_fp8.calibrate`), another name in `hf_fp8.SCHEMES` ("W4A16", "INT8", ...), or a `Scheme`. For several
            groups: a dict from schemes to lists of targets, or the contents of compressed-tensors' `config_groups`. None: the
            checkpoint is quantized.
        targets: which modules to quantize, as in compressed-tensors: names, "re:" patterns or classes.
        ignore: modules that stay dense even if a target matches them. The output embedding and routers also stay dense,
            unless a target matches nothing else ("lm_head", "re:.*router"), or `ignore` is an empty list.
        dequantize: dequantize the weights to the model's dtype while loading.
        backend: "auto" keeps FP8 weights if the device has FP8 matmuls, and else dequantizes them;
            "scaled_mm" keeps them on any device and quantizes inputs as the checkpoint says;
            "weight_only" keeps them on any device and does not quantize inputs (both apply to Linears; for merged
            experts see below); "int8" re-quantizes FP8 Linears to int8
            per channel after loading, with inputs quantized per token, for CPUs and for GPUs without FP8 units
            (int4 and int8 weights stay as they are).
        experts: how experts are held that the model merges into one 3-D parameter: "fp8" keeps them in FP8 on any device,
            "dequantize" dequantizes them, "auto" keeps them in FP8 if the device has a kernel that gains from it: on
            GPUs, not on CPUs, whatever the backend. If they are kept, `backend` says whether their inputs are quantized.
        backward: how gradients of the inputs of Linears are computed when adapters are trained: "exact" multiplies
            unrounded gradients by dequantized weights; "quantized" rounds gradients to 8 bits per token and multiplies
            them by the codes (stored 8-bit values) if the device has such a kernel (docs/training.md has the error; slower
            on CPUs, not measured on GPUs). Experts always use "exact".
        checkpoint: the checkpoint's own `quantization_config`; set by the loader, not by users.

    With a scheme, "auto" keeps Linears and experts in FP8 on any device, and `experts="dequantize"` leaves experts dense.

    `to_dict`, `repr` and JSON contain every option; `from_dict` and `from_pretrained` accept them in place of the object.
    The config of a loaded model contains its checkpoint's config instead, so `config.json` holds no options of hf_fp8.
    Loading does not change the config that it is given. Raises ConfigError for unknown options and values, also if they are
    set later.
    """

    def __init__(
        self,
        scheme: str | Scheme | Mapping[Any, Any] | None = None,
        *,
        targets: str | Sequence[str] = ("Linear",),
        ignore: str | Sequence[str] | None = None,
        dequantize: bool = False,
        backend: str = "auto",
        experts: str = "auto",
        backward: str = "exact",
        checkpoint: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        method = plain(unknown.pop("quant_method", OUR_METHOD))
        if method not in (OUR_METHOD, *METHODS):
            raise ConfigError(f"FP8Config is for compressed-tensors FP8, but quant_method is {method!r}")
        options = settled({
            "scheme": scheme, "targets": targets, "ignore": ignore, "dequantize": dequantize, "backend": backend,
            "experts": experts, "backward": backward, **unknown,
        })  # fmt: skip
        super().__init__(dequantize=options["dequantize"])
        self.backend, self.experts, self.backward = options["backend"], options["experts"], options["backward"]
        self.scheme, self.targets, self._ignore = options["scheme"], options["targets"], options["ignore"]
        self.of_another_load = False  # whether `checkpoint` is from an earlier load: the files decide if it fits this one
        self.spec = QuantizationSpec()
        if checkpoint is not None:
            self.spec = QuantizationSpec.read(checkpoint)
        elif self.scheme is not None:
            asked = QuantizationSpec.asked(self.scheme, self.targets, self._ignore)
            refuse_others(asked)
            self.spec = asked

    @property
    def spec(self) -> QuantizationSpec:
        """The quantization of the checkpoint, or else the one that `scheme` requests; empty if there is neither."""
        return self._spec

    @spec.setter
    def spec(self, spec: QuantizationSpec) -> None:
        self._spec = spec
        self.quantization_config = spec.parsed  # transformers reads this attribute

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """The `quantization_config` of the checkpoint, in its dialect; None if there is none yet."""
        return None if self.spec.written is None else dict(self.spec.written)

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.spec.groups

    @property
    def ignore(self) -> tuple[str, ...]:
        return self.spec.ignore

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a config from a dict: options of this class or of CompressedTensorsConfig (`run_compressed`), or a checkpoint's
        `quantization_config`, which may also contain loading options.

        kwargs: options that override those of the dict. Returns (config, kwargs that are not options) if
        `return_unused_kwargs`. Raises ConfigError, with the names, for keys that are not options, and for dicts of other
        quantization methods.
        """
        given = config_dict.get("quantization_config", config_dict) if isinstance(config_dict, Mapping) else None
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"quantization_config is {given!r}: pass a dict of options, or the `quantization_config` of a config.json"
            )
        given = dict(given)
        if dialect_of(plain(given)) is not None:
            config = cls(**{name: given.pop(name) for name in LOADING if name in given}, checkpoint=plain(given))
            unused = config.update(**kwargs)
            return (config, unused) if return_unused_kwargs else config
        method = plain(given.pop("quant_method", None))
        if method not in (None, OUR_METHOD, *METHODS):
            raise ConfigError(f"quantization_config has quant_method {method!r}, which is not compressed-tensors FP8")
        stock = {name: given.pop(name) for name in STOCK_OPTIONS if name in given}
        if stock:
            given["dequantize"] = dequantize_of({"dequantize": given.get("dequantize", False), **stock})
        checkpoint = None
        if "config_groups" in given or (method in METHODS and "scheme" not in given and set(given) - set(DEFAULTS)):
            if both := [name for name in ("scheme", "targets") if name in given]:
                raise ConfigError(f"{both[0]} and config_groups both select what is quantized: pass only one of them")
            checkpoint = {name: value for name, value in given.items() if name not in LOADING}
            checkpoint["quant_method"] = method if method in METHODS else METHOD
            given = {name: value for name, value in given.items() if name in LOADING}
        config = cls(**settled(given), checkpoint=checkpoint)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    @property
    def options(self) -> dict[str, Any]:
        """Every option as it was requested; `spec` may have changed since."""
        asked = {"scheme": self.scheme, "targets": self.targets, "ignore": self._ignore}
        return {**copy.deepcopy(asked), **self.get_loading_attributes()}

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set options as if they had been passed to the constructor. Returns those of `kwargs` that are not options."""
        known = {name: value for name, value in kwargs.items() if name in DEFAULTS}
        if known:
            new = FP8Config(**{**self.options, **known})
            if self.checkpoint is not None and not set(known) <= set(LOADING):
                raise ConfigError(
                    "scheme, targets and ignore are determined by the checkpoint of this config: make a new FP8Config"
                )
            self.__dict__.update(new.__dict__ if self.checkpoint is None else new.get_loading_attributes())
        return {name: value for name, value in kwargs.items() if name not in known}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DEFAULTS and "_spec" in self.__dict__ and self.checkpoint is None:
            self.update(**{name: value})  # also updates the groups, and raises if options contradict each other
        else:
            super().__setattr__(name, value)

    def get_loading_attributes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LOADING}

    def __repr__(self) -> str:
        said = {**self.options, "checkpoint": self.checkpoint}
        given = [f"{name}={value!r}" for name, value in said.items() if value != DEFAULTS.get(name)]
        return f"FP8Config({', '.join(given)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FP8Config):
            return NotImplemented
        return (self.options, self.spec) == (other.options, other.spec)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict: transformers reads a model's `quantization_config` as a dict even if it is an object.

        The `quant_method` is that of this class, by which transformers finds the quantizer, whatever the dialect of the files.
        """
        return METHOD if key == "quant_method" and self.checkpoint is not None else self.to_dict().get(key, default)

    def to_dict(self) -> dict[str, Any]:
        """Every option as JSON values; if there is a checkpoint, its `quantization_config` without options of hf_fp8."""
        if self.spec.json is None:
            return {"quant_method": OUR_METHOD, **plain(self.options)}
        return self.spec.to_json()

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without options that have their default value."""
        whole = self.to_dict()
        if self.checkpoint is not None:
            return whole
        return {name: value for name, value in whole.items() if name not in DEFAULTS or value != DEFAULTS[name]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """As JSON text. Keys keep the order of `to_dict`, because groups are numbered in that order."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON."""
        Path(json_file_path).write_text(self.to_json_string(use_diff=False), encoding="utf-8")


def dequantize_of(stock: Mapping[str, Any]) -> bool:
    """The value of `dequantize` that options of CompressedTensorsConfig imply; transformers logs its warnings about them.

    `use_optimized_inference` requests what backend="auto" does anyway if the hardware supports it. Raises ConfigError.
    """
    for name, value in stock.items():
        if value not in (None, False, True):
            raise ConfigError(f"{name}={value!r}: must be True or False")
    config = CompressedTensorsConfig(**stock)
    if config.dequantize:
        config.post_init()
    return bool(config.dequantize)
