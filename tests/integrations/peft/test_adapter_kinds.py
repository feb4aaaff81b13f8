"""Every kind of adapter that is let onto quantized layers computes what it computes on the dequantized ones."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import config as lora
from support.build import IDS, error, load

from hf_fp8 import FP8Config, QuantizedLinear, dequantize_model, merging, quantize_model
from hf_fp8.errors import UnsupportedError
from hf_fp8.formats import native
from hf_fp8.integrations.peft.create import SUPPORTED

pytestmark = pytest.mark.hostless

T = ["q_proj", "down_proj"]
KINDS: dict[str, Any] = {
    "LoRA": LoraConfig(target_modules=T),
    "rsLoRA": LoraConfig(target_modules=T, use_rslora=True),
    "all-linear": LoraConfig(target_modules="all-linear"),
    "orthogonal": LoraConfig(target_modules=T, init_lora_weights="orthogonal"),
    "gaussian": LoraConfig(target_modules=T, init_lora_weights="gaussian"),
    "mica": LoraConfig(target_modules=T, init_lora_weights="mica"),
    "DoRA": LoraConfig(target_modules=T, use_dora=True),
    "DoRA, dropout": LoraConfig(target_modules=T, use_dora=True, lora_dropout=0.5),
    "bias": LoraConfig(target_modules=["q_proj"], lora_bias=True),
    "aLoRA": LoraConfig(target_modules=T, alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
    "VeLoRA": LoraConfig(target_modules=T, velora_config=lora.VeloraConfig()),
    "MonteCLoRA": LoraConfig(target_modules=T, monteclora_config=lora.MontecloraConfig()),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=T, total_step=10),
    "IA3": peft.IA3Config(target_modules=T, feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(target_modules=T),
    "LoKr": peft.LoKrConfig(target_modules=T),
    "OFT": peft.OFTConfig(target_modules=T, oft_block_size=8),
    "BOFT": peft.BOFTConfig(target_modules=T, boft_block_size=4),
    "VeRA": peft.VeraConfig(target_modules=["q_proj"]),
    "FourierFT": peft.FourierFTConfig(target_modules=T, n_frequency=50),
    "MiSS": peft.MissConfig(target_modules=T),
    "RandLoRA": peft.RandLoraConfig(target_modules=T),
    "RoAd": peft.RoadConfig(target_modules=T),
    "VBLoRA": peft.VBLoRAConfig(target_modules=T, vector_length=32),
    "C3A": peft.C3AConfig(target_modules=T, block_size=8),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),  # these two go on dense modules alone
    "tokens": peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
    "BEFT": peft.BeftConfig(target_modules=T),
    "DEFT": peft.DeftConfig(target_modules=T),
    "Lily": peft.LilyConfig(target_modules=T),
    "PSOFT": peft.PsoftConfig(target_modules=T),
    "PVeRA": peft.PveraConfig(target_modules=["q_proj"]),
    "TinyLoRA": peft.TinyLoraConfig(target_modules=T),
    "DeLoRA": peft.DeloraConfig(target_modules=T),
    "GraLoRA": peft.GraloraConfig(target_modules=T),
    "WaveFT": peft.WaveFTConfig(target_modules=T, n_frequency=50),
    "OSF": peft.OSFConfig(target_modules=T),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
UNMERGEABLE = {"bias", "aLoRA", "BEFT", "Lily", "OSF", "prompt", "prefix"}  # by PEFT itself, dense or not


def made(path: Path, kind: str, config: FP8Config | None) -> Any:
    model = load(path, config or FP8Config(backend="weight_only"))
    return adapted(model if config else dequantize_model(model, torch.float32), kind)


def adapted(model: Any, kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        made = get_peft_model(model, copy.deepcopy(KINDS[kind]))
    torch.manual_seed(1)
    for _, parameter in made.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    out = model.train()(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(
    found: tuple[torch.Tensor, dict[str, torch.Tensor]],
    wanted: tuple[torch.Tensor, dict[str, torch.Tensor]],
    of_logits: float,
    of_gradients: float,
) -> None:
    (logits, grads), (expected_logits, expected) = found, wanted
    assert error(logits, expected_logits) < of_logits
    assert grads.keys() == expected.keys() and grads
    largest = max(float(grad.norm()) for grad in expected.values())
    for name, grad in expected.items():
        # Where a factor cancels out, a gradient is noise around 0.
        assert float(grad.norm()) < 1e-6 * largest or error(grads[name], grad) < of_gradients, name


@pytest.mark.thinned(5)
@pytest.mark.parametrize("kind", KINDS)
def test_as_on_the_dequantized_model(kind: str, fp8: Path) -> None:
    wanted = run(made(fp8, kind, None))
    with native.use(None):
        found = run(made(fp8, kind, FP8Config(backend="weight_only")))
    assert torch.equal(found[0], wanted[0])  # torch's matmuls of the same weights
    assert_close(found, wanted, 1e-6, 1e-5)
    ours = made(fp8, kind, FP8Config(backend="weight_only"))
    assert_close(run(ours), wanted, 1e-5, 1e-4)  # the library adds up in another order
    if kind in UNMERGEABLE:
        return
    with torch.no_grad():
        before = ours.eval()(input_ids=IDS).logits
        with merging("dense"):
            ours.merge_adapter()
            assert error(ours(input_ids=IDS).logits, before) < 1e-5
            ours.unmerge_adapter()
        assert torch.equal(ours(input_ids=IDS).logits, before)
        ours.merge_adapter()
        # The weights of some linears rounded again, by chance.
        assert error(ours(input_ids=IDS).logits, before) < 0.2
        ours.unmerge_adapter()
        assert torch.equal(ours(input_ids=IDS).logits, before)


def fused(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that multiplies by the head's weight itself, as trl's and Liger's do."""
    torch.manual_seed(2)
    inside = model.train().get_base_model()
    logits = inside.model(IDS, use_cache=False).last_hidden_state @ inside.lm_head.weight.T
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.thinned(8)
@pytest.mark.parametrize("backend", ["weight_only", "int8"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("prompt", "prefix")])
def test_under_a_fused_head(kind: str, backend: str, fp8_head: Path) -> None:
    found = []
    for dense in (False, True):
        model = load(fp8_head, FP8Config(backend=backend), dtype=torch.float32)
        assert isinstance(model.lm_head, QuantizedLinear)
        found.append(fused(adapted(dequantize_model(model, torch.float32) if dense else model, kind)))
    (logits, grads), (wanted, expected) = found
    # int8 rounds the inputs of every layer.
    assert error(logits, wanted) < (1e-5 if backend == "weight_only" else 0.1)
    assert grads.keys() == expected.keys() and grads
    size, off = (torch.stack([g.norm() for g in each]).norm() for each in (
        list(expected.values()), [grads[name] - grad for name, grad in expected.items()]
    ))  # fmt: skip
    assert off <= (1e-4 if backend == "weight_only" else 0.2) * size


REFUSED = {
    "HRA": peft.HRAConfig(target_modules=T),
    "SHiRA": peft.ShiraConfig(target_modules=T, r=4),
    "HiRA": peft.HiraConfig(target_modules=T),
}


@pytest.mark.parametrize("backend", ["weight_only", "int8"])
@pytest.mark.parametrize("kind", REFUSED)
def test_those_that_compute_with_the_weight_are_refused(kind: str, backend: str, fp8: Path) -> None:
    model = load(fp8, FP8Config(backend=backend))
    before = model(IDS).logits
    with pytest.raises(UnsupportedError, match=r"codes.*LORA.*dequantize=True"):
        get_peft_model(model, copy.deepcopy(REFUSED[kind]))
    assert torch.equal(model(IDS).logits, before)
    get_peft_model(load(fp8, FP8Config(dequantize=True)), copy.deepcopy(REFUSED[kind]))


def test_the_list_is_of_kinds_that_were_tried() -> None:
    tried = {getattr(config.peft_type, "value", config.peft_type) for config in KINDS.values()}
    assert tried >= SUPPORTED and not SUPPORTED & {"HRA", "SHIRA", "HIRA", "FROD", "PEANUT", "LN_TUNING", "TRAINABLE_TOKENS"}


OPTIONS = {
    "KaSA": LoraConfig(target_modules=T, kasa_config=lora.KasaConfig()),
    "MiSS bat": peft.MissConfig(target_modules=T, init_weights="bat", r=8),
    "norms": peft.LNTuningConfig(target_modules=["q_proj"]),
    "tokens": peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["q_proj"]),
}


@pytest.mark.parametrize("backend", ["weight_only", "int8"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_a_kind_that_compute_with_the_weight(option: str, backend: str, fp8: Path) -> None:
    with pytest.raises(UnsupportedError, match="dequantize=True"):
        get_peft_model(load(fp8, FP8Config(backend=backend)), copy.deepcopy(OPTIONS[option]))


ON_CONVOLUTIONS = {
    "DoRA": LoraConfig(target_modules=["0"], use_dora=True),
    "LoHa": peft.LoHaConfig(target_modules=["0"]),
    "BOFT": peft.BOFTConfig(target_modules=["0"], boft_block_size=4),
}


@pytest.mark.parametrize("kind", ON_CONVOLUTIONS)
def test_kinds_that_ask_a_convolution_for_more(kind: str) -> None:
    net = quantize_model(torch.nn.Sequential(torch.nn.Conv2d(32, 32, 1)), "INT8", conv1x1=True)
    with pytest.raises(UnsupportedError, match="convolutions in FP8"):
        get_peft_model(net, copy.deepcopy(ON_CONVOLUTIONS[kind]))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_would_have_to_write_offloaded_weights(start: str, fp8: Path) -> None:
    model = load(fp8)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="offloaded"):
        get_peft_model(model, LoraConfig(target_modules=T, init_lora_weights=start))
    assert not [m for m in model.modules() if hasattr(m, "base_layer")]


def test_a_kind_of_somebodys_own(fp8: Path) -> None:
    """A layer class defined after hf_fp8 was imported, with a `merge` of its own."""
    from peft.tuners.lora.layer import Linear

    class Own(Linear):
        def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    model = load(fp8)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    config._register_custom_module({QuantizedLinear: Own, torch.nn.Linear: Own})
    adapted = get_peft_model(model, config)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is Own
    before = adapted(IDS).logits
    adapted.merge_adapter()
    assert isinstance(layer.base_layer, QuantizedLinear) and error(adapted(IDS).logits, before) < 0.2
    adapted.unmerge_adapter()
    assert torch.equal(adapted(IDS).logits, before)


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_starts_that_take_codes_for_weights_are_refused(start: str, fp8: Path) -> None:
    config = LoraConfig(target_modules=T)
    config.init_lora_weights = start
    with pytest.raises(UnsupportedError, match="looks at the model's weights"):
        get_peft_model(load(fp8), config)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_take_something_out_of_the_weight(start: str, fp8: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rest is rounded to codes again; the model starts where it was, but for that rounding."""
    model = load(fp8)
    before = model(IDS).logits
    codes = model.model.layers[0].self_attn.q_proj.weight.clone()
    adapted = get_peft_model(model, LoraConfig(target_modules=T, init_lora_weights=start))
    base = adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert not torch.equal(base.weight.view(torch.uint8), codes.view(torch.uint8)) and base.weight.dtype == codes.dtype
    assert error(adapted(IDS).logits, before) < 0.1
    assert "changed the weights of 4 quantized layers" in caplog.text
