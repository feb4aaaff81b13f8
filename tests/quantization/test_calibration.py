"""Input scales measured from data: exact numbers, what is left alone, and several processes."""

from __future__ import annotations

import copy
import inspect
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.build import OFFLOAD, STATIC_TENSOR, write
from support.experts import KEEP, experts_of
from support.experts import load as load_moe
from support.kernels import fake_quantize
from support.moe import causal, is_linear, llama4, qwen3_moe, write_transposed
from torch import nn

from hf_fp8 import QuantizedLinear, cli
from hf_fp8.errors import CalibrationError, ConfigError, UnsupportedError
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.scheme import CODE_MAX, FP8_DYNAMIC, FP8_STATIC, ROW, TENSOR
from hf_fp8.quantization import observers
from hf_fp8.quantization.calibration import apply_scales, calibrate
from hf_fp8.quantization.observers import Amax, Mse, Observer, Percentile

pytestmark = pytest.mark.hostless

CPU = torch.device("cpu")


class Attention(nn.Module):
    """q, k, v of the same input, by a keyword for one; o of another; `spare` of none."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        for number, name in enumerate(("q", "k", "v", "o", "spare")):
            linear = nn.Linear(32, 32, dtype=dtype)
            linear.weight.data *= number + 1
            setattr(self, name, QuantizedLinear.from_linear(linear, FP8_STATIC, **options))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.q(x).relu() * self.k(x)
        out: torch.Tensor = self.o(y + self.v(input=x))
        return out


def batches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [(torch.randn(2, 5, 32) * size).to(dtype) for size in (1, 7, 3)]


def scales_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in model.named_parameters() if "input_scale" in name}


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_largest_of_all_batches(dtype: torch.dtype, mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, data, seen = Attention(dtype), batches(dtype), []
    with pytest.raises(CalibrationError, match="no input scale yet"):
        model(data[0])
    with calibrate(model, "amax") as run, mode():
        handle = model.o.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        outs = [model(x) for x in data]
        handle.remove()
    for name, inputs in {"q": data, "k": data, "v": data, "o": seen}.items():
        layer = getattr(model, name)
        wanted = (torch.stack([x.abs().max() for x in inputs]).max().float() / 448).to(dtype)
        assert layer.input_scale.dtype == dtype and torch.equal(layer.input_scale, wanted.reshape(1)), name
        assert run.scales[name] == float(wanted) and not layer.needs_calibration and layer.observer is None
        assert not layer._forward_pre_hooks
    assert run.batches == 3 and not model._forward_hooks and run.to_dict()["batches"] == 3
    assert model.spare.needs_calibration and "spare" not in run.scales
    assert [r.getMessage() for r in caplog.records] == ["1 of 5 layers had no input and stay unchanged: spare"]
    # Inputs were not quantized meanwhile; now they are, as by a scale set by hand.
    weight = model.v.dequantized_weight(dtype)
    dense = nn.functional.linear(seen[0], model.o.dequantized_weight(dtype), model.o.bias)
    assert torch.allclose(outs[0], dense, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-4)
    by_hand = QuantizedLinear.from_linear(nn.Linear(32, 32, dtype=dtype), FP8_STATIC, backend="scaled_mm")
    by_hand.load_state_dict({**model.v.state_dict(), "input_scale": (torch.cat(data).abs().max() / 448).reshape(1)})
    model.v.backend = "scaled_mm"
    with torch.no_grad():
        assert torch.equal(model.v(data[0]), by_hand(data[0]))
        unquantized = nn.functional.linear(data[0], weight, model.v.bias)
        assert not torch.allclose(model.v(data[0]), unquantized, rtol=1e-5, atol=1e-5)


def test_the_observer_by_default_is_the_command_lines() -> None:
    named, default = Attention(), Attention()
    default.load_state_dict(named.state_dict())
    command = inspect.signature(cli.quantize).parameters["observer"].default
    for model, options in ((named, {"observer": command}), (default, {})):
        with calibrate(model, **options), torch.no_grad():
            model(batches()[0])
    found = scales_of(named), scales_of(default)
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("q.input_scale", "o.input_scale"))


def test_again_replaces_what_was_measured() -> None:
    model, data = Attention(), batches()
    with calibrate(model, "amax"), torch.no_grad():
        model(data[1])
    first, parameter, version = scales_of(model), model.q.input_scale, model.q.input_scale._version
    with calibrate(model, "amax") as run, torch.no_grad():
        model(data[0])
    assert float(model.q.input_scale) == float(data[0].abs().max() / 448) < float(first["q.input_scale"])
    assert model.q.input_scale is parameter and parameter._version > version
    again = Attention()
    apply_scales(again, json.loads(json.dumps(run.to_dict()))["scales"])
    for name, scale in scales_of(model).items():
        assert torch.equal(scales_of(again)[name], scale) or name == "spare.input_scale"
    assert not again.q.needs_calibration and again.spare.needs_calibration


@pytest.mark.parametrize(("scales", "words"), [
    ({"q": 0.5, "w": 0.5}, "scales for w"), ({"q": 0.5, "k": float("nan")}, "positive"), ({"q": 0.5, "k": -1.0}, "positive"),
    ({"q": 0.5, "k": 0.0}, "positive"), ({"q": 0.5, "k": [1.0, 2.0]}, "needs 1 scales"), ({"q": 1e39}, "float32"),
])  # fmt: skip
def test_scales_that_do_not_fit(scales: dict[str, Any], words: str) -> None:
    model = Attention()
    with pytest.raises(CalibrationError, match=words):
        apply_scales(model, scales)
    assert all(scale.isnan().all() for scale in scales_of(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_never_zero(dtype: torch.dtype) -> None:
    model = nn.Sequential(QuantizedLinear.from_linear(nn.Linear(8, 8, dtype=dtype), FP8_STATIC))
    with calibrate(model), torch.no_grad():
        model(torch.zeros(2, 8, dtype=dtype))
    assert float(model[0].input_scale) == torch.finfo(dtype).eps  # that of compressed-tensors
    least = torch.tensor(6e-8 if dtype == torch.float16 else 1.2e-38, dtype=dtype)
    with calibrate(model), torch.no_grad():
        model(least.expand(2, 8))
    assert 0 < float(model[0].input_scale) <= float(least)


def test_under_autocast_what_the_layer_multiplies_is_measured_and_siblings_are_known() -> None:
    model, x = Attention(), torch.full((2, 32), 1.003)
    model.q.input_scale.data = model.q.input_scale.data.float()
    with calibrate(model, observer=Drifting()), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
    rounded = float(x.bfloat16()[0, 0])
    assert rounded != float(x[0, 0])
    # The third of three observers is the largest.
    assert [float(getattr(model, n).input_scale) for n in "qkv"] == [float(torch.tensor(rounded * 3) / 448)] * 3


class Drifting(Amax):
    """Another threshold for each layer, which no real observer of the same inputs has."""

    made = 0

    def _start(self, streams: int, device: torch.device) -> None:
        super()._start(streams, device)
        type(self).made += 1
        self.number = type(self).made

    def threshold(self, dtype: torch.dtype = FP8) -> torch.Tensor:
        return self.amax * self.number


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Drifting.made = 0


@pytest.mark.parametrize("tie", [True, False])
def test_siblings_by_the_tensors_they_were_given(tie: bool) -> None:
    class Block(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.o(x.clone())  # equal, and not the same
            self.q(x), self.k(x)
            x += 1
            self.v(x), self.spare(x)
            return x

    model, data = Block(), batches()
    wanted = [x.abs().max() for x in data], [(x + 1).abs().max() for x in data]
    with calibrate(model, observer=Drifting, tie=tie), torch.no_grad():
        for x in data:
            model(x)
    before, after = (max(map(float, found)) for found in wanted)
    numbers = {"q": 2, "k": 2, "v": 5, "o": 4, "spare": 5} if tie else {"q": 1, "k": 2, "v": 3, "o": 4, "spare": 5}
    for name, number in numbers.items():
        amax = torch.tensor(before if name in "qko" else after) * number
        assert float(getattr(model, name).input_scale) == float(amax / 448), name


def test_an_exception_changes_nothing() -> None:
    model = Attention()
    before = scales_of(model)
    with pytest.raises(ZeroDivisionError), calibrate(model), torch.no_grad():
        model(batches()[0])
        raise ZeroDivisionError
    assert model.q.needs_calibration and model.q.observer is None and not model.q._forward_pre_hooks
    assert all(s.isnan().all() and before[n].isnan().all() for n, s in scales_of(model).items())
    with pytest.raises(CalibrationError, match="none of 5 layers"), calibrate(model):
        pass
    with calibrate(model), torch.no_grad():
        with pytest.raises(CalibrationError, match="already"), calibrate(model):
            pass
        model(batches()[0])  # the outer block goes on
    assert not model.q.needs_calibration


@pytest.mark.parametrize("observer", ["amax", "percentile", "mse"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(observer: str, value: float) -> None:
    model, data = Attention(), batches()
    with calibrate(model), torch.no_grad():
        model(data[0])
    before = scales_of(model)
    data[1][0, 0, 0] = value
    with pytest.raises(CalibrationError, match=r"NaN or infinity.*: q, k, v"), calibrate(model, observer), torch.no_grad():
        for x in data:
            model(x)
    assert all(torch.equal(s, before[n]) for n, s in scales_of(model).items() if n != "spare.input_scale")


def test_models_with_nothing_to_calibrate(tmp_path: Path) -> None:
    linear = QuantizedLinear.from_linear(nn.Linear(8, 8), FP8_DYNAMIC)
    for model, words in ((linear, r"channel x token \(dynamic\)"), (nn.Linear(8, 8), "no quantized layers")):
        with pytest.raises(CalibrationError, match=words), calibrate(model):
            pass
    with pytest.raises(UnsupportedError, match="q, k, v, o, spare are offloaded"), calibrate(Attention().to("meta")):
        pass
    for observer in ("median", 3, dict):
        with pytest.raises(ConfigError, match="amax, percentile, mse"), calibrate(Attention(), observer):  # type: ignore[arg-type]
            pass
    for percent in (0, 101, float("nan")):
        with pytest.raises(ConfigError, match="at most 100"):
            Percentile(percent)


@pytest.mark.usefixtures("no_native")
def test_nothing_is_kept_alive_and_copies_are_not_watched() -> None:
    model, x = Attention(), torch.randn(2, 32, requires_grad=True)
    with calibrate(model, "mse") as run:
        y = x * 2
        gone = weakref.ref(y)
        model(y).sum().backward()
        del y
        assert gone() is None
        grad = x.grad
        twin = copy.deepcopy(model)
        assert twin.q.observer is None and model.q.observer is not None and twin.q.needs_calibration
        with pytest.raises(CalibrationError):
            twin(x)
    assert grad is not None and run.batches == 1
    twin_of = nn.ModuleDict({"a": model.q, "b": model.q})
    with calibrate(twin_of) as run, torch.no_grad():
        model.q(x)
    assert list(run.scales) == ["a"]


def test_compiled_layers_are_measured() -> None:
    model, data = Attention(), batches()
    compiled = torch.compile(model, backend="eager")
    with calibrate(model), torch.no_grad():
        for x in data:
            compiled(x)
    assert float(model.q.input_scale) == float(torch.cat(data).abs().max() / 448)


@pytest.mark.parametrize("force", [True, False, None])
def test_progress(force: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    model = Attention()
    with calibrate(model, progress=force), torch.no_grad():
        for x in batches():
            model(x)
    assert ("3 forward passes" in capsys.readouterr().err) == bool(force)


# --- observers -------------------------------------------------------------------------------------------------------

KINDS = {
    "normal": lambda: torch.randn(300, 64),
    "heavy": lambda: torch.distributions.StudentT(3.0).sample((300, 64)),
    "sparse": lambda: torch.randn(300, 64) * (torch.rand(300, 64) < 0.1),
    "outliers": lambda: torch.randn(300, 64).flatten().index_fill(0, torch.arange(5), 300.0).view(300, 64),
    "tiny": lambda: torch.randn(300, 64) * 1e-20,
}


def seen(prototype: Observer, x: torch.Tensor, parts: int = 5) -> Any:
    """From small values to large ones, so that ranges grow."""
    observer = prototype.started(1, CPU)
    for part in x[x.abs().amax(1).argsort()].chunk(parts):
        observer.observe(part)
    return observer


@pytest.mark.parametrize("kind", KINDS)
def test_histograms_are_the_same_in_any_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = KINDS[kind]()
    at_once = seen(Mse(), x, 1)
    by_hand = torch.histc(x.abs().double() / float(at_once._width()), observers.BINS, 0, observers.BINS).long()
    assert torch.equal(at_once.counts[0], by_hand) and int(by_hand[observers.BINS // 2 :].sum()) > 0
    assert torch.equal(seen(Mse(), x, 7).counts, at_once.counts)
    monkeypatch.setattr(observers, "CHUNK", 1000)
    assert torch.equal(seen(Mse(), x, 2).counts, at_once.counts)
    streams = Mse().started(3, CPU)
    number = torch.arange(300) % 2 * 2
    for part, of in zip(x.chunk(4), number.chunk(4), strict=True):
        streams.observe(part, of)
    for stream in (0, 2):
        alone = seen(Mse(), x[number == stream])
        assert torch.equal(streams.counts[stream], alone.counts[0]) and streams.amax[stream] == alone.amax[0]
        assert streams.threshold()[stream] == alone.threshold()[0]
    assert streams.amax[1] == -1 and not streams.counts[1].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [50, 99, 99.9, 99.99, 100])
def test_percentile(kind: str, percent: float) -> None:
    torch.manual_seed(0)
    x = KINDS[kind]()
    observer = seen(Percentile(percent), x)
    found = float(observer.threshold())
    ends = [
        float(torch.quantile(x.abs().flatten(), percent / 100, interpolation=side)) for side in ("lower", "higher")
    ]  # fmt: skip
    width = found / 16 + 2**-96  # of a bin; zeros are in the first
    assert ends[0] - width <= found <= ends[1] + width and 0 < found <= float(x.abs().max())
    assert (found == float(x.abs().max())) == (percent == 100) or ends[1] == float(x.abs().max())


@pytest.mark.parametrize("far", [1e3, 1e6, 1e30])
def test_percentile_of_few_values_far_away(far: float) -> None:
    """The rest is told apart, however far they are."""
    torch.manual_seed(0)
    x = torch.randn(64, 4096)
    x[0, :4] = far
    wanted = float(torch.quantile(x.abs().flatten()[: 2**18], 0.99))
    found = float(seen(Percentile(99), x).threshold())
    assert abs(found - wanted) <= wanted / 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codes", [FP8, torch.int8])
def test_mse_is_as_good_as_a_search_over_the_values(kind: str, codes: torch.dtype) -> None:
    torch.manual_seed(0)
    x = KINDS[kind]()

    def error(threshold: float) -> float:
        scale = torch.full((len(x), 1), threshold / CODE_MAX[codes])
        return float((fake_quantize(x, scale, ROW, codes) - x).double().square().sum())

    amax = float(x.abs().max())
    best = min(error(amax * 2 ** (-step / 100)) for step in range(400))
    # 2%: thresholds are 1.1% apart, and with few values the error jumps.
    assert error(float(seen(Mse(), x).threshold(codes))) <= best * 1.02


def test_mse_clips_a_value_that_costs_more_than_it_is_worth() -> None:
    x = torch.randn(2000, 500, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    x[0, 0] = 3.4
    observer = seen(Mse(), x)
    assert float(observer.threshold(torch.int8)) < 3.1


# --- experts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def moe(tmp_path: Path) -> Any:
    model = qwen3_moe()
    write(model, tmp_path / "fp8", quantized=is_linear, weight=TENSOR, inputs=STATIC_TENSOR)
    return load_moe(model, tmp_path / "fp8")


def routed_by_hand(module: Any, calls: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(E,) largest inputs of both projections, token by token; -1 for experts without a token."""
    n_experts = module.first.shape[0]
    first, second = torch.full((n_experts,), -1.0), torch.full((n_experts,), -1.0)
    gate_up = numerics_of(module)
    for x, ids in calls:
        for token, chosen in zip(x, ids.tolist(), strict=True):
            for expert in chosen:
                if 0 <= expert < n_experts:
                    first[expert] = max(first[expert], token.abs().max())
                    gate, up = (gate_up[expert] @ token).chunk(2)
                    second[expert] = max(second[expert], (nn.functional.silu(gate) * up).abs().max())
    return first, second


def numerics_of(module: Any) -> torch.Tensor:
    """gate over up (E, N, K), multiplied out."""
    scale = module.gate_up_proj_scale.float().repeat_interleave(module.first.shape[1] // 2, 1)
    return module.gate_up_proj.codes.float() * scale.unsqueeze(-1)


@pytest.mark.parametrize("tokens", [1, 40])  # few are not sorted by expert on GPUs; one reaches two experts of four
@torch.no_grad()
def test_experts_are_measured_each_for_itself(tokens: int, moe: Any, caplog: pytest.LogCaptureFixture) -> None:
    module = experts_of(moe)[0]
    torch.manual_seed(0)
    sizes = torch.linspace(1, 9, tokens).unsqueeze(1)
    calls = [(torch.randn(tokens, 64) * sizes * n, torch.randint(0, 6, (tokens, 2))) for n in (1, 2)]  # 4, 5: nobody
    if tokens == 1:
        calls = [(calls[0][0], torch.tensor([[2, 0]]))]
    before = module.down_proj_input_scale.clone()
    unquantized = [module(x, ids, torch.ones(ids.shape)) for x, ids in calls]
    module.backend = "scaled_mm"
    with calibrate(module, "amax") as run:
        for (x, ids), wanted in zip(calls, unquantized, strict=True):
            assert torch.equal(module(x, ids, torch.ones(ids.shape)), wanted)
    assert module.observer is None
    found = module.gate_up_proj_input_scale, module.down_proj_input_scale
    for scale, wanted, rtol in zip(found, routed_by_hand(module, calls), (0, 1e-2), strict=True):
        wanted = torch.where(wanted < 0, wanted.max(), wanted)
        assert torch.equal(scale, scale[:, :1].expand_as(scale)) and scale.dtype == torch.bfloat16
        assert torch.allclose(scale[:, 0].float(), (wanted / 448).bfloat16().float(), rtol=rtol, atol=0)
    assert not torch.equal(before, module.down_proj_input_scale)
    assert run.scales == {n: getattr(module, f"{n}_input_scale")[:, 0].tolist() for n in ("gate_up_proj", "down_proj")}
    found_messages = ["gate_up_proj 2 of 4, down_proj 2 of 4" in record.getMessage() for record in caplog.records]
    assert found_messages == ([] if tokens > 1 else [True])
    quantized = module(calls[0][0], calls[0][1], torch.ones(tokens, 2))
    module.gate_up_proj_input_scale.mul_(1.3)
    assert not torch.equal(module(calls[0][0], calls[0][1], torch.ones(tokens, 2)), quantized)


@torch.no_grad()
def test_experts_with_nan_for_one_of_them(moe: Any) -> None:
    module, x = experts_of(moe)[0], torch.randn(3, 64)
    x[1, 5] = float("nan")
    before = scales_of(module)
    with pytest.raises(CalibrationError, match="gate_up_proj"), calibrate(module):
        module(x, torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.rand(3, 2))
    assert all(torch.equal(scale, before[name]) for name, scale in scales_of(module).items())
    with calibrate(module, "mse"):  # nobody's
        module(x, torch.tensor([[0, 1], [4, -1], [1, 2]]), torch.rand(3, 2))


@pytest.mark.parametrize("observer", ["amax", "percentile", "mse"])
def test_whole_mixtures(observer: str, moe: Any) -> None:
    before = scales_of(moe)
    with calibrate(moe, observer) as run:
        causal(moe)
    names = {name for name, module in moe.named_modules() if isinstance(module, QuantizedLinear)}
    names |= {f"model.layers.{n}.mlp.experts.{p}" for n in (0, 1) for p in ("gate_up_proj", "down_proj")}
    assert set(run.scales) == names
    after = scales_of(moe)
    assert all(scale.isfinite().all() and not torch.equal(scale, before[name]) for name, scale in after.items())
    for layer in moe.model.layers:
        a = layer.self_attn
        assert a.q_proj.input_scale == a.k_proj.input_scale == a.v_proj.input_scale
    for name, p in moe.named_parameters():
        if name in after:
            p.data.fill_(1)
    apply_scales(moe, run.scales)
    assert all(torch.equal(scale, after[name]) for name, scale in scales_of(moe).items())


@torch.no_grad()
def test_tokens_that_were_routed_before(tmp_path: Path) -> None:
    write_transposed("llama4", "split", tmp_path / "fp8", weight=TENSOR, inputs=STATIC_TENSOR)
    module = experts_of(load_moe(llama4(), tmp_path / "fp8"))[0]
    x = torch.randn(4, 6, 64) * torch.tensor([1.0, 5.0, 2.0, 0.0]).view(4, 1, 1)  # the last one has none
    with calibrate(module, "amax"):
        module(x.reshape(24, 64))
    wanted = x.abs().amax((1, 2))
    wanted[3] = wanted.max()
    assert torch.equal(module.gate_up_proj_input_scale, (wanted / 448).bfloat16().unsqueeze(1).expand(4, 2))


def test_offloaded_experts(tmp_path: Path) -> None:
    model = qwen3_moe()
    write(model, tmp_path / "fp8", quantized=is_linear, weight=TENSOR, inputs=STATIC_TENSOR)
    kept = load_moe(model, tmp_path / "fp8", KEEP, device_map=OFFLOAD, offload_folder=tmp_path / "offload")
    with pytest.raises(UnsupportedError, match="offloaded"), calibrate(kept):
        pass


# --- several processes -----------------------------------------------------------------------------------------------


def of_rank(rank: int) -> list[torch.Tensor]:
    """Ranges that differ by far; the second process has less to do."""
    torch.manual_seed(rank)
    return [torch.randn(2, 5, 32) * size for size in ((1, 3), (900,))[rank]]


def apart(model: Attention) -> None:
    """After this v is no sibling of q and k, though on one rank alone; and the spare layer has seen something."""
    model.spare(torch.ones(1, 32))
    model.v(torch.ones(1, 32))


OBSERVED = ("amax", "percentile", "mse")


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for observer in OBSERVED:
        model = Attention()
        with calibrate(model, observer) as run, torch.no_grad():
            for x in of_rank(rank):
                model(x)
            if rank == 1:
                apart(model)
        torch.save((run.scales, model.state_dict()), f"{folder}/{observer}{rank}.pt")
        try:
            with calibrate(model, observer), torch.no_grad():
                model(torch.full((1, 32), float("nan") if rank == 0 else 1.0))
        except CalibrationError as error:
            assert "q, k, v" in str(error)
        else:
            raise AssertionError("NaN on a rank went unnoticed")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_would(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    for observer in OBSERVED:
        model = Attention()
        with calibrate(model, observer) as run, torch.no_grad():
            for x in (*of_rank(0), *of_rank(1)):
                model(x)
            apart(model)
        for rank in (0, 1):
            scales, state = torch.load(tmp_path / f"{observer}{rank}.pt")
            assert scales == run.scales
            for name, tensor in model.state_dict().items():
                assert torch.equal(state[name].float(), getattr(tensor, "codes", tensor).float()), name
