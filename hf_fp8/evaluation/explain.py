"""`explain(model)`: what runs where, and why, module by module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..formats.code_types import E5M2, FP8
from ..kernels import Problem, select, select_grouped
from ..loading.layout import NOTES
from ..nn.dtensors import local
from ..nn.experts import QuantizedExperts
from ..nn.fake_quantized import FakeQuantizedLinear
from ..nn.fake_quantized_experts import FakeQuantizedExperts
from ..nn.linear import QuantizedLinear
from ..nn.swap import submodule
from .rows import aligned
from .running import device_of, dtype_of


@dataclass(frozen=True)
class Row:
    """One module (or merged parameter). bytes: its memory, including scales and bias."""

    name: str
    scheme: str
    kernel: str
    reason: str
    bytes: int


class Explanation(list[Row]):
    """The rows of `explain`, as a list; prints as a table, with layers that differ only in their number in one line."""

    def __str__(self) -> str:
        if not self:
            return "no quantized modules"
        folded: dict[tuple[str, str, str, str], list[Row]] = {}
        for row in self:
            pattern = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
            folded.setdefault((pattern, row.scheme, row.kernel, row.reason), []).append(row)
        reasons = {row.reason for row in self}
        common = reasons.pop() if len(reasons) == 1 else None
        lines = [("module", "count", "scheme", "kernel", "bytes", "reason" if common is None else "")]
        for (pattern, scheme, kernel, reason), rows in folded.items():
            size = f"{sum(row.bytes for row in rows):,}"
            lines.append((pattern, str(len(rows)), scheme, kernel, size, reason if common is None else ""))
        lines.append(("total", str(len(self)), "", "", f"{sum(row.bytes for row in self):,}", ""))
        table = aligned(lines, left=range(6))
        return f"{table}\nwhy: {common}" if common else table

    __repr__ = __str__


def _bytes(*tensors: torch.Tensor | None) -> int:
    return sum(local(t).numel() * t.element_size() for t in tensors if t is not None)


def explain(model: nn.Module, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Explanation:
    """For each quantized module of `model`: its scheme, the kernel that is chosen for it, why, and its bytes.

    dtype: that of the inputs; by default that of the first dense parameter. device: as if the model were on it; by default
    the model's. Weights that were dequantized while loading are listed too, with the reason.
    """
    dtype = dtype or dtype_of(model) or torch.bfloat16
    rows = Explanation()
    asked = None if device is None else torch.device(device)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            place = asked or device_of(module)
            choice = select(Problem(place, module.scheme, module.out_features, module.in_features, dtype), module.backend)
            size = _bytes(*module.parameters(recurse=False))
            rows.append(Row(name, module.scheme.describe(), str(choice), choice.reason, size))
        elif isinstance(module, FakeQuantizedLinear | FakeQuantizedExperts):
            kernel, schemes = "dense, rounded in each forward", " and ".join({s.describe(): None for s in module.schemes})
            reason = "prepared for quantization-aware training: convert_qat quantizes it"
            rows.append(Row(name, schemes, kernel, reason, _bytes(*module.parameters(recurse=False))))
        elif isinstance(module, QuantizedExperts):
            rows += _experts(name, module, dtype, asked or device_of(module))
    # Also inside wrappers of the model, and without modules that no longer exist.
    notes = [(part, vars(part)[NOTES]) for part in model.modules() if NOTES in vars(part)]
    for part, name, scheme, reason in ((part, name, *note) for part, found in notes for name, note in found.items()):
        held = _held(part, name)
        if held is None:
            continue
        if isinstance(held, QuantizedLinear) or not reason or (isinstance(held, nn.Parameter) and held.dtype in (FP8, E5M2)):
            continue  # listed above, or dequantized by the user since
        tensors = list(held.parameters(recurse=False)) if isinstance(held, nn.Module) else [held]
        rows.append(Row(name, scheme, "dense", reason, _bytes(*tensors)))
    return rows


def _held(model: nn.Module, name: str) -> nn.Module | nn.Parameter | None:
    """The module or parameter of a name, None if there is none."""
    if (module := submodule(model, name)) is not None:
        return module
    parent, _, leaf = name.rpartition(".")
    owner = submodule(model, parent)
    return None if owner is None else owner._parameters.get(leaf)


def _experts(name: str, module: QuantizedExperts, dtype: torch.dtype, device: torch.device) -> list[Row]:
    """A row for each stack."""
    rows = []
    for projection in module.projections:
        _, n, k = projection.shape
        choice = select_grouped(Problem(device, projection.scheme, n, k, dtype), module.backend)
        leaves = projection.name, projection.scale, projection.input_scale, *module.beside.get(projection.name, ())
        held = [getattr(module, leaf) for leaf in leaves]
        size = _bytes(*held, getattr(module, f"{projection.name}_bias", None))
        rows.append(Row(f"{name}.{projection.name}", projection.scheme.describe(), str(choice), choice.reason, size))
    return rows
