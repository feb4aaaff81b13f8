"""What a kernel is, what it is asked, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..formats.scheme import CODE_MAX, INT8, Scheme

# Products of int8 codes whose sum always fits into int32.
LARGEST_K = (2**31 - 1) // int(CODE_MAX[INT8]) ** 2


class Input(NamedTuple):
    """An input as a kernel takes it.

    x: (M, K), codes or, where they have no scale, values. scale: in the layout that the kernel wants. columns, outliers:
    (R,) numbers of columns whose codes are 0, and (M, R) what stands in them, in float32, any strides.
    """

    x: torch.Tensor
    scale: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    outliers: torch.Tensor | None = None

    def rows(self, start: int, end: int) -> Input:
        """A part of the rows, for scales per row."""
        if start == 0 and end >= self.x.shape[0]:
            return self
        scale, outliers = (None if t is None else t[start:end] for t in (self.scale, self.outliers))
        return Input(self.x[start:end], scale, self.columns, outliers)


class Weight(NamedTuple):
    """A layer's own operands, as the checkpoint stores them: codes (N, K), scales, bias (N,), and what they mean."""

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    scheme: Scheme


class ExpertWeights(NamedTuple):
    """A stack of weights: codes (E, N, K), rows contiguous along K, scales, and what they mean.

    parts: how many matrices lie over each other along N, each with a grid of scales of its own (gate and up: a grid
    over both together would have fewer rows where the block does not divide N / 2). scale: (E, N, 1) per channel,
    (E, parts) per tensor, else (E, parts * ceil(N / parts / rows), ceil(K / cols)).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    scheme: Scheme
    parts: int = 1

    def part(self, index: int) -> ExpertWeights:
        """One of the parts, as views."""
        rows, grid = (size // self.parts for size in (self.codes.shape[1], self.scale.shape[1]))
        codes = self.codes[:, index * rows : (index + 1) * rows]
        return ExpertWeights(codes, self.scale[:, index * grid : (index + 1) * grid], self.scheme)


class Routing(NamedTuple):
    """Which expert multiplies which row. Output i is row `rows[i] // share` of the input times expert `experts[i]`.

    experts: (S,) int64; E where no expert does, and the output is 0. rows: (S,) int64; None stands for 0, 1, 2, ...
    share: how many outputs a row of the input has, one beside the other.
    offsets: (E,) int32, how many outputs there are up to and with each expert, where `experts` is sorted; None: it is not.
    slots: (S,) int64, where output i is written; None: in its own place. expected: about how many outputs are an expert's,
    where many are nobody's; None: all, or nearly. Numbers of experts below 0 or above E are not allowed.
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
        """How many rows an expert that has any gets on average, rounded up."""
        count = self.experts.shape[0] if self.expected is None else self.expected
        return -(-count // max(min(n_experts, count), 1))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x in the order of outputs."""
        rows = self.row_numbers()
        return x if rows is None else x[rows]

    def row_numbers(self) -> torch.Tensor | None:
        """The row of each output; None: its own."""
        if self.share == 1:
            return self.rows
        rows = torch.arange(self.experts.shape[0], device=self.experts.device) if self.rows is None else self.rows
        return rows // self.share


# (x (M, K), input_scale or None, scheme)
Quantize = Callable[[torch.Tensor, "torch.Tensor | None", Scheme], Input]
# (input, weight, dtype of the output) -> (M, N)
Multiply = Callable[[Input, Weight, torch.dtype], torch.Tensor]
# (input, weights, routing, dtype of the output) -> (S, N)
MultiplyGrouped = Callable[[Input, ExpertWeights, Routing, torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """All that the choice of a kernel depends on but M, which varies per call."""

    device: torch.device
    scheme: Scheme
    n: int
    k: int
    dtype: torch.dtype


def takes_all(_: object) -> None:
    """What `why_not_scheme` and `why_not_device` are for kernels that decline nothing."""


@dataclass(frozen=True, kw_only=True)
class BaseKernel:
    """How a kernel describes itself, for `selection`.

    why_not_scheme: why it is not made for a scheme; None if it is. why_not_device: the same for what its code needs of a
    device, sizes and dtypes; asked for schemes that it is made for. probes: schemes, one for each layout of scales; it is
    trusted only where it gives exact results with them (`probing`). Without any it is plain torch, and trusted everywhere.
    is_triton: on a CPU it runs in Triton's interpreter, for tests, and is trusted there: a probe would take minutes.
    """

    name: str
    why_not_scheme: Callable[[Scheme], str | None] = takes_all
    why_not_device: Callable[[Problem], str | None] = takes_all
    probes: tuple[Scheme, ...] = ()
    is_triton: bool = False


@dataclass(frozen=True, kw_only=True)
class Kernel(BaseKernel):
    """A way to multiply, in two steps: quantize the input (None: leave it as it is), then multiply.

    Between the two lies what layers with the same input can share.
    """

    quantize: Quantize | None = None
    multiply: Multiply
    splits_outliers: bool = False  # some columns of an input come as outliers

    def run(self, x: torch.Tensor, input_scale: torch.Tensor | None, weight: Weight) -> torch.Tensor:
        """Both steps: x (M, K), M > 0, to (M, N) in the dtype of x."""
        given = Input(x) if self.quantize is None else self.quantize(x, input_scale, weight.scheme)
        return self.multiply(given, weight, x.dtype)


@dataclass(frozen=True, kw_only=True)
class GroupedKernel(BaseKernel):
    """A way to multiply rows by the experts that they were routed to. quantizes: it takes inputs as codes, not as they are."""

    multiply: MultiplyGrouped
    quantizes: bool = False


def why_sums_overflow(problem: Problem) -> str | None:
    """Why products of int8 codes cannot be added up in int32; None if they can, or are not int8."""
    if problem.scheme.weight.dtype == INT8 and problem.k > LARGEST_K:
        return f"sums of K={problem.k} products of int8 codes may overflow int32 (up to {LARGEST_K} never do)"
    return None


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What floats of `dtype` are multiplied in with multiplied-out weights: the same; but float32 for float16 on a CPU.

    Weights are not always in the range of float16 (their scales are float32), nor are sums before the bias. And it is the
    faster one without float16 units: 2048x2048 by 4, 64, 256 rows on an AMD EPYC with AVX-512, one thread, 2.8, 22 and 108 ms
    in float16, 2.4, 10 and 29 in float32. GPUs have such units, and there Triton's kernels come first.
    """
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def add_bias(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`out`, changed in place."""
    return out if bias is None else out.add_(bias.to(out.dtype))
