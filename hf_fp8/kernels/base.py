"""Types of kernels (Kernel, GroupedKernel), of the problem that they are selected for, and of their operands."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from ..formats.code_types import CODE_TYPES, INT8
from ..formats.scheme import Scheme
from ..formats.storage import COLUMN_GROUPS, WEIGHT_SCALE, ZERO_POINT, format_of

# Largest K for which a sum of products of int8 codes always fits into int32: inputs are -127..127, weights -128..127.
LARGEST_K = (2**31 - 1) // (int(CODE_TYPES[INT8].largest) * -int(CODE_TYPES[INT8].least))


class Input(NamedTuple):
    """An input, prepared for a kernel.

    x: (M, K), codes (8-bit values), or float values if there is no scale. scale: in the layout that the kernel needs. columns,
    outliers: (R,) indices of the outlier columns, whose codes are 0, and (M, R) their values in float32, any strides.
    """

    x: torch.Tensor
    scale: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    outliers: torch.Tensor | None = None

    def rows(self, start: int, end: int) -> Input:
        """Rows start to end; only for scales per row."""
        if start == 0 and end >= self.x.shape[0]:
            return self
        scale, outliers = (None if t is None else t[start:end] for t in (self.scale, self.outliers))
        return Input(self.x[start:end], scale, self.columns, outliers)


class Weight(NamedTuple):
    """Operands of a layer as the checkpoint stores them: codes (N, K), or packed (N, words), scales, bias (N,), their scheme.

    zero_point, column_groups: as stored, if the scheme has them (`formats.storage.PackedCodes`).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    scheme: Scheme
    zero_point: torch.Tensor | None = None
    column_groups: torch.Tensor | None = None

    def pieces(self, k: int, dtype: torch.dtype, elements: int) -> Iterator[tuple[torch.Tensor, int]]:
        """`WeightFormat.pieces` of the weight (N, K)."""
        return format_of(self.scheme.weight).pieces(self.tensors(), self.scheme.weight, k, dtype, elements)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By their role in the format."""
        codes = format_of(self.scheme.weight).codes
        held = {codes: self.codes, WEIGHT_SCALE: self.scale, ZERO_POINT: self.zero_point, COLUMN_GROUPS: self.column_groups}
        return {role: tensor for role, tensor in held.items() if tensor is not None}


class ExpertWeights(NamedTuple):
    """A stack of expert weights: codes (E, N, K), rows contiguous along K, scales, and their scheme.

    parts: number of matrices concatenated along N, each with a separate grid of scales (gate and up: one grid over both
    would have fewer rows if the block does not divide N / 2). scale: (E, N, 1) per channel,
    (E, parts) per tensor, else (E, parts * ceil(N / parts / rows), ceil(K / cols)). Packed codes: (E, N, words), and the
    others as in `Weight`, those of each part one above the other.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    scheme: Scheme
    parts: int = 1
    zero_point: torch.Tensor | None = None
    column_groups: torch.Tensor | None = None

    def part(self, index: int) -> ExpertWeights:
        """One of the parts, as views."""
        of = (self.codes, self.scale, self.zero_point, self.column_groups)
        codes, scale, zero_point, groups = (
            None if t is None else t.view(len(t), self.parts, -1, *t.shape[2:])[:, index] for t in of
        )
        assert codes is not None and scale is not None
        return ExpertWeights(codes, scale, self.scheme, 1, zero_point, groups)

    def matrix(self, expert: int) -> Weight:
        """The weight of one expert; its parts must not need separate treatment."""
        zero_point, groups = (None if t is None else t[expert] for t in (self.zero_point, self.column_groups))
        return Weight(self.codes[expert], self.scale[expert], None, self.scheme, zero_point, groups)

    def pieces(self, expert: int, k: int, dtype: torch.dtype, elements: int) -> Iterator[tuple[torch.Tensor, int]]:
        """`WeightFormat.pieces` of the weight (N, K) of one expert."""
        base, rows = 0, self.codes.shape[1] // self.parts
        # With separate scales for each row, parts need no separate treatment.
        apart = self.parts > 1 and (self.scheme.weight.granularity.rows != 1 or self.scheme.weight.packed)
        for part in map(self.part, range(self.parts)) if apart else [self]:
            for piece, start in part.matrix(expert).pieces(k, dtype, elements):
                yield piece, base + start
            base += rows


class Routing(NamedTuple):
    """Assignment of rows to experts. Output i is row `rows[i] // share` of the input times the weight of expert `experts[i]`.

    experts: (S,) int64; E for no expert: the output is 0. rows: (S,) int64; None means 0, 1, 2, ...
    share: number of consecutive outputs per row of the input.
    offsets: (E,) int32, number of outputs up to and including each expert, if `experts` is sorted; None if it is not.
    slots: (S,) int64, index at which output i is written; None means i. expected: approximate number of outputs with an
    expert, if many have none; None: all or nearly all have one. Values of `experts` below 0 or above E are not allowed.
    """

    experts: torch.Tensor
    rows: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    expected: int | None = None
    share: int = 1

    def to(self, device: torch.device) -> Routing:
        """The same on another device."""
        rows, offsets, slots = (None if t is None else t.to(device) for t in (self.rows, self.offsets, self.slots))
        return Routing(self.experts.to(device), rows, offsets, slots, self.expected, self.share)

    def rows_each(self, n_experts: int) -> int:
        """Average number of rows of an expert that has any rows, rounded up."""
        count = self.experts.shape[0] if self.expected is None else self.expected
        return -(-count // max(min(n_experts, count), 1))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x in the order of the outputs."""
        rows = self.row_numbers()
        return x if rows is None else x[rows]

    def row_numbers(self) -> torch.Tensor | None:
        """The row of x for each output; None if output i uses row i."""
        if self.share == 1:
            return self.rows
        rows = torch.arange(self.experts.shape[0], device=self.experts.device) if self.rows is None else self.rows
        return rows // self.share


# Combines the amax of each row or group of an input with those of other processes, which hold the other columns; in and out:
# (M, 1), (M, groups) or (1, 1).
Reduce = Callable[[torch.Tensor], torch.Tensor]
# (x (M, K), input_scale or None, scheme, reduce or None)
Quantize = Callable[[torch.Tensor, "torch.Tensor | None", Scheme, "Reduce | None"], Input]
# (input, weight, dtype of the output) -> (M, N)
Multiply = Callable[[Input, Weight, torch.dtype], torch.Tensor]
# (input, weights, routing, dtype of the output) -> (S, N)
MultiplyGrouped = Callable[[Input, ExpertWeights, Routing, torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """Everything that kernel selection depends on, except M, which varies per call."""

    device: torch.device
    scheme: Scheme
    n: int
    k: int
    dtype: torch.dtype


def takes_all(_: object) -> None:
    """Default of `why_not_scheme`, `why_not_device` and `why_slow`: the kernel declines nothing."""


@dataclass(frozen=True, kw_only=True)
class BaseKernel:
    """Properties of a kernel that `selection` uses.

    why_not_scheme: the reason why it does not support a scheme; None if it does. why_not_device: the same for device, sizes
    and dtypes; only called with supported schemes. why_slow: the reason why it is not chosen, although it would run, unless it
    is forced. probes: one scheme for each layout of scales; the kernel is used on a
    device only if it gives exact results with them (`probing`). Kernels in plain torch have none, and are used everywhere.
    is_triton: on a CPU it runs in Triton's interpreter, for tests, without probes: they would take minutes.
    """

    name: str
    why_not_scheme: Callable[[Scheme], str | None] = takes_all
    why_not_device: Callable[[Problem], str | None] = takes_all
    why_slow: Callable[[Problem], str | None] = takes_all
    probes: tuple[Scheme, ...] = ()
    is_triton: bool = False


@dataclass(frozen=True, kw_only=True)
class Kernel(BaseKernel):
    """A matmul in two steps: quantize the input (None: it is not quantized), then multiply.

    Layers with the same input can share the result of the first step.
    """

    quantize: Quantize | None = None
    multiply: Multiply
    splits_outliers: bool = False  # `quantize` returns some columns as outliers

    def run(
        self, x: torch.Tensor, input_scale: torch.Tensor | None, weight: Weight, reduce: Reduce | None = None
    ) -> torch.Tensor:
        """Quantize and multiply: x (M, K), M > 0 -> (M, N) in the dtype of x."""
        given = Input(x) if self.quantize is None else self.quantize(x, input_scale, weight.scheme, reduce)
        return self.multiply(given, weight, x.dtype)


@dataclass(frozen=True, kw_only=True)
class GroupedKernel(BaseKernel):
    """A matmul of rows with the weights of their experts. quantizes: inputs are codes, else floats."""

    multiply: MultiplyGrouped
    quantizes: bool = False


def why_sums_overflow(problem: Problem) -> str | None:
    """The reason why sums of int8 products may overflow int32; None if they cannot, or the codes are not int8."""
    if problem.scheme.weight.dtype == INT8 and problem.k > LARGEST_K:
        return f"sums of K={problem.k} products of int8 codes may overflow int32 (up to {LARGEST_K} never do)"
    return None


@cache
def has_bfloat16_units() -> bool:
    """Whether matmuls in bfloat16 are faster than in float32 on this CPU (AVX-512 BF16, AMX, or BF16 of ARM).

    Without them, 2048x2048 by 16 rows on an AMD EPYC 7003 (AVX2) takes 3.1 ms in float32 and 6.9 in bfloat16 with two threads,
    3.8 and 13.2 with one.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of matmuls with dequantized weights for inputs of `dtype`: the same, except float32 for 16 bits on many CPUs.

    float16 on all of them: dequantized weights may exceed its range (their scales are float32), and so may sums before the
    bias is added. float32 is also faster without float16 units: 2048x2048 by 4, 64, 256 rows on an AMD EPYC with AVX-512, one
    thread, 2.8, 22 and 108 ms in float16, 2.4, 10 and 29 in float32. GPUs have such units, and there Triton's kernels are
    preferred. bfloat16 on those without units for it.
    """
    if device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    return torch.bfloat16 if dtype == torch.bfloat16 and has_bfloat16_units() else torch.float32


def add_bias(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Add the bias to `out` in place, and return it."""
    return out if bias is None else out.add_(bias.to(out.dtype))
