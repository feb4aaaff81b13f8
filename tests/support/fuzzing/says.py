"""What a `quantization_config` says, read from JSON by docs/formats.md. No code of hf_fp8 or compressed-tensors is used."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class Contradiction(Exception):
    """The checkpoint contradicts itself, or asks for what is refused: loading has to raise."""


class NotFP8(Exception):
    """By its config the checkpoint is none of ours: transformers loads it by itself."""


class Unclear(Exception):
    """Nothing is claimed of it."""


PLAIN = ("float-quantized", "naive-quantized", "int-quantized", "mixed-precision", "dense", "fakequant", None)
OTHERS = (
    "pack-quantized", "marlin-24", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "sparse-24-bitmask",
    "sparse-bitmask", "mxint4-quantized", "mxint8-quantized",
)  # fmt: skip
STATUSES = ("compressed", "frozen", "initialized", "calibration", None)
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
TOKEN = {**FLOAT8, "strategy": "token", "dynamic": True}
# Presets whose weights are FP8; of any other name nothing is claimed.
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "FP8": ({**FLOAT8, "strategy": "tensor"}, {**FLOAT8, "strategy": "tensor", "dynamic": False}),
    "FP8_DYNAMIC": ({**FLOAT8, "strategy": "channel"}, TOKEN),
    "FP8_BLOCK": (
        {**FLOAT8, "strategy": "block", "block_structure": [128, 128]},
        {**FLOAT8, "strategy": "group", "group_size": 128, "dynamic": True},
    ),
}


@dataclass(frozen=True)
class Weights:
    """kind: tensor, channel, group, block, or "?" where the config is malformed: then the scale's shape says it."""

    kind: str
    rows: int = 0
    cols: int = 0


@dataclass(frozen=True)
class Inputs:
    """kind: none, static, tensor, token, group, or "?" """

    kind: str
    size: int = 0


@dataclass(frozen=True)
class Group:
    """fp8: False for one that transformers runs, which is then described by `arguments`."""

    name: str
    targets: tuple[str, ...]
    fp8: bool
    weights: Weights
    inputs: Inputs
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Says:
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    def groups_of(self, names: Iterable[str], classes: Iterable[str]) -> list[list[Group]]:
        """The groups of a module, those that speak of it most precisely first, together where they have the same target."""
        names, classes = list(names), set(classes)
        if matches(self.ignore, names, classes):
            return []
        found = matches({target for group in self.groups for target in group.targets}, names, classes)
        return [[group for group in self.groups if target in group.targets] for target in found]


def matches(targets: Iterable[str], names: list[str], classes: set[str]) -> list[str]:
    """Exact names first, then expressions in the order of the alphabet, then classes."""
    ordered = sorted(targets)
    exact = [target for target in ordered if not target.startswith("re:") and target in names]
    fitting = [t for t in ordered if t.startswith("re:") and any(re.match(t[3:], name) for name in names)]
    return [*exact, *fitting, *(target for target in ordered if target in classes)]


def whole(value: Any) -> int | None:
    """A number without a fraction, as JSON may hold it."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
        return int(value) if number == int(number) else None
    except (TypeError, ValueError, OverflowError):
        return None


def lower(value: Any) -> Any:
    """compressed-tensors does not mind capitals in types and strategies."""
    return value.lower() if isinstance(value, str) else value


def section(config: Any) -> dict[str, Any]:
    """Where config.json speaks of quantization. Raises NotFP8 if it does not, Contradiction if nothing can be made of it."""
    if not isinstance(config, dict):
        raise Contradiction("config.json holds no object")
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key) if isinstance(part, dict) else None
            if found is None or found == {}:
                continue
            if not isinstance(found, dict):
                raise Contradiction(f"{key} is no object")
            method = found.get(
                "quant_method", "compressed-tensors" if key != "quantization_config" or "config_groups" in found else 0
            )
            if method not in ("compressed-tensors", "sparseml"):
                raise NotFP8(f"quant_method is {method!r}")
            return found
    raise NotFP8("config.json says nothing of quantization")


def read(config: Any) -> Says:
    found = section(config)
    raw = found.get("config_groups")
    if not isinstance(raw, dict) or not raw:
        raise Contradiction("no config_groups")
    groups = [_group(name, group, found) for name, group in raw.items()]
    if not any(group.fp8 for group in groups):
        raise NotFP8("no group is FP8")
    all_fp8 = all(group.fp8 for group in groups)
    _refuse_sections(found, all_fp8)
    ignore = found.get("ignore")
    if ignore is None:
        ignore = []
    if isinstance(ignore, str) or not isinstance(ignore, list):
        raise Contradiction("ignore is no list")
    return Says(tuple(groups), _patterns(ignore, "ignore"))


def _refuse_sections(found: dict[str, Any], all_fp8: bool) -> None:
    if found.get("transform_config"):
        raise Contradiction("transforms")
    sparsity = found.get("sparsity_config")
    if sparsity and not (sparsity == "dense" or (isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense")):
        raise Contradiction("sparsity")
    _refuse_format(found.get("format"), all_fp8)
    status = found.get("quantization_status")
    if not (status is None or status in STATUSES):
        raise Contradiction(f"status {status!r}")


def _refuse_format(value: Any, fp8: bool) -> None:
    known = PLAIN if fp8 else (*PLAIN, *OTHERS)
    if value is not None and (not isinstance(value, str) or value not in known):
        raise Contradiction(f"format {value!r}")


def _patterns(targets: Any, key: str) -> tuple[str, ...]:
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise Contradiction(f"{key} is no list of names")
    for target in targets:
        if target.startswith("re:"):
            try:
                re.compile(target[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise Contradiction(f"{key}: {target[:40]!r} is no expression") from error
    return tuple(targets)


def _group(name: str, group: Any, found: dict[str, Any]) -> Group:
    if isinstance(group, list):
        if name not in PRESETS:
            raise Unclear(f"preset {name}")
        weights, inputs = PRESETS[name]
        return Group(name, _patterns(group, "targets"), True, _weights(weights), _inputs(inputs), {})
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise Contradiction(f"group {name!r} has no weights")
    weights = group["weights"]
    kind, bits = lower(weights.get("type", "int")), whole(weights.get("num_bits", 8))  # the defaults of compressed-tensors
    fp8 = kind == "float" and bits == 8
    if not fp8 and not ((kind == "int" and bits in (4, 8)) or (kind == "float" and bits == 4)):
        # Spellings and widths that compressed-tensors may or may not have: refused, or right.
        raise Unclear(f"weights of {bits} bits and type {kind!r}")
    if "uint8" in str(weights.get("scale_dtype")) or str(group.get("format")).startswith("mx"):
        fp8 = False  # scales in E8M0
    targets = group.get("targets")
    if not targets:
        raise Contradiction(f"group {name!r} has no targets")
    if not fp8:
        plain = group.get("input_activations") is None and group.get("output_activations") is None
        return Group(name, _patterns(targets, "targets"), False, Weights("?"), Inputs("none" if plain else "?"), weights)
    _refuse_format(group.get("format"), True)
    if group.get("output_activations") is not None:
        raise Contradiction("output_activations")
    return Group(name, _patterns(targets, "targets"), True, _weights(weights), _inputs(group.get("input_activations")), {})


def _weights(weights: dict[str, Any]) -> Weights:
    if weights.get("symmetric", True) is False:
        raise Contradiction("asymmetric weights")
    if weights.get("dynamic", False) is True or lower(weights.get("dynamic")) == "local":
        raise Contradiction("dynamic weights")
    strategy, size, structure = lower(weights.get("strategy")), weights.get("group_size"), weights.get("block_structure")
    if strategy in ("token", "tensor_group", "attn_head"):
        raise Contradiction(f"weights by {strategy}")
    if strategy in ("tensor", "channel"):
        # More than is needed: refused, or without a say.
        return Weights(strategy)
    if strategy == "group":
        count = whole(size)
        if count is None or count < 1:
            raise Contradiction("group without a size")
        return Weights("group", 1, count)
    if strategy == "block":
        if isinstance(structure, str):
            structure = structure.split("x")
        extents = [whole(extent) for extent in structure] if isinstance(structure, list) else []
        if len(extents) != 2 or any(extent is None for extent in extents):
            raise Contradiction("block without a structure")
        rows, cols = (extent or 0 for extent in extents)
        if min(rows, cols) < 1:
            raise Contradiction("block of nothing")
        return Weights("block", rows, cols)
    return Weights("?")


def _inputs(inputs: Any) -> Inputs:
    if inputs is None:
        return Inputs("none")
    if not isinstance(inputs, dict):
        raise Contradiction("input_activations is no object")
    if inputs.get("symmetric", True) is False:
        raise Contradiction("asymmetric inputs")
    strategy, dynamic = lower(inputs.get("strategy")), inputs.get("dynamic", False)
    if lower(inputs.get("type")) != "float" or whole(inputs.get("num_bits")) != 8 or not isinstance(dynamic, bool):
        if lower(inputs.get("type")) == "int" and "num_bits" in inputs:
            raise Contradiction("integer inputs")
        return Inputs("?")
    if strategy == "tensor":
        return Inputs("tensor" if dynamic else "static")
    if strategy in ("token", "group") and not dynamic:
        raise Contradiction(f"static inputs by {strategy}")
    if strategy == "token":
        return Inputs("token")
    if strategy == "group":
        size = whole(inputs.get("group_size"))
        if size is None or size < 1:
            raise Contradiction("group without a size")
        return Inputs("group", size)
    if strategy in ("channel", "block", "tensor_group", "attn_head"):
        raise Contradiction(f"inputs by {strategy}")
    return Inputs("?")
