"""FP8Config, and `quantization_config` read into groups: which modules, which scheme.

Parsing is compressed-tensors' own (`QuantizationConfig`, pydantic); what is ours is to say
precisely what is wrong, to know which groups are FP8 and which of those we can run, and to match
names as compressed-tensors does (utils/match.py).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    preset_name_to_scheme,
)
from pydantic import ValidationError
from transformers import CompressedTensorsConfig

from .errors import ConfigError, UnsupportedError
from .kernels import BACKENDS
from .scheme import ROW, TENSOR, Granularity, Scheme, TensorScheme

EXPERTS = ("auto", "fp8", "dequantize")
# compressed-tensors' preset W8A8, as llm-compressor writes it: what a layer of backend="int8" is.
_INT8: dict[str, Any] = {
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "output_activations": None,
    "format": "int-quantized",
}
# Formats that store E4M3 codes as they are, under "weight": int-quantized differs from the others in name
# only (compressors/naive_quantized), and old writers fell back to it.
FP8_FORMATS = (None, "float-quantized", "naive-quantized", "int-quantized", "mixed-precision", "dense", "fakequant")
KNOWN_FORMATS = {*FP8_FORMATS, *(member.value for member in CompressionFormat)}


@dataclass(frozen=True)
class Group:
    """One entry of `config_groups`. `scheme` is None for a group that is not FP8: the host's own path runs it.

    format: compressed-tensors' name of how the group is stored, its own or the whole checkpoint's.
    """

    name: str
    targets: tuple[str, ...]
    scheme: Scheme | None
    parsed: QuantizationScheme
    format: str


class FP8Config(CompressedTensorsConfig):  # type: ignore[misc]
    """How to load a compressed-tensors FP8 checkpoint; never written to `config.json`.

    Args:
        dequantize: multiply the weights out to the model's dtype while loading.
        backend: "auto" keeps FP8 weights where the device has FP8 matmuls and dequantizes elsewhere;
            "scaled_mm" keeps them anywhere and quantizes inputs as the checkpoint says;
            "weight_only" keeps them anywhere and leaves inputs as they are (both: those of Linears; for merged
            experts see below); "int8" re-quantizes Linears to int8
            per channel after loading, with inputs quantized per token, for CPUs and for GPUs without FP8 units.
        experts: what becomes of experts that the model holds merged in one 3-D parameter: "fp8" keeps them in FP8
            anywhere, "dequantize" multiplies them out, "auto" keeps them where the device has a kernel that gains from it: on
            GPUs, not on CPUs, whatever the backend. Where they are kept, `backend` says what is done to their inputs.
        checkpoint: the checkpoint's own `quantization_config`; given by the loader, not by users.

    Raises ConfigError for unknown values.
    """

    def __init__(
        self,
        *,
        dequantize: bool = False,
        backend: str = "auto",
        experts: str = "auto",
        checkpoint: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise ConfigError(
                f"FP8Config has no option {', '.join(map(repr, unknown))}; it has dequantize, backend and experts"
            )
        if backend not in BACKENDS:
            raise ConfigError(f"FP8Config(backend={backend!r}): it is one of {', '.join(BACKENDS)}")
        if experts not in EXPERTS:
            raise ConfigError(f"FP8Config(experts={experts!r}): it is one of {', '.join(EXPERTS)}")
        if experts == "fp8" and (dequantize or backend == "int8"):
            given = "dequantize=True multiplies everything out" if dequantize else "backend='int8' re-quantizes Linears alone"
            raise ConfigError(f"experts='fp8' was asked for, but {given}: pass one of them")
        if dequantize and backend != "auto":
            raise ConfigError(f"dequantize=True leaves nothing for backend={backend!r} to run on: pass one of them")
        super().__init__(dequantize=dequantize)
        self.backend, self.experts = backend, experts
        # What the checkpoint itself says, where `become_int8` has made `checkpoint` say something else.
        self.origin: dict[str, Any] | None = None
        self.of_another_load = False  # whether `checkpoint` was remembered from another load, and may not be this one's
        self.checkpoint: dict[str, Any] | None = None
        self.groups: tuple[Group, ...] = ()
        if checkpoint is not None:
            self._read(checkpoint)

    def _read(self, checkpoint: dict[str, Any]) -> None:
        self.checkpoint = checkpoint
        self.quantization_config = config = parse(checkpoint)
        self.groups = tuple(_group(name, group, config) for name, group in config.config_groups.items())

    @property
    def fp8_groups(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.scheme is not None)

    @property
    def host_groups(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.scheme is None)

    @property
    def ignore(self) -> tuple[str, ...]:
        return tuple(self.quantization_config.ignore or ()) if self.quantization_config else ()

    def group_of(self, names: Iterable[str], classes: Iterable[str]) -> Group | None:
        """The group that a module of any of these names and classes belongs to, None if it is dense."""
        names, classes = tuple(names), tuple(classes)
        if match(names, classes, self.ignore):
            return None
        by_target = {target: group for group in self.groups for target in group.targets}
        found = match(names, classes, by_target)
        return by_target[found] if found else None

    def get_loading_attributes(self) -> dict[str, Any]:
        return {"dequantize": self.dequantize, "backend": self.backend, "experts": self.experts}

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.get_loading_attributes().items())
        return f"FP8Config({options})"

    def get(self, key: str, default: Any = None) -> Any:
        """The host reads a model's config as a dict even where it holds an object."""
        return self.to_dict().get(key, default)

    def to_dict(self) -> dict[str, Any]:
        """The checkpoint's `quantization_config`, without anything of ours.

        The status is always written as "compressed": that is what the files hold, and readers
        that find another one, or none, take the stored codes for plain weights.
        """
        written = copy.deepcopy(self.checkpoint or {})
        written["quant_method"] = "compressed-tensors"
        if self.checkpoint is not None:
            written["quantization_status"] = "compressed"
        return written

    def leave_out(self, dense: Iterable[str], gone: Iterable[str]) -> None:
        """Make what `to_dict` writes fit a model: modules `dense` are not quantized, groups `gone` have none in it."""
        assert self.checkpoint is not None
        groups = {k: v for k, v in self.checkpoint["config_groups"].items() if k not in set(gone)}
        ignore = list(dict.fromkeys([*self.ignore, *dense]))
        self._read({**self.checkpoint, "config_groups": groups, "ignore": ignore})

    def become_int8(self, dense: Iterable[str]) -> None:
        """Make what `to_dict` writes fit a model whose FP8 Linears are int8 now, and whose modules `dense` are dense."""
        written = self.to_dict()
        self.origin = copy.deepcopy(written)
        for group in self.groups:
            if group.scheme is not None:
                written["config_groups"][group.name] = {"targets": list(group.targets), **copy.deepcopy(_INT8)}
            elif len(self.host_groups) < len(self.groups):
                written["config_groups"][group.name]["format"] = group.format
        written["format"] = "mixed-precision" if self.host_groups else _INT8["format"]
        written["ignore"] = list(dict.fromkeys([*self.ignore, *dense]))
        self._read(written)

    def without_fp8_groups(self, dense: Iterable[str] = ()) -> FP8Config:
        """What is left of this config for a model whose FP8 modules, named `dense`, have been dequantized."""
        checkpoint = self.to_dict()
        left = {group.name for group in self.host_groups}
        checkpoint["config_groups"] = {k: v for k, v in checkpoint["config_groups"].items() if k in left}
        checkpoint["ignore"] = list(dict.fromkeys([*self.ignore, *dense]))
        formats = {group.format for group in self.host_groups}
        if len(formats) == 1:
            checkpoint["format"] = formats.pop()
        return FP8Config(experts=self.experts, checkpoint=checkpoint)

    def for_host(self, ignore: Iterable[str], compressed: bool) -> CompressedTensorsConfig:
        """The groups that are not FP8, as the stock config that the host's quantizer takes.

        ignore: modules that are not to be touched. compressed: whether the files hold packed weights,
        whatever the status says.
        """
        checkpoint = self.without_fp8_groups(ignore).to_dict()
        checkpoint["kv_cache_scheme"] = None  # ours to carry: the host's hooks would quantize the cache its own way
        if not compressed:
            checkpoint["quantization_status"] = _value(self.quantization_config.quantization_status)
        return CompressedTensorsConfig(**checkpoint)


class _Name(str):
    """The name of a checkpoint, with how it was quantized."""

    quantized: dict[str, Any]


# PEFT writes the name into a model card, as YAML, which would keep the class.
for _dumper in (yaml.Dumper, yaml.SafeDumper):
    _dumper.add_representer(_Name, lambda dumper, name: dumper.represent_str(str(name)))


def remember(config: Any, quantized: FP8Config) -> None:
    """Leave a note of `quantized` on the config of a model that has become dense, or int8.

    Users pass such a config on: ``from_pretrained(same_checkpoint, config=model.config)``. Nothing in
    it says FP8 any more, and the host would take the codes for values. The note sits on the name of
    the checkpoint, which the host copies with the config and sets anew at the next load.
    """
    name = _Name(getattr(config, "_name_or_path", "") or "")
    name.quantized = quantized.origin or quantized.to_dict()
    config._name_or_path = name


def remembered(config: Any) -> dict[str, Any] | None:
    """The note that `remember` left on a config, None if there is none."""
    return getattr(getattr(config, "_name_or_path", None), "quantized", None)


def match(names: Iterable[str], classes: Iterable[str], targets: Iterable[str]) -> str | None:
    """The first of `targets` that matches, in compressed-tensors' order: exact name, ``re:`` regex, class."""
    ordered = sorted(targets, key=lambda target: ("re:" in target, target))
    names, classes = tuple(names), set(classes)
    for target in ordered:
        if any(re.match(target.removeprefix("re:"), name) if target.startswith("re:") else target == name for name in names):
            return target
    return next((target for target in ordered if target in classes), None)


def is_fp8(weights: Any) -> bool:
    """Whether a group's `weights`, as JSON, are E4M3 codes with float scales (microscaling formats are not)."""
    if not isinstance(weights, dict) or weights.get("type") != "float" or str(weights.get("num_bits")) != "8":
        return False
    return "uint8" not in str(weights.get("scale_dtype"))


def concerns_fp8(checkpoint: dict[str, Any]) -> bool:
    """Whether a compressed-tensors config has an FP8 group, or is broken in a way that may hide one."""
    groups = _with_presets(checkpoint.get("config_groups"))
    if any(isinstance(g, dict) and is_fp8(g.get("weights")) and _is_plain(g.get("format")) for g in groups.values()):
        return True
    no_weights = not groups or not all(isinstance(g, dict) and isinstance(g.get("weights"), dict) for g in groups.values())
    return checkpoint.get("format") == "float-quantized" and no_weights


def _is_plain(fmt: Any) -> bool:
    return not (isinstance(fmt, str) and fmt.startswith("mx"))


def _with_presets(groups: Any) -> dict[str, Any]:
    """`config_groups` with entries like ``"FP8_DYNAMIC": ["Linear"]`` spelled out."""
    if not isinstance(groups, dict):
        return {}
    spelled = {}
    for name, group in groups.items():
        if isinstance(group, list):
            try:
                group = json.loads(preset_name_to_scheme(name, group).model_dump_json())
            except KeyError:
                raise ConfigError(f"quantization_config.config_groups[{name!r}]: no preset has that name") from None
        spelled[name] = group
    return spelled


def parse(checkpoint: dict[str, Any]) -> QuantizationConfig:
    """compressed-tensors' own reading of a `quantization_config`.

    Raises ConfigError, naming the key, for what it cannot read or would silently ignore.
    """
    groups = _with_presets(checkpoint.get("config_groups"))
    if not groups:
        raise ConfigError(
            "quantization_config.config_groups is missing or empty, though the format is "
            f"{checkpoint.get('format')!r}: nothing says how the weights are quantized"
        )
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise ConfigError(
                f"quantization_config.config_groups[{name!r}] has no `weights`: "
                "hf_fp8 runs groups that say how weights are quantized"
            )
        if not group.get("targets"):
            raise ConfigError(f"quantization_config.config_groups[{name!r}] has no `targets`")
        _check_patterns(f"config_groups[{name!r}].targets", group["targets"])
    _check_patterns("ignore", checkpoint.get("ignore") or [])
    if checkpoint.get("transform_config"):
        raise UnsupportedError(
            "quantization_config.transform_config asks for run-time transforms (such as rotations), which "
            "transformers would leave out: the outputs would be wrong. hf_fp8 runs checkpoints without them."
        )
    sparsity = checkpoint.get("sparsity_config") or {}
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if sparse != "dense":
        raise UnsupportedError(f"quantization_config.sparsity_config is {sparse!r}: hf_fp8 reads dense weights only")
    only_fp8 = all(is_fp8(group.get("weights")) for group in groups.values())
    if checkpoint.get("format") not in (FP8_FORMATS if only_fp8 else KNOWN_FORMATS):
        raise ConfigError(
            f"quantization_config.format is {checkpoint['format']!r}: FP8 weights come as float-quantized or naive-quantized"
        )
    try:
        return QuantizationConfig.model_validate({**checkpoint, "config_groups": groups})
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic puts the validators it went through between the keys
        where = "".join(f".{part}" for part in first["loc"] if "[" not in str(part))
        message = first["msg"].split("\n")[0].removeprefix("Value error, ")
        if where.endswith("strategy"):
            message += f"; there are: {', '.join(member.value for member in QuantizationStrategy)}"
        raise ConfigError(f"quantization_config{where}: {message} (found {str(first['input'])[:120]})") from error


def _check_patterns(key: str, targets: Any) -> None:
    for target in targets if isinstance(targets, list) else [targets]:
        if not isinstance(target, str):
            raise ConfigError(f"quantization_config.{key} is {targets!r}: it is a list of names, classes and re: patterns")
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise ConfigError(f"quantization_config.{key}: {target!r} is no regular expression ({error})") from None


def _value(x: Any) -> Any:
    """pydantic hands out some enums as members and some as their values."""
    return getattr(x, "value", x)


def _group(name: str, parsed: QuantizationScheme, config: QuantizationConfig) -> Group:
    weights = json.loads(parsed.weights.model_dump_json())
    fp8 = is_fp8(weights) and _is_plain(_value(parsed.format))
    fmt = _value(parsed.format) or _value(config.format)
    return Group(name, tuple(parsed.targets), _scheme(name, parsed) if fp8 else None, parsed, fmt)


def _scheme(name: str, group: QuantizationScheme) -> Scheme:
    """Raises UnsupportedError, naming the key, for FP8 that hf_fp8 does not run."""
    where = f"quantization_config.config_groups[{name!r}]"

    def refuse(key: str, value: Any, supported: str) -> UnsupportedError:
        return UnsupportedError(f"{where}.{key} is {_value(value)!r}; hf_fp8 supports {supported}")

    fmt = _value(group.format)
    if fmt not in FP8_FORMATS:
        raise ConfigError(f"{where}.format is {fmt!r}: FP8 weights come as float-quantized or naive-quantized")
    weights, inputs = group.weights, group.input_activations
    if not weights.symmetric:
        raise refuse("weights.symmetric", False, "symmetric FP8 weights (no zero points)")
    if weights.dynamic:
        raise refuse("weights.dynamic", weights.dynamic, "weights quantized ahead of time")
    if group.output_activations is not None:
        raise refuse("output_activations", "set", "schemes that quantize weights and inputs only")
    weight = {
        "tensor": lambda: TENSOR,
        "channel": lambda: ROW,
        "group": lambda: Granularity(1, weights.group_size),
        "block": lambda: Granularity(*weights.block_structure),
    }.get(_value(weights.strategy))
    if weight is None:
        raise refuse("weights.strategy", weights.strategy, "tensor, channel, group and block")
    stored = TensorScheme(weight())
    if inputs is None:
        return Scheme(stored)
    if inputs.type != "float" or inputs.num_bits != 8:
        raise refuse("input_activations", f"{inputs.num_bits}-bit {inputs.type}", "8-bit float inputs, or none")
    if not inputs.symmetric:
        raise refuse("input_activations.symmetric", False, "symmetric inputs (no zero points)")
    kinds = {
        ("tensor", True): lambda: TENSOR,
        ("tensor", False): lambda: TENSOR,
        ("token", True): lambda: ROW,
        ("group", True): lambda: Granularity(1, inputs.group_size),
    }
    kind = kinds.get((_value(inputs.strategy), inputs.dynamic))
    if kind is None:
        how = "dynamic" if inputs.dynamic is True else _value(inputs.dynamic) or "static"
        raise refuse(
            "input_activations.strategy",
            f"{_value(inputs.strategy)} ({how})",
            "tensor (static or dynamic), token and group (dynamic)",
        )
    return Scheme(stored, TensorScheme(kind(), dynamic=bool(inputs.dynamic)))
