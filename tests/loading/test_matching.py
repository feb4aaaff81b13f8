"""A checkpoint matched with a model, and planned for one, where both are dicts: no model is built, no file is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from hf_fp8.checkpoint.quantization_spec import QuantizationSpec
from hf_fp8.checkpoint.reader import Checkpoint, TensorInfo
from hf_fp8.errors import ConfigError, FP8Error, MismatchError, MissingTensorError, UnusedTensorError
from hf_fp8.loading.facts import ModelFacts, ModuleFacts, ParameterFacts
from hf_fp8.loading.key_map import KeyMap
from hf_fp8.loading.layout import Layout
from hf_fp8.loading.matching import Policy, match_checkpoint
from hf_fp8.loading.quantization_plan import Plan, plan_quantization
from hf_fp8.nn.experts_layout import ExpertsLayout

PLAIN = ModuleFacts(nn.Linear, has_weight=True)
FP8_ROWS = QuantizationSpec.asked("FP8_DYNAMIC", "Linear", None)
HEADERS = Policy(read_values=False)


class Norm(nn.Module):
    """Any module that is no Linear."""


class Experts(nn.Module):
    """Merged experts."""


def toy(**modules: ModuleFacts) -> ModelFacts:
    """A model of Linears of 4 outputs and 8 inputs, and an embedding."""
    held = {"embed": ModuleFacts(nn.Embedding, has_weight=True), **(modules or {"up": PLAIN, "down": PLAIN})}
    return ModelFacts("Toy", {f"{name}.weight": ParameterFacts((4, 8)) for name in held}, held, prefix="model")


def mixture(n_experts: int = 2, **layout: bool) -> ModelFacts:
    """A model of experts, merged in one module: (E, 2 * 4, 8) and (E, 8, 4)."""
    known = ExpertsLayout(**{"is_transposed": False, "is_concatenated": True, "has_bias": False, **layout})
    first, second = (n_experts, 8, 8), (n_experts, 8, 4)
    if known.is_transposed:
        first, second = (n_experts, 8, 8), (n_experts, 4, 8)
    params = {"mlp.experts.gate_up_proj": ParameterFacts(first), "mlp.experts.down_proj": ParameterFacts(second)}
    return ModelFacts("Toy", params, {"mlp.experts": ModuleFacts(Experts, known)})


def files(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Checkpoint:
    checkpoint = Checkpoint([])
    checkpoint.tensors.update({key: TensorInfo(dtype, shape, "model.safetensors") for key, (dtype, shape) in tensors.items()})
    return checkpoint


def fp8(*names: str, shape: tuple[int, int] = (4, 8)) -> dict[str, tuple[str, tuple[int, ...]]]:
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        found |= {f"{name}.weight": ("F8_E4M3", shape), f"{name}.weight_scale": ("BF16", (shape[0], 1))}
    return found


DENSE_EMBEDDING = {"embed.weight": ("BF16", (4, 8))}
EXPERTS = [
    WeightConverter(
        ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
        "mlp.experts.gate_up_proj",
        [MergeModulelist(0), Concatenate(1)],
    ),
    WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(0)]),
]


def expert_files(n_experts: int = 2) -> dict[str, tuple[str, tuple[int, ...]]]:
    names = [f"mlp.experts.{i}" for i in range(n_experts)]
    up = fp8(*(f"{name}.{part}" for name in names for part in ("gate_proj", "up_proj")))
    return up | fp8(*(f"{name}.down_proj" for name in names), shape=(8, 4))


def matched(model: ModelFacts, tensors: Mapping[str, Any], conversions: Any = (), policy: Policy = HEADERS) -> Layout:
    checkpoint = files(tensors)
    keymap = KeyMap.of(model, conversions, checkpoint.tensors)
    return match_checkpoint(model, keymap, checkpoint, FP8_ROWS, policy)


# --- Linears ---


def test_linears_are_kept() -> None:
    layout = matched(toy(), fp8("up", "down") | DENSE_EMBEDDING)
    assert list(layout.kept) == ["up", "down"]
    assert not layout.dense
    assert not layout.reasons
    assert layout.file_dtypes == {"embed.weight": torch.bfloat16}
    assert layout.dense_modules == []


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"cls": nn.Bilinear}, "Bilinear is not a plain nn.Linear"),
        ({"read_by": "Block"}, "Block reads its weight instead of calling it"),
        ({"gives_dtype_to": "Encoder"}, "Encoder reads its dtype from this weight"),
    ],
)
def test_why_a_linear_is_dense(changed: dict[str, Any], reason: str) -> None:
    layout = matched(toy(up=replace(PLAIN, **changed), down=PLAIN), fp8("up", "down") | DENSE_EMBEDDING)
    assert list(layout.kept) == ["down"]
    assert layout.reasons == {"up": reason}
    assert layout.dense["up.weight"].weights[0].keys["weight"] == "up.weight"
    assert layout.dense_modules == ["up"]


def test_what_the_model_keeps_in_float32_is_dense_in_float32() -> None:
    model = toy()
    model = replace(model, params={**model.params, "up.weight": ParameterFacts((4, 8), torch.float32, keeps_dtype=True)})
    layout = matched(model, fp8("up", "down") | DENSE_EMBEDDING)
    assert layout.reasons == {"up": "the model keeps this module in float32"}
    assert layout.dense["up.weight"].dtype == torch.float32


def test_ties() -> None:
    """A tied parameter is dense, unless the files fill it beside its source."""
    tied = replace(toy(), tied={"up.weight": "down.weight"})
    layout = matched(tied, fp8("down") | DENSE_EMBEDDING)
    assert layout.reasons == {"down": "other parameters of the model are tied to it"}
    both = matched(tied, fp8("up", "down") | DENSE_EMBEDDING)
    assert set(both.reasons) == {"down"}
    assert list(both.kept) == ["up"]


def test_a_policy_has_the_last_word() -> None:
    layout = matched(toy(), fp8("up", "down") | DENSE_EMBEDDING, policy=replace(HEADERS, dense_because="because"))
    assert layout.reasons == {"up": "because", "down": "because"}
    assert not layout.kept


def test_another_size() -> None:
    tensors = fp8("down") | fp8("up", shape=(6, 8)) | DENSE_EMBEDDING
    with pytest.raises(MismatchError, match=r"up\.weight has shape \[6, 8\] in the files, the model's up\.weight has \[4, 8\]"):
        matched(toy(), tensors)
    layout = matched(toy(), tensors, policy=replace(HEADERS, other_sizes=True))
    assert "ignore_mismatched_sizes" in layout.reasons["up"]


def test_renamings_and_the_prefix_of_the_base_model() -> None:
    layout = matched(toy(), fp8("model.w1", "model.down") | DENSE_EMBEDDING, [WeightRenaming("w1", "up")])
    assert list(layout.kept) == ["up", "down"]
    assert layout.kept["up"].keys["weight"] == "model.w1.weight"
    assert layout.kept["up"].renamed["weight_scale"] == "model.up.weight_scale"


@pytest.mark.parametrize(
    "tensors, error, said",
    [
        (fp8("up") | DENSE_EMBEDDING, MissingTensorError, "down.weight"),
        (fp8("up", "down"), MissingTensorError, "embed.weight"),
        ({"up.weight": ("F8_E4M3", (4, 8))} | fp8("down"), MissingTensorError, "up.weight_scale is not in the files"),
        (fp8("up", "down") | {"else.weight_scale": ("BF16", (4, 1))}, UnusedTensorError, "else.weight_scale is a scale"),
        (fp8("up", "down") | {"up.weight": ("BF16", (4, 8))}, MismatchError, "up.weight is stored dense"),
        (fp8("up", "down") | {"embed.weight": ("BF16", (5, 8))}, MismatchError, r"embed.weight has shape \[5, 8\]"),
    ],
)
def test_contradictions(tensors: dict[str, Any], error: type[FP8Error], said: str) -> None:
    with pytest.raises(error, match=said):
        matched(toy(), tensors)


def test_another_class_may_lack_parameters_that_the_files_do_not_speak_of() -> None:
    model = replace(toy(up=PLAIN, head=PLAIN), is_of_class=False)
    layout = matched(model, fp8("up") | DENSE_EMBEDDING | {"rotary.inv_freq": ("F32", (4,))})
    assert layout.missing == ["head.weight"]
    assert layout.unplaced == {"rotary.inv_freq": "rotary.inv_freq"}
    assert matched(replace(model, ignore_missing=("head",)), fp8("up") | DENSE_EMBEDDING).missing == []


# --- experts ---


def test_experts_are_stacked_as_they_are() -> None:
    layout = matched(mixture(), expert_files(), EXPERTS)
    plan = layout.experts["mlp.experts"]
    assert [weight.name for weight in plan.first.sources[1]] == ["mlp.experts.0.up_proj", "mlp.experts.1.up_proj"]
    assert plan.first.projection.shape == (2, 8, 8)
    assert plan.second.projection.shape == (2, 8, 4)
    assert plan.scale_dtypes == {"gate_up_proj_scale": torch.bfloat16, "down_proj_scale": torch.bfloat16}
    assert not layout.dense
    assert not layout.reasons


def test_experts_that_the_host_does_not_map() -> None:
    """Where a family holds them transposed, converters of ours take what llm-compressor wrote."""
    model = mixture(is_transposed=True)
    checkpoint = files(expert_files())
    keymap = KeyMap.of(model, [], checkpoint.tensors)
    assert keymap.unmapped_experts == (model.modules["mlp.experts"].experts, "mlp.experts")
    layout = match_checkpoint(model, keymap, checkpoint, FP8_ROWS, HEADERS)
    assert layout.experts["mlp.experts"].first.projection.shape == (2, 8, 8)
    assert layout.experts["mlp.experts"].second.projection.shape == (2, 8, 4)


@pytest.mark.parametrize(
    "module, said",
    [
        (ModuleFacts(Experts), "Experts does not have transformers' interface"),
        (ModuleFacts(Experts, ExpertsLayout(False, True, False), read_by="Block"), "Block reads its weights"),
    ],
)
def test_why_experts_are_dense(module: ModuleFacts, said: str) -> None:
    layout = matched(replace(mixture(), modules={"mlp.experts": module}), expert_files(), EXPERTS)
    assert not layout.experts
    assert set(layout.dense) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert all(said in reason for reason in layout.reasons.values())


def test_an_expert_too_few() -> None:
    tensors = {key: info for key, info in expert_files().items() if not key.startswith("mlp.experts.0.down_proj")}
    with pytest.raises(MissingTensorError, match=r"mlp\.experts\.1\.down_proj\.weight is in the files, but one of the experts"):
        matched(mixture(), tensors, EXPERTS)


def test_a_policy_about_experts() -> None:
    layout = matched(mixture(), expert_files(), EXPERTS, replace(HEADERS, experts_because=lambda scheme: scheme.describe()))
    assert not layout.experts
    assert set(layout.reasons.values()) == {FP8_ROWS.groups[0].scheme.describe()}  # type: ignore[union-attr]


# --- what a dense checkpoint is to become ---


def planned(model: ModelFacts, tensors: Mapping[str, Any], spec: QuantizationSpec = FP8_ROWS, **options: Any) -> Plan:
    given: dict[str, Any] = {"dense_experts": False, "cast_to": None, **options}
    return plan_quantization(model, given.pop("conversions", ()), files(tensors), spec, **given)[0]


DENSE = dict.fromkeys(("up.weight", "down.weight", "embed.weight"), ("F32", (4, 8)))


def test_a_plan_is_the_headers_of_the_checkpoint_to_be() -> None:
    plan = planned(toy(), DENSE)
    assert {key: str(info) for key, info in plan.written.tensors.items()} == {
        "up.weight": "F8_E4M3 [4, 8]", "up.weight_scale": "F32 [4, 1]",
        "down.weight": "F8_E4M3 [4, 8]", "down.weight_scale": "F32 [4, 1]", "embed.weight": "F32 [4, 8]",
    }  # fmt: skip
    assert planned(toy(), DENSE, cast_to=torch.bfloat16).written.tensors["up.weight_scale"].dtype == "BF16"


def test_what_turns_out_to_be_unfit_is_planned_again_without_it() -> None:
    plan = planned(toy(up=replace(PLAIN, read_by="Block"), down=PLAIN), DENSE)
    assert plan.reasons == {"up": "Block reads its weight instead of calling it"}
    assert list(plan.groups) == ["down.weight"]
    assert plan.written.tensors["up.weight"].dtype == "F32"
    assert plan.spec.ignore == ("up",)


def test_heads_and_routers_stay_dense_unless_a_target_is_about_them_alone() -> None:
    model = replace(toy(up=PLAIN, lm_head=PLAIN, router=PLAIN), heads=("lm_head",))
    tensors = {f"{name}.weight": ("F32", (4, 8)) for name in ("embed", "up", "lm_head", "router")}
    assert list(planned(model, tensors).groups) == ["up.weight"]
    asked = QuantizationSpec.asked("FP8_DYNAMIC", ["up", "lm_head"], None)
    assert list(planned(model, tensors, asked).groups) == ["up.weight", "lm_head.weight"]
    everything = QuantizationSpec.asked("FP8_DYNAMIC", "Linear", [])
    assert set(planned(model, tensors, everything).groups) == {"up.weight", "lm_head.weight", "router.weight"}


def test_stacks_of_experts_are_taken_apart() -> None:
    tensors = {"mlp.experts.gate_up_proj": ("F32", (2, 8, 8)), "mlp.experts.down_proj": ("F32", (2, 8, 4))}
    plan = planned(mixture(), tensors, conversions=EXPERTS)
    assert set(plan.groups) == {f"mlp.experts.{i}.{p}_proj.weight" for i in (0, 1) for p in ("gate", "up", "down")}
    part = plan.parts["mlp.experts.1.up_proj.weight"]
    assert (part.key, part.expert, part.index, part.of) == ("mlp.experts.gate_up_proj", 1, 1, 2)
    dense = planned(mixture(), tensors | DENSE, dense_experts=True, choose=lambda *_: None)
    assert dense.written.tensors.keys() == tensors.keys() | DENSE.keys()


def test_nothing_to_quantize() -> None:
    with pytest.raises(ConfigError, match="they leave no Linear of Toy to be quantized; it has up, down"):
        planned(toy(), DENSE, QuantizationSpec.asked("FP8_DYNAMIC", "Linear", ["up", "down"]))
    with pytest.raises(MismatchError, match="the checkpoint is quantized already"):
        planned(toy(), fp8("up", "down") | DENSE_EMBEDDING)
