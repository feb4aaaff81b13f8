"""What quantizing cost: each number against one computed directly, and everything is left as it was found."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.build import IDS, error, sqnr, tiny_llama, write
from support.moe import MOE, is_linear, write_transposed
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_fp8 import FP8Config, QuantizedLinear
from hf_fp8.evaluation import Row, Rows, perplexity, quality
from hf_fp8.evaluation.plot import depths
from hf_fp8.formats import numerics
from hf_fp8.formats.scheme import FP8_BLOCK, FP8_DYNAMIC, FP8_TENSOR, FP8_WEIGHT_ONLY, Granularity, Scheme, TensorScheme
from hf_fp8.nn.conv import QuantizedConv1x1

pytestmark = pytest.mark.hostless

MANY = [FP8_DYNAMIC, FP8_TENSOR, FP8_BLOCK, Scheme(TensorScheme(Granularity(24, 40))), FP8_WEIGHT_ONLY]


def quantized(model: nn.Module, scheme: Scheme = FP8_DYNAMIC, **options: Any) -> nn.Module:
    """A copy of a model with all its Linears quantized."""
    new = copy.deepcopy(model)
    for name, module in list(new.named_modules()):
        if isinstance(module, nn.Linear):
            new.set_submodule(name, QuantizedLinear.from_linear(module, scheme, backend="scaled_mm", **options))
    return new


def chain(depth: int = 2, width: int = 32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def hooks(*models: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


@pytest.mark.parametrize("scheme", MANY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_against_float64(scheme: Scheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(200, 300)).to(dtype)
    q = quantized(model, scheme)
    wanted, found = model[0].weight.detach(), q[0].dequantized_weight()
    sizes = []
    real = numerics.dequantize
    monkeypatch.setattr(numerics, "CPU_CHUNK", 24 * 200)
    monkeypatch.setattr(numerics, "dequantize", lambda codes, *rest: (sizes.append(codes.numel()), real(codes, *rest))[1])
    (row,) = quality(model, q).rows
    assert row.name == row.module == "0" and row.shape == (300, 200) and row.scheme == scheme.describe()
    assert row.weight_sqnr == pytest.approx(sqnr(found, wanted), abs=1e-9)
    assert row.relative_error == pytest.approx(error(found, wanted), rel=1e-9)
    assert row.largest_error == (found.double() - wanted.double()).abs().max()
    assert row.output_sqnr is row.accumulated_sqnr is None
    assert len(sizes) > 1 and max(sizes) <= 128 * 200  # never the whole weight


def test_sums_do_not_overflow_or_vanish() -> None:
    for size in (1e25, 1e-25):
        model = chain(1)
        model[0].weight.data *= size
        q = quantized(model)
        found = quality(model, q).rows[0].weight_sqnr
        assert found == pytest.approx(sqnr(q[0].dequantized_weight(), model[0].weight.detach()), abs=1e-9) and 25 < found < 40


def test_exact_zero_and_broken_weights(tmp_path: Path) -> None:
    model = chain(5)
    model[0].weight.data.zero_()
    model[1].weight.data.fill_(0.5)  # a power of two times 448, to within nothing
    model[2].weight.data.zero_()
    q = quantized(model)
    q[2].weight.codes.fill_(1.0)  # no longer zero
    q[3].weight_scale.data.fill_(torch.nan)
    report = quality(model, q, torch.randn(4, 32))
    found = [row.weight_sqnr for row in report.rows]
    assert found[0] == math.inf and found[2] == -math.inf and math.isnan(found[3])
    assert found[1] >= 120 and 25 < found[4] < 40
    assert "exact" in str(report) and "NaN" in str(report)
    assert {"2", "3"} <= set(report.ignore) and "0" not in report.ignore
    assert report.worst(1)[0].name == "3"  # NaN is worse than anything
    parsed = strict(report.to_json(tmp_path / "report.json"))
    assert strict((tmp_path / "report.json").read_text()) == parsed
    assert parsed["rows"][0]["weight_sqnr"] is None and parsed["rows"][0]["not_finite"]["weight_sqnr"] == "inf"
    assert parsed["rows"][3]["not_finite"]["weight_sqnr"] == "nan"
    assert parsed["rows"][4]["not_finite"] == {"accumulated_sqnr": "nan"}  # of what came before


def test_an_injected_error_is_found() -> None:
    model = chain(12)
    q = quantized(model)
    data = [torch.randn(16, 32)]
    clean = quality(model, q, data)
    assert clean.ignore == [] and "No layer stands out" in str(clean)
    q[7].weight_scale.data *= 1.2
    for report in (quality(model, q, data), quality(model, q)):
        assert report.worst(3)[0].name == "7" and len(report.worst(3)) == 3
        assert 'ignore=["7"]' in str(report) and "1 layer stands out" in str(report)
    q[3].weight.codes[5] = 0
    assert quality(model, q, data).ignore == ["3", "7"]
    by_output = sorted(quality(model, q, data).rows, key=lambda row: row.output_sqnr)
    assert quality(model, q, data).worst(4) == by_output[:4] and {row.name for row in by_output[:2]} == {"3", "7"}


def test_three_db_and_three_deviations() -> None:
    def out(*values: float | None) -> list[str]:
        rows = Rows(Row(str(i), str(i), "s", (1, 1), output_sqnr=value) for i, value in enumerate(values))
        return [row.name for row in rows.standing_out()]

    assert out(30, 30, 30, 30, 27.1) == []  # no deviation at all, but under 3 dB
    assert out(30, 30, 30, 30, 26.9) == ["4"]
    assert out(20, 25, 30, 35, 40, 18) == []  # far below, but so are others
    assert out(20, 25, 30, 35, 40, math.inf, None, -math.inf) == ["7"]
    assert out() == out(None) == []


def test_alone_and_accumulated_by_hand() -> None:
    model, x, y = chain(2), torch.randn(7, 32), torch.randn(3, 32)
    q = quantized(model)
    report = quality(model, q, [x, y])
    with torch.no_grad():
        first, second = [torch.cat([m[0](x), m[0](y)]) for m in (model, q)]
        whole, in_q = [torch.cat([m(x), m(y)]) for m in (model, q)]
        alone = torch.cat([q[1](model[0](x)), q[1](model[0](y))])
    a, b = report.rows
    assert a.output_sqnr == a.accumulated_sqnr == pytest.approx(sqnr(second, first), abs=1e-9)
    assert b.output_sqnr == pytest.approx(sqnr(alone, whole), abs=1e-9)
    assert b.accumulated_sqnr == pytest.approx(sqnr(in_q, whole), abs=1e-9)
    assert report.logits_sqnr == pytest.approx(b.accumulated_sqnr, abs=1e-9)
    assert b.accumulated_sqnr < b.output_sqnr - 1
    assert report.kl_divergence is None  # no logits
    short = quality(model, q, [x, y], accumulated=False)
    assert short.rows[1].output_sqnr == b.output_sqnr and short.rows[1].accumulated_sqnr is None
    assert short.logits_sqnr == report.logits_sqnr and "in model dB" not in str(short)


def test_outputs_changed_in_place_afterwards() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=True))
    q, x = quantized(model), torch.randn(9, 32)
    with torch.no_grad():
        wanted = sqnr(q[0](x), model[0](x))
    assert quality(model, q, x).rows[0].accumulated_sqnr == pytest.approx(wanted, abs=1e-9)


class Odd(nn.Module):
    """Calls layers twice, by keyword, never, and with no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.keyword, self.never, self.empty = (nn.Linear(32, 32) for _ in range(4))
        self.fails = False

    def forward(self, x: torch.Tensor, *, shift: float = 0.0) -> dict[str, Any]:
        self.empty(x[:0])
        if self.fails:
            raise RuntimeError("fails on purpose")
        return {"about": "text", "out": (self.keyword(input=self.twice(self.twice(x))) + shift,)}


def test_calls_of_all_kinds() -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(6, 32)
    q = quantized(model)
    report = quality(model, q, [{"x": x, "shift": 1.0}])
    rows = {row.name: row for row in report.rows}
    with torch.no_grad():
        once, alone = model.twice(x), q.twice(x)
        pairs = [(alone, once), (q.twice(once), model.twice(once))]
        within = [(alone, once), (q.twice(alone), model.twice(once))]
        last = sqnr(q(x, shift=1.0)["out"][0], model(x, shift=1.0)["out"][0])
    for found, wanted in ((rows["twice"].output_sqnr, pairs), (rows["twice"].accumulated_sqnr, within)):
        assert found == pytest.approx(sqnr(*(torch.cat(parts) for parts in zip(*wanted, strict=True))), abs=1e-9)
    assert rows["keyword"].output_sqnr > 20 and report.logits_sqnr == pytest.approx(last, abs=1e-9)
    assert rows["never"].output_sqnr is None and rows["never"].note == "not called"
    assert rows["empty"].output_sqnr is None and rows["never"].weight_sqnr > 20
    strict(report.to_json())


def test_a_layer_called_otherwise_is_not_compared() -> None:
    class Picky(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.layer, self.times = nn.Linear(32, 32), times

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.times):
                out: torch.Tensor = self.layer(x)
            return out

    for times in ((1, 2), (2, 1)):
        model = Picky(times[0])
        q = quantized(model)
        q.times = times[1]
        (row,) = quality(model, q, torch.randn(3, 32)).rows
        assert row.output_sqnr > 20 and row.accumulated_sqnr is None and "called differently" in row.note


@pytest.mark.parametrize("without", [False, True])
def test_everything_is_left_as_it_was(without: bool) -> None:
    model = Odd().train()
    model.twice.eval()
    q = quantized(model, originals="keep")
    q.keyword.register_forward_hook(lambda *_: None)
    wanted = [[module.training for module in m.modules()] for m in (model, q)]
    reference = None if without else model

    def left() -> bool:
        flags = [[module.training for module in m.modules()] for m in (model, q)]
        return flags == wanted and hooks(model) == 0 and hooks(q) == 1 and torch.is_grad_enabled()

    quality(reference, q, torch.randn(3, 32))
    assert left()
    for fails in (q,) if without else (model, q):
        fails.fails = True
        with pytest.raises(RuntimeError, match="on purpose"):
            quality(reference, q, torch.randn(3, 32))
        assert left()
        fails.fails = False


def test_models_run_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 32)).train()
    x = torch.randn(5, 32)
    assert quality(model, quantized(model), [x, x]).rows[0].output_sqnr > 20
    assert quality(model, quantized(model), x).logits_sqnr > 20


def test_forms_of_data() -> None:
    model, x = chain(2), torch.randn(4, 32)
    q = quantized(model)
    wanted = quality(model, q, [x]).rows
    for data in (x, [(x,)], [[x]], (batch for batch in [x]), {"input": x}, [{"input": x}]):
        assert quality(model, q, data).rows == wanted
    for empty in ([], iter(())):
        with pytest.raises(ValueError, match="no batch"):
            quality(model, q, empty)


def test_models_of_different_dtypes() -> None:
    model = chain(3).double()
    q = quantized(model.bfloat16())  # in place
    model = model.double()
    seen = []
    q[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    report = quality(model, q, torch.randn(4, 32))
    assert set(seen) == {torch.bfloat16}
    assert all(20 < value < 40 for value in report.rows.values("output_sqnr") + report.rows.values("accumulated_sqnr"))
    assert 20 < report.logits_sqnr < 40


def test_a_compiled_model_is_measured() -> None:
    model, x = chain(2), torch.randn(4, 32)
    q = quantized(model)
    wanted = quality(model, q, x).rows
    model.compile(backend="eager")
    q.compile(backend="eager")
    with torch.no_grad():
        model(x), q(x)
    assert quality(model, q, x).rows == wanted


def test_originals_stand_in_for_the_reference() -> None:
    model, x = chain(3), torch.randn(8, 32)
    q = quantized(model, originals="keep")
    q[2].original = None
    report = quality(None, q, x)
    rows, against = report.rows, quality(model, q, x).rows
    assert [row.weight_sqnr for row in rows[:2]] == [row.weight_sqnr for row in against[:2]]
    with torch.no_grad():
        given = q[0](x)
        assert rows[1].output_sqnr == pytest.approx(sqnr(q[1](given), model[1](given)), abs=1e-9)
    assert rows[2].weight_sqnr is rows[2].output_sqnr is None and "not comparable" in rows[2].note
    assert report.rows.values("accumulated_sqnr") == [] and report.logits_sqnr is None
    assert "not comparable" in str(report)
    strict(report.to_json())


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolutions(stride: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 24, 1, stride=stride))
    layer = QuantizedConv1x1(16, 24, FP8_DYNAMIC, stride=(stride, stride), bias=True, backend="scaled_mm")
    layer.bias = model[0].bias
    layer.quantize_from(model[0].weight.flatten(1), originals="keep")
    q = nn.Sequential(layer)
    x = torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        outputs = sqnr(q(x), model(x))
    for reference in (model, None):
        (row,) = quality(reference, q, x).rows
        assert row.weight_sqnr == pytest.approx(sqnr(q[0].dequantized_weight(), model[0].weight.flatten(1)), abs=1e-9)
        assert row.output_sqnr == pytest.approx(outputs, abs=1e-6)


def test_what_does_not_pair_is_named() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(32, 16), "other": nn.Linear(32, 32)})
    q = quantized(model)

    def put(module: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({"fc": model["fc"], "other": module})

    for reference, words in (
        (nn.ModuleDict({"fc": model["fc"]}), "no layer 'other'"),
        (put(nn.Linear(32, 31)), r"other has a weight of shape \(31, 32\)"),
        (put(nn.LayerNorm(32)), "other of the reference is a LayerNorm"),
        (put(nn.Conv2d(32, 32, 3)), r"other has a weight of shape \(32, 32, 3, 3\)"),
        (put(q["other"]), "other of the reference is a QuantizedLinear, which is quantized"),
    ):
        with pytest.raises(ValueError, match=words):
            quality(reference, q)
    with pytest.raises(ValueError, match="the same model"):
        quality(q, q)
    with pytest.raises(ValueError, match="no QuantizedLinear"):
        quality(q, model)
    with pytest.raises(ValueError, match="'lost'"):
        quality(model, q, names=["lost"])


def test_names() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(32, 16), "other": nn.Linear(32, 32)})
    q = quantized(model)
    assert [row.name for row in quality(model, q, names=["other"]).rows] == ["other"]
    renamed = nn.ModuleDict({"fc": model["fc"], "called_otherwise": model["other"]})
    wanted = quality(model, q, names=["other"]).rows
    assert quality(renamed, q, names={"other": "called_otherwise"}).rows == wanted


def causal_pair() -> tuple[PreTrainedModel, nn.Module]:
    model = tiny_llama().float()
    q = copy.deepcopy(model)
    for name, module in list(q.named_modules()):
        if name.endswith("_proj"):
            q.set_submodule(name, QuantizedLinear.from_linear(module, FP8_DYNAMIC, backend="scaled_mm"))
    return model, q


def test_end_to_end() -> None:
    model, q = causal_pair()
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    with torch.no_grad():
        p, found = (m(input_ids=IDS, attention_mask=mask).logits.double() for m in (model, q))
    divergence = (p.softmax(-1) * (p.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
    for batch, keep in (({"input_ids": IDS, "attention_mask": mask}, mask.bool()), ({"input_ids": IDS}, None)):
        if keep is None:
            with torch.no_grad():
                p, found = (m(input_ids=IDS).logits.double() for m in (model, q))
            divergence = (p.softmax(-1) * (p.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
            keep = torch.ones_like(mask).bool()
        report = quality(model, q, [batch, batch])
        assert report.tokens == 2 * int(keep.sum())
        assert report.kl_divergence == pytest.approx(divergence[keep].mean().item(), rel=1e-4)
        assert report.logits_sqnr == pytest.approx(sqnr(found[keep], p[keep]), abs=1e-6)


def test_perplexity_directly() -> None:
    model, q = causal_pair()
    torch.manual_seed(0)
    ids = torch.randint(0, 128, (25,))

    def directly(m: nn.Module, cuts: list[tuple[int, int]]) -> float:
        losses = []
        for start, end in cuts:
            with torch.no_grad():
                likely = m(ids[None, start:end]).logits[0].double().log_softmax(-1)
            losses += [-likely[i, ids[start + i + 1]].item() for i in range(end - start - 1)]
        return math.exp(sum(losses) / len(losses))

    model.train()
    assert perplexity(model, ids, 10) == pytest.approx(directly(model, [(0, 10), (10, 20), (20, 25)]), rel=1e-5)
    assert model.training
    assert perplexity(model, ids, 12) == pytest.approx(directly(model, [(0, 12), (12, 24)]), rel=1e-5)  # one token is left
    assert perplexity(model, ids) == pytest.approx(directly(model, [(0, 25)]), rel=1e-5)
    seen: list[Any] = []
    report = quality(model, q, text=ids, window=10, progress=lambda *step: seen.append(step))
    before, after = report.perplexity
    assert before == perplexity(model, ids, 10) and after == perplexity(q, ids, 10) != before
    assert f"perplexity: {before:.3f} -> {after:.3f}" in str(report)
    assert seen[0] == ("weights", 1, 14) and seen[-1] == ("perplexity", 25, 25)
    for wrong in (ids[None], ids[:1]):
        with pytest.raises(ValueError, match="two or more tokens"):
            perplexity(model, wrong)
    with pytest.raises(ValueError, match="no logits"):
        perplexity(nn.Identity(), ids)
    assert perplexity(Uniform(), ids) == pytest.approx(128, rel=1e-5)


class Uniform(nn.Module):
    def forward(self, ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 128, dtype=torch.bfloat16))


def test_experts(tmp_path: Path) -> None:
    model = MOE["qwen3_moe"]()
    write(model, tmp_path, quantized=is_linear)
    q = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=FP8Config(experts="fp8", backend="scaled_mm")
    )
    name = "model.layers.1.mlp.experts"
    held = q.get_submodule(name)
    held.down_proj_scale.data[2] *= 1.3
    report = quality(model.float(), q, IDS)
    rows = {row.name: row for row in report.rows}
    dense = held.to_dense(torch.float32)
    for part in ("gate_up_proj", "down_proj"):
        found, wanted = getattr(dense, part), getattr(model.get_submodule(name), part)
        row = rows[f"{name}.{part}"]
        assert row.weight_sqnr == pytest.approx(sqnr(found, wanted), abs=1e-6) and row.module == name
        each = [sqnr(a, b) for a, b in zip(found, wanted, strict=True)]
        assert each[row.worst_expert] == min(each) == pytest.approx(row.worst_expert_sqnr, abs=1e-6)
        assert row.output_sqnr is None
    assert rows[f"{name}.down_proj"].worst_expert == 2 and "worst expert 2" in str(report)
    whole = rows[name]
    assert whole.weight_sqnr is None and whole.accumulated_sqnr < whole.output_sqnr < 40 and report.ignore == [name]
    given: list[Any] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, out: given.append((args, out)))
    with torch.no_grad():
        model(IDS)
        handle.remove()
        ((args, out),) = given
        assert whole.output_sqnr == pytest.approx(sqnr(held(*args), out), abs=1e-6)
    with pytest.raises(ValueError, match=rf"{name}.down_proj has a weight of shape"):
        model.get_submodule(name).down_proj = nn.Parameter(torch.zeros(4, 3, 3))
        quality(model, q)
    without = quality(None, q, IDS).rows
    assert without.values("weight_sqnr") == [] and len(without) == len(report.rows) - 2


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
@pytest.mark.parametrize("form", ["split", "stacked"])
def test_experts_held_transposed(family: str, form: str, tmp_path: Path) -> None:
    model, _, _ = write_transposed(family, form, tmp_path)
    q = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=FP8Config(experts="fp8", backend="weight_only")
    )
    report = quality(model.float(), q, IDS)
    stacks = [row for row in report.rows if ".experts." in row.name]
    assert len(stacks) == 4 and all(25 < row.weight_sqnr < 40 for row in stacks)
    wholes = [row for row in report.rows if row.name.endswith(".experts")]
    assert len(wholes) == 2 and all(row.output_sqnr > 20 for row in wholes)


def test_table() -> None:
    model, q = causal_pair()
    report = quality(model, q, IDS)
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "layer",
        "weight",
        "dB",
        "rel.",
        "error",
        "max",
        "error",
        "output",
        "dB",
        "in",
        "model",
        "dB",
        "note",
    ]
    assert [line.split()[0] for line in lines[1:15]] == [n for n, m in q.named_modules() if isinstance(m, QuantizedLinear)]
    assert lines[15].startswith("median") and lines[16].startswith("minimum")
    minimum = min(row.output_sqnr for row in report.rows)
    assert lines[16].split()[2] == f"{minimum:.2f}" == f"{report.worst(1)[0].output_sqnr:.2f}"
    assert "(14 layers)" in report.footer() and "KL divergence" in report.footer()
    assert len(str(report.worst(4)).splitlines()) == 5
    q.set_submodule("lm_head", QuantizedLinear.from_linear(model.lm_head, FP8_WEIGHT_ONLY))
    assert str(quality(model, q)).splitlines()[0].split()[1] == "scheme"
    assert str(Rows()) == "no layers"


def test_places_on_the_axis() -> None:
    names = ["model.layers.0.q", "model.layers.0.k", "model.layers.1.q", "decoder.0.q", "lm_head"]
    places, labels = depths(Rows(Row(name, name, "s") for name in names))
    assert list(places.values()) == [0, 0, 1, 2, 3]
    assert labels == {0: "0", 1: "1", 2: "0", 3: "lm_head"}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("ending", ["svg", "png"])
def test_plot(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = Rows(
        Row(f"model.layers.{i}.mlp.{kind}", "m", "scheme", (1, 1), 31 + i / 90, 0.1, 0.1, None, None, 30 - i / 9, 20.0)
        for i in range(30)
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    rows[7] = Row(
        "model.layers.1.mlp.q_proj", "m", "scheme", (1, 1), math.inf, output_sqnr=math.nan, accumulated_sqnr=-math.inf
    )
    report = quality(chain(1), quantized(chain(1)))
    report.rows[:] = rows
    path = report.plot(tmp_path / f"picture.{ending}")
    first = path.read_bytes()
    assert 10_000 < len(first) < 300_000
    assert report.plot(path).read_bytes() == first  # the same rows, the same file
    report.rows[:] = rows[7:8]
    report.plot(path)
    report.rows[:] = [Row("a", "a", "scheme")]
    with pytest.raises(ValueError, match="no row"):
        report.plot(path)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = quality(chain(1), quantized(chain(1)))
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.plot(tmp_path / "picture.svg")
