"""FP8Config: how a checkpoint is loaded, or quantized while loading, and what `config.json` says of it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import CompressedTensorsConfig

from ..checkpoint.config_groups import Group, all_of
from ..checkpoint.spec import METHOD, QuantizationSpec, plain
from ..errors import ConfigError
from ..formats.scheme import FP8, Scheme
from .options import DEFAULTS, LOADING, settled

METHODS = (METHOD, "sparseml")  # the second is its name in old files
OUR_METHOD = "hf_fp8"  # what a plain dict may say to mean FP8Config
STOCK_OPTIONS = ("run_compressed", "use_optimized_inference")  # of CompressedTensorsConfig, beside `dequantize`


class FP8Config(CompressedTensorsConfig):  # type: ignore[misc]
    """How to load a compressed-tensors FP8 checkpoint, or how to quantize a dense one while loading.

    Args:
        scheme: quantize a dense checkpoint while loading: "FP8_DYNAMIC", "FP8" (static inputs, to be measured with
            `hf_fp8.calibrate`), "FP8_BLOCK", "FP8_WEIGHT_ONLY", "FP8_TENSOR", or a `Scheme`; for several groups a dict of such
            to lists of targets, or `config_groups` as compressed-tensors writes them. None: the checkpoint is quantized.
        targets: which modules, as in compressed-tensors: names, "re:" patterns or classes.
        ignore: those that stay dense all the same. The output embedding and routers stay dense, too, unless a target is
            about them alone ("lm_head", "re:.*router"), or `ignore` is an empty list.
        dequantize: multiply the weights out to the model's dtype while loading.
        backend: "auto" keeps FP8 weights where the device has FP8 matmuls and dequantizes elsewhere;
            "scaled_mm" keeps them anywhere and quantizes inputs as the checkpoint says;
            "weight_only" keeps them anywhere and leaves inputs as they are (both: those of Linears; for merged
            experts see below); "int8" re-quantizes Linears to int8
            per channel after loading, with inputs quantized per token, for CPUs and for GPUs without FP8 units.
        experts: what becomes of experts that the model holds merged in one 3-D parameter: "fp8" keeps them in FP8
            anywhere, "dequantize" multiplies them out, "auto" keeps them where the device has a kernel that gains from it: on
            GPUs, not on CPUs, whatever the backend. Where they are kept, `backend` says what is done to their inputs.
        backward: how gradients go through Linears when adapters are trained: "exact" multiplies them as they are with the
            dequantized weights; "quantized" rounds them to 8 bits per token and multiplies them with the codes where
            the device has such a kernel (docs/training.md has the error; slower on CPUs, not measured on GPUs). Experts'
            are exact.
        checkpoint: the checkpoint's own `quantization_config`; given by the loader, not by users.

    With a scheme, "auto" keeps Linears and experts in FP8 on any device, and `experts="dequantize"` leaves experts dense.

    `to_dict`, `repr` and what is made of them say every option, and `from_dict`, or `from_pretrained`, takes that for the
    object. A loaded model's config is that of its checkpoint instead: `config.json` holds nothing of ours. Loading changes no
    config that was passed to it. Raises ConfigError for unknown options and values, when they are set later, too.
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
        self.of_another_load = False  # whether `checkpoint` is of an earlier load: the files tell whether of this one, too
        self.spec = QuantizationSpec()
        if checkpoint is not None:
            self.spec = QuantizationSpec.read(checkpoint)
        elif self.scheme is not None:
            asked = QuantizationSpec.asked(self.scheme, self.targets, self._ignore)
            if not all_of(FP8, asked.groups):
                raise ConfigError(
                    f"scheme={scheme!r} is not FP8, which is all that hf_fp8 quantizes to while loading; for int8 use "
                    "hf_fp8.quantize_model(model, 'INT8')"
                )
            self.spec = asked

    @property
    def spec(self) -> QuantizationSpec:
        """What the checkpoint's config says, or what was asked for; empty if neither is known."""
        return self._spec

    @spec.setter
    def spec(self, spec: QuantizationSpec) -> None:
        self._spec = spec
        self.quantization_config = spec.parsed  # under the name that the host looks for

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """The `quantization_config` of the checkpoint, None if there is none yet."""
        return None if self.spec.json is None else dict(self.spec.json)

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.spec.groups

    @property
    def ignore(self) -> tuple[str, ...]:
        return self.spec.ignore

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a dict: of options, ours or stock's (`run_compressed`), or a checkpoint's `quantization_config`, beside
        which there may be loading options.

        kwargs: options that win over those of the dict. Returns (config, kwargs that are no options) if `return_unused_kwargs`.
        Raises ConfigError, naming them, for keys that are no options, and for dicts of other methods.
        """
        given = config_dict.get("quantization_config", config_dict) if isinstance(config_dict, Mapping) else None
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"a quantization_config is a dict of options, or what config.json has by that name, not {given!r}"
            )
        given = dict(given)
        method = plain(given.pop("quant_method", None))
        if method not in (None, OUR_METHOD, *METHODS):
            raise ConfigError(f"quantization_config says {method!r}, which is not compressed-tensors FP8")
        stock = {name: given.pop(name) for name in STOCK_OPTIONS if name in given}
        if stock:
            given["dequantize"] = dequantize_of({"dequantize": given.get("dequantize", False), **stock})
        checkpoint = None
        if "config_groups" in given or (method in METHODS and "scheme" not in given and set(given) - set(DEFAULTS)):
            if both := [name for name in ("scheme", "targets") if name in given]:
                raise ConfigError(f"{both[0]} and config_groups both say what is quantized: pass one of them")
            checkpoint = {name: value for name, value in given.items() if name not in LOADING}
            checkpoint["quant_method"] = method if method in METHODS else METHOD
            given = {name: value for name, value in given.items() if name in LOADING}
        config = cls(**settled(given), checkpoint=checkpoint)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    @property
    def options(self) -> dict[str, Any]:
        """Every option, as it was asked for, whatever has become of the config since."""
        asked = {"scheme": self.scheme, "targets": self.targets, "ignore": self._ignore}
        return {**copy.deepcopy(asked), **self.get_loading_attributes()}

    def afresh(self) -> FP8Config:
        """A config of its own with the same options, that knows of no checkpoint."""
        new = FP8Config(**self.options)
        new.spec = replace(new.spec, dense_by_default=self.spec.dense_by_default)
        return new

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set options, as if they had been passed at first. Returns those of `kwargs` that are none."""
        known = {name: value for name, value in kwargs.items() if name in DEFAULTS}
        if known:
            new = FP8Config(**{**self.options, **known})
            if self.checkpoint is not None and not set(known) <= set(LOADING):
                raise ConfigError(
                    "scheme, targets and ignore of a config that a checkpoint has are what it says: make a new one"
                )
            for name in DEFAULTS if self.checkpoint is None else LOADING:
                name = "_ignore" if name == "ignore" else name
                super().__setattr__(name, getattr(new, name))
            if self.checkpoint is None:
                self.spec = new.spec
        return {name: value for name, value in kwargs.items() if name not in known}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DEFAULTS and "_spec" in self.__dict__ and self.checkpoint is None:
            self.update(**{name: value})  # groups follow, and options that do not fit each other are refused
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
        """The host reads a model's config as a dict even where it holds an object."""
        return self.to_dict().get(key, default)

    def to_dict(self) -> dict[str, Any]:
        """Every option as JSON; or, of a config that a checkpoint has, its `quantization_config`, without anything of ours."""
        if self.spec.json is None:
            return {"quant_method": OUR_METHOD, **plain(self.options)}
        return self.spec.to_json()

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without options that are at their defaults."""
        whole = self.to_dict()
        if self.checkpoint is not None:
            return whole
        return {name: value for name, value in whole.items() if name not in DEFAULTS or value != DEFAULTS[name]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """As JSON, in the order of `to_dict`: groups are numbered by it."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON."""
        Path(json_file_path).write_text(self.to_json_string(use_diff=False), encoding="utf-8")

    def without_fp8(self, dense: Iterable[str]) -> FP8Config:
        """What is left of this config for a model whose FP8 modules, named `dense`, have been dequantized."""
        return FP8Config(experts=self.experts, checkpoint=self.spec.host_part(dense))


def dequantize_of(stock: Mapping[str, Any]) -> bool:
    """What `dequantize` stock's loading options come to, with the warnings that stock has for them.

    `use_optimized_inference` asks for what backend="auto" does anyway where the hardware can. Raises ConfigError.
    """
    for name, value in stock.items():
        if value not in (None, False, True):
            raise ConfigError(f"{name}={value!r}: it is True or False")
    config = CompressedTensorsConfig(**stock)
    if config.dequantize:
        config.post_init()
    return bool(config.dequantize)
