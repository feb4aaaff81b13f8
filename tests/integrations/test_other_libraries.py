"""Models of other libraries that are quantized in place: what saves them, what fuses their projections, what ties them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from peft import LoraConfig, get_peft_model
from support.build import IDS, differing, error, load, logits, stock_transformers, tensors, tiny_llama
from torch import nn

import hf_fp8
from hf_fp8 import FP8Config, QuantizedLinear, quantize_model
from hf_fp8.errors import UnsupportedError
from hf_fp8.recipes import apply_w8a8_monkey_patch

# -- saving by others --


class Hub(nn.Module, PyTorchModelHubMixin):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Saver(nn.Module):
    """A library's base class with a method of its own."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self.state_dict(), folder / "weights.pt")


class Mine(Saver):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(32, 16))


@pytest.mark.parametrize("kind", [Hub, Mine])
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "INT8"])
def test_savers_that_know_nothing_of_codes_are_refused(kind: Any, scheme: str, tmp_path: Path) -> None:
    model = kind()
    model.save_pretrained(tmp_path / "dense")
    quantize_model(model, scheme)
    for saved in (model, quantize_model(kind(), scheme, inplace=False)):
        with pytest.raises(UnsupportedError, match=r"(fc|inner\.0) of (Hub|Mine) is a quantized layer.*save_quantized"):
            saved.save_pretrained(tmp_path / "codes")
    assert not (tmp_path / "codes").exists()
    hf_fp8.save_quantized(model, tmp_path / "ours")
    again = hf_fp8.load_quantized(kind(), tmp_path / "ours")
    with pytest.raises(UnsupportedError):
        again.save_pretrained(tmp_path / "codes")
    with stock_transformers():
        assert "hf_fp8" not in kind.save_pretrained.__code__.co_filename
    with pytest.raises(UnsupportedError):  # registered again
        again.save_pretrained(tmp_path / "codes")
    hf_fp8.dequantize_model(model).save_pretrained(tmp_path / "again")


def test_adapters_and_models_that_know_are_saved(tmp_path: Path) -> None:
    class Around(Saver):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def save_pretrained(self, folder: Path) -> None:
            self.model.save_pretrained(folder)

    around = Around(tiny_llama())
    quantize_model(around, backend="weight_only")
    around.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", FP8Config(backend="weight_only"), dtype=around.model.dtype)
    assert error(logits(again), logits(around.model)) < 0.05  # casting the model has cast its rotary frequencies, too
    adapted = get_peft_model(quantize_model(nn.Sequential(nn.Linear(16, 16))), LoraConfig(target_modules=["0"]))
    adapted.save_pretrained(tmp_path / "adapter")
    base = get_peft_model(nn.Sequential(nn.Linear(16, 16)), LoraConfig(target_modules=["0"]))
    apply_w8a8_monkey_patch(base, "fp8")  # quantizes within the PeftModel
    base.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "adapter_model.safetensors").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


# -- methods that read weights, and are no part of a forward --


class Attention(nn.Module):
    fused = False

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.out = nn.Linear(32, 16), nn.Linear(32, 16), nn.ModuleList([nn.Linear(32, 8)])

    @torch.no_grad()
    def fuse(self) -> None:
        both = torch.cat([self.to_q.weight.data, self.to_k.weight.data])
        self.to_qk = nn.Linear(32, 32, device=self.to_q.weight.device, dtype=self.to_q.weight.data.dtype)
        self.to_qk.weight.copy_(both)
        self.to_qk.bias.copy_(torch.cat([self.to_q.bias, self.to_k.bias]))
        self.fused = True

    def norm(self) -> torch.Tensor:
        return self.out[0].weight.norm()

    def double(self) -> None:
        self.to_q.weight.data *= 2
        self.to_q.weight.mul_(2)

    def behind(self) -> None:
        self.to_k.weight.data *= 2

    def shift(self) -> None:
        self.out[0].bias.add_(self.out[0].weight.mean())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.to_qk(x) if self.fused else torch.cat([self.to_q(x), self.to_k(x)], -1)
        return self.out[0](both)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "INT8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_projections_are_made_of_the_dequantized_weights(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(Attention()).to(dtype), scheme, backend="int8" if scheme == "INT8" else "weight_only")
    attention, x = model[0], torch.randn(3, 32, dtype=dtype)
    layers = attention.to_q, attention.to_k, attention.out[0]
    assert all(isinstance(layer, QuantizedLinear) for layer in layers)
    with torch.no_grad():
        before = model(x)
        attention.fuse()
        fused = model(x)
    assert (attention.to_q, attention.to_k) == layers[:2] and type(attention.to_qk) is nn.Linear
    assert torch.equal(attention.to_qk.weight, torch.cat([layer.dequantized_weight(dtype) for layer in layers[:2]]))
    assert (fused - before).norm() < (1e-2 if dtype == torch.bfloat16 or scheme == "INT8" else 1e-6) * before.norm()
    assert torch.equal(attention.norm(), layers[2].dequantized_weight(dtype).norm()) and attention.out[0] is layers[2]
    with pytest.raises(UnsupportedError, match=r"0\.to_q \(to_q of a Attention\) was changed"), torch.no_grad():
        attention.double()
    for change in (attention.behind, attention.shift):
        with pytest.raises(UnsupportedError, match="was changed by a method"), torch.no_grad():
            change()
    assert (attention.to_q, attention.to_k, attention.out[0]) == layers
    with stock_transformers():
        assert not hasattr(Attention.norm, "__wrapped__")


def test_diffusers_own_transformer(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="its Flux is one of those whose projections can be fused")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    quantize_model(model, backend="weight_only")
    assert all(isinstance(m, QuantizedLinear) for m in model.modules() if isinstance(m, nn.Linear))
    x = {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 8, 32), "timestep": torch.ones(1),
        "pooled_projections": torch.randn(1, 32), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3),
    }  # fmt: skip
    with torch.no_grad():
        wanted = model(**x).sample
        model.fuse_qkv_projections()
        assert (model(**x).sample - wanted).norm() < 1e-5 * wanted.norm()
        model.unfuse_qkv_projections()
        assert torch.equal(model(**x).sample, wanted)
    model.save_pretrained(tmp_path / "saved")  # unlike others, it can be told what the codes are (test_diffusers)
    again = diffusers.FluxTransformer2DModel.from_pretrained(
        tmp_path / "saved", quantization_config=FP8Config(backend="weight_only")
    )
    with torch.no_grad():
        assert torch.equal(again(**x).sample, wanted)


# -- made under inference mode, trained over later --


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "INT8"])
def test_made_under_inference_mode(scheme: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    x = torch.randn(4, 32)
    with torch.inference_mode():
        quantize_model(model, scheme, originals="keep")
        hf_fp8.requantize_model(model)
        wanted = model(x)
    adapted = get_peft_model(model, LoraConfig(target_modules=["0", "2"]))
    found = adapted(x.requires_grad_())
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    assert x.grad is not None and all(p.grad is not None for n, p in adapted.named_parameters() if "lora_B" in n)
    with torch.inference_mode():
        dense = hf_fp8.dequantize_model(quantize_model(nn.Sequential(nn.Linear(32, 32)), scheme))
    dense(x).square().sum().backward()
    assert dense[0].weight.grad is not None
    with torch.no_grad():
        dense[0].weight -= dense[0].weight.grad


# -- ties --


@pytest.mark.parametrize("head", ["lm_head", "no head"])
@pytest.mark.parametrize("backend", ["weight_only", "auto", "int8"])
def test_tying_after_loading_changes_nothing(head: str, backend: str, tmp_path: Path) -> None:
    """The files have a head of their own beside a config that says that it is tied."""
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "dense")
    config = FP8Config("FP8_DYNAMIC", targets=["Linear", "lm_head"] if head == "lm_head" else ["Linear"], backend="weight_only")
    load(tmp_path / "dense", config).save_pretrained(tmp_path / "fp8")
    text = json.loads((tmp_path / "fp8" / "config.json").read_text())
    (tmp_path / "fp8" / "config.json").write_text(json.dumps({**text, "tie_word_embeddings": True}))
    model = load(tmp_path / "fp8", FP8Config(backend=backend))
    wanted = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "again")
    if backend == "weight_only":
        assert differing(tensors(tmp_path / "again"), tensors(tmp_path / "fp8")) == []
    if backend != "int8":
        again = load(tmp_path / "again", FP8Config(backend=backend) if backend == "weight_only" else None)
        again.tie_weights()
        assert torch.equal(logits(again), wanted)


def test_ties_stay(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", FP8Config("FP8_DYNAMIC"))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


# -- what serving engines run as one layer --


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "serving engines" in record.getMessage()]


@pytest.mark.parametrize("ignore", ["re:.*q_proj", "re:.*up_proj"])
def test_parts_of_what_is_served_as_one_layer(ignore: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    caplog.set_level(logging.WARNING)
    model = load(tmp_path / "dense", FP8Config("FP8_DYNAMIC", ignore=["lm_head", ignore], backend="weight_only"))
    leaf = ignore.removeprefix("re:.*")
    assert len(said(caplog)) == 1 and f"{leaf} dense" in said(caplog)[0] and "`ignore`" in said(caplog)[0]
    caplog.clear()
    model.save_pretrained(tmp_path / "fp8")
    assert len(said(caplog)) == 1 and "(and 1 more)" in said(caplog)[0]
    caplog.clear()
    quantize_model(tiny_llama(), ignore=["lm_head", ignore])
    assert len(said(caplog)) == 1


def test_merging_that_tears_such_parts(fp8: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for targets, into, expected in (
        (["q_proj", "v_proj"], "dense", 1), (["q_proj", "v_proj"], "quantized", 0), (["q_proj", "k_proj", "v_proj"], "dense", 0)
    ):  # fmt: skip
        adapted = get_peft_model(load(fp8), LoraConfig(target_modules=targets, init_lora_weights=False))
        caplog.clear()
        with hf_fp8.merging(into):
            model = adapted.merge_and_unload()
        assert len(said(caplog)) == expected and (not expected or "k_proj channel" in said(caplog)[0]), (targets, into)
        caplog.clear()
        model.save_pretrained(tmp_path / f"{into}{len(targets)}")
        assert len(said(caplog)) == expected


def test_other_families() -> None:
    from hf_fp8.loading.serving import torn

    assert torn({"a.q_proj": "x", "a.k_proj": "x", "a.v_proj": "x", "b.q_proj": None, "a.o_proj": None}) == {}
    assert torn({"q_proj": "x", "k_proj": "x"}) == {} and torn({}) == {}
    assert torn({"l.w1": "x", "l.w3": None, "l.w2": None}) == {"l.w1/w3": ["w1 x", "w3 dense"]}
    assert list(torn({"s.in_proj_qkv": None, "s.in_proj_z": "y", "m.q_a_proj": "x", "m.kv_a_proj_with_mqa": "y"})) == [
        "s.in_proj_qkv/in_proj_z", "m.q_a_proj/kv_a_proj_with_mqa",
    ]  # fmt: skip


def test_class_names_that_others_look_for() -> None:
    """`isinstance` finds quantized layers; names of classes do not (README)."""
    model = quantize_model(nn.Sequential(nn.Linear(8, 8)))
    assert isinstance(model[0], nn.Linear) and type(model[0]).__name__ == "QuantizedLinear"
    assert IDS.ndim == 2
