"""Checks the files against the config: finds every quantized weight, and raises for contradictions, by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from ..errors import ConfigError, FP8Error, MismatchError, UnsupportedError, UnusedTensorError
from ..formats.storage import INPUT_SCALE, PACKED, WEIGHT, WEIGHT_SCALE, format_of
from .config_groups import Group, classes_of, fits, groups_of, match, weight_name
from .dense_by_default import is_router
from .quantization_spec import QuantizationSpec
from .reader import DENSE_DTYPES, DTYPE_NAMES, Checkpoint
from .stored_weight import HOST_ROLES, SPELLINGS, StoredWeight, stored

# Scales of `kv_cache_scheme`, such as `k_scale` and `v_scale`, in the spellings found in checkpoints.
CACHE_SCALE = re.compile(r"\.([kvq]_scale|kv_scale|[kv]_proj\.output_scale|[kvq]_zero_point|prob_output_scale)$")
ORPHAN = re.compile(
    rf"(^|[._])({'|'.join(name for names in SPELLINGS.values() for name in names)}|(weight|input)_global_scale|weight_g_idx)$"
)
# A stack of experts has no ".weight": suffixes that give the names of its scales.
STACK_SUFFIXES = {
    WEIGHT_SCALE: ("_scale", "_weight_scale", ".weight_scale", "_scale_inv"),
    INPUT_SCALE: ("_input_scale", ".input_scale", "_activation_scale"),
}


@dataclass
class Scan:
    """Quantized weights in the files. weights: of groups that hf_fp8 runs. host: of other groups. cache: keys of the KV cache's
    scales. dense: name in the files of a matrix that is dense although the targets of a group match it, whatever `ignore` says
    -> all its names that readers may look for."""

    weights: list[StoredWeight] = field(default_factory=list)
    host: list[StoredWeight] = field(default_factory=list)
    cache: list[str] = field(default_factory=list)
    dense: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def all_dense(self) -> list[str]:
        """All names of dense matrices, for a config."""
        return list(dict.fromkeys(name for names in self.dense.values() for name in names))

    @property
    def groups(self) -> set[str]:
        """The names of the groups that weights belong to."""
        return {weight.group.name for weight in [*self.weights, *self.host]}


@dataclass(frozen=True)
class Owner:
    """The module of the model to which a weight of the files belongs.

    names: all its names in a config, that in the files first (`names_of`). module: the name of the module that exists in the
    model, None if there is none. cls: its class. has_weight: whether its `weight` is a parameter.
    """

    names: tuple[str, ...]
    module: str | None = None
    cls: type[nn.Module] | None = None
    has_weight: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of its class and base classes; empty if there is no such module."""
        return () if self.cls is None else classes_of(self.cls)

    def is_a(self, *kinds: type[nn.Module]) -> bool:
        return self.cls is not None and issubclass(self.cls, kinds)


def weights_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Key of each weight in the files -> the name of its module there."""
    named = ((key, module_named(key, info.dtype, len(info.shape))) for key, info in checkpoint.tensors.items())
    return {key: name for key, name in named if name is not None}


def scan(checkpoint: Checkpoint, spec: QuantizationSpec, owners: Mapping[str, Owner], params: Collection[str]) -> Scan:
    """Find the quantized weights among the tensors of the files, and check them against the config.

    owners: key of each weight in the files (`weights_of`) -> its module. params: names of the model's parameters.

    Raises a subclass of CheckpointError, naming the tensor or the config key, for the first contradiction.
    """
    found, used = Scan(), set[str]()
    candidates = []
    for key, name in weights_of(checkpoint).items():
        names = owners[key].names
        candidates.append((name, key, names, _group_of(spec, name, names, owners[key], key, checkpoint)))
    _check_groups(spec, [(names, owners[key].classes or ("Linear",), group) for _, key, names, group in candidates])
    for name, key, names, group in candidates:
        owner = owners[key]
        if group is not None and group.scheme is None:
            _check_host(key, names, group, owner, checkpoint)
            host = {role: f"{name}.{role}" for role in HOST_ROLES if f"{name}.{role}" in checkpoint.tensors}
            if len(host) > 1:  # a target may be a regex that also matches norms
                found.host.append(stored(name, host, checkpoint, group))
                used.update(host.values())
            continue
        if key.endswith(PACKED) and group is None:
            continue
        keys = companions(name, key, checkpoint)
        if _is_stored(key, keys, checkpoint, spec, group, names, owner):
            assert group is not None
            found.weights.append(stored(name, keys, checkpoint, group))
            used.update(keys.values())
        elif checkpoint.tensors[key].dtype in DENSE_DTYPES:
            found.dense |= _dense(name, key, checkpoint, spec, owner)
    found.cache = [key for key in checkpoint.tensors if CACHE_SCALE.search(key)]
    _check_orphans(checkpoint, {*used, *found.cache, *params})
    if spec.in_dialect is not None and not found.weights:
        raise MismatchError(
            f"the config says that the checkpoint is quantized ({spec.in_dialect.dialect.name}), but no weight in the files is "
            "stored in FP8: remove `quantization_config` from config.json if the checkpoint is dense"
        )
    return found


def _dense(name: str, key: str, checkpoint: Checkpoint, spec: QuantizationSpec, owner: Owner) -> dict[str, tuple[str, ...]]:
    """The entry of `Scan.dense` for a dense weight; none if no target would match it.

    Routers have classes of their own in the model, and experts are parts of one module; for other readers each is a Linear.
    """
    is_merged = owner.module is not None and owner.module not in owner.names
    also = ("Linear",) if owner.cls is None or is_merged or is_router(owner.names) else ()
    if len(checkpoint.tensors[key].shape) != 2 or not groups_of(spec.groups, owner.names, (*owner.classes, *also)):
        return {}
    names = (name, owner.names[1] if len(owner.names) > 1 else name, *([owner.module] if is_merged and owner.module else []))
    return {name: tuple(dict.fromkeys(names))}


def _check_orphans(checkpoint: Checkpoint, used: set[str]) -> None:
    for key in checkpoint.tensors:
        beside = key.endswith("_scale") and key.removesuffix("_scale") in checkpoint.tensors
        if key not in used and (ORPHAN.search(key) or beside):
            raise UnusedTensorError(
                f"{key} is a scale in the files, but no config group quantizes a weight that it belongs to, so it would not be "
                "used. Either the weight is missing, or `targets` and `ignore` in config.json do not match the files."
            )


def names_of(name: str, place: str, prefix: str, inside: bool) -> tuple[str, ...]:
    """All names of a module in a config: that in the files (`name`) and that in the model (`place`), with and without `prefix`,
    that of the base model. inside: whether the module lies in the base model; a head lies beside it, and has no such name.
    """
    bare = [n.removeprefix(f"{prefix}.") for n in (name, place)]
    return tuple(dict.fromkeys((name, place, *bare, *(f"{prefix}.{n}" for n in bare if inside))))


def module_named(key: str, dtype: str, ndim: int) -> str | None:
    """The name in the files of the module whose (possibly packed) weight is `key`; None if `key` is not a weight."""
    for suffix in (f".{WEIGHT}", ".weight_packed"):
        if key.endswith(suffix):
            return key.removesuffix(suffix)
    if key in (WEIGHT, "weight_packed"):
        return ""
    # A stack of experts is a parameter without a module. No scale is stored in FP8 with three dimensions.
    return key if ndim == 3 and dtype.startswith("F8_") else None


def companions(name: str, key: str, checkpoint: Checkpoint, *, strict: bool = True) -> dict[str, str]:
    """Role -> key, for the weight `key` of the module `name` and its scales and zero points.

    Raises UnusedTensorError for two spellings of one role, if `strict`.
    """
    keys = {PACKED if key.endswith(PACKED) else WEIGHT: key}
    dot = f"{name}." if name else ""
    for role, spellings in SPELLINGS.items():
        candidates = [dot + spelling for spelling in spellings]
        if key == name:
            candidates = [name + suffix for suffix in STACK_SUFFIXES.get(role, ())]
        elif role == WEIGHT_SCALE and checkpoint.tensors[key].dtype.startswith("F8_"):
            candidates.append(f"{dot}scale")  # DeepSeek-V4's; beside a dense weight it is another parameter
        present = [candidate for candidate in candidates if candidate in checkpoint.tensors]
        if strict and len(present) > 1:
            raise UnusedTensorError(f"{' and '.join(present)} are both in the files: only one can be the {role} of {name}")
        if present:
            keys[role] = present[0]
    return keys


def _group_of(
    spec: QuantizationSpec, name: str, names: tuple[str, ...], owner: Owner, key: str, checkpoint: Checkpoint
) -> Group | None:
    """The group of the weight `key` of the module `name`, matched by its names in files and model, or by class.

    Of several groups it is the most specific match among those that store weights as the file does: with the same codes, and,
    if there are still several, with the same kind of scales.
    """
    if match(names, owner.classes, spec.ignore):
        return None
    dtype = checkpoint.tensors[key].dtype
    groups = groups_of(spec.groups, names, owner.classes)
    if dtype not in DENSE_DTYPES and not owner.is_a(nn.Embedding, nn.Conv1d, nn.Conv2d):
        # Experts and routers were Linears when they were quantized, but may be parts of another module in the model; a module
        # that this model class lacks has no class here. So the file decides.
        groups += groups_of(spec.groups, names, ("Linear",))
    with_weights = [group for group in groups if group.parsed.weights is not None]
    if dtype in DENSE_DTYPES:
        return next(iter(with_weights or groups), None)
    alike = [group for group in with_weights if _stores(group, key, dtype)]
    fitting = [group for group in alike if len(alike) > 1 and _scales_fit(group, name, key, checkpoint)]
    return next(iter([*fitting, *alike, *with_weights]), None)


def _scales_fit(group: Group, name: str, key: str, checkpoint: Checkpoint) -> bool:
    """Whether the scales of a weight are those of `group`, which hf_fp8 must run."""
    if group.scheme is None:
        return False
    try:
        weight = stored(name, companions(name, key, checkpoint, strict=False), checkpoint, group)
        weight.check()
        weight.check_shapes()
    except FP8Error:
        return False
    return True


def _stores(group: Group, key: str, dtype: str) -> bool:
    """Whether a group stores weights as this one is stored: the same codes, packed or not."""
    if group.scheme is not None:
        scheme = group.scheme.weight
        return DTYPE_NAMES[scheme.storage] == dtype and scheme.packed == key.endswith("_packed")
    if dtype == "F8_E4M3" and not key.endswith("_packed"):
        weights = group.parsed.weights  # formats that transformers runs may have E4M3 codes with other scales
        return bool(weights.type == "float" and weights.num_bits == 8)
    return True


def _is_stored(
    key: str,
    keys: dict[str, str],
    checkpoint: Checkpoint,
    spec: QuantizationSpec,
    group: Group | None,
    names: tuple[str, ...],
    owner: Owner,
) -> bool:
    """Whether a weight is stored as its group, which hf_fp8 runs, says; False if it is dense. Raises MismatchError if that
    contradicts the config."""
    info = checkpoint.tensors[key]
    scale = keys.get(WEIGHT_SCALE)
    if group is not None and _stores(group, key, info.dtype):
        return True
    if info.dtype == "F8_E4M3":
        if group is None:
            ignored = " (it is in `ignore`)" if match(names, (), spec.ignore) else ""
            raise MismatchError(
                f"{key} is stored in FP8 ({info}), but no config group quantizes {names[0]}{ignored}: its E4M3 codes would be "
                "used as values. Correct `targets` or `ignore` in config.json"
            )
    elif info.dtype in DENSE_DTYPES:
        if scale is not None:
            raise MismatchError(
                f"{key} is stored dense ({info}), but the files also have {scale}: either the weight was dequantized and its "
                "scale left in, or it was never quantized. Applying the scale would be wrong. Remove it, or export again"
            )
        strict = group is not None and len(info.shape) == 2 and not spec.files_decide
        if group is not None and strict and not (_excused(names, spec) or _may_be_dense(names, owner)):
            raise MismatchError(
                f"{key} is stored dense ({info}), but config group {group.name!r} says {_codes(group)} for {names[0]}: "
                "add it to `ignore` in config.json if it is meant to be dense, otherwise quantize it again"
            )
        return False
    if group is not None and group.scheme is not None:
        wanted = f"{DTYPE_NAMES[group.scheme.weight.storage]} under {format_of(group.scheme.weight).codes!r}"
        raise MismatchError(
            f"{key} is stored as {info}, but config group {group.name!r} has the format {group.format}, which stores "
            f"{names[0]} as {wanted} ({_codes(group)}): its codes would be misread. Correct `targets`, `ignore` or `format` in "
            "config.json"
        )
    if scale is not None or info.dtype.startswith("F8_"):
        raise MismatchError(f"{key} is stored as {info}; hf_fp8 reads FP8 weights stored as F8_E4M3 (float8_e4m3fn)")
    return False


def _codes(group: Group) -> str:
    return "other weights" if group.scheme is None else group.scheme.weight.code.label


def _may_be_dense(names: tuple[str, ...], owner: Owner) -> bool:
    """Whether a weight that a group matches may be dense: it is not of a Linear (but of an embedding, or of a router with a
    separate class), it is of a router, or this model class does not have it."""
    if owner.is_a(nn.Linear):
        return is_router(names)
    return owner.cls is None or owner.has_weight


def _check_host(key: str, names: tuple[str, ...], group: Group, owner: Owner, checkpoint: Checkpoint) -> None:
    """Raise for a weight that is not stored as its group, which transformers runs, says, and for inputs quantized alone."""
    info = checkpoint.tensors[key]
    if group.parsed.weights is None:
        if owner.is_a(nn.Linear) and len(info.shape) == 2:
            raise UnsupportedError(
                f"config group {group.name!r} quantizes the inputs of {names[0]}, whose weight is dense ({info}): hf_fp8 reads "
                "groups without `weights` for attention modules only. Narrow its `targets` in config.json"
            )
    elif info.dtype.startswith("F8_") and not key.endswith("_packed") and not _stores(group, key, info.dtype):
        raise MismatchError(
            f"{key} is stored in FP8 ({info}), but the only config group that matches {names[0]}, {group.name!r}, stores "
            f"{group.format} weights: its codes would be misread. Correct `targets` or `ignore` in config.json"
        )
    elif info.dtype not in DENSE_DTYPES and (name := weight_name(group)) is not None and key.rpartition(".")[2] != name:
        raise MismatchError(
            f"{key} is stored as {info}, but config group {group.name!r} has the format {group.format}, which stores {name!r}: "
            "correct its `format` in config.json"
        )


def _excused(names: tuple[str, ...], spec: QuantizationSpec) -> bool:
    """Whether `ignore` names a dense module by a shorter or longer path than the file and the model do."""
    for entry in spec.ignore:
        if entry.startswith("re:"):
            if any(fits(entry.removeprefix("re:"), name, anywhere=True) for name in names):
                return True
        elif any(name.endswith(f".{entry}") or entry.endswith(f".{name}") for name in names):
            return True
    return False


def _check_groups(spec: QuantizationSpec, weights: list[tuple[tuple[str, ...], tuple[str, ...], Group | None]]) -> None:
    """Raise for a group that matches nothing. It is valid if all its matches belong to more specific groups."""
    owners = {group.name for *_, group in weights if group is not None}
    for group in (group for group in spec.groups if group.parsed.weights is not None):
        if group.name in owners or any(
            other is not None and match(names, classes, group.targets) for names, classes, other in weights
        ):
            continue
        raise ConfigError(
            f"quantization_config.config_groups[{group.name!r}].targets is {list(group.targets)}: "
            "they match no weight in the files, except those in `ignore`"
        )
