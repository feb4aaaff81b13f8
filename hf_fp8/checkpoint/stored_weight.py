"""A quantized weight of the files with its scales (`StoredWeight`), and slices of stacked tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import CheckpointError, MismatchError, MissingTensorError, ScaleError, UnsupportedError, UnusedTensorError
from ..formats.scheme import Scheme
from ..formats.storage import INPUT_SCALE, SCALAR, WEIGHT, WEIGHT_SCALE, Shape, accepted_of_stack, format_of
from .config_groups import Group
from .reader import SCALE_DTYPES, Checkpoint

ZERO_POINTS = ("weight_zero_point", "input_zero_point")

# Spellings of the same scales. In DeepSeek-style files the factor for dequantization is named `weight_scale_inv`; the other
# names are from older quantizers.
SPELLINGS = {
    WEIGHT_SCALE: ("weight_scale", "weight_scale_inv", "scale_weight"),
    INPUT_SCALE: ("input_scale", "act_scale", "activation_scale", "input_activation_scale", "scale_input"),
    **{name: (name,) for name in ZERO_POINTS},
}
# Tensors that a weight of a group that is not FP8 may have (compressed-tensors' compressors).
HOST_ROLES = (
    WEIGHT, "weight_packed", WEIGHT_SCALE, "weight_zero_point", "weight_shape", "weight_g_idx",
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
    part: for a weight that is not quantized yet, the source of its values, by the renamed key.
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

    @property
    def scheme(self) -> Scheme:
        assert self.group.scheme is not None
        return self.group.scheme

    @property
    def primary(self) -> str:
        """The role of the tensor with the values: packed formats have no "weight"."""
        return WEIGHT if WEIGHT in self.keys else "weight_packed"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[WEIGHT]

    @property
    def module(self) -> str:
        return self.target.removesuffix(f".{WEIGHT}")

    @property
    def is_expert(self) -> bool:
        """Whether it goes into a stack of experts, not into the `weight` of a module."""
        merged = self.pattern is not None or len(self.shapes.get(WEIGHT, ())) == 3
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
        if WEIGHT_SCALE not in self.keys:
            raise MissingTensorError(
                f"{self.name}.{WEIGHT_SCALE} is not in the files, but {self.keys[WEIGHT]} is stored in FP8 "
                f"({self.scheme.describe()}) and cannot be dequantized without it: download or export the checkpoint again."
            )
        if not self.scheme.has_static_input and INPUT_SCALE in self.keys:
            raise UnusedTensorError(
                f"{self.keys[INPUT_SCALE]} is in the files, but config group {self.group.name!r} has no static inputs "
                f"({self.scheme.describe()}): it would not be used. Set input_activations.dynamic to false if it should be."
            )
        for role in (WEIGHT_SCALE, INPUT_SCALE):
            if role in self.keys and self.dtypes[role] not in SCALE_DTYPES:
                raise ScaleError(f"{self.keys[role]} has dtype {self.dtypes[role]}; supported are {', '.join(SCALE_DTYPES)}")

    def check_shapes(self) -> None:
        """Raise ScaleError, naming the tensor, for scales of a wrong shape."""
        allowed = self._accepted(WEIGHT_SCALE)
        if self.shapes[WEIGHT_SCALE] not in allowed:
            raise ScaleError(
                f"{self.keys[WEIGHT_SCALE]} has shape {list(self.shapes[WEIGHT_SCALE])}; for a weight of shape "
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
        if len(self.shape) == 2:
            return format_of(scheme).accepted(scheme, role, *self.shape)
        if len(self.shape) == 3:
            return accepted_of_stack(scheme, role, self.shape, self.transposed)
        raise UnsupportedError(
            f"{self.keys[WEIGHT]} has {len(self.shape)} dimensions; hf_fp8 reads FP8 matrices and stacks of them"
        )


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
    """Read the scales and zero points of all weights to CPU memory (they are small); return them by key.

    Raises ScaleError for the first weight scale that is not finite and positive, UnsupportedError for zero points.
    `wrong_input_scales` checks input scales.
    """
    names = [w.keys[role] for w in weights for role in (WEIGHT_SCALE, INPUT_SCALE, *ZERO_POINTS) if role in w.keys]
    found = checkpoint.read(names)
    for name, scale in found.items():
        if "zero_point" in name and scale.float().count_nonzero():
            raise UnsupportedError(f"{name} is not zero: hf_fp8 runs symmetric FP8, without zero points")
    for key in (weight.keys[WEIGHT_SCALE] for weight in weights if WEIGHT_SCALE in weight.keys):
        if (wrong := _wrong_values(found[key])) is not None:
            raise ScaleError(
                f"{key} {wrong}: the dequantized weights would be wrong. The checkpoint is damaged or badly calibrated."
            )
    return found


def wrong_input_scales(weights: list[StoredWeight], scales: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name of a weight with static inputs -> what is wrong with its input scale: missing, or invalid values."""
    found = {}
    for weight in weights:
        key = weight.keys.get(INPUT_SCALE)
        if weight.part is not None or not weight.scheme.has_static_input:
            continue
        if key is None:
            found[weight.name] = f"{weight.name}.{INPUT_SCALE} is not in the files"
        elif (wrong := _wrong_values(scales[key])) is not None:
            found[weight.name] = f"{key} {wrong}"
    return found


def _wrong_values(scale: torch.Tensor) -> str | None:
    scale = scale.float()
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
    if WEIGHT not in keys and group.scheme is not None:
        raise CheckpointError(f"{name} has no weight")
    return StoredWeight(
        name,
        dict(keys),
        {role: info.shape for role, info in infos.items()},
        {role: info.dtype for role, info in infos.items()},
        group,
    )
