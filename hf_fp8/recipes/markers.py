"""torchao's small types that configs are made of: granularities, enums, `Float8MMConfig`. torchao's own objects work as well.

Recipes look only at names of classes and at attributes, so that torchao need not be installed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple

from ..formats.scheme import ROW, TENSOR
from ..formats.scheme import Granularity as Extent


class Granularity:
    """Base class of torchao's markers of what one scale covers."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for a whole matrix, of weights or of inputs."""


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale for each output channel of a weight, and for each token of an input."""

    dim: int = -1


@dataclass(frozen=True)
class PerAxis(Granularity):
    """One scale for each index of an axis; axis 0 of a weight are its output channels."""

    axis: int


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for `group_size` values of a channel that lie next to each other."""

    group_size: int


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each token of an input."""


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for a block of (rows, columns) values."""

    block_size: tuple[int, ...]


def extent_of(marker: Any, kinds: Collection[str] = ()) -> Extent | None:
    """The granularity of hf_fp8 for a marker, found by its class name; None for one that hf_fp8 does not support.

    kinds: the names of the classes that are meant, if not all.
    """
    kind = type(marker).__name__
    if kinds and kind not in kinds:
        return None
    if (kind == "PerRow" and getattr(marker, "dim", -1) == -1) or kind == "PerToken":
        return ROW
    if kind == "PerAxis" and marker.axis == 0:
        return ROW
    if kind == "PerGroup":
        return Extent(1, marker.group_size)
    if kind == "PerBlock" and len(marker.block_size) == 2:
        return Extent(*marker.block_size)
    return TENSOR if kind == "PerTensor" else None


class MappingType(Enum):
    """How floats are mapped to integers: around 0, or with zero points (ASYMMETRIC)."""

    SYMMETRIC = auto()
    SYMMETRIC_NO_CLIPPING_ERR = auto()
    ASYMMETRIC = auto()


class KernelPreference(str, Enum):
    """Which kernels run an FP8 layer. hf_fp8 supports AUTO (`backend="auto"`) and TORCH (`backend="scaled_mm"`)."""

    AUTO = "auto"
    TORCH = "torch"
    MSLK = "mslk"
    EMULATED = "emulated"
    TRITON = "triton"


class Float8PackingFormat(str, Enum):
    """How torchao lays out FP8 codes. hf_fp8 supports PLAIN."""

    PLAIN = "plain"
    SPARSE_2D_DATA_2D_METADATA = "sparse_2d_data_2d_metadata"
    SPARSE_1D_DATA_1D_METADATA = "sparse_1d_data_1d_metadata"


class Int4PackingFormat(str, Enum):
    """How torchao lays out int4 codes. hf_fp8 stores them as compressed-tensors does, whatever is given."""

    PLAIN = "plain"
    PRESHUFFLED = "preshuffled"
    PLAIN_INT32 = "plain_int32"
    TILE_PACKED_TO_4D = "tile_packed_to_4d"


class IntxPackingFormat(str, Enum):
    """How torchao lays out integers of up to 8 bits. hf_fp8 stores them as compressed-tensors does, whatever is given."""

    UNPACKED_TO_INT8 = "unpacked_to_int8"
    OPAQUE_ATEN_KLEIDIAI = "opaque_aten_kleidiai"
    OPAQUE_TORCHAO_AUTO = "opaque_torchao_auto"
    OPAQUE_TORCHAO_KLEIDIAI = "opaque_torchao_kleidiai"
    OPAQUE_TORCHAO_LOWBIT = "opaque_torchao_lowbit"


class Int4ChooseQParamsAlgorithm(str, Enum):
    """How scales and zero points of int4 weights are computed. hf_fp8 supports TINYGEMM: from the range of a group."""

    TINYGEMM = "tinygemm"
    HQQ = "hqq"


class IntxChooseQParamsAlgorithm(str, Enum):
    """How scales of integer weights are computed. hf_fp8 supports AFFINE: from the range of a group."""

    AFFINE = "affine"
    HQQ_SCALE_ONLY = "hqq_scale_only"


class Float8MMConfig(NamedTuple):
    """Options of torchao's FP8 matmul, with torchao's defaults: fast accumulation is off unless it is asked for.

    emulate: UnsupportedError if True. pad_inner_dim: True changes nothing, as layers of any size run.
    """

    emulate: bool = False
    use_fast_accum: bool = False
    pad_inner_dim: bool = False
