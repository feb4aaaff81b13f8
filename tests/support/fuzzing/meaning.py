"""What the tensors of a checkpoint folder are worth: an independent decoder, by docs/formats.md, in float64."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.build import State

from .reading import parsed, tensors_of
from .says import Contradiction, Group, Inputs, Says, Unclear, Weights, read

FP8 = torch.float8_e4m3fn
DENSE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SPELLINGS = {
    "weight_scale": ("weight_scale", "weight_scale_inv", "scale_weight"),
    "input_scale": ("input_scale", "act_scale", "activation_scale", "input_activation_scale", "scale_input"),
}
ZERO_POINTS = ("weight_zero_point", "input_zero_point")
STACKED = {
    "weight_scale": ("_scale", "_weight_scale", ".weight_scale", "_scale_inv"),
    "input_scale": ("_input_scale", ".input_scale"),
}
CACHE = re.compile(r"\.([kvq]_scale|[kv]_proj\.output_scale|[kvq]_zero_point|prob_output_scale)$")
# Modules that are Linears in any of the bases' models, and quantized or named in `ignore`.
LINEAR = re.compile(r"(^|\.)(((q|k|v|o|gate|up|down|[qk]v?_[ab])_proj|kv_a_proj_with_mqa)|lm_head)$")


@dataclass
class Meaning:
    """state: dense tensors by the file's names. inputs: module -> how its inputs are quantized, and the static scale.

    unfit: module -> what is wrong with its static scale, which matters only where inputs are rounded.
    """

    state: State = field(default_factory=dict)
    inputs: dict[str, tuple[Inputs, float]] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)


def decode(folder: Path) -> Meaning:
    """Raises Contradiction, NotFP8 or Unclear."""
    config = parsed(folder / "config.json")
    says = read(config)
    tensors = tensors_of(folder)
    meaning, used = Meaning(), set[str]()
    layers = config.get("num_hidden_layers")
    candidates = {key: stem for key in tensors if (stem := _module(key, tensors[key])) is not None}
    _refuse_idle_groups(says, list(candidates.values()))
    for key, stem in candidates.items():
        ranks = _groups_of(says, stem)
        tensor = tensors[key]
        if key.endswith("weight_packed"):
            _unpack(stem, [group for rank in ranks for group in rank if not group.fp8], tensors, meaning, used)
        elif tensor.dtype == FP8:
            meaning.state[key] = _multiplied_out(key, stem, ranks, tensors, meaning, used)
        elif ranks and not all(group.fp8 for group in ranks[0]):
            if len(ranks[0]) > 1 or tensor.dtype not in DENSE or f"{stem}.weight_scale" in tensors:
                raise Unclear("a plain weight of a group that transformers runs")
        else:
            _check_dense(key, stem, ranks[0][0] if ranks else None, says, tensors, layers)
    for name, tensor in tensors.items():
        if name in meaning.state or name in used or CACHE.search(name):
            continue
        if _is_scale(name):
            raise Contradiction(f"{name} is a scale that nothing uses")
        meaning.state[name] = tensor
    meaning.state = merged(meaning.state, config)
    return meaning


def lenient(folder: Path) -> State:
    """Dense tensors, as well as can be: for asking what transformers makes of the rest of a folder. Raises Contradiction."""
    tensors = tensors_of(folder)
    dense = {name: tensor for name, tensor in tensors.items() if not _is_scale(name) and not CACHE.search(name)}
    for key, tensor in dense.items():
        if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
            dense[key] = tensor.float()
            scale = next((tensors[name] for name in _scale_names(key, key.removesuffix(".weight")) if name in tensors), None)
            if scale is not None and tensor.ndim in (2, 3) and scale.numel():
                with suppress(Unclear, Contradiction):
                    dense[key] = (tensor.double() * factors(scale, tuple(tensor.shape), Weights("?"))).float()
    try:
        return merged(dense, parsed(folder / "config.json"))
    except (Contradiction, RuntimeError):
        return dense


def _is_scale(name: str) -> bool:
    names = [*SPELLINGS["weight_scale"], *SPELLINGS["input_scale"], *ZERO_POINTS, "weight_global_scale", "weight_g_idx"]
    return name.rpartition(".")[2] in names or re.search(r"experts\.\w+_scale$", name) is not None


def _module(key: str, tensor: torch.Tensor) -> str | None:
    """The module that a key is the weight of; a stack of experts is a parameter of its own."""
    for end in (".weight", ".weight_packed"):
        if key.endswith(end) and (tensor.ndim != 3 or tensor.dtype == FP8 or LINEAR.search(key.removesuffix(end))):
            return key.removesuffix(end)
    if key == "weight":
        return ""
    is_stack = tensor.ndim == 3 and tensor.dtype.itemsize == 1 and tensor.is_floating_point()
    return key if is_stack and EXPERTS.search(key) else None


def names(stem: str) -> list[str]:
    """What a module may be called: by the file or by the model, with the base model's prefix or without."""
    found = [stem, re.sub(r"block_sparse_moe\.", "mlp.", stem)]
    bare = [name.removeprefix("model.") for name in found]
    return [*found, *bare, *(f"model.{name}" for name in bare)]


def _groups_of(says: Says, stem: str) -> list[list[Group]]:
    if any(target == "Module" for group in says.groups for target in group.targets) or "Module" in says.ignore:
        raise Unclear("a target that is a class above all others")
    return says.groups_of(
        names(stem), {"Embedding"} if stem.endswith("embed_tokens") else set() if "norm" in stem else {"Linear"}
    )


def _refuse_idle_groups(says: Says, stems: list[str]) -> None:
    known = [name for stem in stems for name in names(stem)]
    for group in says.groups:
        # Names and expressions; nothing is claimed of classes.
        spelled = all(re.fullmatch(r"re:.*|[a-z][\w.]*", target) for target in group.targets)
        if spelled and not any(matched(group.targets, name) for name in known):
            raise Contradiction(f"{group.targets} matches nothing")


def matched(targets: tuple[str, ...], name: str) -> bool:
    return any(re.match(t[3:], name) is not None if t.startswith("re:") else t == name for t in targets)


def _scale_names(key: str, stem: str) -> list[str]:
    if key == stem:
        return [stem + end for end in STACKED["weight_scale"]]
    return [f"{stem}.{name}" if stem else name for name in SPELLINGS["weight_scale"]]


def _one(role: str, key: str, stem: str, tensors: State) -> str | None:
    """The key of a companion; two of a kind are a contradiction."""
    ends = STACKED[role] if key == stem else SPELLINGS[role]
    found = [name for end in ends if (name := stem + end if key == stem else f"{stem}.{end}" if stem else end) in tensors]
    if len(found) > 1:
        raise Contradiction(f"{found} are both there")
    return found[0] if found else None


def _multiplied_out(
    key: str, stem: str, ranks: list[list[Group]], tensors: State, meaning: Meaning, used: set[str]
) -> torch.Tensor:
    if not ranks:
        raise Contradiction(f"{key} is FP8, and no group says so")
    scale, static = _one("weight_scale", key, stem, tensors), _one("input_scale", key, stem, tensors)
    if scale is None:
        raise Contradiction(f"{key} has no scale")
    for zero in (f"{stem}.{name}" for name in ZERO_POINTS):
        if zero in tensors:
            if tensors[zero].float().ne(0).any():
                raise Contradiction(f"{zero} is not zero")
            used.add(zero)
    used.update(filter(None, (scale, static)))
    wrong = _wrong_scale(scale, tensors[scale])
    codes = tensors[key]
    if wrong or codes.ndim not in (2, 3):
        raise Contradiction(wrong or f"{key} has {codes.ndim} dimensions")
    group, factor = _one_that_fits(ranks, tensors[scale], tuple(codes.shape))
    if group.inputs.kind not in ("static", "?") and static is not None:
        raise Contradiction(f"{static} is not used")
    value = 0.0
    if static is not None:
        meaning.unfit[stem] = _wrong_scale(static, tensors[static])
        if tensors[static].numel() != 1 and codes.ndim == 2:
            meaning.unfit[stem] = f"{static} has {tensors[static].numel()} values"
        value = tensors[static].reshape(-1)[0].item() if tensors[static].numel() else 0.0
    elif group.inputs.kind == "static":
        meaning.unfit[stem] = f"{stem} has no input scale"
    meaning.inputs[stem] = (group.inputs, value)
    return (codes.double() * factor).float()


def _one_that_fits(ranks: list[list[Group]], scale: torch.Tensor, shape: tuple[int, ...]) -> tuple[Group, torch.Tensor]:
    """Of several groups, the most precise one that fits the scale."""
    reason = Contradiction("FP8 in a group of another format")
    for groups in ranks:
        fitting = []
        for group in groups:
            if not group.fp8:
                raise Unclear("FP8 codes in a group that transformers runs")
            try:
                fitting.append((group, factors(scale, shape, group.weights)))
            except Contradiction as error:
                reason = error
        if any(group.inputs != fitting[0][0].inputs or not torch.equal(f, fitting[0][1]) for group, f in fitting):
            raise Unclear("several groups with the same target that mean different things")
        if fitting:
            return fitting[0]
    raise reason


def _wrong_scale(name: str, scale: torch.Tensor) -> str:
    """What is wrong with a scale, "" if nothing."""
    if scale.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{name} is in {scale.dtype}"
    if not (scale.double().isfinite() & (scale.double() > 0)).all():
        return f"{name} has a value that is not finite and positive"
    return ""


def factors(scale: torch.Tensor, shape: tuple[int, ...], weights: Weights) -> torch.Tensor:
    """What each code is multiplied by, (rows, cols) or (experts, rows, cols). Raises Contradiction if it does not fit."""
    scale, given = scale.double(), tuple(scale.shape)
    if len(shape) == 3:
        return _stack_factors(scale, shape, weights)
    rows, cols = shape
    if weights.kind == "?":
        kinds = {(1,): "tensor", (): "tensor", (1, 1): "tensor", (rows,): "channel", (rows, 1): "channel"}
        if given not in kinds:
            raise Unclear("a malformed config, and a scale of groups or blocks")
        weights = Weights(kinds[given])
    allowed: list[tuple[int, ...]] = {
        "tensor": [(1,), (), (1, 1)],
        "channel": [(rows, 1), (rows,)],
        "group": [(rows, math.ceil(cols / max(weights.cols, 1)))],
        "block": [(math.ceil(rows / max(weights.rows, 1)), math.ceil(cols / max(weights.cols, 1)))],
    }[weights.kind]
    if given not in allowed:
        raise Contradiction(f"a scale of {list(given)} for {weights} and a weight of {list(shape)}")
    if weights.kind == "tensor":
        return scale.reshape(1, 1).expand(shape)
    if weights.kind == "channel":
        return scale.reshape(rows, 1).expand(shape)
    return _spread(scale, shape, weights.rows, weights.cols)


def _spread(grid: torch.Tensor, shape: tuple[int, ...], rows: int, cols: int) -> torch.Tensor:
    row = torch.arange(shape[-2]) // rows
    col = torch.arange(shape[-1]) // cols
    return grid[..., row, :][..., col]


def _stack_factors(scale: torch.Tensor, shape: tuple[int, ...], weights: Weights) -> torch.Tensor:
    """Of gpt-oss, the only one of the bases with stacks: (experts, in, out), so that an output is a column."""
    experts, rows, cols = shape
    given = tuple(scale.shape)
    if weights.kind == "?":
        raise Unclear("a malformed config, and a stack of experts")
    if weights.kind == "tensor":
        if given not in [(), (1,), (experts,), (experts, 1), (experts, 1, 1)]:
            raise Contradiction(f"a scale of {list(given)} for a stack {list(shape)}")
        return scale.reshape(-1, 1, 1).expand(shape)
    if weights.kind == "channel":
        if given not in [(experts, 1, cols), (experts, cols)]:
            raise Contradiction(f"a scale of {list(given)} for a stack {list(shape)}")
        return scale.reshape(experts, 1, cols).expand(shape)
    per_row, per_col = weights.cols, weights.rows  # transposed
    if given != (experts, math.ceil(rows / per_row), math.ceil(cols / per_col)):
        raise Contradiction(f"a scale of {list(given)} for a stack {list(shape)}")
    return _spread(scale, shape, per_row, per_col)


def _check_dense(key: str, stem: str, group: Group | None, says: Says, tensors: State, layers: Any) -> None:
    """layers: how many the model has; weights of others are none of its business."""
    tensor = tensors[key]
    scale = _one("weight_scale", key, stem, tensors)
    if scale is not None:
        raise Contradiction(f"{key} is not FP8, and {scale} is beside it")
    if group is None:
        if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
            raise Contradiction(f"{key} is {tensor.dtype}")
        return
    if tensor.dtype not in DENSE and LINEAR.search(stem):
        raise Contradiction(f"{key} is {tensor.dtype}, and a group says FP8")
    layer = re.search(r"layers\.(\d+)\.", stem)
    if layer and isinstance(layers, int) and int(layer[1]) >= layers:
        return
    spoken_of = any(entry in stem or stem in entry or entry.startswith("re:") for entry in says.ignore)
    # Of experts that the model holds merged, some may be dense.
    if tensor.ndim == 2 and LINEAR.search(stem) and ".experts." not in stem and not spoken_of:
        raise Contradiction(f"{key} is dense, and a group says FP8")


def _unpack(stem: str, groups: list[Group], tensors: State, meaning: Meaning, used: set[str]) -> None:
    """int4 in groups, eight to an int32, the lowest bits first, with an offset of 8: what the base with int4 has."""
    if not groups:
        raise Contradiction(f"{stem} is packed, and no group says so")
    group = groups[0]
    arguments = group.arguments
    size = arguments.get("group_size")
    parts = [tensors.get(f"{stem}.{role}") for role in ("weight_packed", "weight_scale", "weight_shape")]
    usual = arguments.get("num_bits") == 4 and arguments.get("type") == "int" and arguments.get("symmetric", True) is True
    usual = usual and group.inputs.kind == "none"
    if not usual or arguments.get("strategy") != "group" or not isinstance(size, int) or any(part is None for part in parts):
        raise Unclear(f"{stem} is packed in another way than int4 in groups")
    packed, scale, shape = parts
    if packed.dtype != torch.int32 or scale.dtype not in DENSE or shape.numel() != 2 or packed.ndim != 2:
        raise Unclear(f"{stem} is packed in another way")
    rows, cols = (int(extent) for extent in shape)
    values = torch.stack([(packed >> (4 * place)) & 15 for place in range(8)], -1).reshape(len(packed), -1) - 8
    if values.shape != (rows, cols) or tuple(scale.shape) != (rows, math.ceil(cols / max(size, 1))):
        raise Unclear(f"{stem} is packed in another shape")
    meaning.state[f"{stem}.weight"] = (values.double() * _spread(scale.double(), (rows, cols), 1, size)).float()
    used.update(f"{stem}.{role}" for role in ("weight_packed", "weight_scale", "weight_shape"))


EXPERTS = re.compile(r"experts\.\w+$")
EXPERT = re.compile(r"^(.*experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)$")


def merged(state: State, config: Any) -> State:
    """Names that stock transformers reads: Mixtral's experts are w1, w3, w2; gpt-oss's are stacked, transposed, interleaved."""
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind == "mixtral":
        hub = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        return {f"{m[1]}.{m[2]}.{hub[m[3]]}.{m[4]}" if (m := EXPERT.match(name)) else name: t for name, t in state.items()}
    if kind != "gpt_oss":
        return state
    parts: dict[str, dict[tuple[int, str, str], torch.Tensor]] = {}
    for name in [name for name in state if EXPERT.match(name)]:
        found = EXPERT.match(name)
        assert found
        place = (int(found[2]), found[3], found[4])
        if place in parts.setdefault(found[1], {}):
            raise Contradiction(f"{name} is there twice")
        parts[found[1]][place] = state[name].float()
    out = {name: tensor for name, tensor in state.items() if not EXPERT.match(name)}
    for stem, of in parts.items():
        count = len({number for number, _, _ in of})
        for leaf, end in (("weight", ""), ("bias", "_bias")):
            try:
                gate, up, down = ([of[n, p, leaf] for n in range(count)] for p in ("gate_proj", "up_proj", "down_proj"))
                both = torch.stack([torch.stack([g, u], 1).flatten(0, 1) for g, u in zip(gate, up, strict=True)])
                lower = torch.stack(down)
            except (KeyError, RuntimeError, IndexError):
                continue  # what is not there is missing from the model
            out[f"{stem}.gate_up_proj{end}"] = both.mT.contiguous() if leaf == "weight" else both
            out[f"{stem}.down_proj{end}"] = lower.mT.contiguous() if leaf == "weight" else lower
    return out
