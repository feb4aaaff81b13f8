"""Tensor and expert parallelism and FSDP2 of the host (transformers): how it shards codes and scales, and what it loads.

The host's plans name a style for each parameter and module. Codes are sharded by the style that a dense weight would have;
their scales follow them (`nn.shard.Shard`). `import hf_fp8` wraps the method that expands a plan to the names of a model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightRenaming, WeightTransform, apply_renamings
from transformers.distributed import DistributedConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from ..checkpoint.lazy import LazyCheckpoint, LazyTensor
from ..checkpoint.reader import Checkpoint
from ..errors import UnsupportedError
from ..formats.cuts import Cut, MatrixPart
from ..formats.quantized_weight.tensor import codes_of
from ..formats.scheme import Scheme
from ..loading.conversions import KeyRenaming, RoutedConverter
from ..loading.layout import Layout
from ..loading.ops import Reshape
from ..loading.parts import Parts, parts_of
from ..nn.base import QuantizedModule
from ..nn.dtensors import gathered, is_dtensor
from ..nn.experts import QuantizedExperts
from ..nn.linear import QuantizedLinear
from ..nn.shard import Shard
from . import pipeline

# The styles of codes and scales are called as the host's style of the weight, with this in front.
PREFIX = "hf_fp8 "


def expand_plan(host: Any, model: Any, plan: dict[str, str]) -> dict[str, str]:
    """`_expand_parallel_plan`: concrete name -> style, with our styles for codes and scales."""
    expanded: dict[str, str] = host(model, plan)
    found = {}
    for name, style in expanded.items():
        path, _, leaf = name.rpartition(".")
        module = _submodule(model, path)
        if not isinstance(module, QuantizedModule) or leaf not in module.quantized:
            found[name] = style
            continue
        if style == "colwise":
            _refuse_split_heads(model, path, module)
        if leaf in module.holds:  # its scales follow it, whatever rule they have or lack
            scales = [scale for scale in module.holds[leaf] if module._parameters.get(scale) is not None]
            found |= dict.fromkeys([f"{path}.{one}" for one in (leaf, *scales)], _registered(style))
    return found


def _refuse_split_heads(model: Any, path: str, module: QuantizedModule) -> None:
    """Raise UnsupportedError if processes would not get whole heads of attention, and all as many."""
    parent, _, name = path.rpartition(".")
    size = getattr(model.get_submodule(parent), "head_dim", None)
    if name not in ("q_proj", "k_proj", "v_proj") or not isinstance(size, int) or not isinstance(module, QuantizedLinear):
        return
    heads, tp_size = module.out_features // size, model._tp_size or 1
    if heads % tp_size:
        raise UnsupportedError(
            f"{path} has {heads} heads of {size}, which {tp_size} processes cannot share: use a tp_size that divides {heads}, "
            "or FSDP instead (fsdp_size in DistributedConfig, which goes with ep_size, too)"
        )


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _registered(style: str) -> str:
    name = PREFIX + style
    if name not in ALL_PARALLEL_STYLES:
        ALL_PARALLEL_STYLES.register(name, QuantizedParameter(style))
    return name


class QuantizedParameter:
    """The style of a codes parameter, or of its scales. style: the host's, for a dense weight."""

    def __init__(self, style: str) -> None:
        self.style = style

    def validate_param(self, module: Any, leaf: str, mesh: Any, parameter_name: str | None = None) -> None:
        ALL_PARALLEL_STYLES[self.style].validate_param(module, leaf, mesh, parameter_name=parameter_name)

    def shard_param(self, module: QuantizedModule, leaf: str, mesh: Any) -> None:
        """Make the parameter, which is on the meta device, a DTensor, if this process is to hold a part of it.

        Raises UnsupportedError for codes that cannot be cut so.
        """
        if module._parameters.get(leaf) is None:
            return
        if leaf in module.holds:
            self._shard_codes(module, leaf, mesh)
        else:
            codes = next(codes for codes, scales in module.holds.items() if leaf in scales)
            _shard_scale(module, codes, leaf)

    def _shard_codes(self, module: QuantizedModule, leaf: str, mesh: Any) -> None:
        placement = _placement(ALL_PARALLEL_STYLES[self.style], module, leaf, mesh)
        if placement is None:
            return
        shard = _shard_of(module, leaf, placement, mesh)
        _refuse(module, leaf, shard)
        _distribute(module, leaf, mesh, placement)
        if isinstance(module, QuantizedExperts):
            module.take_part(leaf, shard)
        else:
            assert isinstance(module, QuantizedLinear)
            module.take_part(shard)


def _distribute(module: nn.Module, leaf: str, mesh: Any, placement: Any) -> None:
    from torch.distributed.tensor import distribute_tensor

    whole = codes_of(module._parameters[leaf])  # type: ignore[arg-type]
    plain = torch.empty(whole.shape, dtype=whole.dtype, device="meta")
    sharded = distribute_tensor(plain, mesh, [placement], src_data_rank=None)
    module.register_parameter(leaf, nn.Parameter(sharded, requires_grad=False))


def _placement(style: Any, module: QuantizedModule, leaf: str, mesh: Any) -> Any:
    """How the codes are cut: as the host's style cuts a dense weight; None if it leaves it whole.

    Stacks of experts have other dimensions here than in some families: their rows are outputs, always. EP also tells the module
    how many experts it has.
    """
    from torch.distributed.tensor import Shard as Contiguous
    from torch.distributed.tensor.placement_types import _StridedShard

    probe = nn.Module()
    vars(probe).update({name: vars(module)[name] for name in ("num_experts",) if name in vars(module)})
    probe.register_parameter(leaf, nn.Parameter(torch.empty(_whole(module, leaf), device="meta"), requires_grad=False))
    style.shard_param(probe, leaf, mesh)
    (placement,) = getattr(probe._parameters[leaf], "placements", (None,))
    if placement is None or not hasattr(placement, "dim"):
        return None
    if not isinstance(module, QuantizedExperts):
        return placement
    if getattr(style, "shards_expert_dim", False):
        for name in ("num_experts", "_is_expert_parallel"):
            if name in vars(probe):
                setattr(module, name, vars(probe)[name])
        return Contiguous(0)
    projection = module._projection(leaf)
    if projection is module.second:
        return Contiguous(2)
    return Contiguous(1) if projection.parts == 1 else _StridedShard(1, split_factor=projection.parts)


def _whole(module: QuantizedModule, leaf: str) -> tuple[int, ...]:
    parameter = module._parameters[leaf]
    assert parameter is not None
    return tuple(parameter.shape)


def _shard_of(module: QuantizedModule, leaf: str, placement: Any, mesh: Any) -> Shard:
    """What this process holds of codes that are cut so."""
    index, of, group = mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name
    *stack, n, k = _whole(module, leaf)
    dim = placement.dim - len(stack) if placement.dim >= 0 else placement.dim + 2
    pieces = getattr(placement, "split_factor", 1)
    scheme: Scheme
    if isinstance(module, QuantizedExperts):
        projection = module._projection(leaf)
        scheme, n, pieces = projection.scheme, n // projection.parts, 1
    else:
        scheme = module.scheme  # type: ignore[assignment]
    rows = Cut(n, index, of, pieces) if dim == 0 else Cut(n)
    cols = Cut(k, index, of, pieces) if dim == 1 else Cut(k)
    return Shard(MatrixPart(rows, cols), scheme, group, Cut(stack[0], index, of) if dim == -1 else None)


def _refuse(module: QuantizedModule, leaf: str, shard: Shard) -> None:
    """Raise UnsupportedError for codes that cannot be cut so: the same on every process."""
    rows, cols = shard.part.rows, shard.part.cols
    cut, what = (rows, "rows") if rows.of > 1 else (cols, "columns")
    called = f"{module.called(leaf)} ({rows.size} x {cols.size}, {shard.whole.describe()})"
    if cut.of > 1 and cut.size % cut.pieces:
        raise UnsupportedError(f"{called}: its {what} cannot be cut into {cut.pieces} equal matrices for {cut.of} processes")
    if cut.of > 1 and cut.chunk * (cut.of - 1) >= cut.size // cut.pieces:
        raise UnsupportedError(
            f"{called}: its {cut.size // cut.pieces} {what} are too few for {cut.of} processes: use fewer (tp_size), or leave "
            "the module out of the plan (tp_plan)"
        )
    given = shard.whole.input
    if cols.of > 1 and given is not None and given.dynamic and module.backend != "weight_only":
        advice = "or load with FP8Config(backend='weight_only') or FP8Config(dequantize=True)"
        if not cols.is_even:  # processes could choose different kernels, and one of them wait for the others' amax
            raise UnsupportedError(
                f"{called}: {cols.size} columns are not a multiple of {cols.of} processes, which quantize inputs together: use "
                f"another tp_size, {advice}"
            )
        if cols.pieces > 1 and given.granularity.cols > 1:
            raise UnsupportedError(
                f"{called}: inputs are quantized by groups of columns, and each process has columns of {cols.pieces} matrices: "
                f"use another plan (tp_plan), {advice}"
            )
    extent = shard.whole.weight.granularity.cols
    if cols.of > 1 and extent > 1 and cols.unit(extent) == 1:
        raise UnsupportedError(
            f"{called}: {cols.of} processes have {cols.chunk} columns each, which have no divisor in common with blocks of "
            f"{extent}: use another tp_size, or load with FP8Config(dequantize=True)"
        )


def _shard_scale(module: QuantizedModule, codes: str, leaf: str) -> None:
    """Cut the scales as the codes are cut, if the blocks allow it; otherwise every process holds all of them."""
    from torch.distributed.tensor import Shard as Contiguous
    from torch.distributed.tensor.placement_types import _StridedShard

    shard, sharded = module.shards.get(codes), module._parameters[codes]
    if shard is None:
        return
    place: Any = sharded.placements[0]  # type: ignore[union-attr]
    mesh: Any = sharded.device_mesh  # type: ignore[union-attr]
    if shard.experts is not None:
        _distribute(module, leaf, mesh, Contiguous(0))
    elif shard.cuts_scale and leaf == module.holds[codes][0]:
        dim = module._parameters[leaf].ndim - (2 if shard.part.rows.of > 1 else 1)  # type: ignore[union-attr]
        pieces = getattr(place, "split_factor", 1)
        _distribute(module, leaf, mesh, Contiguous(dim) if pieces == 1 else _StridedShard(dim, split_factor=pieces))


def slice_and_cat(host: Any, self: Any, source: Any, intervals: list[list[tuple[int, int]]], device: Any, dtype: Any) -> Any:
    """`DtensorShardOperation._slice_and_cat`, also for a process that holds nothing, where the host (5.24) looks for a first
    interval. Scales have so few rows that this happens."""
    if all(intervals):
        return host(self, source, intervals, device, dtype)
    shape = [sum(end - start for start, end in found) for found in intervals]
    like = source[tuple(slice(0, 0) for _ in shape)]
    return like.new_empty(shape).to(device=device, dtype=dtype)


def is_sharded(model: Any) -> bool:
    """Whether the host has sharded parameters of `model`."""
    return any(is_dtensor(parameter) for parameter in model.parameters())


def will_shard(model: Any) -> bool:
    """Whether the host will shard parameters of `model`, which is being built."""
    asked = getattr(model.config, "distributed_config", None)  # as a dict it is of an earlier load: the host ignores it
    return isinstance(asked, DistributedConfig) and max(asked.tp_size, asked.ep_size, asked.dp_size) > 1


def of_all(model: Any, texts: list[str]) -> list[str]:
    """`texts` of all processes that load `model` together, without repetitions: each may have read other weights."""
    if not is_sharded(model) and getattr(model, "_pp_stage", None) is None:
        return texts
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, texts)
    return list(dict.fromkeys(text for each in found for text in each))


def sources(
    model: Any, layout: Layout, files: list[str], dtype: torch.dtype, conversions: list[WeightTransform], *, as_int8: bool
) -> tuple[dict[str, LazyTensor], list[WeightTransform]]:
    """What the host loads a sharded model from: lazy tensors by key, and the conversions to use with them.

    conversions: as `build_conversions` returns them.
    """
    checkpoint = Checkpoint(files)
    lazy = LazyCheckpoint(checkpoint)
    # As the host does with every key; what was used is reversed on saving.
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    original = {apply_renamings(key, renamings): key for key in checkpoint.tensors}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    parts: Parts = parts_of(layout, lazy, dtype, original, shapes, as_int8=as_int8)
    found = {key: lazy.tensor(key) for key in checkpoint.tensors if key not in parts.used} | parts.dense
    routes = {}
    for number, (name, tensor) in enumerate(parts.parameters.items()):
        found[f"{_PART}.{number}"], routes[str(number)] = tensor, (name, _PART)
    # Weights that are dequantized as they are read go through the host's own conversions.
    plain = [c.base if isinstance(c, RoutedConverter) else c for c in conversions]
    return found, [PartConverter(routes, [_PART], [_PART], [Reshape({})]), *(c for c in plain if c is not None)]


def gathered_state(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of `model`, with codes as plain tensors.

    That of a sharded model is gathered by all processes together, one tensor after the other, in the CPU memory of the first;
    the others get nothing.
    """
    state, found = model.state_dict(), {}
    has_own = getattr(model, "_pp_stage", None) is not None or not is_sharded(model)  # tensors that no other process has
    keeps = has_own or model.should_save_on_this_rank(True)
    for name in list(state):
        tensor = state.pop(name)
        whole = gathered(tensor).cpu() if is_dtensor(tensor) else tensor
        if keeps:
            found[name] = codes_of(whole)
    return pipeline.collect(model, found)


_PART = "hf_fp8_part"


class PartConverter(RoutedConverter):
    """Routes the keys of lazy tensors: by their number, as renamings of the host may put a prefix before it."""

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        stem, _, number = source_key.rpartition(".")
        return super().rename_source_key(number) if stem.endswith(_PART) else (source_key, None)


def used(conversions: list[WeightTransform]) -> list[WeightTransform]:
    """Those of `build_conversions` that loading used, or would have used if the model were not sharded; for saving."""
    return [c for c in conversions if isinstance(c, (RoutedConverter, KeyRenaming)) or c.was_used()]
