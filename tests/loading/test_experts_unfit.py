"""Experts that cannot stay in FP8, and files whose experts are not those of the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.build import State, differing, error, tensors, write
from support.experts import KEEP, experts_of, load
from support.moe import causal, dense_logits, is_linear, qwen3_moe, write_transposed
from transformers import PreTrainedModel

import hf_fp8
from hf_fp8 import FP8Config, explain
from hf_fp8.errors import UnsupportedError
from hf_fp8.formats.scheme import TENSOR
from hf_fp8.nn.experts_layout import ExpertsLayout


@pytest.fixture
def qwen(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model, path = qwen3_moe(), tmp_path / "fp8"
    write(model, path, quantized=is_linear)
    return model, path


UNFIT = {
    "some dense": ({"quantized": lambda n: is_linear(n) and "experts.2" not in n, "ignore": ["lm_head", "re:.*experts.2.*"]},
                   "some experts of gate_up_proj are dense in the files"),
    "scale dtypes": ({"edit": lambda s: {n: t.float() if "experts.1.up_proj.weight_scale" in n else t for n, t in s.items()}},
                     "differ in the dtypes of their scales"),
    "down dense": ({"quantized": lambda n: is_linear(n) and ("down" not in n or "experts" not in n),
                    "ignore": ["lm_head", "re:.*experts.*down_proj"]}, "no quantized weights for down_proj"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_stay_is_multiplied_out_and_said(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    options, reason = UNFIT[case]
    model, path = qwen3_moe(), tmp_path / "fp8"
    written, dense = write(model, path, **{"quantized": is_linear, **options})  # type: ignore[arg-type]
    logging.enable_propagation()
    try:
        kept = load(model, path)
    finally:
        logging.disable_propagation()
    assert not experts_of(kept)
    assert caplog.text.count("hf_fp8:") == 1 and reason in caplog.text
    assert any(reason in row.reason and row.kernel == "dense" for row in explain(kept))
    assert error(causal(kept), dense_logits(model, dense, tmp_path / "dense")) <= 1e-5
    load(model, path, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert not differing(written, tensors(tmp_path / "saved"))


def test_a_layer_that_cannot_beside_layers_that_can(tmp_path: Path) -> None:
    model, path = qwen3_moe(), tmp_path / "fp8"
    written, dense = write(
        model, path, quantized=lambda n: is_linear(n) and "layers.1" not in n, ignore=["lm_head", "re:.*layers.1.*"]
    )
    kept = load(model, path)
    assert len(experts_of(kept)) == 1
    assert error(causal(kept), dense_logits(model, dense, tmp_path / "dense")) <= 1e-5
    load(model, path, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert not differing(written, tensors(tmp_path / "saved"))


def test_a_family_without_the_interface(qwen: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code is not known here, so that its experts are multiplied out."""
    model, path = qwen
    monkeypatch.setattr(ExpertsLayout, "of", staticmethod(lambda module: None))
    kept = load(model, path)
    assert not experts_of(kept) and torch.equal(causal(kept), causal(load(model, path, FP8Config())))
    assert any("Qwen3MoeExperts does not have transformers' interface" in row.reason for row in explain(kept))


def test_what_a_kernel_from_the_hub_would_read(qwen: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the parameters of the module that it replaces for dense ones. `kernels` marks the class."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    model, path = qwen
    monkeypatch.setattr(Qwen3MoeSparseMoeBlock, "kernel_layer_name", "SomeMoE", raising=False)
    monkeypatch.setattr(PreTrainedModel, "set_use_kernels", lambda *_: None)
    assert experts_of(load(model, path))
    replaced = load(model, path, use_kernels=True)
    assert not experts_of(replaced)
    assert any("a kernel from the Hub for Qwen3MoeSparseMoeBlock" in row.reason for row in explain(replaced))


MISSING, MISFIT = hf_fp8.errors.MissingTensorError, hf_fp8.errors.MismatchError


BROKEN: dict[str, tuple[str, Any, type[Exception], str]] = {
    "an expert is missing": ("experts.3.", lambda t: None, MISSING, "3 experts of .*experts.down_proj"),
    "one in the middle": ("experts.1.", lambda t: None, MISSING, r"experts\.2\.\w+_proj.* one of the experts before"),
    "half of one": ("experts.3.up_proj", lambda t: None, MISSING, "3 experts of .*gate_up_proj"),
    "another shape": ("experts.2.up_proj.weight", lambda t: t[:39], MISFIT, r"experts\.2\.up_proj.* has shape \[39"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("config", [KEEP, FP8Config()], ids=["fp8", "dense"])
def test_experts_that_are_not_those_of_the_model(case: str, config: FP8Config, tmp_path: Path) -> None:
    part, change, kind, words = BROKEN[case]

    def edit(state: State) -> State:
        changed = {name: change(t) if f"layers.0.mlp.{part}" in name else t for name, t in state.items()}
        return {name: t.contiguous() for name, t in changed.items() if t is not None}

    model = qwen3_moe()
    write(model, tmp_path / "fp8", quantized=is_linear, edit=edit)
    with pytest.raises(kind, match=words):
        load(model, tmp_path / "fp8", config)


def test_experts_under_names_of_the_users(tmp_path: Path) -> None:
    """What counts is what `key_mapping` makes of a name; layer 1 is not expert 1."""
    model = qwen3_moe()

    def rename(state: State) -> State:
        return {re.sub(r"experts\.(\d+)\.", r"expert_\1.", n): t for n, t in state.items()}

    write(model, tmp_path / "fp8", quantized=is_linear, edit=rename)
    mapping = {
        r"expert_0\.": "experts.0.",
        r"expert_1\.": "experts.1.",
        r"expert_2\.": "experts.2.",
        r"expert_3\.": "experts.3.",
    }
    kept = load(model, tmp_path / "fp8", key_mapping=mapping)
    write(model, tmp_path / "plain", quantized=is_linear)
    assert len(experts_of(kept)) == 2 and torch.equal(causal(kept), causal(load(model, tmp_path / "plain")))


def test_more_experts_than_the_model_has(tmp_path: Path) -> None:
    model = qwen3_moe()

    def one_more(state: State) -> State:
        return state | {n.replace("experts.3.", "experts.4."): t.clone() for n, t in state.items() if "experts.3." in n}

    write(model, tmp_path / "fp8", quantized=is_linear, edit=one_more)
    with pytest.raises(hf_fp8.errors.MismatchError, match=r"experts\.4\..* has 4 experts"):
        load(model, tmp_path / "fp8")


def test_scales_edited_apart_are_not_lost(tmp_path: Path) -> None:
    """One scale for a whole stack in the file: if experts come to differ, saving says so."""
    model, _, _ = write_transposed("llama4", "stacked", tmp_path / "fp8", weight=TENSOR)
    path = tmp_path / "fp8"
    state = tensors(path)
    for name in list(state):
        if name.endswith("_proj_scale"):
            state[name] = state[name][:1].clone()
    from safetensors.torch import save_file

    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    kept = load(model, path, dtype=torch.bfloat16)
    kept.save_pretrained(tmp_path / "saved")
    assert not differing(state, tensors(tmp_path / "saved"))
    experts_of(kept)[0].down_proj_scale.data[2] *= 2
    with pytest.raises(UnsupportedError, match="experts now differ"):
        kept.save_pretrained(tmp_path / "edited")
