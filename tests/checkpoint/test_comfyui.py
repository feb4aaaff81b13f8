"""FP8 weights of single files as ComfyUI stores them: read, written, refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hf_fp8
from hf_fp8 import (
    FP8_TENSOR,
    QuantizedLinear,
    Scheme,
    TensorScheme,
    errors,
    load_fp8_state_dict,
    quantize_model,
    save_quantized,
)
from hf_fp8.checkpoint.dialects import comfyui
from hf_fp8.checkpoint.reader import Checkpoint
from hf_fp8.formats.scheme import TENSOR

State = dict[str, torch.Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WEIGHT_ONLY = Scheme(TensorScheme(TENSOR))
STATIC = Scheme(TensorScheme(TENSOR), TensorScheme(TENSOR))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.proj = nn.Linear(96, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.proj(self.qkv(self.norm(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 32, 1)
        self.table = nn.Embedding(8, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(32, 4)
        self.register_buffer("step", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2) + self.table(self.step % 8)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "proj")]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def values(state: State, scales: dict[str, float], dtype: torch.dtype = E4M3) -> tuple[State, State]:
    """(tensors with codes under "X.weight", the dense tensors that they stand for)."""
    stored, dense = dict(state), dict(state)
    for name, scale in scales.items():
        codes = (state[f"{name}.weight"] / scale).clamp(-448, 448).to(dtype)
        stored[f"{name}.weight"], dense[f"{name}.weight"] = codes, codes.float() * scale
    return stored, dense


SCALES = {name: 0.0007 * (i + 1) for i, name in enumerate(LAYERS)}
INPUTS = {LAYERS[0]: 0.02, LAYERS[1]: 1.0}


def file_of(form: str, full: bool, prefix: str = "", inputs: bool = True) -> tuple[State, dict[str, str], Net]:
    """(tensors, metadata, the dense twin) of a file in one of the forms."""
    stored, dense = values(net().state_dict(), SCALES)
    state = {prefix + key: tensor for key, tensor in stored.items()}
    weight, input = ("scale_weight", "scale_input") if form == "scaled_fp8" else ("weight_scale", "input_scale")
    for name, scale in SCALES.items():
        state[f"{prefix}{name}.{weight}"] = torch.tensor(scale)
        if inputs and name in INPUTS:
            state[f"{prefix}{name}.{input}"] = torch.tensor([INPUTS[name]])
    config = {"format": "float8_e4m3fn", **({"full_precision_matrix_mult": True} if full else {})}
    metadata = {}
    if form == "scaled_fp8":
        state[f"{prefix}scaled_fp8"] = torch.zeros(2 if full else 0, dtype=E4M3)
    elif form == "metadata":
        layers = {prefix + name: config for name in SCALES}
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    else:
        for name in SCALES:
            state[f"{prefix}{name}.comfy_quant"] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    twin = net()
    twin.load_state_dict(dense)
    return state, metadata, twin


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("form", ["scaled_fp8", "metadata", "tensors"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("full", [False, True])
def test_all_forms_mean_the_same(form: str, prefix: str, full: bool, tmp_path: Path) -> None:
    state, metadata, twin = file_of(form, full, prefix)
    if prefix:
        state["first_stage_model.decoder.weight"] = torch.zeros(3)  # of another model
    save_file(state, tmp_path / "model.safetensors", metadata)
    model = load_fp8_state_dict(net(1), tmp_path / "model.safetensors", backend="weight_only")
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert sorted(found) == sorted(LAYERS)
    with torch.no_grad():
        assert error(model(X), twin(X)) <= 1e-5
    for name, layer in found.items():
        assert torch.equal(layer.held_codes("weight").view(torch.uint8), state[f"{prefix}{name}.weight"].view(torch.uint8))
        assert layer.weight_scale.item() == torch.tensor(SCALES[name]).item() and layer.weight_scale.dtype == torch.float32
    # An input scale of exactly 1 is a placeholder in the form with the marker only (`convert_old_quants`).
    static = {LAYERS[0]} if form == "scaled_fp8" else set(INPUTS)
    assert {name for name, layer in found.items() if layer.has_static_input} == static
    assert all(found[name].input_scale.item() == torch.tensor(INPUTS[name]).item() for name in static)
    auto = load_fp8_state_dict(net(1), tmp_path / "model.safetensors")
    assert {auto.get_submodule(name).backend for name in LAYERS} == {"weight_only" if full else "auto"}
    dense = load_fp8_state_dict(net(1), state, metadata=metadata, dequantize=True)
    assert all(torch.equal(a, b) for a, b in zip(dense.state_dict().values(), twin.state_dict().values(), strict=True))


def test_inputs_are_quantized_with_the_scale_of_the_file() -> None:
    state, metadata, twin = file_of("metadata", full=False)
    model = load_fp8_state_dict(net(), state, metadata=metadata, backend="scaled_mm")
    layer, x = model.blocks[0].qkv, torch.randn(5, 32)
    rounded = (x / 0.02).clamp(-448, 448).to(E4M3).float() * 0.02
    with torch.no_grad():
        assert error(layer(x), twin.blocks[0].qkv(rounded)) < 1e-5
        assert error(layer(x), twin.blocks[0].qkv(x)) > 1e-3


def test_int8() -> None:
    state, metadata, twin = file_of("metadata", full=True)
    model = load_fp8_state_dict(net(), state, metadata=metadata, backend="int8")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert {layer.weight.dtype for layer in layers} == {torch.int8} and len(layers) == len(LAYERS)
    with torch.no_grad():
        assert error(model(X), twin(X)) < 0.03


def test_values_that_were_cast_have_the_scale_one(tmp_path: Path) -> None:
    """A checkpoint that was cast as a whole: biases, norms, embeddings and convolutions, too."""
    state = {k: t.to(E4M3) if t.is_floating_point() else t for k, t in net().state_dict().items()}
    twin = net()
    twin.load_state_dict({key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()})
    save_file(state, tmp_path / "cast.safetensors")
    for model in (net(1), net(1).to("meta").to_empty(device="cpu")):
        load_fp8_state_dict(model, tmp_path / "cast.safetensors", backend="weight_only")
        assert {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)} == {*LAYERS, "out"}
        assert all(layer.weight_scale.item() == 1 for layer in model.modules() if isinstance(layer, QuantizedLinear))
        assert {p.dtype for n, p in model.named_parameters() if not n.endswith((".weight", "_scale"))} == {torch.float32}
        with torch.no_grad():
            assert error(model(X), twin(X)) <= 1e-5


def test_a_model_on_meta_and_in_bfloat16(tmp_path: Path) -> None:
    state, metadata, twin = file_of("scaled_fp8", full=True)
    save_file(state, tmp_path / "model.safetensors", metadata)
    with torch.device("meta"):
        model = Net().to(torch.bfloat16)
    load_fp8_state_dict(model, tmp_path / "model.safetensors", backend="weight_only").eval()
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert model.blocks[0].norm.weight.dtype == torch.bfloat16 and model.step.item() == 3
    with torch.no_grad():
        assert error(model(X.bfloat16()).float(), twin(X)) < 0.02


def test_shared_modules_and_a_linear_alone() -> None:
    codes = torch.randn(8, 8).to(E4M3)
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU())
    tied.append(tied[0])
    for state in ({"0.weight": codes, "2.weight": codes}, {"0.weight": codes}):
        model = load_fp8_state_dict(copy.deepcopy(tied), state, backend="weight_only")
        assert isinstance(model[0], QuantizedLinear) and model[2] is model[0]
    alone = load_fp8_state_dict(nn.Linear(8, 8, bias=False), {"weight": codes}, backend="weight_only")
    assert isinstance(alone, QuantizedLinear) and torch.equal(alone(torch.eye(8)), codes.float().T)


# -- writing --


@pytest.mark.parametrize("form", ["fp8_scaled", "comfy_quant"])
@pytest.mark.parametrize("scheme", [FP8_TENSOR, WEIGHT_ONLY, STATIC])
def test_written_and_read_back(form: str, scheme: Scheme, tmp_path: Path) -> None:
    model = quantize_model(net(), scheme, ignore=["out"], backend="auto" if scheme == STATIC else "weight_only")
    if scheme == STATIC:
        with hf_fp8.calibrate(model):
            model(X)
    save_quantized(model, tmp_path / "a.safetensors", format=form)
    again = load_fp8_state_dict(net(1), tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[key].reshape(-1).view(torch.uint8)), key
    for name in LAYERS:
        layer = again.get_submodule(name)
        assert layer.scheme == (STATIC if scheme == STATIC else WEIGHT_ONLY)
        assert layer.backend == ("auto" if scheme == STATIC else "weight_only")
    with torch.no_grad():
        assert torch.equal(model(X), again(X))
    save_quantized(again, tmp_path / "b.safetensors", format=form)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_what_is_in_the_file(tmp_path: Path) -> None:
    model = quantize_model(net(), "FP8_TENSOR", ignore=["out"])
    save_quantized(model, tmp_path / "old.safetensors", format="fp8_scaled")
    old = load_file(tmp_path / "old.safetensors")
    assert old["scaled_fp8"].shape == (2,) and old["scaled_fp8"].dtype == E4M3
    assert old["blocks.0.qkv.scale_weight"].shape == () and old["blocks.0.qkv.scale_weight"].dtype == torch.float32
    assert not any("weight_scale" in key for key in old)
    save_quantized(model, tmp_path / "new.safetensors", format="comfy_quant")
    with safe_open(tmp_path / "new.safetensors", "pt") as opened:
        said = json.loads(opened.metadata()["_quantization_metadata"])
        names = list(opened.keys())
    assert "blocks.0.qkv.weight_scale" in names and "scaled_fp8" not in names
    config = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert said == {"format_version": "1.0", "layers": dict.fromkeys(LAYERS, config)}


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize_model(net(), "FP8_TENSOR", ignore=["out"])
    good = tmp_path / "good.safetensors"
    save_quantized(model, good, format="fp8_scaled")
    before = good.read_bytes()
    for scheme in ("FP8_DYNAMIC", "INT8", "FP8_BLOCK"):
        with pytest.raises(errors.UnsupportedError, match=r"blocks\.0\.qkv is a QuantizedLinear with .*FP8_TENSOR"):
            save_quantized(quantize_model(net(), scheme, targets=["re:blocks"]), good, format="fp8_scaled")
    with pytest.raises(errors.ConfigError, match=r"must end in \.safetensors"):
        save_quantized(model, tmp_path / "folder", format="comfy_quant")
    with pytest.raises(errors.ConfigError, match="format='gguf'"):
        save_quantized(model, good, format="gguf")
    with pytest.raises(errors.CalibrationError, match=r"blocks\.0\.qkv has no input scale yet"):
        save_quantized(quantize_model(net(), STATIC), good, format="fp8_scaled")
    mixed = quantize_model(net(), {STATIC: ["re:.*qkv"], WEIGHT_ONLY: ["re:.*proj"]})
    with hf_fp8.calibrate(mixed):
        mixed(X)
    with pytest.raises(errors.UnsupportedError, match=r"quantizes inputs, and other layers do not.*comfy_quant"):
        save_quantized(mixed, good, format="fp8_scaled")
    save_quantized(mixed, tmp_path / "mixed.safetensors", format="comfy_quant")
    again = load_fp8_state_dict(net(), tmp_path / "mixed.safetensors")
    assert [again.get_submodule(name).has_static_input for name in LAYERS] == [True, False, True, False]
    # A save that fails on the way leaves the file that is there.
    monkeypatch.setattr("hf_fp8.checkpoint.writer.ShardWriter.write", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_quantized(model, good, format="comfy_quant")
    assert good.read_bytes() == before and not list(tmp_path.glob(".*"))


# -- refused, by name, before anything is changed --


def nvfp4(state: State, meta: dict[str, Any]) -> None:
    meta["layers"]["blocks.1.proj"] = {"format": "nvfp4"}


BROKEN: dict[str, tuple[str, Any, type[Exception], str]] = {
    "no weight": (
        "scaled_fp8",
        lambda s, m: s.pop("blocks.0.qkv.weight"),
        errors.MissingTensorError,
        r"blocks\.0\.qkv\.weight",
    ),
    "no scale": (
        "scaled_fp8",
        lambda s, m: s.pop("blocks.0.qkv.scale_weight"),
        errors.MissingTensorError,
        r"blocks\.0\.qkv\.scale_weight",
    ),
    "no scale for a weight without an input scale": (
        "scaled_fp8",
        lambda s, m: s.pop("blocks.1.qkv.scale_weight"),
        errors.MissingTensorError,
        r"blocks\.1\.qkv\.scale_weight",
    ),
    "no scale (new)": (
        "metadata",
        lambda s, m: s.pop("blocks.0.qkv.weight_scale"),
        errors.MissingTensorError,
        r"blocks\.0\.qkv\.weight_scale",
    ),
    "no marker": ("scaled_fp8", lambda s, m: s.pop("scaled_fp8"), errors.UnusedTensorError, r"blocks\.0\.\w+\.scale_\w+"),
    "odd marker": (
        "scaled_fp8",
        lambda s, m: s.update(scaled_fp8=torch.zeros(5, dtype=E4M3)),
        errors.ConfigError,
        r"scaled_fp8 is F8_E4M3 \[5\]",
    ),
    "orphan": (
        "metadata",
        lambda s, m: s.update({"out.weight_scale": torch.ones(())}),
        errors.UnusedTensorError,
        r"out\.weight_scale",
    ),
    "smoothing": (
        "metadata",
        lambda s, m: s.update({"out.pre_quant_scale": torch.ones(32)}),
        errors.UnusedTensorError,
        r"out\.pre_quant_scale",
    ),
    "nan": (
        "scaled_fp8",
        lambda s, m: s.update({"blocks.1.proj.scale_weight": torch.tensor(float("nan"))}),
        errors.ScaleError,
        r"blocks\.1\.proj\.scale_weight.* is nan",
    ),
    "zero": (
        "metadata",
        lambda s, m: s.update({"blocks.0.qkv.input_scale": torch.zeros(1)}),
        errors.ScaleError,
        r"blocks\.0\.qkv\.input_scale",
    ),
    "per channel": (
        "metadata",
        lambda s, m: s.update({"blocks.0.qkv.weight_scale": torch.ones(96, 1)}),
        errors.ScaleError,
        r"blocks\.0\.qkv\.weight_scale is F32 \[96, 1\]",
    ),
    "dense": (
        "metadata",
        lambda s, m: s.update({"blocks.0.qkv.weight": torch.ones(96, 32)}),
        errors.MismatchError,
        r"blocks\.0\.qkv\.weight is F32",
    ),
    "bytes": (
        "metadata",
        lambda s, m: s.update({"blocks.0.qkv.weight": s["blocks.0.qkv.weight"].view(torch.uint8)}),
        errors.MismatchError,
        r"blocks\.0\.qkv\.weight is U8",
    ),
    "shape": (
        "metadata",
        lambda s, m: s.update({"blocks.0.qkv.weight": torch.zeros(32, 96).to(E4M3)}),
        errors.MismatchError,
        r"blocks\.0\.qkv\.weight is F8_E4M3 \[32, 96\].*\[96, 32\]",
    ),
    "missing": ("metadata", lambda s, m: s.pop("blocks.0.norm.bias"), errors.MissingTensorError, r"blocks\.0\.norm\.bias"),
    "unexpected": (
        "metadata",
        lambda s, m: s.update({"blocks.9.bias": torch.ones(1)}),
        errors.CheckpointError,
        r"blocks\.9\.bias",
    ),
    "nvfp4": ("metadata", nvfp4, errors.UnsupportedError, r"blocks\.1\.proj has the format 'nvfp4'"),
    "mxfp8": (
        "metadata",
        lambda s, m: m["layers"].update({"out": {"format": "mxfp8"}}),
        errors.UnsupportedError,
        "out has the format 'mxfp8'",
    ),
    "int8": (
        "metadata",
        lambda s, m: m["layers"].update({"out": {"format": "int8_tensorwise"}}),
        errors.UnsupportedError,
        "int8_tensorwise",
    ),
    "convrot": (
        "metadata",
        lambda s, m: m["layers"]["blocks.0.qkv"].update(convrot=True),
        errors.UnsupportedError,
        r"blocks\.0\.qkv .*'convrot'",
    ),
    "version": ("metadata", lambda s, m: m.update(format_version="2.0"), errors.UnsupportedError, "format_version '2.0'"),
    "no layers": ("metadata", lambda s, m: m.pop("layers"), errors.ConfigError, "no `layers`"),
    "not json": (
        "tensors",
        lambda s, m: s.update({"blocks.0.qkv.comfy_quant": torch.tensor([123, 123], dtype=torch.uint8)}),
        errors.ConfigError,
        r"blocks\.0\.qkv\.comfy_quant cannot be read",
    ),
    "not bytes": (
        "tensors",
        lambda s, m: s.update({"blocks.0.qkv.comfy_quant": torch.ones(3)}),
        errors.ConfigError,
        r"blocks\.0\.qkv\.comfy_quant is F32",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    form, breaks, kind, text = BROKEN[case]
    state, metadata, _ = file_of(form, full=True)
    meta = json.loads(metadata.get("_quantization_metadata", "{}"))
    breaks(state, meta)
    save_file(state, tmp_path / "model.safetensors", {"_quantization_metadata": json.dumps(meta)} if meta else None)
    model = net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=text):
        load_fp8_state_dict(model, tmp_path / "model.safetensors")
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_two_descriptions_must_agree() -> None:
    state, metadata, _ = file_of("metadata", full=True)
    config = b'{"format": "float8_e4m3fn"}'
    state["blocks.0.qkv.comfy_quant"] = torch.tensor(list(config), dtype=torch.uint8)
    with pytest.raises(errors.ConfigError, match=r"blocks\.0\.qkv\.comfy_quant says"):
        load_fp8_state_dict(net(), state, metadata=metadata)


def test_other_models_and_arguments(tmp_path: Path) -> None:
    state, _, _ = file_of("scaled_fp8", full=True)
    with pytest.raises(errors.CheckpointError, match=r"has no tensor of the model, whose names are like bias, weight"):
        load_fp8_state_dict(nn.Linear(2, 2), state)
    with pytest.raises(errors.UnsupportedError, match="has quantized layers"):
        load_fp8_state_dict(quantize_model(net()), state)
    with pytest.raises(errors.CheckpointError, match="has no FP8 weights"):
        load_fp8_state_dict(net(), net().state_dict())
    with pytest.raises(errors.ConfigError, match="backend='fast'"):
        load_fp8_state_dict(net(), state, backend="fast")
    with pytest.raises(errors.CheckpointError, match="extra in the state dict is a int, not a tensor"):
        load_fp8_state_dict(net(), {**state, "extra": 3})
    with pytest.raises(errors.MissingTensorError, match="does not exist"):
        load_fp8_state_dict(net(), tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(errors.CorruptFileError, match=r"cut\.safetensors"):
        load_fp8_state_dict(net(), tmp_path / "cut.safetensors")
    odd = {f"my.{key}": tensor for key, tensor in state.items()}
    with pytest.raises(errors.CheckpointError, match="Pass the `prefix`"):
        load_fp8_state_dict(net(), odd)
    assert isinstance(load_fp8_state_dict(net(), odd, prefix="my.").blocks[0].qkv, QuantizedLinear)
    del state["out.bias"]
    model = net(1)
    kept = model.out.bias.clone()
    load_fp8_state_dict(model, {**state, "other": torch.ones(1)}, strict=False)
    assert torch.equal(model.out.bias, kept)


def test_e5m2(tmp_path: Path) -> None:
    stored, dense = values(net().state_dict(), SCALES, E5M2)
    state = {
        **stored,
        "scaled_fp8": torch.zeros(2, dtype=E5M2),
        **{f"{n}.scale_weight": torch.tensor(s) for n, s in SCALES.items()},
    }
    model = load_fp8_state_dict(net(), state, dequantize=True)
    assert all(torch.equal(tensor, dense[key]) for key, tensor in model.state_dict().items())
    quantized = load_fp8_state_dict(net(), state, backend="weight_only")
    with torch.no_grad():
        assert error(quantized(X), model(X)) <= 1e-5


def test_layers_whose_weight_others_read_are_dense(caplog: pytest.LogCaptureFixture) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.wo = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wo(self.fc(x).to(self.wo.weight.dtype))

    state = {key: tensor.to(E4M3) for key, tensor in Reads().state_dict().items()}
    model = load_fp8_state_dict(Reads(), state)
    assert isinstance(model.fc, QuantizedLinear) and type(model.wo) is nn.Linear
    assert torch.equal(model.wo.weight, state["wo.weight"].float()) and "loaded dense" in caplog.text


def test_a_description_needs_no_model(tmp_path: Path) -> None:
    state, metadata, _ = file_of("scaled_fp8", full=True, prefix="model.diffusion_model.")
    save_file(state, tmp_path / "model.safetensors", metadata)
    checkpoint = Checkpoint([str(tmp_path / "model.safetensors")])
    found = comfyui.describe(checkpoint.metadata(checkpoint.files[0]), checkpoint.tensors, checkpoint.load)
    assert found.form == "scaled_fp8" and found.markers == {"model.diffusion_model.scaled_fp8"}
    layer = found.layers["model.diffusion_model.blocks.0.qkv"]
    assert layer.scheme == STATIC and layer.full_precision and layer.dtype == "F8_E4M3"
    assert layer.keys["weight_scale"] == "model.diffusion_model.blocks.0.qkv.scale_weight"
