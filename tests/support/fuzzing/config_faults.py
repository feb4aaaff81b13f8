"""Mutations of `quantization_config`. Each takes a draft and a source of chance; it says what it did, None if nothing."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

from .drafts import Change, Draft, some

Fault = Callable[[Draft, Random], Change | None]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


ODD: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: False, lambda: 0, lambda: 1, lambda: -1, lambda: 7, lambda: 2**31, lambda: 10**30,
    lambda: 0.5, lambda: 1e308, lambda: math.nan, lambda: math.inf, lambda: "", lambda: " ", lambda: "8", lambda: "null",
    lambda: "ß∂\u202e\x00\ud800", lambda: "a" * 20_000, lambda: [], lambda: {}, lambda: [None], lambda: [[]],
    lambda: {"": None}, lambda: {"weights": {}}, lambda: ["Linear"], lambda: nested(40), lambda: nested(400),
    lambda: nested(5000), lambda: {"a": nested(900)},
]  # fmt: skip
# What the keys of a quantization_config may hold, and near misses.
ENUMS: dict[str, list[Any]] = {
    "strategy": ["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head", "Channel", "diagonal", None],
    "type": ["float", "int", "Float", "uint", None],
    "num_bits": [8, 4, 16, 1, 2, 0, "8", 8.0, 8.5, None],
    "group_size": [-1, 0, 1, 24, 25, 32, 40, 64, 128, 4096, 10**12, "32", None],
    "block_structure": [
        [24, 40], [40, 24], [25, 41], [1, 1], [24], [24, 40, 1], [0, 40], [-1, -1], [128, 128], "24x40", [10**9, 10**9], None,
    ],
    "symmetric": [True, False, "true", None],
    "dynamic": [True, False, "local", "true", None],
    "scale_dtype": ["torch.float32", "torch.bfloat16", "torch.uint8", "float64", None],
    "zp_dtype": ["torch.int8", "torch.float8_e4m3fn", None],
    "actorder": ["weight", "group", True, None],
    "observer": ["minmax", "mse", "nonsense", 3, None],
    "observer_kwargs": [{}, {"a": 1}, None, []],
}  # fmt: skip
STATUSES = ["compressed", "frozen", "initialized", "calibration", None]
SAME_FORMATS = ["float-quantized", "naive-quantized"]
FORMATS = [
    *SAME_FORMATS, "dense", "fakequant", "int-quantized", "mixed-precision", "pack-quantized", "marlin-24",
    "nvfp4-pack-quantized", "mxfp8-quantized", "sparse-24-bitmask", "zip", "", None, 8, ["float-quantized"], {},
]  # fmt: skip
CATASTROPHIC = [
    "re:(a+)+$", "re:(.*)*x$", r"re:(\w+\.?)+!", r"re:^(([a-z])+.)+[A-Z]([a-z])+$", "re:(.|.)*Q", "re:(?=(.*)*~)",
    r"re:((\w|\.)*)*[=]", "re:(a|aa)+$",
]  # fmt: skip
TARGETS: list[Any] = [
    "Linear", "Module", "Embedding", "LlamaMLP", "linear", "lm_head", "model.layers.0.self_attn.q_proj", "q_proj",
    "model.norm", "model.embed_tokens", "re:.*", "re:", "re:.*nothing_here.*", r"re:.*self_attn\..*_proj$", "re:.*mlp.*",
    "re:model.layers.0.*", r"re:.*\.experts\..*", "re:((", "re:[", "re:(?P<x>a)(?P<x>b)", "re:" + "(" * 500 + ")" * 500,
    "re:a{99999999999}", "re:.*q_proj{e}", r"re:[[:alpha:]_.0-9]+$", "", " ", "ünïcödé", "\ud800", "a" * 5000, None, 3, [],
    {}, True,
]  # fmt: skip
# No name of any tensor or module of the bases.
NOWHERE = ["model.layers.7.self_attn.q_proj", "vision_tower", "re:.*visual.*", "re:^never$", "Conv3d"]
PRESETS = ["FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "NVFP4", "MXFP4", "INT8", "UNQUANTIZED", "no_such_preset"]


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a parsed JSON value (of what the bases hold: mutations nest deeper)."""
    if len(path) > 8:
        return []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in children for found in [(*path, key), *_nodes(child, (*path, key))]]


def _inside(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def short(value: Any) -> str:
    text = repr(value) if not isinstance(value, list) or len(_nodes(value)) < 8 else "something deeply nested"
    return text if len(text) < 60 else text[:57] + "..."


def _only_fp8(draft: Draft) -> bool:
    """Whether all groups are FP8, of which docs/formats.md speaks: the host runs others by rules of its own."""
    return all(isinstance(w := group.get("weights"), dict) and w.get("type") == "float" for group in draft.groups())


def any_key(draft: Draft, rng: Random) -> Change | None:
    """Something at a random depth of quantization_config deleted, replaced, or there twice."""
    quantization = draft.quantization
    path = some(rng, _nodes(quantization)) if quantization else None
    if path is None:
        return None
    parent, key = _inside(quantization, path[:-1]), path[-1]
    where = ".".join(map(str, path))
    what = rng.random()
    if what < 0.25:
        del parent[key]
        return Change(f"{where} deleted")
    if what < 0.4:
        twin = copy.deepcopy(parent[key])
        if isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), twin)
            return Change(f"{where} is there twice")
        name = rng.choice([f"{key}_2", f"{key} ", str(key).upper(), f"_{key}", "extra"])
        parent[name] = twin
        return Change(f"{where} is there again as {name!r}")
    parent[key] = rng.choice(ODD)()
    return Change(f"{where} is {short(parent[key])}")


def argument(draft: Draft, rng: Random) -> Change | None:
    """A value of a group's `weights` or `input_activations` that another config could have."""
    group = some(rng, draft.groups())
    part = rng.choice(["weights", "weights", "input_activations"])
    if group is None or not isinstance(group.get(part), dict):
        return None
    key = rng.choice(list(ENUMS)[: 6 if rng.random() < 0.8 else None])
    group[part][key] = copy.deepcopy(rng.choice(ENUMS[key]))
    if rng.random() < 0.3:
        other = {"strategy": "block_structure" if group[part].get("strategy") == "block" else "group_size"}.get(key, "strategy")
        group[part][other] = copy.deepcopy(rng.choice(ENUMS[other]))
    return Change(f"{part} is {group[part]}")


def whole_part(draft: Draft, rng: Random) -> Change | None:
    """Inputs of another kind, outputs quantized, weights left out."""
    group = some(rng, draft.groups())
    if group is None:
        return None
    float8 = {"num_bits": 8, "type": "float", "symmetric": True}
    key, value = rng.choice([
        ("input_activations", None),
        ("input_activations", {**float8, "strategy": "token", "dynamic": True}),
        ("input_activations", {**float8, "strategy": "tensor", "dynamic": True}),
        ("input_activations", {**float8, "strategy": "tensor", "dynamic": False}),
        ("input_activations", {**float8, "strategy": "group", "group_size": rng.choice([16, 32, 40, 128]), "dynamic": True}),
        ("input_activations", {**float8, "type": "int", "strategy": "token", "dynamic": True}),
        ("output_activations", {**float8, "strategy": "tensor", "dynamic": True}),
        ("weights", None),
        ("weights", {}),
        ("weights", {"num_bits": 8, "type": "float"}),
        ("weights", {**float8, "strategy": "tensor", "dynamic": False}),
    ])  # fmt: skip
    group[key] = value
    return Change(f"{key} of a group is {value}")


def group_targets(draft: Draft, rng: Random) -> Change | None:
    group = some(rng, draft.groups())
    if group is None:
        return None
    group["targets"] = _listed(group.get("targets"), rng, draft)
    return Change(f"targets is {short(group['targets'])}")


def ignored(draft: Draft, rng: Random) -> Change | None:
    if draft.quantization is None:
        return None
    draft.quantization["ignore"] = _listed(draft.quantization.get("ignore"), rng, draft)
    return Change(f"ignore is {short(draft.quantization['ignore'])}")


def _listed(old: Any, rng: Random, draft: Draft) -> Any:
    """A list of targets, changed."""
    listed = list(old) if isinstance(old, list) else []
    stems = [name.rpartition(".")[0] for name in draft.names if name.endswith(".weight")]
    new = rng.choice(CATASTROPHIC) if rng.random() < 0.2 else some(rng, stems) if rng.random() < 0.3 else rng.choice(TARGETS)
    new = copy.deepcopy(new)
    what = rng.random()
    if what < 0.45:
        return [*listed, new]
    if what < 0.7:
        return [new]
    if what < 0.8:
        return new
    if what < 0.9:
        return listed[1:]
    return rng.choice(ODD)()


def new_group(draft: Draft, rng: Random) -> Change | None:
    """One more group: with the targets of another and another scheme, or a preset, or one that matches little."""
    if draft.quantization is None or not draft.groups():
        return None
    groups = draft.quantization["config_groups"]
    what = rng.random()
    if what < 0.2:
        name = rng.choice(PRESETS)
        groups[name] = rng.choice([["Linear"], ["re:.*mlp.*"], "Linear", [], None])
        return Change(f"a group by preset: {name}: {groups[name]}")
    group = copy.deepcopy(rng.choice(draft.groups()))
    weights = rng.choice([
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [24, 40], "dynamic": False},
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "dynamic": False},
        {"num_bits": 8, "type": "int", "strategy": "channel", "dynamic": False},
        group.get("weights"),
    ])  # fmt: skip
    group["weights"] = weights
    if rng.random() < 0.6:
        group["targets"] = [rng.choice([target for target in TARGETS if isinstance(target, str)])]
    items = list(groups.items())
    items.insert(rng.randrange(len(items) + 1), (rng.choice(["group_9", "a", "Z", ""]), group))
    draft.quantization["config_groups"] = dict(items)
    return Change(f"one more group: {short(group.get('targets'))} {weights}")


def group_order(draft: Draft, rng: Random) -> Change | None:
    groups = (draft.quantization or {}).get("config_groups")
    if not isinstance(groups, dict) or len(groups) < 2 or draft.quantization is None:
        return None
    draft.quantization["config_groups"] = dict(reversed(groups.items()))
    return Change("groups in another order", harmless=True)


def group_name(draft: Draft, rng: Random) -> Change | None:
    groups = (draft.quantization or {}).get("config_groups")
    if not isinstance(groups, dict) or draft.quantization is None:
        return None
    draft.quantization["config_groups"] = {f"{rng.choice(['g', 'ß', 'group 0 '])}{n}": g for n, g in enumerate(groups.values())}
    return Change("groups of other names", harmless=True)


def status(draft: Draft, rng: Random) -> Change | None:
    if draft.quantization is None:
        return None
    if rng.random() < 0.7:
        value = rng.choice(STATUSES)
        harmless = _only_fp8(draft)
    else:
        value, harmless = rng.choice(["melted", "", 3, [], {}, True]), False
    draft.quantization["quantization_status"] = value
    if value is None and rng.random() < 0.5:
        del draft.quantization["quantization_status"]
    return Change(f"status {value!r}", harmless and draft.quantization.get("quantization_status", "") is not None)


def formats(draft: Draft, rng: Random) -> Change | None:
    if draft.quantization is None:
        return None
    place = some(rng, [draft.quantization, *draft.groups()])
    value = copy.deepcopy(rng.choice(FORMATS if rng.random() < 0.6 else SAME_FORMATS))
    harmless = _only_fp8(draft) and isinstance(value, str) and value in SAME_FORMATS
    place["format"] = value
    return Change(f"format {value!r} {'of all' if place is draft.quantization else 'of a group'}", harmless)


def cache_scheme(draft: Draft, rng: Random) -> Change | None:
    if draft.quantization is None:
        return None
    good = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    value = rng.choice([None, good, {**good, "num_bits": 3}, {**good, "dynamic": True}, "fp8", 8, [], {}, {"num_bits": "x"}])
    draft.quantization["kv_cache_scheme"] = value
    return Change(f"kv_cache_scheme is {value}", harmless=value is None or value is good)


def other_sections(draft: Draft, rng: Random) -> Change | None:
    if draft.quantization is None:
        return None
    key, value = rng.choice([
        ("transform_config", {"config_groups": {"R1": {"type": "hadamard", "apply": []}}}), ("transform_config", [1]),
        ("transform_config", "x"), ("sparsity_config", {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}),
        ("sparsity_config", {"format": "dense"}), ("sparsity_config", {"format": 3}), ("sparsity_config", []),
        ("sparsity_config", "dense"), ("quant_method", "fp8"), ("quant_method", "gptq"), ("quant_method", "sparseml"),
        ("quant_method", "nonsense"), ("quant_method", None), ("quant_method", 5), ("quant_method", []),
        ("run_compressed", False), ("dequantize", True), ("backend", "int8"), ("scheme", "FP8"), ("unknown_key", {"a": 1}),
    ])  # fmt: skip
    draft.quantization[key] = value
    return Change(f"{key} is {value!r}")


def harmless_keys(draft: Draft, rng: Random) -> Change | None:
    """What nobody reads, or what is the default, said or left out."""
    quantization = draft.quantization
    if quantization is None or not draft.groups():
        return None
    weights = [group["weights"] for group in draft.groups() if isinstance(group.get("weights"), dict)]
    choice = rng.randrange(6)
    if choice == 0 and isinstance(quantization.get("ignore"), list):
        quantization["ignore"].insert(0, rng.choice(NOWHERE))
        return Change(f"ignore has {quantization['ignore'][0]!r}, which is nowhere", harmless=True)
    if choice == 1:
        quantization["version"] = rng.choice(["0.6.0", "0.20.1", "99.0", None])
        return Change("another version", harmless=True)
    if choice == 2:
        quantization["global_compression_ratio"] = rng.choice([None, 1.5, 2.0])
        return Change("another global_compression_ratio", harmless=True)
    if choice == 3:
        for group in draft.groups():
            if group.get("output_activations", ...) is None:
                del group["output_activations"]
        return Change("output_activations left out", harmless=True)
    if choice == 4:
        for part in weights:
            part["observer"] = "mse"
        return Change("another observer", harmless=True)
    for part in weights:
        for key in ("actorder", "group_size", "block_structure", "scale_dtype", "zp_dtype"):
            if part.get(key, ...) is None:
                del part[key]
    return Change("nulls of weights left out", harmless=True)


def moved(draft: Draft, rng: Random) -> Change | None:
    """The quantization_config somewhere else, in two places, or nowhere."""
    if draft.quantization is None:
        return None
    what = rng.randrange(7)
    if what == 0:
        draft.config["compression_config"] = draft.config.pop("quantization_config")
        return Change("it is called compression_config", harmless=True)
    if what == 1:
        draft.config["compression_config"] = copy.deepcopy(draft.config["quantization_config"])
        return Change("compression_config beside it")
    if what == 2:
        draft.config["text_config"] = {"quantization_config": draft.config.pop("quantization_config")}
        return Change("it is in a text_config")
    if what == 3:
        draft.config["quantization_config"] = [draft.config["quantization_config"]]
        return Change("it is in a list")
    if what == 4:
        draft.config["quantization_config"] = {"quantization_config": draft.config["quantization_config"]}
        return Change("it is in itself")
    if what == 5:
        draft.config["quantization_config"] = rng.choice(ODD)()
        return Change(f"quantization_config is {short(draft.config['quantization_config'])}")
    del draft.config["quantization_config"]
    return Change("quantization_config deleted")


def repeated_key(draft: Draft, rng: Random) -> Change | None:
    """A key that the text has twice: the last one counts."""
    key = rng.choice(["num_bits", "strategy", "targets", "format", "type", "quantization_config", "hidden_size", "ignore"])
    value = json.dumps(rng.choice([None, 4, "tensor", ["re:nothing"], "int", {}]))

    def edit(text: str) -> str:
        return text.replace(f'"{key}":', f'"{key}": {value}, "{key}":', 1)

    draft.text.append(edit)
    return Change(f"{key} is there before as {value}", harmless=True)


CONFIG: dict[Fault, float] = {
    any_key: 6, argument: 6, whole_part: 3, group_targets: 5, ignored: 4, new_group: 4, group_order: 1, group_name: 1,
    status: 2, formats: 3, cache_scheme: 1, other_sections: 3, harmless_keys: 4, moved: 2, repeated_key: 2,
}  # fmt: skip
