"""A quantized weight of the files with its scales (`StoredWeight`), and slices of stacked tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import CheckpointError, MismatchError, MissingTensorError, ScaleError, UnsupportedError, UnusedTensorError
from ..formats.exponents import scale_values
from ..formats.packing import words
from ..formats.scheme import Scheme
from ..formats.storage import (
    COLUMN_GROUPS,
    INPUT_SCALE,
    PACKED,
    SCALAR,
    SHAPE,
    WEIGHT,
    WEIGHT_SCALE,
    ZERO_POINT,
    Shape,
    accepted_of_stack,
    format_of,
)
from .config_groups import Group
from .reader import DTYPE_NAMES, SCALE_DTYPES, Checkpoint, weight_scale_dtypes

ZERO_POINTS = (ZERO_POINT, "input_zero_point")

# Spellings of the same scales. In DeepSeek-style files the factor for dequantization is named `weight_scale_inv`; the other
# names are from older quantizers.
SPELLINGS = {
    WEIGHT_SCALE: ("weight_scale", "weight_scale_inv", "scale_weight", "qscale_weight"),
    INPUT_SCALE: ("input_scale", "act_scale", "activation_scale", "input_activation_scale", "scale_input", "qscale_act"),
    **{name: (name,) for name in (*ZERO_POINTS, SHAPE, COLUMN_GROUPS)},
}
# Tensors that a weight of a group that transformers runs may have (compressed-tensors' compressors).
HOST_ROLES = (
    WEIGHT, PACKED, WEIGHT_SCALE, ZERO_POINT, SHAPE, COLUMN_GROUPS,
    "weight_global_scale", INPUT_SCALE, "input_global_scale",
)  # fmt: skip


@dataclass(frozen=True)
class TensorSlice:
    """A checkpoint tensor, or one expert's slice of a stacked tensor: the source of the values of a planned tensor.

    key: name of the tensor in the files. expert: its number, None for the whole tensor. index, of: which of how many matrices
    (gate, up) along the outputs, interleaved or concatenated. transposed: a stack of (E, K, N) instead of (E, N, K).
    """

    key: str
    expert: int | None = None
    index: int = 0
    of: int = 1
    transposed: bool = False
    interleaved: bool = False

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slice of `tensor`, the one named `key`: a view."""
        if self.expert is None:
            return tensor
        rows = tensor[self.expert]
        if self.transposed and rows.ndim == 2:
            rows = rows.t()
        if self.of == 1:
            return rows
        return rows[self.index :: self.of] if self.interleaved else rows.chunk(self.of)[self.index]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the slice of a tensor of shape `whole`."""
        if self.expert is None:
            return whole
        return tuple(self.take(torch.empty(whole, device="meta")).shape)


@dataclass(frozen=True)
class DenseTensor:
    """A dense tensor of the files that the model merges with quantized ones.

    saved: as in `StoredWeight`. dtype: safetensors' name of it.
    """

    saved: str
    dtype: str


@dataclass(eq=False)
class StoredWeight:
    """A weight of the files that a config group quantizes.

    name: the module's name in the files. keys: role ("weight", "weight_scale", ...) -> key in the files. renamed: role -> that
    key after transformers' renamings. target: the parameter of the model that it fills, "" if the model has none. pattern: the
    source pattern of the transformers converter that takes it there, None if there is no converter. saved: role -> the name
    under which it is written back, before transformers reverses its renamings. transposed: (in, out) instead of (out, in).
    part: for a weight that is not quantized yet, the source of its values, by the renamed key. extents: N and K of packed
    codes, which the headers need not tell exactly (`takes`).
    """

    name: str
    keys: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    group: Group
    renamed: dict[str, str] = field(default_factory=dict)
    target: str = ""
    pattern: str | None = None
    saved: dict[str, str] = field(default_factory=dict)
    transposed: bool = False
    part: TensorSlice | None = None
    extents: tuple[int, ...] | None = None

    @property
    def scheme(self) -> Scheme:
        assert self.group.scheme is not None
        return self.group.scheme

    @property
    def primary(self) -> str:
        """The role of the tensor with the values: packed formats have no "weight"."""
        return WEIGHT if WEIGHT in self.keys else PACKED

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight; as far as it is known, of packed codes."""
        if self.primary == WEIGHT or self.group.scheme is None or len(self.shapes[PACKED]) != 2:
            return self.shapes[self.primary]
        if self.extents is not None:
            return self.extents
        scheme, (n, count) = self.group.scheme.weight, self.shapes[PACKED]
        scales = self.shapes.get(WEIGHT_SCALE, ())
        if scheme.granularity.cols == -1 or len(scales) < 2:
            return n, count * scheme.per_element
        return n, scales[1] * scheme.granularity.cols

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether it is a weight of this shape; then its packed codes are known to be of it."""
        if self.group.scheme is None or not self.group.scheme.weight.packed or len(self.shapes[PACKED]) != 2:
            return self.shape == shape
        scheme = self.group.scheme.weight
        fits = len(shape) == 2 and self.shapes[PACKED] == (shape[0], words(shape[1], scheme.code.bits))
        if fits and self.extents is None:
            self.extents = tuple(shape)
        return self.extents == tuple(shape)

    @property
    def zeros(self) -> list[str]:
        """The roles of zero points that files have although the scheme has none: all of them are zero."""
        return [r for r in ZERO_POINTS if r in self.keys and not (r == ZERO_POINT and self.scheme.weight.has_zero_points)]

    @property
    def module(self) -> str:
        return self.target.removesuffix(f".{WEIGHT}")

    @property
    def is_expert(self) -> bool:
        """Whether it goes into a stack of experts, not into the `weight` of a module."""
        merged = self.pattern is not None or len(self.shapes[self.primary]) == 3
        return merged and bool(self.target) and not self.target.endswith(f".{WEIGHT}")

    def matrices(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Views of `tensors` (by role, shaped as in the files) for each expert of a stack, of a matrix for itself."""
        experts = self.shape[0]
        if len(self.shape) == 2:
            yield dict(tensors)
            return
        for expert in range(experts):
            each = TensorSlice("", expert, transposed=self.transposed)
            # A scale that all experts share has no dimension for them.
            yield {
                role: each.take(tensor) if tensor.ndim and len(tensor) == experts else tensor
                for role, tensor in tensors.items()
            }

    def check(self) -> None:
        """Raise, naming the tensor, for scales that are missing, unused, or of a wrong dtype.

        A static input scale may be missing, as it is not always needed (`wrong_input_scales`).
        """
        scheme = self.scheme.weight
        needed = format_of(scheme).forms(scheme, 1, 1, torch.float32)
        for role in needed:
            if role not in self.keys:
                also = [name for name in SPELLINGS[role] if name != role]
                or_else = f", nor under another of its names ({', '.join(also)})" if also else ""
                raise MissingTensorError(
                    f"{self.name}.{role} is not in the files{or_else}, but {self.keys[self.primary]} is stored in "
                    f"{scheme.code.label} "
                    f"({self.scheme.describe()}) and cannot be dequantized without it: download or export the checkpoint again."
                )
        for role in (SHAPE, COLUMN_GROUPS):
            if role in self.keys and role not in needed:
                raise UnusedTensorError(
                    f"{self.keys[role]} is in the files, but config group {self.group.name!r} ({self.scheme.describe()}) has "
                    "no use for it: its format, or `actorder`, in config.json may be wrong"
                )
        for role in (PACKED, SHAPE, ZERO_POINT, COLUMN_GROUPS):
            if role in needed and self.dtypes[role] not in (wanted := {DTYPE_NAMES[needed[role].dtype], _INTEGERS[role]}):
                raise MismatchError(
                    f"{self.keys[role]} has dtype {self.dtypes[role]}, and must be {' or '.join(sorted(wanted))} in "
                    f"{self.group.format} weights"
                )
        if not self.scheme.has_static_input and INPUT_SCALE in self.keys:
            raise UnusedTensorError(
                f"{self.keys[INPUT_SCALE]} is in the files, but config group {self.group.name!r} has no static inputs "
                f"({self.scheme.describe()}): it would not be used. Set input_activations.dynamic to false if it should be."
            )
        for role, known in ((WEIGHT_SCALE, weight_scale_dtypes(scheme.mx)), (INPUT_SCALE, SCALE_DTYPES)):
            if role in self.keys and self.dtypes[role] not in known:
                raise ScaleError(f"{self.keys[role]} has dtype {self.dtypes[role]}; supported are {', '.join(known)}")

    def check_shapes(self) -> None:
        """Raise ScaleError, naming the tensor, for scales, zero points and groups of a wrong shape."""
        scheme = self.scheme.weight
        for role in format_of(scheme).forms(scheme, 1, 1, torch.float32):
            if role == WEIGHT:
                continue
            allowed = self._accepted(role)
            if self.shapes[role] not in allowed:
                raise ScaleError(
                    f"{self.keys[role]} has shape {list(self.shapes[role])}; for a weight of shape "
                    f"{list(self.shape)} and {self.scheme.describe()} it must be {' or '.join(str(list(s)) for s in allowed)}"
                )
        scalars: tuple[Shape, ...] = (SCALAR, (1,), (1, 1))
        if len(self.shape) == 3:
            scalars += ((self.shape[0],), (self.shape[0], 1), (self.shape[0], 1, 1))
        if INPUT_SCALE in self.keys and self.shapes[INPUT_SCALE] not in scalars:
            raise ScaleError(
                f"{self.keys[INPUT_SCALE]} has shape {list(self.shapes[INPUT_SCALE])}; a static input has one scale per tensor"
            )

    def _accepted(self, role: str) -> list[Shape]:
        scheme = self.scheme.weight
        if len(self.shapes[self.primary]) == 2:
            return format_of(scheme).accepted(scheme, role, *self.shape)
        if len(self.shape) == 3 and not scheme.packed:
            return accepted_of_stack(scheme, role, self.shape, self.transposed)
        kinds = "packed matrices" if scheme.packed else "FP8 matrices and stacks of them"
        raise UnsupportedError(f"{self.keys[self.primary]} has {len(self.shape)} dimensions; hf_fp8 reads {kinds}")


# Another dtype that a role may have in files.
_INTEGERS = {PACKED: "I32", SHAPE: "I32", ZERO_POINT: "I32", COLUMN_GROUPS: "I64"}


def companion(pattern: str, role: str) -> str:
    """The name of the tensor `role` of a weight that is named, or matched by, `pattern`."""
    if pattern == WEIGHT or pattern.endswith(f".{WEIGHT}"):
        return pattern.removesuffix(WEIGHT) + role
    return f"{pattern}.{role}"


def name_beside(target: str, renamed: str, prefix: str) -> str:
    """`renamed` (a key after transformers' renamings) with the base model's `prefix` if the parameter `target` has it, else
    without: transformers adds or removes the prefix while loading, and does not reverse that when it saves."""
    dot = f"{prefix}."
    if not prefix or target.startswith(dot) == renamed.startswith(dot):
        return renamed
    return dot + renamed if target.startswith(dot) else renamed.removeprefix(dot)


def check_scale_values(weights: list[StoredWeight], checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Read what belongs to the codes of all weights to CPU memory (it is small), and return it by key.

    Raises ScaleError for the first weight scale that is not finite and positive, and for a column of no group;
    UnsupportedError for zero points of symmetric weights; MismatchError for another `weight_shape`. `wrong_input_scales`
    checks input scales.
    """
    found = checkpoint.read([key for weight in weights for role, key in weight.keys.items() if role != weight.primary])
    for weight in weights:
        for role in weight.zeros:
            if found[weight.keys[role]].float().count_nonzero():
                raise UnsupportedError(
                    f"{weight.keys[role]} is not zero: config group {weight.group.name!r} is symmetric, without zero points"
                )
        key = weight.keys.get(WEIGHT_SCALE)
        if key is not None and (wrong := wrong_values(found[key])) is not None:
            raise ScaleError(
                f"{key} {wrong}: the dequantized weights would be wrong. The checkpoint is damaged or badly calibrated."
            )
        _check_shape_and_groups(weight, found)
    return found


def _check_shape_and_groups(weight: StoredWeight, found: Mapping[str, torch.Tensor]) -> None:
    key = weight.keys.get(SHAPE)
    if key is not None and not weight.takes(tuple(found[key].tolist())):
        raise MismatchError(
            f"{key} is {found[key].tolist()}, but {weight.keys[PACKED]} and its scales are of a weight of shape "
            f"{list(weight.shape)}"
        )
    key = weight.keys.get(COLUMN_GROUPS)
    if key is not None:
        groups, size = found[key], weight.scheme.weight.granularity.cols
        counts = torch.bincount(groups[groups >= 0]) if groups.numel() else groups
        if bool((groups < 0).any()) or len(counts) * size != len(groups) or bool((counts != size).any()):
            raise ScaleError(
                f"{key} does not put the {len(groups)} columns into groups of {size}: the dequantized weights would be wrong"
            )


def wrong_input_scales(weights: list[StoredWeight], scales: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name of a weight with static inputs -> what is wrong with its input scale: missing, or invalid values."""
    found = {}
    for weight in weights:
        key = weight.keys.get(INPUT_SCALE)
        if weight.part is not None or not weight.scheme.has_static_input:
            continue
        if key is None:
            found[weight.name] = f"{weight.name}.{INPUT_SCALE} is not in the files"
        elif (wrong := wrong_values(scales[key])) is not None:
            found[weight.name] = f"{key} {wrong}"
    return found


def wrong_values(scale: torch.Tensor) -> str | None:
    """What is wrong with the values of a scale, for a message; None if all are finite and positive."""
    scale = scale_values(scale).float()
    bad = ~(scale.isfinite() & (scale > 0))
    if not bad.any():
        return None
    return f"contains {scale[bad][0].item()} ({int(bad.sum())} of {scale.numel()} values are not finite and positive)"


def check_host_shapes(weights: list[StoredWeight], held: Mapping[str, torch.Tensor]) -> None:
    """Raise MismatchError for weights that transformers runs and whose tensors have other shapes than its modules.

    held: the model's tensors by name, after transformers has created its modules.
    """
    for weight in weights:
        for role, name in weight.saved.items():
            if weight.pattern is None and name in held and tuple(held[name].shape) != weight.shapes[role]:
                raise MismatchError(
                    f"{weight.keys[role]} has shape {list(weight.shapes[role])} in the files; for config group "
                    f"{weight.group.name!r} ({weight.group.format}) it must be {list(held[name].shape)}"
                )


def stored(name: str, keys: Mapping[str, str], checkpoint: Checkpoint, group: Group) -> StoredWeight:
    """The StoredWeight of the module `name`, from its keys by role."""
    infos = {role: checkpoint.tensors[key] for role, key in keys.items()}
    if WEIGHT not in keys and PACKED not in keys and group.scheme is not None:
        raise CheckpointError(f"{name} has no weight")
    return StoredWeight(
        name,
        dict(keys),
        {role: info.shape for role, info in infos.items()},
        {role: info.dtype for role, info in infos.items()},
        group,
    )
