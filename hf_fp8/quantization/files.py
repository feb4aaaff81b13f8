"""Rewrites checkpoints file by file, with memory for one tensor: dense to FP8, and FP8 to dense."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping

from ..checkpoint.dialects.registry import READ
from ..checkpoint.quantization_spec import QuantizationSpec
from ..checkpoint.reader import DTYPE_NAMES, TORCH_DTYPES, Checkpoint, TensorInfo
from ..checkpoint.stored_weight import StoredWeight, TensorSlice
from ..checkpoint.writer import ShardWriter, check_place, nbytes, shard_names, whole_folder, write_index
from ..errors import CalibrationError, CheckpointError, ConfigError, MissingTensorError, ScaleError
from ..formats.storage import INPUT_SCALE, WEIGHT, WEIGHT_SCALE
from ..integrations.config import FP8Config
from ..loading.facts import ModelFacts
from ..loading.key_map import EXPERT, KeyMap, converters, hub_name
from ..loading.layout import Layout
from ..loading.matching import Policy, match_checkpoint
from ..loading.ops import quantize_named, weight_from
from ..loading.quantization_plan import Plan, plan_quantization
from .methods import HF_FP8, how_stored
from .source import Source

# Called with the number of source bytes processed since the last call.
ProgressCallback = Callable[[int], Any]
# A folder with this file is a checkpoint, which `overwrite` may replace.
_MARK = "config.json"


@dataclass
class Written:
    """Summary of what was written. weights: number of quantized ones. before, after: bytes of all tensors. reasons: name of a
    matrix that a target matches -> why it is dense. unmatched: entries of `ignore` that match nothing.
    """

    weights: int
    before: int
    after: int
    reasons: Mapping[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)


def plan_source(source: Source, config: FP8Config) -> tuple[Checkpoint, Plan]:
    """The plan for quantizing a dense checkpoint with `config`. Raises CheckpointError if it is quantized already."""
    if (stored := how_stored(source)) is not None:
        way = ", or dequantize it first (`hf-fp8 dequantize`)" if stored.reader == HF_FP8 else ""
        raise CheckpointError(
            f"{source.folder} is quantized already ({stored.method}): use the dense checkpoint that it was made from{way}"
        )
    model, checkpoint = source.structure(), source.checkpoint
    plan, _ = plan_quantization(
        ModelFacts.of(model, source.dtype), get_model_conversion_mapping(model), checkpoint, config.spec,
        dense_experts=config.experts == "dequantize", cast_to=None,
    )  # fmt: skip
    return checkpoint, plan


def quantize_checkpoint(
    source: Source,
    destination: Path,
    config: FP8Config,
    *,
    input_scales: Mapping[str, torch.Tensor] | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    tick: ProgressCallback = lambda count: None,
) -> Written:
    """Quantize a dense checkpoint with `config`, which has a scheme; `destination` is created when everything is written.

    Weights are quantized on `device`, in their dtype in the files. input_scales: key of each static input scale -> calibrated
    value. The shards are those of the source.

    Raises CalibrationError without scales for a static scheme, and ScaleError, naming it, for a weight with NaN or infinity.
    """
    checkpoint, plan = plan_source(source, config)
    scales = input_scales or {}
    groups = {key: group.scheme for key, group in plan.groups.items() if group.scheme is not None}
    static = [key for key in plan.written.tensors if key.rpartition(".")[2] == INPUT_SCALE]
    if lacking := [key for key in static if key not in scales]:
        raise CalibrationError(
            f"the scheme has static input scales, but {len(lacking)} (such as {lacking[0]}) are not calibrated: pass a text "
            "(--calibrate), or use a scheme with dynamic input scales, such as FP8_DYNAMIC"
        )
    by_source: dict[str, list[str]] = {}
    for key, part in plan.parts.items():
        by_source.setdefault(part.key, []).append(key)

    copied = {key for key, made in by_source.items() if made == [key] and key not in groups}

    def make(key: str) -> Iterator[tuple[str, torch.Tensor]]:
        tensor = checkpoint.load(key)
        for written in by_source[key]:
            values = plan.parts[written].take(tensor)
            scheme = groups.get(written)
            if scheme is None:
                yield written, values
                continue
            module = written.removesuffix(WEIGHT)
            made = quantize_named(module.rstrip("."), values.to(device), scheme.weight)
            yield from ((module + role, tensor) for role, tensor in made.items())
            if scheme.has_static_input:
                yield module + INPUT_SCALE, scales[module + INPUT_SCALE].reshape(1).to(made[WEIGHT_SCALE].dtype)

    write_checkpoint(source, destination, checkpoint, plan.written, make, copied, plan.spec.to_json(), overwrite, tick)
    return Written(len(plan.groups), total_bytes(checkpoint), total_bytes(plan.written), plan.reasons, plan.unmatched)


@dataclass(frozen=True)
class Reading:
    """A quantized checkpoint, checked against its config and its model."""

    checkpoint: Checkpoint
    spec: QuantizationSpec
    model: ModelFacts
    keymap: KeyMap
    layout: Layout


def read_quantized(source: Source) -> Reading:
    """Read the headers and scales of a quantized checkpoint, with the checks and errors of loading."""
    stored = how_stored(source)
    if stored is None:
        raise ConfigError(f"{source.folder} is not quantized: its config.json has no quantization_config")
    if stored.reader != HF_FP8:
        raise ConfigError(f"{source.folder} is {stored}. hf-fp8 reads FP8 of {READ}")
    spec = QuantizationSpec.read(source.quantization or {})
    model, checkpoint = source.structure(), source.checkpoint
    facts = ModelFacts.of(model, source.dtype)
    keymap = KeyMap.of(facts, get_model_conversion_mapping(model), checkpoint.tensors)
    policy = Policy(
        dense_because="dequantize=True",
        experts_because=lambda scheme: "dequantize=True",
        dequantize=True,
        needs_input_scales=False,
    )
    layout = match_checkpoint(facts, keymap, checkpoint, spec, policy)
    return Reading(checkpoint, spec.settled(layout.scan.groups, layout.scan.all_dense), facts, keymap, layout)


def dequantize_checkpoint(
    source: Source,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    tick: ProgressCallback = lambda count: None,
) -> Written:
    """Write a quantized checkpoint as a dense one: weights are dequantized in float32 and rounded once.

    dtype: of the dense weights, by default that of the config. Scales are left out, other tensors are copied unchanged. Experts
    that llm-compressor split are written in the layout of the model family, as transformers would initialize others randomly.
    """
    reading = read_quantized(source)
    checkpoint, layout, of = reading.checkpoint, reading.layout, dtype or source.dtype
    homes, shapes = host_form(reading.model, reading.keymap, checkpoint)
    weights = {weight.keys[weight.primary]: weight for weight in [*layout.scan.weights, *layout.scan.host]}
    dropped = {key for w in weights.values() for role, key in w.keys.items() if role != w.primary} | set(layout.scan.cache)
    written, members = Checkpoint([]), dict[str, list[str]]()
    for key, info in checkpoint.tensors.items():
        if key in dropped:
            continue
        home = homes.get(key, TensorSlice(key.removesuffix("_packed") if key in weights else key))
        members.setdefault(home.key, []).append(key)
        stored = DTYPE_NAMES[of] if key in weights else info.dtype
        shape = _dense_shape(weights[key], checkpoint) if key in weights else info.shape
        written.tensors.setdefault(home.key, TensorInfo(stored, shapes.get(home.key, shape), info.file))

    def values(key: str) -> torch.Tensor:
        return checkpoint.load(key) if key not in weights else _dequantized(weights[key], checkpoint, of)

    def stacked(name: str) -> torch.Tensor:
        info = written.tensors[name]
        if len(members[name]) != info.shape[0] * homes[members[name][0]].of:
            raise MissingTensorError(
                f"{name} has shape {list(info.shape)}, but the files have {len(members[name])} tensors for it: the checkpoint "
                "is incomplete"
            )
        out = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        for key in members[name]:
            homes[key].take(out).copy_(values(key))
        return out

    def make(key: str) -> Iterator[tuple[str, torch.Tensor]]:
        home = homes.get(key)
        if key in dropped:
            return
        if home is None or home.expert is None:
            yield home.key if home else key.removesuffix("_packed"), values(key)
        elif members[home.key][0] == key:
            yield home.key, stacked(home.key)

    copied = set(checkpoint.tensors) - dropped - set(weights) - set(homes)
    write_checkpoint(source, destination, checkpoint, written, make, copied, None, overwrite, tick, of)
    return Written(len(weights), total_bytes(checkpoint), total_bytes(written))


def _dequantized(weight: StoredWeight, checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    found = weight_from(weight, {role: checkpoint.load(name) for role, name in weight.keys.items()}, dtype)
    if dtype == torch.float16 and not bool(found.isfinite().all()):
        raise ScaleError(
            f"{weight.keys[weight.primary]} has values that are not finite in float16: choose --dtype bfloat16 or float32"
        )
    return found


def check_destination(source: Source, destination: Path, overwrite: bool) -> None:
    """Raise ConfigError if a checkpoint made from `source` cannot, or must not, be written to `destination`."""
    read, write = (Path(os.path.realpath(folder)) for folder in (source.folder, destination))
    if read in (write, *write.parents) or write in read.parents:
        raise ConfigError(f"{destination} and the source {source.folder} contain each other: write to another folder")
    check_place(write, _MARK if overwrite else None)


def total_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors, from their headers."""
    return sum(map(nbytes, checkpoint.tensors.values()))


def _dense_shape(weight: StoredWeight, checkpoint: Checkpoint) -> tuple[int, ...]:
    if weight.primary == WEIGHT:
        return weight.shape
    shape = checkpoint.read([weight.keys["weight_shape"]])[weight.keys["weight_shape"]]
    return tuple(int(extent) for extent in shape)


def write_checkpoint(
    source: Source,
    destination: Path,
    checkpoint: Checkpoint,
    written: Checkpoint,
    make: Callable[[str], Iterator[tuple[str, torch.Tensor]]],
    copied: Collection[str],
    quantization: dict[str, Any] | None,
    overwrite: bool,
    tick: ProgressCallback,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the folder file by file. make: key of the source -> tensors made from it. copied: keys that are copied instead."""
    files = _files(written)
    total = total_bytes(written)
    check_destination(source, destination, overwrite)
    _check_space(destination, total)
    with whole_folder(destination, replaces=_MARK if overwrite else None) as folder:
        for file, (name, tensors) in files.items():
            with ShardWriter(folder / name, tensors) as shard:
                for key in (key for key, info in checkpoint.tensors.items() if info.file == file):
                    if key in copied:
                        shard.copy(key, checkpoint.pieces(key))  # never whole in memory
                    else:
                        for made, values in make(key):
                            shard.write(made, values)
                    tick(nbytes(checkpoint.tensors[key]))
        write_index(folder, dict(files.values()))
        source.copy_rest(folder)
        source.write_config(folder, quantization, dtype)
        source.check_unchanged()


def _files(written: Checkpoint) -> dict[str, tuple[str, dict[str, TensorInfo]]]:
    """File of the source -> (name of the new one, its tensors)."""
    by_file: dict[str, dict[str, TensorInfo]] = {}
    for key, info in written.tensors.items():
        by_file.setdefault(info.file, {})[key] = info
    return {file: (name, by_file[file]) for file, name in zip(sorted(by_file), shard_names(len(by_file)), strict=True)}


def _check_space(destination: Path, total: int) -> None:
    place = destination.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < total:
        raise ConfigError(f"{destination} has {free / 1e9:.2f} GB free, but {total / 1e9:.2f} GB are needed")


def host_form(
    model: ModelFacts, keymap: KeyMap, checkpoint: Checkpoint
) -> tuple[dict[str, TensorSlice], dict[str, tuple[int, ...]]]:
    """(key -> where its values go in a dense checkpoint, name of a stack of experts -> its shape), for keys that transformers
    does not map: to other names (Mixtral), or into stacks (gpt-oss, Llama-4)."""
    merges = converters(*keymap.unmapped_experts) if keymap.unmapped_experts is not None else []
    sources = {pattern: converter.source_patterns for converter in merges for pattern in converter.source_patterns}
    homes: dict[str, TensorSlice] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key in checkpoint.tensors:
        plain = key.removesuffix("_packed")
        target, pattern = keymap.resolve(plain)
        called = EXPERT.match(plain)
        if called is None or called["rest"] not in ("weight", "bias"):
            continue
        if pattern in sources:
            experts, _, leaf = target.rpartition(".")
            layout = model.experts(experts)
            if layout is None:
                continue  # in a layer that this model class does not have: copied unchanged
            patterns, stack = sources[pattern], f"{called['experts']}.{leaf}"
            homes[key] = TensorSlice(
                stack, int(called["index"]), patterns.index(pattern), len(patterns),
                layout.is_transposed, not layout.is_concatenated,
            )  # fmt: skip
            shapes[stack] = keymap.shapes[target]
        elif keymap.plain(plain) in keymap.aliases:
            homes[key] = TensorSlice(hub_name(plain) or plain)
    return homes, shapes
