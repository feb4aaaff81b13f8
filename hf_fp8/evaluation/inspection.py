"""`hf-fp8 inspect`: what a checkpoint holds and what would run, from its headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping

from ..checkpoint.config_groups import match
from ..checkpoint.quantization_spec import is_ours
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import nbytes
from ..errors import FP8Error
from ..integrations.config import FP8Config
from ..integrations.quantizer import FP8HfQuantizer
from ..quantization.files import plan_source, total_bytes
from ..quantization.methods import HF_FP8, how_stored
from ..quantization.source import Source, type_of
from .explain import Explanation, explain


@dataclass
class GroupFound:
    """A config group, and the size of its weights in the files. bytes: codes and scales."""

    name: str
    scheme: str
    targets: list[str]
    matrices: int = 0
    bytes: int = 0


@dataclass
class Inspection:
    """What a checkpoint holds. dtypes: (name in safetensors, tensors, bytes). explanation: what would run, module by module.
    error: the message that loading would raise, None if it would not.
    """

    folder: str
    model: str
    files: list[str]
    bytes: int
    dtypes: list[tuple[str, int, int]]
    groups: list[GroupFound] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)
    summary: str = ""
    explanation: Explanation | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """In plain types, for JSON."""
        found = {key: value for key, value in vars(self).items() if key not in ("groups", "explanation")}
        rows = [asdict(row) for row in self.explanation or ()]
        return {**found, "groups": [asdict(group) for group in self.groups], "modules": rows}


def inspect_source(source: Source, device: torch.device | str | None = None) -> Inspection:
    """Inspect a checkpoint. device: on which it would run; by default the accelerator of this machine, or its CPU.

    Raises CheckpointError only for files that cannot be read: other errors are in `Inspection.error`.
    """
    checkpoint = source.checkpoint
    found = Inspection(
        folder=str(source.folder),
        model=type_of(source),
        files=source.files,
        bytes=total_bytes(checkpoint),
        dtypes=sizes_of(checkpoint),
    )
    try:
        _look(source, checkpoint, found, device)
    except FP8Error as error:
        found.error = str(error)
    return found


def sizes_of(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """(dtype, number of its tensors, their bytes), the most frequent first."""
    counts, sizes = Counter[str](), Counter[str]()
    for info in checkpoint.tensors.values():
        counts[info.dtype] += 1
        sizes[info.dtype] += nbytes(info)
    return [(dtype, count, sizes[dtype]) for dtype, count in counts.most_common()]


def _look(source: Source, checkpoint: Checkpoint, found: Inspection, device: torch.device | str | None) -> None:
    stored = how_stored(source)
    if stored is None:
        _, plan = plan_source(source, FP8Config("FP8_DYNAMIC"))
        found.ignore = plan.dense
        found.summary = (
            f"not quantized: FP8_DYNAMIC would make {len(plan.groups):,} matrices FP8, "
            f"{found.bytes / 1e9:.2f} GB -> {total_bytes(plan.written) / 1e9:.2f} GB"
        )
        return
    if stored.reader != HF_FP8:
        found.summary = str(stored)
        return
    config = FP8Config(checkpoint=source.quantization)
    groups = {}
    for group in config.groups:
        scheme = str(group.format) if group.scheme is None else group.scheme.describe()
        groups[group.name] = GroupFound(group.name, scheme, list(group.targets))
    spec = config.spec
    found.groups = list(groups.values())
    found.ignore = list(config.ignore if spec.in_dialect is None else spec.in_dialect.listed)
    model = source.structure()
    quantizer = FP8HfQuantizer(config)
    layout = quantizer.dry_run(model, get_model_conversion_mapping(model), checkpoint, source.dtype, device)
    if spec.in_dialect is not None:  # such a config need not name them
        found.ignore += [name for name, every in layout.scan.dense.items() if match(every, (), spec.ignore) is None]
    for weight in [*layout.scan.weights, *layout.scan.host]:
        one = groups[weight.group.name]
        one.matrices += weight.shapes[weight.primary][0] if len(weight.shapes[weight.primary]) == 3 else 1
        one.bytes += sum(nbytes(checkpoint.tensors[key]) for key in weight.keys.values())
    found.explanation = explain(model, source.dtype, quantizer.compute_device)
    by_default = is_ours(source.quantization or {})
    kinds = {group.scheme.weight.code.label for group in config.spec.our_groups if group.scheme is not None}
    found.summary = (
        f"{' and '.join(sorted(kinds))} in the {stored.method} format; from_pretrained"
        f"{'' if by_default else ' with quantization_config=FP8Config()'} on {quantizer.compute_device.type} would run:"
    )
