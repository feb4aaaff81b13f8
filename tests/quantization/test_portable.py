"""Quantized models that are not transformers': saved and loaded to the bit, and files that are damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.build import differing, tensors, tiny_llama
from torch import nn

import hf_fp8
from hf_fp8 import FP8Error, QuantizedConv1x1, QuantizedLinear, load_quantized, quantize_model, save_quantized
from hf_fp8.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    CorruptFileError,
    MismatchError,
    MissingTensorError,
    ScaleError,
    StateDictError,
    UnsupportedError,
)

pytestmark = pytest.mark.hostless

State = dict[str, torch.Tensor]
NAMES = ["FP8_DYNAMIC", "FP8", "FP8_BLOCK", "FP8_WEIGHT_ONLY", "FP8_TENSOR", "INT8", "INT8_WEIGHT_ONLY"]
X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, a norm with buffers, a layer in two places, two layers with one weight, a layer that is left alone."""

    def __init__(self, stride: int = 2, kernel: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(16, 32, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(32)
        self.first = nn.Linear(32, 32)
        self.again = self.first
        self.one, self.two = nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.__dict__["_modules"]["two"].weight = self.__dict__["_modules"]["one"].weight
        self.dense = nn.Linear(32, 8)
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("empty", torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        return self.dense(self.two(self.one(self.again(self.first(x).relu())))) * self.steps[1]


def made(scheme: str = "FP8_DYNAMIC", dtype: torch.dtype = torch.float32, **options: Any) -> Net:
    model = Net().eval().to(dtype)
    quantize_model(model, scheme, conv1x1=True, filter_fn=lambda name, _: name != "dense", **options)
    if scheme == "FP8":
        with hf_fp8.calibrate(model), torch.no_grad():
            model(X.to(dtype))
    return model


def empty(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Net:
    with torch.device(device):
        model = Net().eval().to(dtype)
    for tensor in model.state_dict().values():
        if device == "cpu" and tensor.is_floating_point():
            tensor.fill_(7.0)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", NAMES)
def test_there_and_back(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(scheme, dtype)
    save_quantized(model, tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == ["model.safetensors", "quantization.json"]
    for device in ("cpu", "meta"):
        again = empty(device, dtype)
        assert load_quantized(again, tmp_path / "saved") is again
        assert differing(dict(model.state_dict()), dict(again.state_dict())) == []
        with torch.no_grad():
            assert torch.equal(again(X.to(dtype)), model(X.to(dtype)))
        assert type(again.conv) is QuantizedConv1x1 and type(again.dense) is nn.Linear and not again.training
        assert again.first is again.again and again.one.weight is again.two.weight
        assert again.one.weight_scale is again.two.weight_scale
        assert again.first.scheme == model.first.scheme and again.first.shares_input == model.first.shares_input
        trainable = {name for name, p in again.named_parameters() if p.requires_grad}
        assert trainable == {name for name, p in model.named_parameters() if p.requires_grad} and "first.bias" in trainable
        save_quantized(again, tmp_path / device)
        for file in ("model.safetensors", "quantization.json"):
            assert (tmp_path / device / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W4AFP8", "W8A16"])
def test_packed_weights(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def built() -> nn.Sequential:
        first = nn.Linear(128, 17, dtype=dtype)
        model = nn.Sequential(first, nn.Linear(17, 128, dtype=dtype), first, nn.Linear(17, 128, dtype=dtype))
        model[3].weight = model[1].weight
        return model

    model = quantize_model(built(), scheme, filter_fn=lambda name, _: name in ("0", "2"))
    save_quantized(model, tmp_path / "saved")
    again = load_quantized(built(), tmp_path / "saved")
    assert differing(dict(model.state_dict()), dict(again.state_dict())) == []
    x = torch.randn(3, 128, dtype=dtype)
    assert torch.equal(again(x), model(x)) and again[0] is again[2] and type(again[0]) is hf_fp8.PackedLinear
    assert again[1].weight is again[3].weight


def test_convolutions_hold_no_packed_weights() -> None:
    model = quantize_model(nn.Sequential(nn.Linear(128, 128), nn.Conv2d(128, 128, 1)), "W4A16", conv1x1=True)
    assert [type(module) for module in model] == [hf_fp8.PackedLinear, nn.Conv2d]


def test_packed_weights_of_another_size(tmp_path: Path) -> None:
    """17 columns take as many elements as 24."""
    scheme = replace(hf_fp8.W4A16, weight=replace(hf_fp8.W4A16.weight, granularity=hf_fp8.Granularity(1, -1)))
    small = quantize_model(nn.Sequential(nn.Linear(17, 8)), scheme)
    save_quantized(small, tmp_path / "saved")
    with pytest.raises(MismatchError, match=r"0.weight_shape .* says \[8, 17\], but the model has Linear\(in_features=24"):
        load_quantized(nn.Sequential(nn.Linear(24, 8)), tmp_path / "saved")
    large = quantize_model(nn.Sequential(nn.Linear(24, 8)), scheme)
    with pytest.raises(StateDictError, match=r"0.weight_shape says \[8, 17\]"):
        large.load_state_dict(small.state_dict())


def test_another_dtype_of_the_model_is_the_files(tmp_path: Path) -> None:
    model = made(dtype=torch.bfloat16)
    save_quantized(model, tmp_path / "saved")
    again = load_quantized(empty(), tmp_path / "saved", device="cpu")
    assert differing(dict(model.state_dict()), dict(again.state_dict())) == []


@pytest.mark.parametrize("options", [
    {"originals": "keep"}, {"originals": "offload"}, {"backward": "quantized"},
    {"compute_dtype": torch.bfloat16}, {"backend": "weight_only"},
    {"compute_dtype": torch.bfloat16, "cast_output": False, "backend": "scaled_mm"},
])  # fmt: skip
def test_how_layers_run_is_saved(options: Any, tmp_path: Path) -> None:
    model = quantize_model(nn.Sequential(nn.Linear(32, 32), nn.Conv1d(32, 16, 1)), conv1x1=True, **options)
    save_quantized(model, tmp_path / "saved")
    assert not [name for name in tensors(tmp_path / "saved") if "original" in name]
    again = load_quantized(nn.Sequential(nn.Linear(32, 32), nn.Conv1d(32, 16, 1)), tmp_path / "saved")
    x = torch.randn(3, 32)
    assert again[0](x).dtype == model[0](x).dtype and torch.equal(again[0](x), model[0](x))
    assert torch.equal(again[1](x[..., None]), model[1](x[..., None]))
    assert (again[0].backend, again[0].backward) == (model[0].backend, model[0].backward) and again[0].original is None


def test_shards_hold_shared_tensors_once(tmp_path: Path) -> None:
    model = made()
    save_quantized(model, tmp_path / "saved", max_shard_bytes=1500)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    held = [name for file in files for name in load_file(file)]
    assert len(files) > 3 and len(held) == len(set(held))
    assert not [name for name in held if name.startswith("again.") or name in ("two.weight", "two.weight_scale")]
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 1500 or len(load_file(file)) == 1 for file in files)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert {name: (tmp_path / "saved" / file) for name, file in index["weight_map"].items()} == {
        name: file for file in files for name in load_file(file)
    }
    again = load_quantized(empty("meta"), tmp_path / "saved")
    assert torch.equal(again(X), model(X))
    files[1].unlink()
    with pytest.raises(MissingTensorError):
        load_quantized(empty(), tmp_path / "saved")


def test_a_layer_that_is_the_model_itself(tmp_path: Path) -> None:
    for float_layer, x in ((lambda: nn.Linear(32, 16), X[0, :, 0].repeat(1, 6)[:, :32]), (lambda: nn.Conv2d(16, 8, 1), X)):
        model = quantize_model(float_layer(), conv1x1=True)
        save_quantized(model, tmp_path / "saved")
        again = load_quantized(float_layer(), tmp_path / "saved")
        assert isinstance(again, QuantizedLinear) and torch.equal(again(x), model(x))


def test_what_is_there_is_replaced_whole(tmp_path: Path) -> None:
    save_quantized(made(), tmp_path / "saved", max_shard_bytes=1500)
    (tmp_path / "empty").mkdir()
    for name in ("saved", "empty", "new/nested"):
        save_quantized(made("INT8"), tmp_path / name)
        assert sorted(os.listdir(tmp_path / name)) == ["model.safetensors", "quantization.json"]
        assert load_quantized(empty(), tmp_path / name).first.weight.dtype == torch.int8
    with pytest.raises(CalibrationError):
        save_quantized(quantize_model(nn.Linear(8, 8), "FP8"), tmp_path / "saved")
    assert load_quantized(empty(), tmp_path / "saved").first.weight.dtype == torch.int8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "new", "saved"]  # nothing is left behind


def test_a_folder_of_something_else_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not overwritten"):
        save_quantized(made(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_someone_elses_checkpoint_stays(tmp_path: Path) -> None:
    """A diffusers folder, say: config.json beside the only copy of the float weights."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError):
        save_quantized(made(), tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError):
        save_quantized(made(), tmp_path / "file")


def test_what_is_not_for_this_format(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="save_pretrained"):
        save_quantized(quantize_model(tiny_llama()), tmp_path / "saved")
    with torch.device("meta"):
        on_meta = quantize_model(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(UnsupportedError, match="meta"):
        save_quantized(on_meta, tmp_path / "saved")
    complex_ = quantize_model(nn.Sequential(nn.Linear(8, 8)))
    complex_.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedError, match="phase"):
        save_quantized(complex_, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"no quantization\.json"):
        load_quantized(empty(), tmp_path)


def test_buffers_that_no_file_holds(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8))
        model.register_buffer("table", torch.ones(3), persistent=False)
        return model

    save_quantized(quantize_model(build()), tmp_path / "saved")
    assert load_quantized(build(), tmp_path / "saved").table.tolist() == [1, 1, 1]
    with torch.device("meta"):
        model = build()
    with pytest.raises(ConfigError, match="table"):
        load_quantized(model, tmp_path / "saved")


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return files(lambda state: {**state, name: change(state[name])})


def files(change: Callable[[State], State]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        state = change(load_file(path / "model.safetensors"))
        save_file({name: value.contiguous() for name, value in state.items()}, path / "model.safetensors")

    return edit


def without(*names: str) -> Callable[[Path], None]:
    return files(lambda state: {name: value for name, value in state.items() if name not in names})


def text(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        described = json.loads((path / "quantization.json").read_text())
        change(described)
        (path / "quantization.json").write_text(json.dumps(described))

    return edit


def layer(name: str = "first", **entries: Any) -> Callable[[Path], None]:
    return text(lambda described: described["modules"][name].update(entries))


def cut(count: int, file: str = "model.safetensors") -> Callable[[Path], None]:
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[:count]) and None


def case(*values: Any, id: str) -> Any:
    return pytest.param(*values, id=id)


DAMAGE: dict[str, tuple[Callable[[Path], None], type[FP8Error]]] = {
    "truncated": (cut(-5), CorruptFileError), "cut in the header": (cut(20), CorruptFileError),
    "nothing": (cut(0), CorruptFileError),
    "NaN scale": (tensor("first.weight_scale", lambda t: t * torch.nan), ScaleError),
    "negative scale": (tensor("first.weight_scale", lambda t: -t), ScaleError),
    "zero scale": (tensor("one.weight_scale", lambda t: t * 0), ScaleError),
    "infinite scale": (tensor("conv.weight_scale", lambda t: t / 0), ScaleError),
    "no weight": (without("one.weight"), MissingTensorError), "no scale": (without("conv.weight_scale"), MissingTensorError),
    "no bias": (without("conv.bias"), MissingTensorError), "no buffer": (without("steps"), MissingTensorError),
    "extra": (files(lambda s: {**s, "more": torch.ones(1)}), CheckpointError),
    "scale of another shape": (tensor("first.weight_scale", lambda t: t[:5]), MismatchError),
    "codes of another shape": (tensor("first.weight", lambda t: t[:5]), MismatchError),
    "buffer of another shape": (tensor("steps", lambda t: t[:2]), MismatchError),
    "E5M2": (tensor("first.weight", lambda t: t.float().to(torch.float8_e5m2)), MismatchError),
    "uint8": (tensor("first.weight", lambda t: t.view(torch.uint8)), MismatchError),
    "dense weight": (tensor("first.weight", lambda t: t.float()), MismatchError),
    "no JSON": (lambda path: (path / "quantization.json").write_text("{") and None, CorruptFileError),
    "bytes": (lambda path: (path / "quantization.json").write_bytes(b"\xff\x80") and None, CorruptFileError),
    "a list": (lambda path: (path / "quantization.json").write_text("[]") and None, CheckpointError),
    "format 2": (text(lambda d: d.update(format=2)), CheckpointError),
    "no format": (text(lambda d: d.pop("format")), CheckpointError),
    "no modules": (text(lambda d: d.pop("modules")), CheckpointError),
    "shared list": (text(lambda d: d.update(shared=[])), CheckpointError),
    "kind": (layer(kind="conv3"), CheckpointError), "kind of another": (layer(kind="conv1x1"), MismatchError),
    "backend": (layer(backend="mine"), CheckpointError), "scheme": (layer(scheme="FP8"), CheckpointError),
    "scheme of zeros": (layer(scheme="0x5s|-"), CheckpointError), "no scheme": (layer(scheme=None), CheckpointError),
    "scheme per tensor": (layer(scheme="-1x-1s|-"), MismatchError),
    "scheme int8": (layer(scheme="1x-1si|1x-1di"), MismatchError),
    "static scheme": (layer(scheme="1x-1s|-1x-1s"), MissingTensorError),
    "entry": (text(lambda d: d["modules"].update(first=3)), CheckpointError),
    "unknown module": (text(lambda d: d["modules"].update(more=d["modules"]["first"])), MismatchError),
    "module left out": (text(lambda d: d["modules"].pop("conv")), CheckpointError),
    "shares nothing": (text(lambda d: d["shared"].update({"two.weight": "more"})), MissingTensorError),
    "shares another": (text(lambda d: d["shared"].update({"two.weight": "conv.weight"})), MismatchError),
}  # fmt: skip
BUGS = [
    case(
        tensor("first.weight_scale", lambda t: torch.ones_like(t, dtype=torch.int32)),
        MismatchError,
        id="int scale",
    ),
    case(
        tensor("first.weight_scale", lambda t: t.to(torch.float8_e4m3fn)),
        MismatchError,
        id="FP8 scale",
    ),
    case(tensor("first.bias", lambda t: t.long()), MismatchError, id="int bias"),
    case(tensor("dense.weight", lambda t: t.bool()), MismatchError, id="bool weight"),
    case(tensor("dense.weight", lambda t: t.to(torch.float8_e4m3fn)), MismatchError, id="codes in a dense layer"),
    case(tensor("steps", lambda t: t.float() / 3), MismatchError, id="float in an int buffer"),
    case(layer(compute_dtype="bfloat17"), CheckpointError, id="unknown compute_dtype"),
    case(layer(compute_dtype="nn"), CheckpointError, id="compute_dtype that is none"),
    case(layer(cast_output="no"), CheckpointError, id="cast_output"),
    case(layer("conv", stride=[1, 1]), MismatchError, id="stride of another model"),
    case(layer(scheme="1x-1d|1x-1d"), CheckpointError, id="dynamic weights"),
    case(
        text(lambda d: d["shared"].update({"two.weight": ["one.weight"]})),
        CheckpointError,
        id="shared with a list",
    ),
]


@pytest.mark.parametrize(("damage", "error"), [*(pytest.param(*both, id=name) for name, both in DAMAGE.items()), *BUGS])
def test_damage(damage: Callable[[Path], None], error: type[FP8Error], tmp_path: Path) -> None:
    save_quantized(made(), tmp_path / "saved")
    damage(tmp_path / "saved")
    model = empty()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises(FP8Error) as caught:
        load_quantized(model, tmp_path / "saved")
    assert isinstance(caught.value, error), caught.value
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert differing(before, dict(model.state_dict())) == []


@pytest.mark.parametrize(("build", "error"), [
    (lambda: nn.Linear(4, 4), CheckpointError), (lambda: made(), MismatchError),
    case(lambda: Net(stride=1), MismatchError, id="stride"),
    case(lambda: Net(kernel=3), MismatchError, id="kernel"),
])  # fmt: skip
def test_another_model(build: Callable[[], nn.Module], error: type[FP8Error], tmp_path: Path) -> None:
    save_quantized(made(), tmp_path / "saved")
    with pytest.raises(error):
        load_quantized(build(), tmp_path / "saved")


def test_not_strict(tmp_path: Path) -> None:
    save_quantized(model := made(), tmp_path / "saved")
    files(lambda s: {**{k: v for k, v in s.items() if k != "dense.bias"}, "more": torch.ones(1)})(tmp_path / "saved")
    again = load_quantized(empty(), tmp_path / "saved", strict=False)
    assert torch.equal(again.first.weight_scale, model.first.weight_scale) and again.dense.bias.tolist() == [7.0] * 8
    without("conv.weight_scale")(tmp_path / "saved")
    with pytest.raises(MissingTensorError):
        load_quantized(empty(), tmp_path / "saved", strict=False)


def test_not_strict_is_not_careless(tmp_path: Path) -> None:
    """A bias of a layer that is made anew has no value to fall back to."""
    save_quantized(quantize_model(nn.Sequential(nn.Linear(16, 16))), tmp_path / "net")
    path = tmp_path / "net" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "0.bias"}, path)
    with pytest.raises(MissingTensorError, match=r"0\.bias"):
        load_quantized(nn.Sequential(nn.Linear(16, 16)), tmp_path / "net", strict=False)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_buffer_may_share_the_memory_of_a_parameter(flipped: bool, tmp_path: Path) -> None:
    class Reader(nn.Module):
        def __init__(self, embedding: nn.Embedding) -> None:
            super().__init__()
            self.register_buffer("table", embedding.weight.data)

    def build() -> nn.Module:
        embedding = nn.Embedding(4, 16)
        parts = [Reader(embedding), embedding] if flipped else [embedding, Reader(embedding)]
        return nn.Sequential(*parts, nn.Linear(16, 16))

    model = quantize_model(build())
    save_quantized(model, tmp_path / "saved")
    again = load_quantized(build(), tmp_path / "saved")
    assert [name for name, _ in again.named_buffers()] == [name for name, _ in model.named_buffers()] != []
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    places = {value.data_ptr() for name, value in again.state_dict().items() if not name.startswith("2.")}
    assert len(places) == 1 and differing(dict(model.state_dict()), dict(again.state_dict())) == []


def test_frozen_biases_stay_frozen(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16).requires_grad_(False), nn.Linear(16, 16))

    save_quantized(quantize_model(build()), tmp_path / "saved")
    assert [layer.bias.requires_grad for layer in load_quantized(build(), tmp_path / "saved")] == [False, True]
