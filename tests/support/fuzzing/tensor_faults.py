"""Mutations of tensors: scales, weights, what is beside them, experts, names."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

import torch

from .config_faults import Fault
from .drafts import Change, Draft, some

SCALE = re.compile(r"(weight_scale|input_scale|_proj_scale|_proj_input_scale)$")
FP8 = torch.float8_e4m3fn
# The spellings of docs/formats.md; the others are no names of scales, or of other things.
WEIGHT_SCALE = ["weight_scale_inv", "scale_weight"]
INPUT_SCALE = ["act_scale", "activation_scale", "input_activation_scale", "scale_input"]
WRONG = ["weight_scales", "scale", "weight_scale_2", "scales", "Weight_Scale", "weight.scale", "weight_zero_point", "w_scale"]
ODD_NAMES = [
    "",
    ".",
    "..",
    "a\u0000b",
    "ünïcödé.weight",
    "a/b\\c",
    "model.layers.0." + "x" * 3000,
    "\n",
    "weight",
    "__metadata",
]


def scales(draft: Draft) -> list[str]:
    return [name for name in draft.names if SCALE.search(name)]


def weights(draft: Draft) -> list[str]:
    return [name for name in draft.names if draft[name].dtype == FP8]


def beside(draft: Draft, weight: str) -> str | None:
    """The key of the scale of a weight, as the bases spell it."""
    name = f"{weight.removesuffix('.weight')}.weight_scale" if weight.endswith(".weight") else f"{weight}_scale"
    return name if name in draft.names else None


def scale_value(draft: Draft, rng: Random) -> Change | None:
    name = some(rng, scales(draft))
    if name is None or not draft[name].is_floating_point() or not draft[name].numel():
        return None
    tensor = draft[name].clone()
    value = rng.choice([float("nan"), float("inf"), -float("inf"), 0.0, -0.01, 1e30, 3e38, 1e-12, 1e-30, 1e-40, 0.5, 7.0])
    if rng.random() < 0.3:
        tensor.fill_(value)
        where = "all"
    else:
        place = rng.randrange(tensor.numel())
        tensor.view(-1)[place] = value
        where = f"element {place}"
    draft.put(name, tensor)
    return Change(f"{name}: {where} {value}")


def scale_dtype(draft: Draft, rng: Random) -> Change | None:
    name = some(rng, scales(draft))
    if name is None:
        return None
    dtype = rng.choice([
        torch.float32, torch.float32, torch.float16, torch.float64, torch.int32, torch.int64, FP8, torch.float8_e8m0fnu,
        torch.uint8, torch.bool, torch.bfloat16,
    ])  # fmt: skip
    old = draft[name]
    if rng.random() < 0.2 and old.element_size() == dtype.itemsize:
        draft.put(name, old.view(dtype))  # the bytes of one type under the name of another
        return Change(f"{name}: bytes of {old.dtype} as {dtype}")
    new = old.float().to(dtype)
    draft.put(name, new)
    harmless = dtype in (torch.float32, torch.bfloat16, torch.float16) and torch.equal(new.float(), old.float())
    return Change(f"{name} in {dtype}", harmless)


def scale_shape(draft: Draft, rng: Random) -> Change | None:
    name = some(rng, scales(draft))
    if name is None:
        return None
    old = draft[name]
    n = old.numel()
    stack = not name.endswith(".weight_scale") and not name.endswith(".input_scale")
    shape = rng.choice([[n], [n, 1], [1, n], [n, 1, 1], [1, n, 1], [1] * 5 + [n], [], [1, 1], list(old.shape)[::-1]])
    if shape in ([], [1, 1]) and n != 1:
        shape = [n]
    draft.put(name, old.reshape(shape))
    weight = name.removesuffix("_scale")
    rows = len(draft[weight]) if weight in draft.names and draft[weight].ndim else 0
    single = n == 1 and shape in ([], [1], [1, 1]) and not stack
    harmless = list(old.shape) == shape or single or (list(old.shape) == [rows, 1] and shape == [n] and not stack)
    return Change(f"{name}: {list(old.shape)} as {shape}", harmless)


def scale_size(draft: Draft, rng: Random) -> Change | None:
    """More or fewer values than there should be."""
    name = some(rng, scales(draft))
    if name is None or not draft[name].ndim:
        return None
    old = draft[name]
    how: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "twice": lambda t: torch.cat([t, t]), "cut": lambda t: t[:-1].clone(), "none": lambda t: t[:0].clone(),
        "first": lambda t: t.reshape(-1)[:1].clone(), "transposed": lambda t: t.mT.contiguous() if t.ndim > 1 else t[:, None],
        "columns": lambda t: t.reshape(len(t), -1)[:, :1].repeat(1, 2), "half": lambda t: t[: max(1, len(t) // 2)].clone(),
        "wide": lambda t: t.reshape(1, -1).repeat(3, 1),
    }  # fmt: skip
    what = rng.choice(sorted(how))
    draft.put(name, how[what](old))
    return Change(f"{name}: {what}, {list(old.shape)} became {list(draft[name].shape)}")


def scale_gone(draft: Draft, rng: Random) -> Change | None:
    name = some(rng, scales(draft))
    if name is None:
        return None
    if rng.random() < 0.3:
        end = name.rpartition(".")[2]
        for each in [other for other in scales(draft) if other.rpartition(".")[2] == end]:
            draft.drop(each)
        return Change(f"every {end} dropped")
    draft.drop(name)
    return Change(f"{name} dropped")


def scale_name(draft: Draft, rng: Random) -> Change | None:
    name = some(rng, [name for name in scales(draft) if name.endswith(("weight_scale", ".input_scale"))])
    if name is None:
        return None
    stem, _, role = name.rpartition(".")
    known = WEIGHT_SCALE if role == "weight_scale" else INPUT_SCALE
    new = rng.choice(known if rng.random() < 0.6 else WRONG)
    if rng.random() < 0.25:
        draft.put(f"{stem}.{new}", draft[name].clone(), name)
        return Change(f"{name} is there as {new}, too")
    everywhere = rng.random() < 0.5
    for each in [n for n in draft.names if n.endswith(f".{role}")] if everywhere else [name]:
        draft.rename(each, f"{each.rpartition('.')[0]}.{new}")
    # An int4 group is read by the host, under its own names.
    harmless = new in known and not any(n.endswith("weight_packed") for n in draft.names)
    return Change(f"{'every' if everywhere else stem} {role} is called {new}", harmless)


def swapped(draft: Draft, rng: Random) -> Change | None:
    """Two tensors in each other's place: scales, or weights, or both."""
    names = rng.choice([scales, weights])(draft)
    first, second = some(rng, names), some(rng, names)
    if first is None or first == second:
        return None
    pairs = [(first, second)]
    if first in weights(draft) and rng.random() < 0.4:
        a, b = beside(draft, first), beside(draft, second)
        pairs += [(a, b)] if a and b else []
    for a, b in pairs:
        one, other = draft[a], draft[b]
        draft.put(a, other)
        draft.put(b, one)
    return Change("swapped: " + ", ".join(" with ".join(pair) for pair in pairs))


def stray_scale(draft: Draft, rng: Random) -> Change | None:
    """Scales and zero points where none were."""
    weight = some(rng, [name for name in draft.names if name.endswith(".weight")])
    if weight is None:
        return None
    stem = weight.removesuffix("weight")
    rows = draft[weight].shape[0] if draft[weight].ndim else 1
    is_fp8 = draft[weight].dtype == FP8
    end, tensor = rng.choice([
        ("input_scale", torch.ones(1)), ("weight_scale", torch.ones(rows, 1)), ("weight_scale_inv", torch.ones(1)),
        ("weight_zero_point", torch.zeros(rows, 1)), ("input_zero_point", torch.zeros(1, dtype=torch.int8)),
        ("weight_zero_point", torch.ones(rows, 1)), ("input_zero_point", torch.full((1,), 3, dtype=torch.int8)),
        ("weight_global_scale", torch.ones(1)), ("weight_g_idx", torch.zeros(4, dtype=torch.int32)),
        ("output_scale", torch.ones(1)), ("k_scale", torch.ones(1)), ("weight_shape", torch.tensor([4, 4])),
    ])  # fmt: skip
    fresh = f"{stem}{end}" not in draft.names
    draft.put(f"{stem}{end}", tensor, weight)
    harmless = fresh and is_fp8 and "zero_point" in end and not tensor.any().item()
    return Change(f"{stem}{end} of {tensor.reshape(-1)[0].item()} added", harmless)


def cache_scales(draft: Draft, rng: Random) -> Change | None:
    layer = some(rng, sorted({m[0] for name in draft.names if (m := re.match(r".*layers\.\d+\.self_attn\.", name))}))
    if layer is None:
        return None
    value = rng.choice([0.02, float("nan"), -1.0])
    for name in ("k_scale", "v_scale"):
        draft.put(f"{layer}{name}", torch.tensor([value]), f"{layer}o_proj.weight")
    return Change(f"{layer}k_scale and v_scale of {value}", harmless=value > 0)


def codes(draft: Draft, rng: Random) -> Change | None:
    """A weight's values: NaN, or stored otherwise than in E4M3."""
    name = some(rng, weights(draft))
    if name is None:
        return None
    old = draft[name]
    scale = beside(draft, name)
    what = rng.choice(
        ["nan", "I8", "U8", "E5M2", "FNUZ", "E8M0", "BF16", "F32", "multiplied out", "out, scale gone", "zeros", "F64"]
    )
    values = old.float()
    if what == "nan":
        raw = old.clone().view(torch.uint8)
        raw.view(-1)[rng.randrange(raw.numel())] = rng.choice([0x7F, 0xFF])
        new = raw.view(FP8)
    elif what in ("multiplied out", "out, scale gone"):
        factor = draft[scale].float() if scale else torch.ones(1)
        try:
            new = (values * factor).bfloat16()
        except RuntimeError:
            return None
        if what == "out, scale gone" and scale:
            draft.drop(scale)
    else:
        new = {
            "I8": lambda: old.view(torch.int8), "U8": lambda: old.view(torch.uint8),
            "E5M2": lambda: old.view(torch.float8_e5m2), "FNUZ": lambda: old.view(torch.float8_e4m3fnuz),
            "E8M0": lambda: old.view(torch.float8_e8m0fnu), "BF16": values.bfloat16, "F32": lambda: values,
            "zeros": lambda: torch.zeros_like(values).to(FP8), "F64": values.double,
        }[what]()  # fmt: skip
    draft.put(name, new)
    return Change(f"{name}: {what}")


def weight_shape(draft: Draft, rng: Random) -> Change | None:
    name = some(rng, weights(draft))
    if name is None or draft[name].ndim < 2 or not draft[name].numel():
        return None
    old = draft[name].view(torch.uint8)
    what = rng.choice(["transposed", "flat", "rows", "columns", "more rows", "3-D", "4-D", "scalar", "empty", "same size"])
    rows, cols = old.shape[-2:]
    new = {
        "transposed": lambda: old.mT, "flat": lambda: old.reshape(-1), "rows": lambda: old[..., : rows - 1, :],
        "columns": lambda: old[..., : cols // 2], "more rows": lambda: torch.cat([old, old], -2), "3-D": lambda: old[None],
        "4-D": lambda: old[None, None], "scalar": lambda: old.reshape(-1)[0], "empty": lambda: old[..., :0],
        "same size": lambda: old.reshape(*old.shape[:-2], cols * 2, rows // 2) if rows % 2 == 0 else old.mT,
    }[what]()  # fmt: skip
    draft.put(name, new.contiguous().clone().view(FP8))
    return Change(f"{name}: {what}, {list(old.shape)} became {list(new.shape)}")


def gone(draft: Draft, rng: Random) -> Change | None:
    """Tensors left out: a weight, with its scales or without, a norm, an embedding, one kind in all layers, a layer."""
    name = some(rng, draft.names)
    if name is None:
        return None
    what = rng.random()
    if what < 0.4:
        names = [name]
    elif what < 0.6:
        names = [other for other in draft.names if other.rpartition(".")[0] == name.rpartition(".")[0]]
    elif what < 0.8:
        end = ".".join(name.split(".")[-2:])
        names = [other for other in draft.names if other.endswith(end)]
    else:
        layer = re.match(r".*layers\.\d+\.", name)
        names = [other for other in draft.names if layer and other.startswith(layer[0])] or [name]
    for each in names:
        draft.drop(each)
    return Change(f"dropped: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))


def added(draft: Draft, rng: Random) -> Change | None:
    """Tensors that belong to nothing."""
    weight = some(rng, weights(draft))
    if weight is None:
        return None
    tensor = draft[weight]
    stem = rng.choice(["model.ghost", "model.layers.0.mlp.ghost_proj", "model.layers.9.self_attn.q_proj", "ghost", *ODD_NAMES])
    what = rng.choice(["dense", "FP8", "FP8 with scale", "scale", "empty", "int"])
    if what == "dense":
        draft.put(f"{stem}.weight", torch.ones(4, 4).bfloat16(), weight)
    elif what in ("FP8", "FP8 with scale"):
        draft.put(f"{stem}.weight", tensor.clone(), weight)
        scale = beside(draft, weight)
        if what == "FP8 with scale" and scale:
            draft.put(f"{stem}.weight_scale", draft[scale].clone(), weight)
    elif what == "scale":
        draft.put(f"{stem}.weight_scale", torch.ones(4, 1), weight)
    else:
        draft.put(stem, torch.zeros(0) if what == "empty" else torch.zeros(3, dtype=torch.int64), weight)
    return Change(f"added: {what} {stem[:40]!r}")


def dense_tensor(draft: Draft, rng: Random) -> Change | None:
    """A norm, an embedding, a head, a router, a bias."""
    quantized = {*weights(draft), *scales(draft)}
    name = some(rng, [n for n in draft.names if n not in quantized and draft[n].is_floating_point()])
    if name is None:
        return None
    old = draft[name]
    what = rng.choice(["nan", "FP8", "F32", "F16", "I64", "shape", "cut", "E5M2", "F64", "bool"])
    new = {
        "nan": lambda: old.clone().index_fill_(0, torch.tensor([0]), float("nan")) if old.ndim else old,
        "FP8": lambda: old.to(FP8), "F32": old.float, "F16": old.half, "I64": old.long, "shape": lambda: old.reshape(-1, 1),
        "cut": lambda: old[:-1].clone(), "E5M2": lambda: old.to(torch.float8_e5m2), "F64": old.double, "bool": old.bool,
    }[what]()  # fmt: skip
    draft.put(name, new.contiguous())
    return Change(f"{name}: {what}", harmless=what in ("F32", "F64"))


def tensor_name(draft: Draft, rng: Random) -> Change | None:
    name = some(rng, draft.names)
    if name is None:
        return None
    if rng.random() < 0.4:
        prefix, new = rng.choice([
            ("model.", ""), ("", "model."), ("", "language_model."), ("model.", "model.language_model."),
            ("model.", "transformer."), ("model.", "base_model.model.model."), ("", "_orig_mod."), ("", "module."),
        ])  # fmt: skip
        for each in [n for n in draft.names if n.startswith(prefix)]:
            draft.rename(each, new + each.removeprefix(prefix))
        return Change(f"every {prefix!r} became {new!r}")
    other = rng.choice([
        name.upper(), name + " ", name.replace(".", "_"), name.replace("proj", "prøj"), name.replace("layers.0", "layers.00"),
        name.replace("layers.0", "layers.-1"), name.replace("layers.1", "layers.99999999999999999999"), name + ".weight",
        name.replace("self_attn", "attention"), name.replace(".weight", ".qweight"), *ODD_NAMES,
    ])  # fmt: skip
    if other == name or other in draft.names:
        return None
    draft.rename(name, other)
    return Change(f"{name} is called {other[:60]!r}")


def experts(draft: Draft, rng: Random) -> Change | None:
    """One expert gone, one too many, one after a gap, one of another dtype or stored dense."""
    found = sorted({m[0] for name in draft.names if (m := re.match(r".*experts\.\d+\.", name))})
    stem = some(rng, found)
    if stem is None:
        return None
    what = rng.choice(["gone", "copied", "numbered", "scales in F32", "dense", "part gone", "number"])
    mine = [name for name in draft.names if name.startswith(stem)]
    path = re.sub(r"\d+\.$", "", stem)
    number = rng.choice(["4", "5", "17", "00", "-1", "1000000", "x", "1.0"])
    if what == "gone":
        for name in mine:
            draft.drop(name)
    elif what == "part gone":
        end = rng.choice(mine).removeprefix(stem).rpartition(".")[0]
        for name in [name for name in mine if name.removeprefix(stem).startswith(end)]:
            draft.drop(name)
    elif what in ("copied", "numbered", "number"):
        for name in mine if what != "number" else mine[:1]:
            draft.put(f"{path}{number}.{name.removeprefix(stem)}", draft[name].clone(), name)
            if what != "copied":
                draft.drop(name)
    else:
        for name in [name for name in mine if not (what == "dense" and SCALE.search(name))]:
            if what == "scales in F32" and SCALE.search(name):
                draft.put(name, draft[name].float())
            elif what == "dense" and draft[name].dtype == FP8:
                scale = beside(draft, name)
                draft.put(name, draft[name].float().bfloat16())
                if scale:
                    draft.drop(scale)
    return Change(f"{stem}: {what} {number if 'number' in what or what == 'copied' else ''}", harmless=what == "scales in F32")


TENSORS: dict[Fault, float] = {
    scale_value: 6, scale_dtype: 4, scale_shape: 4, scale_size: 4, scale_gone: 2, scale_name: 3, swapped: 3, stray_scale: 4,
    cache_scales: 1, codes: 5, weight_shape: 3, gone: 3, added: 3, dense_tensor: 4, tensor_name: 3, experts: 4,
}  # fmt: skip
