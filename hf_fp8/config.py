"""FP8Config: how a checkpoint is loaded, or quantized while loading, and what `config.json` says of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]
from transformers import CompressedTensorsConfig

from .errors import ConfigError
from .gradients import BACKWARDS
from .groups import Group, all_of, asked_groups, match, parse, read_group, write_group, written_config
from .kernels import BACKENDS
from .scheme import FP8, INT8_DYNAMIC, Scheme

EXPERTS = ("auto", "fp8", "dequantize")


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
    `dequantize`, `backend`, `experts` and `backward` are never written to `config.json`. Raises ConfigError for unknown values.
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
        unknown.pop("quant_method", None)
        if unknown:
            raise ConfigError(
                f"FP8Config has no option {', '.join(map(repr, unknown))}; it has scheme, targets, ignore, dequantize, "
                "backend, experts and backward"
            )
        if backend not in BACKENDS:
            raise ConfigError(f"FP8Config(backend={backend!r}): it is one of {', '.join(BACKENDS)}")
        if experts not in EXPERTS:
            raise ConfigError(f"FP8Config(experts={experts!r}): it is one of {', '.join(EXPERTS)}")
        if backward not in BACKWARDS:
            raise ConfigError(f"FP8Config(backward={backward!r}): it is one of {', '.join(BACKWARDS)}")
        if experts == "fp8" and (dequantize or backend == "int8"):
            given = "dequantize=True multiplies everything out" if dequantize else "backend='int8' re-quantizes Linears alone"
            raise ConfigError(f"experts='fp8' was asked for, but {given}: pass one of them")
        if dequantize and backend != "auto":
            raise ConfigError(f"dequantize=True leaves nothing for backend={backend!r} to run on: pass one of them")
        if scheme is not None and (dequantize or backend == "int8"):
            given = "dequantize=True" if dequantize else "backend='int8'"
            hint = "" if dequantize else "; for int8 weights use hf_fp8.quantize_model(model, 'INT8')"
            raise ConfigError(f"scheme={scheme!r} quantizes weights to FP8, which {given} would undo: pass one of them{hint}")
        super().__init__(dequantize=dequantize)
        self.backend, self.experts, self.backward = backend, experts, backward
        self.scheme = scheme
        # What the checkpoint itself says, where `become_int8` has made `checkpoint` say something else.
        self.origin: dict[str, Any] | None = None
        self.of_another_load = False  # whether `checkpoint` was remembered from another load, and may not be this one's
        self.checkpoint: dict[str, Any] | None = None
        self.groups: tuple[Group, ...] = ()
        if checkpoint is not None:
            self._read(checkpoint)
        elif scheme is not None:
            self.ask(scheme, targets, ignore)
            if not all_of(FP8, self.groups):
                raise ConfigError(
                    f"scheme={scheme!r} is not FP8, which is all that hf_fp8 quantizes to while loading; for int8 use "
                    "hf_fp8.quantize_model(model, 'INT8')"
                )
        elif ignore is not None or tuple(targets) != ("Linear",):
            raise ConfigError("targets and ignore say what to quantize while loading: pass a scheme with them")

    def ask(
        self, scheme: str | Scheme | Mapping[Any, Any], targets: str | Sequence[str], ignore: str | Sequence[str] | None
    ) -> None:
        """Take the groups of what is to be quantized from what a user asks for (see the arguments of the class)."""
        listed = [ignore] if isinstance(ignore, str) else list(ignore or ())
        self.spares = ignore is None or len(listed) > 0  # whether output embeddings and routers are left out
        self.quantization_config, self.groups = asked_groups(scheme, targets, listed)

    def _read(self, checkpoint: dict[str, Any]) -> None:
        self.checkpoint = checkpoint
        self.quantization_config = parse(checkpoint)
        self._read_groups()

    def _read_groups(self) -> None:
        config = self.quantization_config
        self.groups = tuple(read_group(name, group, config) for name, group in config.config_groups.items())

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
        return {name: getattr(self, name) for name in ("dequantize", "backend", "experts", "backward")}

    def __repr__(self) -> str:
        given = {} if self.scheme is None else {"scheme": self.scheme}
        options = ", ".join(f"{name}={value!r}" for name, value in {**given, **self.get_loading_attributes()}.items())
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

    def become(self, used: Iterable[str], dense: Iterable[str]) -> None:
        """Make of the groups that were asked for what `to_dict` writes: those in `used`, with modules `dense` not quantized."""
        groups = {group.name: group for group in self.groups if group.name in set(used)}
        written = {name: write_group(group.scheme, group.targets) for name, group in groups.items() if group.scheme}
        self._read(written_config(written, dense))

    def become_int8(self, dense: Iterable[str]) -> None:
        """Make what `to_dict` writes fit a model whose FP8 Linears are int8 now, and whose modules `dense` are dense."""
        written = self.to_dict()
        self.origin = copy.deepcopy(written)
        for group in self.groups:
            if group.scheme is not None:
                written["config_groups"][group.name] = write_group(INT8_DYNAMIC, group.targets)
            elif len(self.host_groups) < len(self.groups):
                written["config_groups"][group.name]["format"] = group.format
        written["format"] = "mixed-precision" if self.host_groups else "int-quantized"
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
            status = self.quantization_config.quantization_status
            checkpoint["quantization_status"] = getattr(status, "value", status)
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
