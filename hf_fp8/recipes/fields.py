"""`Recipe`: a config of torchao as a scheme; what its fields mean, and which values of them are refused."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Collection, Iterable
from enum import Enum
from typing import Any, ClassVar

import torch

from ..errors import ConfigError, UnsupportedError
from ..formats.code_types import INT4, INT8
from ..formats.scheme import ROW, Scheme, scheme_named
from ..formats.scheme import Granularity as Extent
from ..kernels import BACKENDS_OF_LAYERS
from .markers import extent_of

logger = logging.getLogger(__name__)

# Fields of torchao for which hf_fp8 supports one meaning -> the spellings of the values with that meaning.
_ONE_MEANING: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("weight_dtype", "activation_dtype"), ("torch.float8_e4m3fn",)),
    "packing_format": ("None", "PLAIN", "plain"),
    "act_mapping_type": ("None", "SYMMETRIC"),
    **dict.fromkeys(("reduce_range", "weight_only_decode", "quantize_and_dequantize_output", "use_hqq"), ("None", "False")),
    # Limits of activations for computing a scale, a scale of outputs, zero points of inputs: there are none here.
    **dict.fromkeys(
        ("activation_value_lb", "activation_value_ub", "output_act_quant_scale", "act_quant_zero_point"), ("None",)
    ),
    # Scales have the dtype of the weight, as in compressed-tensors.
    **dict.fromkeys(("scale_dtype", "weight_scale_dtype"), ("None",)),
    "int4_choose_qparams_algorithm": ("TINYGEMM", "tinygemm"),
    "intx_choose_qparams_algorithm": ("AFFINE", "affine"),
    # Zero points are integers here. torchao's are integers or floats, depending on the layout, if nothing is said.
    "zero_point_domain": ("None", "NONE", "INT", "FLOAT"),
    "preserve_zero": ("None", "True"),
    "alg_id": ("0",),  # of a sparse kernel
    "version": ("1", "2"),  # selects one of torchao's tensor classes, which hold the same values
}
_NOT_OURS = "codes are stored as in compressed-tensors"
# Fields that are accepted and do nothing -> (spellings of accepted values, those that are not even logged, what is said).
_NO_EFFECT: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "set_inductor_config": (("True", "False"), ("False",), "hf_fp8 changes no settings of the compiler"),
    "int4_packing_format": (("plain", "preshuffled", "plain_int32", "tile_packed_to_4d"), ("plain",), _NOT_OURS),
    "intx_packing_format": (
        (
            "unpacked_to_int8", "opaque_aten_kleidiai", "opaque_torchao_auto", "opaque_torchao_kleidiai",
            "opaque_torchao_lowbit",
        ),
        ("unpacked_to_int8",),
        _NOT_OURS,
    ),
    "int4_tile_packed_ntile": (("8", "16"), ("8",), _NOT_OURS),
}  # fmt: skip
# Layouts of earlier versions of torchao, by class name: how codes lie in memory, and nothing else.
DENSE_LAYOUTS = (
    "PlainLayout", "TensorCoreTiledLayout", "Int4CPULayout", "Int4XPULayout", "QDQLayout", "Int8DynamicActInt4WeightCPULayout",
    "PackedLinearInt8DynamicActivationIntxWeightLayout",
)  # fmt: skip


class Elsewhere(UnsupportedError):
    """hf_fp8 does not run it, torchao may: `quantize_` passes torchao's own config on to torchao."""


def spellings(value: Any) -> set[str]:
    """How a value of a field may be written: its text, and the name and value of an enum."""
    return {str(value), repr(value)} | ({value.name, str(value.value)} if isinstance(value, Enum) else set())


def number(value: Any, what: str) -> float | None:
    """A scale as a float; None for None. Raises ConfigError if it is not one finite positive number."""
    if value is None:
        return None
    given = torch.as_tensor(value, dtype=torch.float64)
    if given.numel() != 1 or not 0 < given.item() < math.inf:
        raise ConfigError(f"{what}={value!r}: give one finite positive number, or none")
    return float(given.item())


class Recipe:
    """A config of torchao, translated to `scheme`.

    Fields may be given by position, in torchao's order (`order`), or by name. A value with a meaning that hf_fp8 does not
    support raises UnsupportedError, which names the field, the value, and what is supported; an unknown field, too.

    Attributes: scheme. input_scale: of all layers, for static inputs whose scale is given, else None. step: "prepare" or
    "convert" of torchao's two-step calibration, else None. backend: of the layers that `quantize_` makes.
    """

    order: ClassVar[tuple[str, ...]] = ()
    scheme: Scheme
    input_scale: float | None = None
    step: str | None = None
    backend: str = "auto"
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls) -> None:
        """What `help` shows: the fields by position, those with a meaning of their own, and the other ones."""
        super().__init_subclass__()
        own = dict(inspect.signature(cls._read).parameters)
        del own["self"]
        kind, by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        shown = [inspect.Parameter(name, kind, default=own[name].default if name in own else None) for name in cls.order]
        shown += [found.replace(kind=by_name) for name, found in own.items() if name not in cls.order]
        shown.append(inspect.Parameter("other_fields", inspect.Parameter.VAR_KEYWORD))
        cls.__signature__ = inspect.Signature(shown)

    def __init__(self, *positional: Any, **named: Any) -> None:
        if len(positional) > len(self.order):
            raise ConfigError(
                f"{self.name} takes {len(self.order)} fields by position ({', '.join(self.order)}), got {len(positional)}"
            )
        fields = dict(zip(self.order, positional, strict=False))
        if twice := sorted(fields.keys() & named.keys()):
            raise ConfigError(f"{self.name}: {', '.join(twice)} is given by position and by name: give it once")
        fields |= named
        self.fields: dict[str, Any] = fields
        own = inspect.signature(self._read).parameters
        for field, value in fields.items():
            if field not in own:
                self._check(field, value)
        self._read(**{field: value for field, value in fields.items() if field in own})

    @property
    def name(self) -> str:
        return type(self).__name__

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{field}={value!r}' for field, value in self.fields.items())})"

    def _read(self) -> None:
        """Set `scheme` and the other attributes. Its parameters are the fields that a subclass gives a meaning of its own."""
        raise NotImplementedError

    def _check(self, field: str, value: Any) -> None:
        if field == "layout":
            return self._check_layout(value)
        if field in _NO_EFFECT:
            accepted, unsaid, why = _NO_EFFECT[field]
            found = spellings(value)
            if not found & set(accepted):
                raise self.refusal(field, value, " or ".join(accepted))
            if not found & set(unsaid):
                self.ignores(field, value, why)
            return
        supported = _ONE_MEANING.get(field, ())
        if not spellings(value) & set(supported):
            raise self.refusal(field, value, " or ".join(supported) or f"no such field; {self.name} has {self._known()}")

    def _known(self) -> str:
        own = [name for name in inspect.signature(self._read).parameters if name not in self.order]
        return ", ".join([*self.order, *own])

    def ignores(self, field: str, value: Any, why: str) -> None:
        """Log that a field does nothing."""
        logger.info(f"hf_fp8: {self.name}({field}={value!r}) does nothing: {why}")

    def refusal(self, field: str, value: object, supported: str) -> UnsupportedError:
        return UnsupportedError(f"{self.name}({field}={value!r}): hf_fp8 supports {supported}")

    def elsewhere(self, field: str, value: object, why: str) -> Elsewhere:
        return Elsewhere(
            f"{self.name}({field}={value!r}): {why}. hf_fp8 does not run it; pass torchao's own config to `quantize_`, which "
            "passes it on to torchao if that has it"
        )

    def _extent(self, field: str, marker: Any, kinds: Collection[str]) -> Extent:
        """The granularity for a marker of one of the classes `kinds`."""
        found = extent_of(marker, kinds)
        if found is None:
            raise self.refusal(field, marker, " or ".join(f"{kind}(...)" for kind in kinds))
        return found

    def _of(self, granularity: Any, supported: str, *schemes: str | Scheme) -> Scheme:
        """The scheme for a marker, or for a pair (inputs, weights), as in torchao; the first of `schemes` for None."""
        given = granularity if isinstance(granularity, (tuple, list)) else (granularity, granularity)
        found = [extent_of(marker, ("PerTensor", "PerRow", "PerBlock")) for marker in given]
        for scheme in map(scheme_named, schemes):
            if granularity is None or found == [scheme.input and scheme.input.granularity, scheme.weight.granularity]:
                return scheme
        raise self.refusal("granularity", granularity, supported)

    def _take_mm_config(self, mm_config: Any, kernel_preference: Any) -> None:
        """Set `backend` by options of torchao's FP8 matmul. None, AUTO: hf_fp8's defaults, with fast accumulation."""
        preferred = spellings(kernel_preference)
        if not preferred & {"AUTO", "TORCH"}:
            why = "kernels.use('dequantize') computes with dequantized codes" if "EMULATED" in preferred else "no others"
            raise self.refusal("kernel_preference", kernel_preference, f"AUTO, or TORCH for torch's scaled_mm; {why}")
        self.backend = "scaled_mm" if "TORCH" in preferred else "auto"
        if mm_config is None:
            return
        if not all(hasattr(mm_config, field) for field in ("emulate", "use_fast_accum", "pad_inner_dim")):
            raise self.refusal("mm_config", mm_config, "a Float8MMConfig")
        if mm_config.emulate:
            raise self.refusal("mm_config", mm_config, "emulate=False; kernels.use('dequantize') does that within a block")
        if mm_config.pad_inner_dim:
            self.ignores("mm_config", mm_config, "pad_inner_dim is not needed, as layers of any size run")
        if not mm_config.use_fast_accum:
            self.backend = f"{self.backend}_slow_accum"
            assert self.backend in BACKENDS_OF_LAYERS

    def _integers(self, field: str, dtype: Any) -> torch.dtype:
        """int4 or int8 of a field with integers of 1 to 8 bits; Elsewhere for the other ones."""
        found = {"int4": INT4, "INT4": INT4, "torch.int4": INT4, "torch.int8": INT8, "int8": INT8, "INT8": INT8}
        for spelling in spellings(dtype):
            if spelling in found:
                return found[spelling]
        if any(word.removeprefix("torch.").lower().startswith(("int", "uint")) for word in spellings(dtype)):
            raise self.elsewhere(field, dtype, "weights of hf_fp8 have 4 or 8 bits (torch.int4, torch.int8)")
        raise self.refusal(field, dtype, "torch.int4 or torch.int8")

    def _has_zero_points(self, field: str, mapping: Any) -> bool:
        found = spellings(mapping)
        if found & {"SYMMETRIC", "ASYMMETRIC"}:
            return "ASYMMETRIC" in found
        raise self.refusal(field, mapping, "SYMMETRIC (the largest magnitude of a group is 7.5 or 127.5 steps) or ASYMMETRIC")

    def _check_layout(self, layout: Any) -> None:
        """A layout of earlier versions of torchao: dense ones do nothing, others are for other kernels."""
        if layout is None:
            return
        kind = layout.partition("(")[0] if isinstance(layout, str) else type(layout).__name__
        if kind not in DENSE_LAYOUTS:
            raise self.elsewhere("layout", layout, "hf_fp8 supports layouts of dense weights, and this is for other kernels")
        if kind != "PlainLayout":
            self.ignores("layout", layout, _NOT_OURS)

    def _check_inputs_mapping(self, mapping: Any) -> None:
        """Of int8 inputs beside int4 weights: torchao has zero points there, compressed-tensors' W4A8 does not."""
        if "ASYMMETRIC" in spellings(mapping):
            self.ignores("act_mapping_type", mapping, "int8 inputs are quantized symmetrically, as in compressed-tensors' W4A8")
        elif not {"SYMMETRIC", "None"} & spellings(mapping):
            raise self.refusal("act_mapping_type", mapping, "SYMMETRIC or ASYMMETRIC")


def fields_of(config: Any) -> dict[str, Any]:
    """The fields of a config object, dataclass or not, by name."""
    names: Iterable[str] = getattr(config, "__dataclass_fields__", None) or vars(config)
    return {name: getattr(config, name) for name in names}


def per_group(group_size: int | None) -> Extent:
    """Groups along the columns; channels for None."""
    return ROW if group_size is None else Extent(1, group_size)
