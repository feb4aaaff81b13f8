"""`hf_fp8.recipes` against torchao 0.18: every public name, every field, and weights as torchao quantizes them.

Without torchao the names and fields are those of `tests/data/torchao_names.json`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
import torch
from support import torchao_names
from support.markdown import ROOT
from torch import nn

from hf_fp8 import QuantizedLinear, quantize_model, recipes
from hf_fp8.errors import CalibrationError, ConfigError, UnsupportedError
from hf_fp8.formats.code_types import FP8, INT4, INT8
from hf_fp8.formats.scheme import (
    FP8_BLOCK,
    FP8_DYNAMIC,
    FP8_STATIC,
    FP8_TENSOR,
    FP8_WEIGHT_ONLY,
    INT8_DYNAMIC,
    INT8_WEIGHT_ONLY,
    ROW,
    TENSOR,
    W4A8,
    W4A16,
    W4A16_ASYM,
    W4AFP8,
    Granularity,
    Scheme,
    TensorScheme,
)
from hf_fp8.recipes import names, quantize_
from hf_fp8.recipes.fields import Elsewhere

pytestmark = pytest.mark.hostless

RECORDED: dict[str, Any] = json.loads(torchao_names.WRITTEN.read_text())
NAMES = sorted({name for listed in RECORDED["names"].values() for name in listed})
DELEGATED = {name for listed in names.DELEGATED.values() for name in listed}
TOKEN8 = TensorScheme(ROW, dynamic=True, dtype=INT8)


@pytest.fixture(scope="module")
def ao() -> Any:
    """torchao.quantization."""
    pytest.importorskip("torchao", "0.18")
    import torchao.quantization

    return torchao.quantization


@pytest.fixture
def without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchao", raising=False)


def net(dtype: torch.dtype = torch.bfloat16, k: int = 256) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.first, model.second = nn.Linear(k, 64), nn.Linear(128, 128, bias=False)
    model.norm = nn.LayerNorm(64)
    return model.to(dtype)


def quantized(config: Any, **options: Any) -> Any:
    model = net(**options)
    quantize_(model, config)
    return model


# --- names ---


def test_each_name_is_in_one_table() -> None:
    tables = [set(names.OURS), DELEGATED, set(names.REFUSED)]
    for name in NAMES:
        assert sum(name in table for table in tables) == 1, name
    for i, table in enumerate(tables):
        for other in tables[i + 1 :]:
            assert not table & other
    assert len(DELEGATED) == sum(map(len, names.DELEGATED.values()))


def test_the_page_has_the_tables() -> None:
    text = (ROOT / "docs" / "torchao.md").read_text()

    def shown(title: str) -> set[str]:
        section = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
        cells = (row.split("|")[1] for row in section.splitlines() if row.startswith("| `"))
        return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}

    assert shown("Ours") == set(names.OURS)
    assert shown("torchao's own") == DELEGATED
    assert shown("Refused") == set(names.REFUSED)


def test_names_are_as_recorded(ao: Any) -> None:
    found = torchao_names.recorded()
    assert found["version"].startswith("0.18."), "record another version: python tests/support/torchao_names.py"
    assert found["names"] == RECORDED["names"]
    assert found["configs"] == RECORDED["configs"]


@pytest.mark.parametrize("name", sorted(names.OURS))
def test_our_names_exist(name: str) -> None:
    assert callable(getattr(recipes, name)) or isinstance(getattr(recipes, name), type)


@pytest.mark.parametrize("name", sorted(DELEGATED))
@pytest.mark.usefixtures("without_torchao")
def test_names_of_torchao_without_it(name: str) -> None:
    with pytest.raises(UnsupportedError, match="torchao") as error:
        getattr(recipes, name)
    assert name in str(error.value)


def test_names_of_torchao_are_torchaos(ao: Any) -> None:
    found = {}
    for module in map(sys.modules.__getitem__, torchao_names.MODULES):
        found.update({name: getattr(module, name) for name in torchao_names.public(module)})
    for name in sorted(DELEGATED & found.keys()):
        assert getattr(recipes, name) is found[name], name
    import torchao.prototype.gptq
    import torchao.prototype.quantization.quant_api as prototype

    assert recipes.UIntxWeightOnlyConfig is recipes.uintx_weight_only is prototype.UIntxWeightOnlyConfig
    assert recipes.GPTQConfig is torchao.prototype.gptq.GPTQConfig


@pytest.mark.parametrize(("name", "why"), sorted(names.REFUSED.items()))
def test_refused_names(name: str, why: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        getattr(recipes, name)
    assert name in str(error.value) and why in str(error.value)
    with pytest.raises(UnsupportedError):
        quantize_(net(), name)


def test_other_names_are_no_attributes() -> None:
    for name in ("Int5WeightOnly", "anything", "__wrapped__", "_private"):
        assert not hasattr(recipes, name)


def test_torchao_is_not_needed_nor_imported() -> None:
    files = (ROOT / "hf_fp8").rglob("*.py")
    assert [file.name for file in files if re.search(r"^\s*(import|from) torchao", file.read_text(), re.MULTILINE)] == []
    # transformers imports torchao where it is installed: here it is not found, and cannot be imported.
    code = """
import importlib.util, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchao":
            raise ImportError("hidden")
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torchao" else real(name, *rest)
sys.meta_path.insert(0, Hide())
import torch, hf_fp8
from hf_fp8 import recipes
def model(): return torch.nn.Sequential(torch.nn.Linear(128, 32))
recipes.quantize_(model(), recipes.Int8WeightOnlyConfig())
recipes.quantize_(model(), recipes.FqnToConfig({"0": "int4_weight_only"}))
assert "torchao" not in sys.modules
print("lean")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "lean\n"


# --- fields ---


def default(text: str) -> Any:
    """The value of a recorded default."""
    markers = {
        "PerRow(dim=-1)": recipes.PerRow(),
        "PerAxis(axis=0)": recipes.PerAxis(0),
        "PerGroup(group_size=32)": recipes.PerGroup(32),
    }
    if text in markers:
        return markers[text]
    if found := re.fullmatch(r"<(\w+)\.(\w+): .*>", text):
        return getattr(getattr(recipes, found[1]), found[2])
    return getattr(torch, text.removeprefix("torch.")) if text.startswith("torch.") else ast.literal_eval(text)


RECIPES = sorted(name for name in RECORDED["configs"] if name.removesuffix("Config") in names.RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_defaults_of_all_fields_are_taken(name: str) -> None:
    fields = {field: default(text) for field, text in RECORDED["configs"][name].items()}
    made = getattr(recipes, name)(**fields)
    assert made.scheme == getattr(recipes, name)().scheme
    assert set(type(made).order) <= fields.keys() | {"scale"}
    known = list(fields)
    assert [field for field in type(made).order if field in known] == known[: len(type(made).order)], "positions are torchao's"


@pytest.mark.parametrize("name", RECIPES)
def test_objects_of_torchao_are_read(ao: Any, name: str) -> None:
    kind = getattr(ao, name)
    config = kind(act_quant_scale=torch.tensor(0.5)) if "Static" in name else kind()
    made = names.recipe_of(config)
    assert made is not None and made.scheme == getattr(recipes, name)().scheme
    assert made.input_scale == (0.5 if "Static" in name else None)


class Strange:
    def __repr__(self) -> str:
        return "Strange()"


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in RECIPES for field in RECORDED["configs"][name]])
def test_no_field_is_ignored(name: str, field: str) -> None:
    """A value that means nothing is refused for every field, by the name of the field."""
    with pytest.raises((UnsupportedError, ConfigError, TypeError, ValueError, RuntimeError)) as error:
        getattr(recipes, name)(**{field: Strange()})
    if field != "group_size":
        assert field in str(error.value) or "scale" in field


G = Granularity
ROWS, GROUPS, WHOLE = recipes.PerRow(), recipes.PerGroup(64), recipes.PerTensor()
SYM, ASYM = recipes.MappingType.SYMMETRIC, recipes.MappingType.ASYMMETRIC
CASES: list[tuple[str, dict[str, Any], Scheme]] = [
    ("Float8WeightOnlyConfig", {}, FP8_WEIGHT_ONLY),
    ("Float8WeightOnlyConfig", {"granularity": WHOLE}, Scheme(TensorScheme(TENSOR))),
    ("Float8WeightOnlyConfig", {"granularity": GROUPS}, Scheme(TensorScheme(G(1, 64)))),
    ("Float8DynamicActivationFloat8WeightConfig", {}, FP8_TENSOR),
    ("Float8DynamicActivationFloat8WeightConfig", {"granularity": ROWS}, FP8_DYNAMIC),
    (
        "Float8DynamicActivationFloat8WeightConfig",
        {"granularity": [recipes.PerBlock((1, 128)), recipes.PerBlock((128, 128))]},
        FP8_BLOCK,
    ),
    ("Float8StaticActivationFloat8WeightConfig", {"act_quant_scale": torch.tensor(0.5)}, FP8_STATIC),
    ("Int8WeightOnlyConfig", {}, INT8_WEIGHT_ONLY),
    ("Int8WeightOnlyConfig", {"granularity": GROUPS}, Scheme(TensorScheme(G(1, 64), dtype=INT8))),
    ("Int8WeightOnlyConfig", {"granularity": WHOLE}, Scheme(TensorScheme(TENSOR, dtype=INT8))),
    ("Int8DynamicActivationInt8WeightConfig", {}, INT8_DYNAMIC),
    ("Int8DynamicActivationInt8WeightConfig", {"granularity": None}, INT8_DYNAMIC),
    ("Int8DynamicActivationInt8WeightConfig", {"granularity": [ROWS, WHOLE]}, Scheme(TensorScheme(TENSOR, dtype=INT8), TOKEN8)),
    (
        "Int8StaticActivationInt8WeightConfig",
        {"act_quant_scale": torch.tensor([[0.5]])},
        Scheme(TensorScheme(ROW, dtype=INT8), TensorScheme(TENSOR, dtype=INT8)),
    ),
    (
        "Int8StaticActivationInt8WeightConfig",
        {"act_quant_scale": torch.tensor(0.5), "granularity": [WHOLE, WHOLE]},
        Scheme(TensorScheme(TENSOR, dtype=INT8), TensorScheme(TENSOR, dtype=INT8)),
    ),
    ("Int4WeightOnlyConfig", {}, W4A16_ASYM),
    ("Int4WeightOnlyConfig", {"group_size": 64}, Scheme(TensorScheme(G(1, 64), dtype=INT4, has_zero_points=True))),
    ("Float8DynamicActivationInt4WeightConfig", {}, W4AFP8),
    ("IntxWeightOnlyConfig", {}, Scheme(TensorScheme(ROW, dtype=INT8, packed=True))),
    ("IntxWeightOnlyConfig", {"weight_dtype": INT4, "granularity": recipes.PerGroup(128)}, W4A16),
    (
        "IntxWeightOnlyConfig",
        {"weight_dtype": INT4, "granularity": recipes.PerGroup(128), "mapping_type": ASYM},
        W4A16_ASYM,
    ),
    ("IntxWeightOnlyConfig", {"mapping_type": ASYM}, Scheme(TensorScheme(ROW, dtype=INT8, packed=True, has_zero_points=True))),
    ("Int8DynamicActivationIntxWeightConfig", {}, Scheme(TensorScheme(G(1, 32), dtype=INT8), TOKEN8)),
    (
        "Int8DynamicActivationIntxWeightConfig",
        {"weight_dtype": INT4, "weight_granularity": recipes.PerGroup(128)},
        W4A8,
    ),
    (
        "Int8DynamicActivationIntxWeightConfig",
        {"weight_dtype": INT4, "weight_granularity": GROUPS, "weight_mapping_type": ASYM},
        Scheme(TensorScheme(G(1, 64), dtype=INT4, has_zero_points=True), TOKEN8),
    ),
    (
        "Int8DynamicActivationIntxWeightConfig",
        {"weight_dtype": INT8, "weight_granularity": recipes.PerAxis(0), "weight_mapping_type": ASYM},
        Scheme(TensorScheme(ROW, dtype=INT8, packed=True, has_zero_points=True), TOKEN8),
    ),
]  # fmt: skip
IDS = [f"{name}-{', '.join(fields)}-{scheme.text}" for name, fields, scheme in CASES]


@pytest.mark.parametrize(("name", "fields", "scheme"), CASES, ids=IDS)
def test_schemes(name: str, fields: dict[str, Any], scheme: Scheme) -> None:
    assert getattr(recipes, name)(**fields).scheme == scheme
    model = quantized(getattr(recipes, name)(**fields))
    assert isinstance(model.second, QuantizedLinear) and model.second.scheme == scheme
    x = torch.randn(40, 128, dtype=torch.bfloat16) * 0.2
    exact = net().second(x)
    if not scheme.has_static_input:
        assert (model.second(x) - exact).norm() < (0.2 if scheme.weight.dtype == INT4 else 0.06) * exact.norm()


def theirs(value: Any, ao: Any) -> Any:
    """torchao's own object for a value of hf_fp8.recipes."""
    if isinstance(value, list):
        return [theirs(one, ao) for one in value]
    if isinstance(value, Enum):
        return getattr(getattr(ao.quant_api, type(value).__name__), value.name)
    if isinstance(value, recipes.Granularity):
        fields = {name: list(one) if isinstance(one, tuple) else one for name, one in vars(value).items()}
        return getattr(ao, type(value).__name__)(**fields)
    return value


def by_torchao(name: str, config: Any, weight: torch.Tensor, scheme: Scheme, ao: Any) -> torch.Tensor:
    """`weight` quantized and dequantized by torchao, with its `quantize_` where that runs on a CPU."""
    granularity = {ROW: ao.PerRow(), TENSOR: ao.PerTensor()}.get(scheme.weight.granularity)
    if name.startswith(("Float8Dynamic", "Float8Static")) and scheme.weight.dtype == FP8:
        marker = granularity or ao.PerBlock([128, 128])
        return ao.Float8Tensor.from_hp(weight, granularity=marker).dequantize()  # its quantize_ wants a GPU
    if name.startswith(("Int4", "Float8")) and scheme.weight.dtype == INT4:  # its quantize_ wants FBGEMM
        mapping = ao.MappingType.ASYMMETRIC if scheme.weight.has_zero_points else ao.MappingType.SYMMETRIC
        block = (1, scheme.weight.granularity.cols)
        scale, point = ao.choose_qparams_affine(weight, mapping, block, torch.int8, -8, 7)
        codes = ao.quantize_affine(weight, block, scale, point, torch.int8, -8, 7)
        return ao.dequantize_affine(codes, block, scale, point, torch.int8, -8, 7, output_dtype=weight.dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    holder = nn.Sequential(layer)
    ao.quantize_(holder, config)
    return holder[0].weight.dequantize()


def sqnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(20 * torch.log10(wanted.norm() / (found - wanted).norm()))


@pytest.mark.parametrize(("name", "fields", "scheme"), CASES, ids=IDS)
def test_weights_are_as_good_as_torchaos(ao: Any, name: str, fields: dict[str, Any], scheme: Scheme) -> None:
    """Through torchao's own config object."""
    config = getattr(ao, name)(**{field: theirs(value, ao) for field, value in fields.items()})
    model = quantized(config)
    assert model.second.scheme == scheme
    weight = net().second.weight.detach()
    ours = model.second.dequantized_weight()
    other = by_torchao(name, config, weight, scheme, ao).detach().float()
    # Half a step of the scale (127.5 against 127 steps), and scales in bf16 here, in float32 there.
    assert abs(sqnr(ours, weight.float()) - sqnr(other, weight.float())) < 1.0
    assert sqnr(ours, other) > sqnr(other, weight.float()) - 3.5


REFUSED_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("Int4WeightOnlyConfig", {"int4_choose_qparams_algorithm": recipes.Int4ChooseQParamsAlgorithm.HQQ}),
    ("IntxWeightOnlyConfig", {"intx_choose_qparams_algorithm": recipes.IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY}),
    ("IntxWeightOnlyConfig", {"mapping_type": recipes.MappingType.SYMMETRIC_NO_CLIPPING_ERR}),
    ("IntxWeightOnlyConfig", {"scale_dtype": torch.float32}),
    ("Int8DynamicActivationIntxWeightConfig", {"weight_scale_dtype": torch.float32}),
    ("Int8DynamicActivationInt8WeightConfig", {"act_mapping_type": ASYM}),
    ("Int8DynamicActivationInt8WeightConfig", {"reduce_range": True}),
    ("Int8DynamicActivationInt8WeightConfig", {"weight_only_decode": True}),
    ("Int8StaticActivationInt8WeightConfig", {"act_quant_zero_point": torch.tensor(3), "act_quant_scale": torch.tensor(0.5)}),
    ("Int8StaticActivationInt8WeightConfig", {"act_quant_scale": torch.ones(4, 1)}),
    ("Float8WeightOnlyConfig", {"weight_dtype": torch.float8_e5m2}),
    ("Float8DynamicActivationFloat8WeightConfig", {"activation_value_ub": 1200.0}),
    ("Float8DynamicActivationFloat8WeightConfig", {"kernel_preference": recipes.KernelPreference.EMULATED}),
    ("Float8DynamicActivationFloat8WeightConfig", {"mm_config": recipes.Float8MMConfig(emulate=True)}),
    (
        "Float8StaticActivationFloat8WeightConfig",
        {"quantize_and_dequantize_output": True, "act_quant_scale": torch.tensor(0.5)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), REFUSED_VALUES, ids=str)
@pytest.mark.parametrize("whose", ["ours", "torchao's"])
def test_refused_values(request: pytest.FixtureRequest, whose: str, name: str, fields: dict[str, Any]) -> None:
    field = next(iter(fields))
    with pytest.raises(UnsupportedError, match=rf"(?s){name.removesuffix('Config')}\({field}=.*hf_fp8 supports"):
        if whose == "ours":
            getattr(recipes, name)(**fields)
        else:
            ao = request.getfixturevalue("ao")
            quantize_(net(), getattr(ao, name)(**{one: theirs(value, ao) for one, value in fields.items()}))


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("Int8WeightOnlyConfig", {"set_inductor_config": True}, "changes no settings of the compiler"),
        ("Int4WeightOnlyConfig", {"int4_packing_format": recipes.Int4PackingFormat.TILE_PACKED_TO_4D}, "compressed-tensors"),
        ("Int4WeightOnlyConfig", {"int4_tile_packed_ntile": 16}, "compressed-tensors"),
        ("Float8DynamicActivationInt4WeightConfig", {"int4_packing_format": "preshuffled"}, "compressed-tensors"),
        ("IntxWeightOnlyConfig", {"intx_packing_format": recipes.IntxPackingFormat.OPAQUE_TORCHAO_AUTO}, "compressed-tensors"),
        ("Int8DynamicActivationIntxWeightConfig", {"act_mapping_type": ASYM}, "symmetrically"),
        ("Float8DynamicActivationFloat8WeightConfig", {"mm_config": recipes.Float8MMConfig(pad_inner_dim=True)}, "any size"),
        ("Int8StaticActivationInt8WeightConfig", {"granularity": ROWS}, "one scale per tensor"),
    ],
)  # fmt: skip
def test_what_does_nothing_is_said(name: str, fields: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        getattr(recipes, name)(**fields)
    ((field, _),) = fields.items()
    assert f"{field}=" in caplog.text and "does nothing" in caplog.text and said in caplog.text


def test_earlier_layouts(caplog: pytest.LogCaptureFixture) -> None:
    def layout(name: str) -> Any:
        return type(name, (), {})()

    with caplog.at_level(logging.INFO):
        assert recipes.int4_weight_only(
            group_size=64, layout=layout("TensorCoreTiledLayout"), use_hqq=False
        ).scheme.weight.packed
    assert "layout=" in caplog.text
    for name in ("MarlinSparseLayout", "SemiSparseLayout", "MarlinQQQLayout", "GemlitePackedLayout"):
        with pytest.raises(Elsewhere, match="layout="):
            recipes.int4_weight_only(layout=layout(name))
    with pytest.raises(UnsupportedError, match="use_hqq=True"):
        recipes.int4_weight_only(use_hqq=True)
    with pytest.raises(UnsupportedError, match="preserve_zero=False"):
        recipes.int4_weight_only(preserve_zero=False)


def test_earlier_functions_and_positions() -> None:
    assert recipes.float8_weight_only().scheme == FP8_WEIGHT_ONLY
    assert recipes.float8_dynamic_activation_float8_weight(FP8, FP8, ROWS).scheme == FP8_DYNAMIC
    assert recipes.int8_weight_only().scheme == INT8_WEIGHT_ONLY
    assert recipes.int8_weight_only(64).scheme == Scheme(TensorScheme(G(1, 64), dtype=INT8))
    assert recipes.int8_dynamic_activation_int8_weight().scheme == INT8_DYNAMIC
    assert recipes.int4_weight_only(128).scheme == W4A16_ASYM
    assert recipes.int8_dynamic_activation_int4_weight(128).scheme == W4A8
    assert recipes.int8_dynamic_activation_int4_weight(128, mapping_type=ASYM).scheme.weight.has_zero_points
    assert recipes.intx_weight_only(INT4, recipes.PerGroup(128)).scheme == W4A16
    static = recipes.float8_static_activation_float8_weight
    earlier = static(torch.tensor(0.25), FP8, FP8, WHOLE, recipes.Float8MMConfig(use_fast_accum=True))
    assert (earlier.scheme, earlier.input_scale, earlier.step, earlier.backend) == (FP8_STATIC, 0.25, None, "auto")
    assert static(None, FP8).input_scale is None
    later = static(None, 0.25, FP8)
    assert (later.input_scale, later.step) == (0.25, None)
    assert static("Prepare").step == "prepare"
    with pytest.raises(ConfigError, match="by position"):
        recipes.int8_weight_only(1, 2, 3, 4, 5)
    with pytest.raises(ConfigError, match="by position and by name"):
        recipes.int4_weight_only(64, group_size=64)
    with pytest.raises(ConfigError, match="give one"):
        static("prepare", 0.25)


# --- options of the matmul ---


def test_fast_accumulation_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fp8.kernels import torch_fp8

    seen: list[bool] = []
    real = torch.nn.functional.scaled_mm

    def record(*args: Any, use_fast_accum: bool, **options: Any) -> torch.Tensor:
        seen.append(use_fast_accum)
        return real(*args, use_fast_accum=False, **options)

    made = recipes.Float8DynamicActivationFloat8Weight
    for mm, kernel_preference, backend in (
        (recipes.Float8MMConfig(use_fast_accum=False), "AUTO", "auto_slow_accum"),
        (recipes.Float8MMConfig(use_fast_accum=True), "AUTO", "auto"),
        (None, recipes.KernelPreference.TORCH, "scaled_mm"),
        (recipes.Float8MMConfig(), recipes.KernelPreference.TORCH, "scaled_mm_slow_accum"),
    ):
        model = quantized(made(granularity=ROWS, mm_config=mm, kernel_preference=kernel_preference))
        assert model.second.backend == backend
    # What the kernels ask of torch, on a device that has the option: the same call on a CPU, where it is always off.
    monkeypatch.setattr(torch_fp8.F, "scaled_mm", record)
    x = torch.randn(40, 128, dtype=torch.bfloat16)
    expected = quantize_model(net(), "FP8_DYNAMIC", backend="scaled_mm").second(x)
    assert torch.equal(model.second(x), expected)
    assert seen and not any(seen)


@pytest.mark.parametrize("scheme", [FP8_TENSOR, FP8_DYNAMIC, FP8_BLOCK], ids=str)
def test_kernels_without_fast_accumulation(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of the two kinds differ in the option that they pass to torch, if the device is a CUDA device."""
    from hf_fp8.kernels import Input, Problem, Weight, select, torch_fp8

    class OnCuda:
        device = torch.device("cuda")
        dtype = torch.bfloat16

    passed: dict[str, bool] = {}
    kinds = {
        FP8_TENSOR: (torch_fp8.TENSORWISE, torch_fp8.SLOW_TENSORWISE),
        FP8_DYNAMIC: (torch_fp8.ROWWISE, torch_fp8.SLOW_ROWWISE),
        FP8_BLOCK: (torch_fp8.BLOCKWISE, torch_fp8.SLOW_BLOCKWISE),
    }[scheme]
    if scheme != FP8_BLOCK:  # which a CPU does not have
        problem = Problem(torch.device("cpu"), scheme, 64, 64, torch.float32)
        assert select(problem, "scaled_mm_slow_accum").kernel.name == kinds[1].name
        assert select(problem, "scaled_mm").kernel.name == kinds[0].name
    for kernel in kinds:

        def record(*_: Any, use_fast_accum: bool, name: str = kernel.name, **__: Any) -> torch.Tensor:
            passed[name] = use_fast_accum
            return torch.zeros(2, 2)

        monkeypatch.setattr(torch_fp8.F, "scaled_mm", record)
        monkeypatch.setattr(torch_fp8, "product_dtype", lambda dtype, device: dtype)
        w = Weight(torch.zeros(2, 2).to(FP8), torch.ones(2 if scheme == FP8_DYNAMIC else 1, 1), None, scheme)
        x: Any = OnCuda()
        kernel.multiply(Input(x, torch.ones(2, 1)), w, torch.float32)
    assert passed == {kinds[0].name: True, kinds[1].name: False}


def test_slow_accumulation_is_saved(tmp_path: Any) -> None:
    from hf_fp8 import load_quantized, save_quantized

    model = quantized(recipes.Float8DynamicActivationFloat8Weight(mm_config=recipes.Float8MMConfig()))
    save_quantized(model, tmp_path / "saved")
    again: Any = load_quantized(net(), tmp_path / "saved")
    assert again.first.backend == "auto_slow_accum"


def test_block_configs_of_torchao_are_without_fast_accumulation(ao: Any) -> None:
    config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=[ao.PerBlock([1, 128]), ao.PerBlock([128, 128])])
    model = quantized(config)
    assert (model.first.scheme, model.first.backend) == (FP8_BLOCK, "auto_slow_accum")


# --- configs by name ---


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.up = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)


def blocks() -> Any:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    model.embed, model.head = nn.Embedding(8, 64), nn.Linear(64, 8)
    return model


def schemes(model: nn.Module) -> dict[str, str]:
    return {n: m.scheme.text for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def tables(q: Any) -> dict[str, dict[str, Any]]:
    """Tables with configs of torchao or of hf_fp8."""
    int8, fp8, dynamic = q.Int8WeightOnlyConfig(), q.Float8WeightOnlyConfig(), q.Int8DynamicActivationInt8WeightConfig()
    return {
        "default": {"_default": int8},
        "module before default": {"layers.0.q": fp8, "_default": int8},
        "none": {"layers.0.q": None, "head": None, "_default": int8},
        "regex": {r"re:layers\..*\.q": fp8, "_default": int8},
        "regex matches all of the name": {r"re:layers\.": fp8, "head": int8},
        "first regex": {r"re:layers\..*\.q": fp8, r"re:layers\..*\.\w+": int8},
        "exact before regex": {r"re:layers\..*\.q": fp8, "layers.1.q": int8},
        "parameter": {"layers.0.q.weight": fp8, "layers.0.q": int8, "head": dynamic},
        "parameter none": {"layers.0.q.weight": None, "_default": int8},
        "regex for parameters": {r"re:layers\..*\.up\.weight": fp8, r"re:layers\..*\.[qk]": int8},
        "no default": {"layers.0.k": dynamic},
        "regex none": {r"re:layers\.1\..*": None, "_default": fp8},
    }


@pytest.mark.parametrize("case", list(tables(recipes)))
def test_configs_by_name_as_torchao_finds_them(ao: Any, case: str) -> None:
    def which(layer: nn.Module) -> str | None:
        weight: Any = layer.weight
        if isinstance(weight, ao.Float8Tensor):
            return FP8_WEIGHT_ONLY.text
        if isinstance(weight, ao.Int8Tensor):
            return INT8_WEIGHT_ONLY.text if weight.act_quant_kwargs is None else INT8_DYNAMIC.text
        return None

    other = blocks()
    ao.quantize_(other, ao.FqnToConfig(tables(ao)[case]), filter_fn=None)
    wanted = {n: found for n, m in other.named_modules() if isinstance(m, nn.Linear) and (found := which(m)) is not None}
    model = blocks()
    quantize_(model, ao.FqnToConfig(tables(ao)[case]))
    assert schemes(model) == wanted
    again = blocks()
    quantize_(again, recipes.FqnToConfig(tables(recipes)[case]))
    assert schemes(again) == wanted


def test_configs_by_name_without_torchao(caplog: pytest.LogCaptureFixture) -> None:
    model = blocks()
    with caplog.at_level(logging.WARNING):
        quantize_(
            model, recipes.AOPerModuleConfig({"layers.0.q": "float8_weight_only", "layers.9.q": None, "head": "Int8WeightOnly"})
        )
    assert schemes(model) == {"layers.0.q": FP8_WEIGHT_ONLY.text, "head": INT8_WEIGHT_ONLY.text}
    assert "layers.9.q" in caplog.text and "match nothing" in caplog.text
    static = blocks()
    quantize_(
        static,
        recipes.ModuleFqnToConfig(
            module_fqn_to_config={
                "layers.0.q": recipes.Float8StaticActivationFloat8Weight(0.5),
                "layers.0.k": recipes.Float8StaticActivationFloat8Weight(0.25, mm_config=recipes.Float8MMConfig()),
            }
        ),
    )
    q, k = static.layers[0].q, static.layers[0].k
    assert (q.input_scale.item(), q.backend, k.input_scale.item(), k.backend) == (0.5, "auto", 0.25, "auto_slow_accum")


def test_configs_by_name_of_a_transformers_model() -> None:
    from support.build import tiny_llama

    model: Any = tiny_llama()
    quantize_(model, recipes.FqnToConfig({r"re:.*\.mlp\..*": "int8_weight_only", "_default": recipes.Float8WeightOnly()}))
    found = schemes(model)
    assert {found[name] for name in found if ".mlp." in name} == {INT8_WEIGHT_ONLY.text}
    assert {found[name] for name in found if ".self_attn." in name} == {FP8_WEIGHT_ONLY.text}
    assert "lm_head" not in found and model.hf_quantizer is not None


@pytest.mark.parametrize(
    ("table", "error", "said"),
    [
        ({}, ConfigError, "has no names"),
        ({"embed": "int8_weight_only"}, UnsupportedError, "embed has a config"),
        ({"layers.0.q.bias": "int8_weight_only"}, UnsupportedError, "layers.0.q.bias has a config"),
        ({"layers.0.q": "int9_weight_only"}, ConfigError, "int9_weight_only"),
        ({"layers.0.q": 3}, ConfigError, "config is a int"),
        ({"nothing": "int8_weight_only"}, ConfigError, "nothing"),
        ({"layers.0.q": recipes.Float8StaticActivationFloat8Weight("prepare")}, UnsupportedError, "step"),
        ({"layers.0.q": recipes.QATConfig("int8_weight_only")}, UnsupportedError, "QATConfig"),
    ],
)
def test_refused_configs_by_name(table: dict[str, Any], error: type[Exception], said: str) -> None:
    model = blocks()
    with pytest.raises(error, match=said):
        quantize_(model, recipes.FqnToConfig(table))
    assert schemes(model) == {}


def test_names_and_a_filter_are_not_given_together() -> None:
    with pytest.raises(ConfigError, match="filter_fn and FqnToConfig"):
        quantize_(blocks(), recipes.FqnToConfig({"head": "int8_weight_only"}), lambda module, name: True)
    with pytest.raises(ConfigError, match="differ"):
        recipes.FqnToConfig({"a": None}, {"b": None})


def test_fqn_matches(ao: Any) -> None:
    for q in (ao, recipes):
        config = q.FqnToConfig({"a.b": None, r"re:c\..*": q.Int8WeightOnlyConfig()})
        found = [recipes.fqn_matches_fqn_config(name, config) for name in ("a.b", "a", "c.d", "xc.d", "_default")]
        assert found == [True, False, True, False, False]
        assert found[:4] == [
            ao.fqn_matches_fqn_config(n, ao.FqnToConfig({"a.b": None, r"re:c\..*": None})) for n in ("a.b", "a", "c.d", "xc.d")
        ]


# --- torchao's own ---


def test_other_configs_are_passed_on(ao: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, other = net(torch.float32), net(torch.float32)
    config = ao.IntxWeightOnlyConfig(torch.int2, ao.PerGroup(32))
    with caplog.at_level(logging.WARNING):
        quantize_(model, config)
    ao.quantize_(other, config)
    assert type(model.second.weight) is type(other.second.weight) is ao.IntxUnpackedToInt8Tensor
    assert torch.equal(model.second.weight.dequantize(), other.second.weight.dequantize())
    assert "IntxWeightOnlyConfig is passed on to torchao" in caplog.text
    some = net(torch.float32)
    quantize_(some, config, lambda module, name: name == "second")
    assert type(some.first.weight) is nn.Parameter and type(some.second.weight) is ao.IntxUnpackedToInt8Tensor


def test_int8_by_int4_of_the_prototype(ao: Any) -> None:
    """Its weights have zero points, and it has no field that says so."""
    from torchao.prototype.quantization.int4 import Int8DynamicActivationInt4WeightConfig

    model = quantized(Int8DynamicActivationInt4WeightConfig(group_size=64))
    assert model.second.scheme == Scheme(TensorScheme(G(1, 64), dtype=INT4, has_zero_points=True), TOKEN8)


def test_some_layers_are_passed_on(ao: Any) -> None:
    model = blocks()
    config = ao.FqnToConfig({"layers.0.q": ao.IntxWeightOnlyConfig(torch.int3), "_default": ao.Int8WeightOnlyConfig()})
    quantize_(model, config)
    assert type(model.layers[0].q.weight) is ao.IntxUnpackedToInt8Tensor
    assert set(schemes(model).values()) == {INT8_WEIGHT_ONLY.text} and len(schemes(model)) == 6


def test_configs_of_ones_own_are_passed_on(ao: Any) -> None:
    @dataclasses.dataclass
    class Zero(ao.quant_api.AOBaseConfig):
        pass

    @ao.register_quantize_module_handler(Zero)
    def _(module: nn.Module, config: Any) -> nn.Module:
        return nn.Identity()

    model = net()
    quantize_(model, Zero())
    assert type(model.first) is nn.Identity


def test_own_recipes_are_never_passed_on(ao: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"weight_dtype=torch.int2.*4 or 8 bits.*torchao's own config"):
        recipes.IntxWeightOnlyConfig(torch.int2)
    with pytest.raises(UnsupportedError, match="2:4 sparse"):
        recipes.Float8DynamicActivationFloat8Weight(packing_format=recipes.Float8PackingFormat.SPARSE_2D_DATA_2D_METADATA)


def test_a_name_is_passed_on_if_torchao_has_it(ao: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(ao, "quantize_", lambda model, config, **options: given.append((config, options)))
    quantize_(net(), "uintx_weight_only", device="cpu")
    ((config, options),) = given
    assert type(config).__name__ == "UIntxWeightOnlyConfig" and options == {"device": "cpu"}


# --- convolutions, stacks, observers ---


def test_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 16, 1))
    x = torch.randn(2, 16, 8, 8)
    exact = model(x)
    recipes.swap_conv2d_1x1_to_linear(model, lambda module, name: name == "0")
    quantize_(model, recipes.Int8WeightOnly())
    assert [type(layer).__name__ for layer in model] == ["QuantizedConv1x1", "Conv2d", "Conv2d"]
    recipes.swap_conv2d_1x1_to_linear(model)
    quantize_(model, recipes.FqnToConfig({"_default": recipes.Float8WeightOnly()}))
    assert [type(layer).__name__ for layer in model] == ["QuantizedConv1x1", "Conv2d", "QuantizedConv1x1"]
    assert (model(x) - exact).norm() < 0.06 * exact.norm()
    with pytest.raises(ConfigError, match="must choose convolutions"):
        recipes.swap_conv2d_1x1_to_linear(nn.Sequential(nn.ReLU()), lambda module, *_: True)
    plain = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Linear(32, 32))
    quantize_(plain, recipes.Int8WeightOnly())
    assert type(plain[0]) is nn.Conv2d


def test_weights_with_three_dimensions_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = nn.Module()
    model.experts = nn.Module()
    model.experts.gate = nn.Parameter(torch.randn(2, 32, 32))
    model.conv, model.linear = nn.Conv1d(8, 8, 3), nn.Linear(32, 32)
    with caplog.at_level(logging.WARNING):
        quantize_(model, recipes.Int8WeightOnly())
    assert "three dimensions stay dense: experts.gate." in caplog.text and "quantize_model" in caplog.text
    caplog.clear()
    model.linear = nn.Linear(32, 32)
    with caplog.at_level(logging.WARNING):
        quantize_(model, recipes.FqnToConfig({"experts.gate": "int8_weight_only", "linear": "int8_weight_only"}))
    assert "experts.gate" in caplog.text


STEPS: list[Callable[..., Any]] = [recipes.Float8StaticActivationFloat8Weight, recipes.Int8StaticActivationInt8Weight]


@pytest.mark.parametrize("kind", STEPS)
def test_two_steps(kind: Callable[..., Any]) -> None:
    model, x = net(torch.float32), torch.randn(50, 128)
    quantize_(model, kind(step="prepare"), lambda module, name: name == "second")
    with pytest.raises(CalibrationError, match="being observed already"):
        quantize_(model, kind(step="prepare"))
    before = net(torch.float32).second(x)
    assert (model.second(x) - before).norm() < 0.06 * before.norm()
    quantize_(model, kind(step="convert"))
    assert model.second.input_scale.item() == pytest.approx(x.abs().max().item() / (448 if "Float8" in kind.__name__ else 127))
    model.second.backend = "scaled_mm" if "Float8" in kind.__name__ else "auto"
    assert (model.second(x) - before).norm() < 0.06 * before.norm()
    assert type(model.first) is nn.Linear
    with pytest.raises(ConfigError, match="not being observed"):
        quantize_(model, kind(step="convert"))


def test_signatures_show_the_fields() -> None:
    shown = list(inspect.signature(recipes.Float8DynamicActivationFloat8Weight).parameters)
    assert shown[:5] == ["activation_dtype", "weight_dtype", "granularity", "packing_format", "mm_config"]
    assert shown[5:] == ["kernel_preference", "other_fields"]


def test_two_steps_leave_other_scales_as_they_are() -> None:
    import copy

    model, x = net(torch.float32), torch.randn(50, 128)
    quantize_(model, recipes.Float8StaticActivationFloat8Weight(0.5), lambda module, name: name == "first")
    quantize_(model, recipes.Float8StaticActivationFloat8Weight(step="prepare"))
    twin = copy.deepcopy(model)
    with pytest.raises(ConfigError, match="not being observed"):
        quantize_(twin, recipes.Float8StaticActivationFloat8Weight(step="convert"))
    with pytest.raises(ConfigError, match="prepared for"):
        quantize_(model, recipes.Int8StaticActivationInt8Weight(step="convert"))
    model.first(torch.randn(3, 256)), model.second(x)
    quantize_(model, recipes.Float8StaticActivationFloat8Weight(step="convert"))
    assert model.first.input_scale.item() == 0.5 and model.second.input_scale.item() != 0.5


def test_two_steps_of_torchao(ao: Any) -> None:
    model, other, x = net(torch.float32), net(torch.float32), torch.randn(50, 128)
    for one, quantize in ((model, quantize_), (other, ao.quantize_)):
        quantize(one, ao.Float8StaticActivationFloat8WeightConfig(step="prepare"), lambda module, name: name == "second")
        one.second(x)
    observed, _ = other.second.input_act_obs.calculate_qparams()
    quantize_(model, ao.Float8StaticActivationFloat8WeightConfig(step="convert"))
    assert model.second.input_scale.item() == pytest.approx(observed.item(), rel=1e-6)


def test_observers_of_torchao(ao: Any) -> None:
    from torchao.quantization.observer import AffineQuantizedMSEObserver

    symmetric, whole = ao.MappingType.SYMMETRIC, ao.PerTensor()
    x = torch.randn(50, 128)
    for dtype, largest in ((FP8, 448), (INT8, 127)):
        observer = ao.AffineQuantizedMinMaxObserver(symmetric, dtype, whole)
        for given in (observer, ao.AffineQuantizedMinMaxObserver.with_args(symmetric, dtype, granularity=whole)):
            model = net(torch.float32)
            recipes.insert_observers_(model, given, filter_fn=lambda module, name: name == "second")
            model.second(x)
            kind = recipes.Float8StaticActivationFloat8Weight if dtype == FP8 else recipes.Int8StaticActivationInt8Weight
            quantize_(model, kind(step="convert"))
            assert model.second.input_scale.item() == pytest.approx(x.abs().max().item() / largest)
    weight = ao.AffineQuantizedMinMaxObserver(symmetric, INT8, ao.PerTensor())
    model = net(torch.float32)
    recipes.insert_observers_(model, AffineQuantizedMSEObserver(symmetric, INT8, whole), weight)
    assert model.first.scheme == Scheme(TensorScheme(TENSOR, dtype=INT8), TensorScheme(TENSOR, dtype=INT8))
    for refused in (
        ao.AffineQuantizedMinMaxObserver(ao.MappingType.ASYMMETRIC, INT8, whole),
        ao.AffineQuantizedMinMaxObserver(symmetric, torch.uint8, whole),
        ao.AffineQuantizedMinMaxObserver(symmetric, INT8, ao.PerAxis(0)),
        nn.Identity(),
    ):
        with pytest.raises(UnsupportedError):
            recipes.insert_observers_(net(), refused)


# --- training ---


def fakes(q: Any) -> list[tuple[Any, Scheme]]:
    """Configs of training of torchao or of hf_fp8, and the schemes that they are for."""
    weight = q.IntxFakeQuantizeConfig(INT4, group_size=64, is_symmetric=True)
    inputs = q.IntxFakeQuantizeConfig(INT8, "per_token", is_symmetric=False)
    w4 = TensorScheme(G(1, 64), dtype=INT4)
    fp8 = q.Float8FakeQuantizeConfig()
    int4 = q.Int4WeightFakeQuantizeConfig
    return [
        (q.QATConfig(weight_config=weight), Scheme(w4)),
        (q.QATConfig(weight_config=weight, activation_config=inputs), Scheme(w4, TOKEN8)),
        (q.QATConfig(weight_config=fp8, activation_config=fp8), FP8_DYNAMIC),
        (q.QATConfig(weight_config=int4(), activation_config=fp8), W4AFP8),
        (q.QATConfig(weight_config=int4(activation_dtype=torch.bfloat16)), W4A16_ASYM),
        (q.QATConfig(weight_config=q.IntxFakeQuantizeConfig(INT8, "per_channel")), INT8_WEIGHT_ONLY),
        (q.IntXQuantizationAwareTrainingConfig(inputs, weight), Scheme(w4, TOKEN8)),
    ]


def bases(q: Any) -> list[tuple[Any, Scheme]]:
    return [
        (q.Int4WeightOnlyConfig(group_size=64), Scheme(TensorScheme(G(1, 64), dtype=INT4, has_zero_points=True))),
        (q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow()), FP8_DYNAMIC),
        (q.Float8DynamicActivationInt4WeightConfig(), W4AFP8),
        (q.IntxWeightOnlyConfig(INT4, q.PerGroup(128)), W4A16),
        (q.Int8DynamicActivationIntxWeightConfig(INT4, q.PerGroup(128)), W4A8),
    ]


QAT, TOKENS = recipes.QATConfig, recipes.IntxFakeQuantizeConfig(INT8, "per_token")


def fake(**options: Any) -> Any:
    return recipes.IntxFakeQuantizeConfig(**{"dtype": INT4, "group_size": 8, **options})


@pytest.mark.parametrize("whose", ["ours", "torchao's"])
def test_schemes_of_training(request: pytest.FixtureRequest, whose: str) -> None:
    from hf_fp8.recipes.training import scheme_of

    q: Any = recipes
    if whose != "ours":
        ao = request.getfixturevalue("ao")
        import torchao.quantization.qat as qat
        from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig

        q = type("Both", (), {**vars(ao), **vars(qat), "Int4WeightFakeQuantizeConfig": Int4WeightFakeQuantizeConfig})
    for config, scheme in fakes(q):
        assert scheme_of(config) == scheme
    for base, scheme in bases(q):
        assert scheme_of(q.QATConfig(base, step="prepare")) == scheme


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        (lambda: QAT(weight_config=fake(dtype=torch.int3)), UnsupportedError, "4 or 8 bits"),
        (lambda: QAT(weight_config=fake(is_dynamic=False, range_learning=True)), UnsupportedError, "range_learning"),
        (lambda: QAT(weight_config=fake(scale_precision=torch.float16)), UnsupportedError, "scale_precision"),
        (lambda: QAT(weight_config=fake(eps=1e-3)), UnsupportedError, "eps=0.001"),
        (lambda: QAT(weight_config=fake(zero_point_domain="FLOAT")), UnsupportedError, "zero_point_domain"),
        (lambda: QAT(activation_config=TOKENS), UnsupportedError, "inputs alone"),
        (
            lambda: QAT(weight_config=fake(), activation_config=fake(dtype=INT8, is_dynamic=False)),
            UnsupportedError, "is_dynamic",
        ),
        (lambda: QAT(weight_config=TOKENS), UnsupportedError, "PerGroup"),
        (lambda: QAT(weight_config=recipes.Float8FakeQuantizeConfig(hp_value_ub=3.0)), UnsupportedError, "hp_value_ub"),
        (lambda: QAT(weight_config=recipes.Float8FakeQuantizeConfig(torch.float8_e5m2)), UnsupportedError, "dtype"),
        (lambda: QAT(weight_config=recipes.PerRow()), UnsupportedError, "PerRow as a config of weights"),
        (lambda: QAT(step="train"), ConfigError, "train"),
        (lambda: QAT(), ConfigError, "base_config"),
        (lambda: QAT("int4_weight_only", weight_config=fake()), ConfigError, "not both"),
        (lambda: QAT(weight_config=fake(), step="convert"), ConfigError, "base_config only"),
        (lambda: QAT(3), UnsupportedError, "base_config is a int"),
    ],
)  # fmt: skip
def test_refused_training(config: Callable[[], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        quantize_(net(), config())


def test_training_of_a_model() -> None:
    model, base = net(torch.float32), recipes.IntxWeightOnly(INT4, recipes.PerGroup(64))
    quantize_(model, recipes.QATConfig(base, step="prepare"))
    assert not isinstance(model.second, QuantizedLinear) and type(model.second) is not nn.Linear
    x = torch.randn(5, 128)
    model.second(x).sum().backward()
    with pytest.raises(ConfigError, match="prepared for"):
        quantize_(model, recipes.QATConfig("int8_weight_only", step="convert"))
    quantize_(model, recipes.QATConfig(base, step="convert"))
    assert model.second.scheme == base.scheme
    back = net(torch.float32)
    quantize_(back, recipes.QATConfig(base), lambda module, name: name == "second")
    quantize_(back, recipes.FromIntXQuantizationAwareTrainingConfig())
    assert type(back.second) is nn.Linear and torch.equal(back.second.weight, net(torch.float32).second.weight)


def test_steps_of_training_are_passed_to_hf_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fp8.recipes import training

    peft: Any = net()
    peft.merge_and_unload = lambda: None
    with pytest.raises(UnsupportedError, match="cannot be converted in place"):
        quantize_(peft, recipes.QATConfig("int4_weight_only", step="convert"))
    calls: list[Any] = []

    def prepare_qat(model: nn.Module, scheme: Any, *, filter_fn: Any, experts: str) -> nn.Module:
        assert experts == "dequantize"
        calls.append((scheme, None if filter_fn is None else filter_fn("second", model.second)))
        return model

    def convert_qat(model: nn.Module) -> nn.Module:
        calls.append("convert")
        return model

    monkeypatch.setattr(training, "prepare_qat", prepare_qat)
    monkeypatch.setattr(training, "convert_qat", convert_qat)
    model = net()
    quantize_(model, recipes.QATConfig("int4_weight_only"), lambda module, name: name == "second")
    quantize_(model, recipes.QATConfig("int4_weight_only", step=recipes.QATStep.CONVERT))
    quantize_(
        model, recipes.intx_quantization_aware_training(weight_config=recipes.IntxFakeQuantizeConfig(INT4, group_size=64))
    )
    assert calls == [(W4A16_ASYM, True), "convert", (Scheme(TensorScheme(G(1, 64), dtype=INT4)), None)]
