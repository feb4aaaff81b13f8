"""What PyTorch, transformers and users do to experts in FP8."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.build import OFFLOAD, copies, differing, error, tensors, tiny_llama, write
from support.experts import KEEP, experts_of, load, write_family
from support.moe import IDS, causal, is_linear, qwen3_moe, write_transposed
from torch.nn.utils import parametrize
from transformers import AutoModel, PreTrainedModel

import hf_fp8
from hf_fp8 import FP8Config, explain
from hf_fp8.errors import UnsupportedError
from hf_fp8.formats.code_types import FP8


@pytest.fixture
def qwen(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model, path = qwen3_moe(), tmp_path / "fp8"
    write(model, path, quantized=is_linear)
    return model, path


def block(model: PreTrainedModel) -> Any:
    return model.model.layers[0].mlp


@pytest.mark.usefixtures("no_native")
def test_default_and_options(qwen: tuple[PreTrainedModel, Path]) -> None:
    """On a CPU "auto" multiplies experts out: reading FP8 there costs more than it saves (docs/performance.md)."""
    model, path = qwen
    assert FP8Config().experts == "auto"
    for options, kept in (
        ({}, False), ({"backend": "weight_only"}, False), ({"backend": "weight_only", "experts": "dequantize"}, False),
        ({"experts": "fp8"}, True), ({"experts": "fp8", "backend": "scaled_mm"}, True),
    ):  # fmt: skip
        assert bool(experts_of(load(model, path, FP8Config(**options)))) == kept, options
        assert bool(experts_of(load(model, path, options))) == kept, options
    for options in ({"experts": "fp8", "dequantize": True}, {"experts": "fp8", "backend": "int8"}, {"experts": "bf16"}):
        with pytest.raises(hf_fp8.errors.ConfigError, match="experts"):
            FP8Config(**options)


@pytest.mark.usefixtures("no_native")
def test_bytes_are_those_of_the_file(qwen: tuple[PreTrainedModel, Path]) -> None:
    model, path = qwen
    kept = load(model, path, dtype=torch.bfloat16)
    held = sum(p.nbytes for module in experts_of(kept) for p in module.parameters())
    assert held == sum(tensor.nbytes for name, tensor in tensors(path).items() if ".experts." in name)
    rows = {row.name: row for row in explain(kept) if ".experts." in row.name}
    assert sum(row.bytes for row in rows.values()) == held
    assert {row.kernel for row in rows.values()} == {"grouped_weight_only"} and len(rows) == 4


def test_what_is_done_to_models(qwen: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, path = qwen
    kept = load(model, path)
    wanted = causal(kept)
    others = copies(kept, lambda: load(model, path), tmp_path)
    for name, other in others.items():
        assert torch.equal(causal(other), wanted), name
        other.save_pretrained(tmp_path / name)
        assert not [n for n in differing(tensors(tmp_path / name), tensors(path)) if ".experts." in n], name
    half = copy.deepcopy(kept)
    torch.nn.Module.half(half)  # the host's own refuses
    assert {p.dtype for module in experts_of(half) for n, p in module.named_parameters() if "scale" not in n} == {FP8}
    assert {p.dtype for module in experts_of(half) for n, p in module.named_parameters() if "scale" in n} == {torch.bfloat16}
    assert error(causal(half), wanted) < 0.02
    state = load(model, path).state_dict()
    name = "model.layers.0.mlp.experts.down_proj"
    for broken, words in (({name: state[name].float() * 1.1}, "holds codes"), ({f"{name}_scale": None}, "comes without")):
        edited = {k: v for k, v in {**state, **broken}.items() if v is not None}
        with pytest.raises(RuntimeError, match=words):
            load(model, path).load_state_dict(edited, strict=False)


def test_offloaded(qwen: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, path = qwen
    wanted = causal(load(model, path))
    kept = load(model, path, device_map=OFFLOAD, offload_folder=tmp_path / "offload")
    assert experts_of(kept)[0].is_offloaded
    assert torch.equal(causal(kept), wanted)
    with pytest.raises(UnsupportedError, match="offloaded"):
        kept.dequantize()
    kept.save_pretrained(tmp_path / "saved")
    assert not [n for n in differing(tensors(tmp_path / "saved"), tensors(path)) if ".experts." in n]


@pytest.mark.parametrize("how", ["dispatched", "compiled"])
def test_dequantized_is_dense_whatever_was_put_on_the_module(
    how: str, qwen: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    """Hooks of accelerate and `module.compile()` sit on the instance, bound to the old one."""
    model, path = qwen
    if how == "dispatched":
        places = {"model": "cpu", "lm_head": "disk"}
        kept = load(model, path, device_map=places, offload_folder=tmp_path / "offload")
        assert hasattr(experts_of(kept)[0], "_hf_hook")
    else:
        kept = load(model, path)
        for module in experts_of(kept):
            module.compile(backend="aot_eager")
    before = causal(kept)
    dense = kept.dequantize()
    assert error(causal(dense), before) < 1e-6
    for layer in dense.model.layers:
        layer.mlp.experts.down_proj.data.zero_()
    assert error(causal(dense), before) > 0.01


@pytest.mark.usefixtures("no_native")
def test_explained_after_dequantizing_and_without_experts(
    qwen: tuple[PreTrainedModel, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.utils import logging

    model, path = qwen
    assert explain(load(model, path, FP8Config(experts="fp8")).dequantize()) == []
    write(tiny_llama(), tmp_path / "llama")
    logging.enable_propagation()
    try:
        load(tiny_llama(), tmp_path / "llama")
        assert "no experts that the model holds merged" in caplog.text
        caplog.clear()
        load(model, path, FP8Config(backend="weight_only"))
        assert "experts='fp8' keeps experts" in caplog.text
    finally:
        logging.disable_propagation()


def test_base_model_and_back(tmp_path: Path) -> None:
    """A prefix that the file has and the model lacks, and the other way round; names that only llm-compressor writes."""
    model, written, _ = write_transposed("gpt_oss", "split", tmp_path / "fp8")
    options: dict[str, Any] = {"quantization_config": KEEP, "dtype": torch.bfloat16}
    base = AutoModel.from_pretrained(tmp_path / "fp8", **options)
    assert len(experts_of(base)) == 2
    base.save_pretrained(tmp_path / "base")
    assert {f"model.{name}" for name in tensors(tmp_path / "base")} == set(written) - {"lm_head.weight"}
    again = type(model).from_pretrained(tmp_path / "base", **options)
    assert torch.equal(again.model(IDS).last_hidden_state, base(IDS).last_hidden_state)
    again.save_pretrained(tmp_path / "again")
    saved = tensors(tmp_path / "again")
    same = {name.removeprefix("model."): t for name, t in saved.items() if name != "lm_head.weight"}
    assert not differing(same, tensors(tmp_path / "base"))


def test_generate_and_the_hosts_names_of_implementations(qwen: tuple[PreTrainedModel, Path]) -> None:
    model, path = qwen
    kept = load(model, path)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = load(model, path, FP8Config(dequantize=True)).generate(IDS, **greedy)
    for name in ("grouped_mm", "batched_mm", "eager"):
        kept.set_experts_implementation(name)
        assert torch.equal(kept.generate(IDS, **greedy), wanted), name
    kept.set_experts_implementation("deepgemm")
    with pytest.raises(UnsupportedError, match="deepgemm"):
        causal(kept)


def test_compiled_with_gradients(qwen: tuple[PreTrainedModel, Path]) -> None:
    """The backward is one op, too: it need not know in the graph how many rows an expert has."""
    model, path = qwen
    mlp = block(load(model, path))
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (mlp, compiled):
        torch.manual_seed(0)
        x = torch.randn(1, 9, 64, requires_grad=True)
        call(x).square().sum().backward()
        grads.append(x.grad)
    assert error(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize("backend", ["weight_only", "scaled_mm"])
def test_compiled_in_one_graph(backend: str, qwen: tuple[PreTrainedModel, Path]) -> None:
    model, path = qwen
    kept = load(model, path, FP8Config(experts="fp8", backend=backend))
    compiled = torch.compile(block(kept), fullgraph=True, backend="aot_eager")
    for tokens in (1, 7, 12):
        x = torch.randn(1, tokens, 64)
        with torch.no_grad():
            assert error(compiled(x)[0], block(kept)(x)[0]) < 1e-5


def test_gradients(qwen: tuple[PreTrainedModel, Path]) -> None:
    """Through frozen experts, to the input and to the router, as through the dense ones."""
    model, path = qwen
    found = []
    for config in (KEEP, FP8Config(dequantize=True)):
        mlp = block(load(model, path, config)).train()
        torch.manual_seed(0)
        x = torch.randn(1, 9, 64, requires_grad=True)
        out = mlp(x)
        (out if isinstance(out, torch.Tensor) else out[0]).square().sum().backward()
        found.append((x.grad, mlp.gate.weight.grad))
        if config is KEEP:
            assert all(p.grad is None for p in mlp.experts.parameters())
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs) < 1e-5
    experts = experts_of(load(model, path))[0]
    experts.gate_up_proj_scale.requires_grad_()
    with pytest.raises(hf_fp8.errors.InputError, match="no gradient"):
        experts(torch.randn(3, 64), torch.zeros(3, 2, dtype=torch.long), torch.rand(3, 2)).sum().backward()


class Doubled(torch.nn.Module):
    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes.float() * 2).to(codes.dtype)


def test_codes_that_somebody_computes_anew_are_refused(qwen: tuple[PreTrainedModel, Path]) -> None:
    """As PEFT does to parameters, where hf_fp8 is not there: its delta would be added to codes."""
    from peft import LoraConfig, get_peft_model

    model, path = qwen
    for name, leaf in (("model.layers.0.mlp.experts", "down_proj"), ("model.layers.1.self_attn.q_proj", "weight")):
        kept = load(model, path)
        parametrize.register_parametrization(kept.get_submodule(name), leaf, Doubled(), unsafe=True)
        with pytest.raises(UnsupportedError, match="parametrized"):
            kept(IDS, use_cache=False)
    on_linears = get_peft_model(load(model, path), LoraConfig(target_modules=["q_proj", "v_proj"]))
    on_linears(IDS, use_cache=False, labels=IDS).loss.backward()
    assert len(explain(on_linears)) == len(explain(load(model, path)))
    grads = [p.grad for n, p in on_linears.named_parameters() if "lora_A" in n or "lora_B" in n]
    assert grads and all(g is not None and g.isfinite().all() for g in grads)
    config = LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    dense = get_peft_model(load(model, path, FP8Config(experts="dequantize", backend="weight_only")), config)
    dense(IDS, use_cache=False, labels=IDS).loss.backward()


CHOICES = {
    "no tokens": torch.zeros(0, 2),
    "one token": torch.tensor([[3, 1]]),
    "all to one": torch.full((17, 2), 2),
    "some experts empty": torch.tensor([[0, 3]] * 17),
    "nobody's": torch.tensor([[0, 4], [4, 4], [2, 4], [3, 1], [-1, 2]]),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["weight_only", "scaled_mm"])
def test_choices(name: str, dtype: torch.dtype, backend: str, qwen: tuple[PreTrainedModel, Path]) -> None:
    model, path = qwen
    config = FP8Config(experts="fp8", backend=backend)
    experts = experts_of(load(model, path, config, dtype))[0]
    ids = CHOICES[name].long()
    x = torch.randn(len(ids), 2 * 64, dtype=dtype)[:, ::2]  # not contiguous
    weights = torch.rand(ids.shape, dtype=dtype)
    found = experts(x, ids, weights)
    assert found.shape == x.shape and found.dtype == dtype and torch.equal(experts(x, ids, weights), found)
    wanted = torch.zeros_like(x)
    for token in range(len(ids)):  # a token alone is what it is among others
        for slot in range(2):
            if 0 <= ids[token, slot] < 4:
                one = experts(x[token : token + 1], ids[token : token + 1, slot : slot + 1], torch.ones(1, 1, dtype=dtype))
                wanted[token] += one[0] * weights[token, slot]
    assert not len(ids) or error(found, wanted) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss split"])
def test_nobodys_share_is_nothing(family: str, tmp_path: Path) -> None:
    """Biases, too, which have a row for each expert alone."""
    model, _, _ = write_family(family, tmp_path / "fp8")
    experts = experts_of(load(model, tmp_path / "fp8"))[0]
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    ids = torch.tensor([[0, 4], [4, 4], [2, -1], [3, 1], [99, 2]])
    found = experts(x, ids, weights)
    wanted = torch.zeros(5, 64)
    for token in range(5):
        for slot in (0, 1):
            if 0 <= ids[token, slot] < 4:
                one = [t[token : token + 1, slot : slot + 1] for t in (ids, weights)]
                wanted[token] += experts(x[token : token + 1], *one)[0]
    assert error(found, wanted) < 1e-6 and not found[1].any()


def test_what_is_not_finite_stays_visible(qwen: tuple[PreTrainedModel, Path]) -> None:
    model, path = qwen
    for backend in ("weight_only", "scaled_mm"):
        experts = experts_of(load(model, path, FP8Config(experts="fp8", backend=backend)))[0]
        x, ids = torch.randn(5, 64), torch.tensor([[0, 1]] * 5)
        x[1, 3], x[3, 7] = float("nan"), float("inf")
        found = experts(x, ids, torch.rand(5, 2))
        assert found.isfinite().all(1).tolist() == [True, False, True, False, True]
