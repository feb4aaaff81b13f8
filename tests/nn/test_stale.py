"""Codes whose kept float weight was changed: refused wherever they would be used, and nowhere else."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.build import logits, tiny_llama
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef

from hf_fp8 import dequantize_model, load_quantized, merging, quantize_model, requantize_model, save_quantized
from hf_fp8.errors import StaleError, UnsupportedError
from hf_fp8.formats.code_types import FP8

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
ORIGINALS = ["keep", "offload"]


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8, bias=False)).to(dtype)


def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 1), nn.GELU(), nn.Conv2d(32, 8, 1, bias=False))


def quantized(originals: str = "keep", **options: Any) -> Any:
    return quantize_model(mlp(), "FP8_WEIGHT_ONLY", originals=originals, **options)


def run(model: Any, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(x)
    return out


def refused(model: Any, x: torch.Tensor = X) -> bool:
    try:
        run(model, x)
    except StaleError as error:
        assert "requantize_model" in str(error) and "dequantize_model" in str(error)
        return True
    return False


@torch.no_grad()
def in_place(layer: Any) -> None:
    layer.original[2].mul_(5)


@torch.inference_mode()
def under_inference_mode(layer: Any) -> None:
    layer.original[2].mul_(5)


def by_an_optimizer(layer: Any) -> None:
    weight = nn.Parameter(layer.original)
    weight.grad = torch.zeros_like(weight)
    weight.grad[2] = -4 * weight.detach()[2]
    torch.optim.SGD([weight], lr=1.0).step()


@torch.no_grad()
def by_an_average(layer: Any) -> None:
    other = layer.original.clone()
    other[2] *= 9
    torch._foreach_lerp_([layer.original], [other], 0.5)


def other_data(layer: Any) -> None:
    layer.original.data = changed(layer)


def other_data_twice(layer: Any) -> None:
    """Memory that was given back is often what is asked for next."""
    rest = changed(layer)
    layer.original.data = torch.empty_like(rest)
    layer.original.data = rest


def another_tensor(layer: Any) -> None:
    layer.original = changed(layer)


def another_parameter(layer: Any) -> None:
    layer.original = nn.Parameter(changed(layer))
    assert "original" not in dict(layer.named_parameters())


@torch.inference_mode()
def a_tensor_without_a_counter(layer: Any) -> None:
    layer.original = changed(layer)


def changed(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.original.clone()
    weight[2] *= 5
    return weight


CHANGES: list[Callable[[Any], None]] = [
    in_place, under_inference_mode, by_an_optimizer, by_an_average, other_data, other_data_twice, another_tensor,
    another_parameter, a_tensor_without_a_counter,
]  # fmt: skip


@pytest.mark.parametrize("originals", ORIGINALS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_noticed(change: Any, originals: str, tmp_path: Path) -> None:
    model = quantized(originals)
    before = run(model)
    change(model[0])
    assert model[0].is_stale and not model[2].is_stale
    for use in (run, lambda model: save_quantized(model, tmp_path / "x"), lambda model: model.state_dict()):
        with pytest.raises(StaleError, match=r"weight of 0 \(`original`, 32x16 in torch.float32\)"):
            use(model)
    assert not (tmp_path / "x").exists()
    fresh = mlp()
    fresh[0].weight.data[2] *= 5
    twin = copy.deepcopy(model)
    assert refused(twin)
    assert torch.allclose(run(dequantize_model(twin)), run(fresh))
    requantize_model(model)
    assert not model[0].is_stale and not torch.equal(run(model), before)
    assert torch.allclose(run(model), run(quantize_model(fresh, "FP8_WEIGHT_ONLY")))
    save_quantized(model, tmp_path / "x")
    assert torch.equal(run(load_quantized(mlp(), tmp_path / "x")), run(model))
    change(model[0])
    assert refused(model)


@pytest.mark.parametrize("change", [in_place, other_data, another_tensor], ids=lambda change: change.__name__)
def test_convolutions(change: Any, tmp_path: Path) -> None:
    model, x = quantize_model(conv(), conv1x1=True, originals="keep"), torch.randn(2, 16, 3, 3)
    run(model, x)
    change(model[0])
    assert refused(model, x)
    with pytest.raises(StaleError, match="weight of 0 "):
        save_quantized(model, tmp_path / "x")
    requantize_model(model)
    fresh = conv()
    fresh[0].weight.data[2] *= 5
    assert torch.allclose(run(model, x), run(quantize_model(fresh, conv1x1=True), x))


def test_the_parameter_that_it_was_made_of() -> None:
    model = mlp()
    weight = model[0].weight
    quantize_model(model, originals="keep")
    with torch.no_grad():
        weight.add_(1)
    assert refused(model) and torch.equal(model[0].original, weight)


def test_weights_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = mlp()
        quantize_model(model, "FP8_WEIGHT_ONLY", originals="keep")
    assert not refused(model)
    under_inference_mode(model[0])
    assert refused(model)
    with torch.inference_mode():
        requantize_model(model)
        assert not refused(copy.deepcopy(model))
    assert not refused(model)


def to_half_and_back(model: Any) -> Any:
    return model.half().float()


def shared_memory(model: Any) -> Any:
    return model.share_memory()


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def quantized_out_of_place(model: Any) -> Any:
    """The layers of a copy are copied once more."""
    return quantize_model(nn.ModuleDict({"a": model, "b": nn.Linear(4, 4)}), originals="keep", inplace=False)["a"]


COPIES: list[Callable[[Any], Any]] = [
    copy.deepcopy, copy.copy, pickled, saved, to_half_and_back, shared_memory, quantized_out_of_place, torch.nn.Module.double,
    lambda model: model.to("cpu"), lambda model: model.train().requires_grad_(False),
    lambda model: nn.DataParallel(model).module,
]  # fmt: skip


@pytest.mark.parametrize("originals", ORIGINALS)
@pytest.mark.parametrize("copied", COPIES, ids=range(len(COPIES)))
def test_copies_are_what_they_were(copied: Any, originals: str) -> None:
    with torch.no_grad():
        model = mlp()
        model[0].weight.mul_(1)  # a version that a copy does not have
        model = quantize_model(model, "FP8_WEIGHT_ONLY", originals=originals)
    fresh = copied(model)
    x = X.to(fresh[0].bias.dtype)
    assert not refused(fresh, x) and not fresh[0].is_stale
    requantize_model(fresh)
    in_place(fresh[0])
    assert refused(fresh, x)
    stale = copied(fresh)
    assert refused(stale, x)
    stale = copied(stale)  # twice
    assert refused(stale, x)
    requantize_model(stale)
    assert not refused(stale, x)


def test_nothing_to_compare_is_nothing_stale() -> None:
    """Dropped, replaced by a state dict, never kept, or not there to be seen."""
    model = quantized()
    in_place(model[0])
    model[0].original = None
    assert not refused(model) and model[0].state_dict()
    model = quantized()
    in_place(model[0])
    model.load_state_dict(quantized("discard").state_dict())
    assert model[0].original is None and torch.equal(run(model), run(quantized("discard")))
    assert not refused(quantize_model(mlp()))
    meta = quantize_model(mlp().to("meta"), originals="keep")
    assert not meta[0].is_stale and meta(X.to("meta")).shape == (3, 8)
    assert quantized().to("meta")(X.to("meta")).shape == (3, 8)


def test_what_is_dropped_is_freed() -> None:
    model = quantized()
    memory = StorageWeakRef(model[0].original.untyped_storage())
    assert not memory.expired()
    model[0].original = None
    assert memory.expired()


def twins() -> Any:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    return quantize_model(model, "FP8_WEIGHT_ONLY", originals="keep")


@pytest.mark.parametrize("change", [in_place, other_data], ids=lambda change: change.__name__)
def test_layers_with_one_weight(change: Any) -> None:
    model = twins()
    change(model[0])
    assert model[0].is_stale and model[1].is_stale
    alone = copy.deepcopy(model)
    alone[0].requantize()
    assert not alone[0].is_stale and alone[1].is_stale
    requantize_model(alone)
    assert not alone[0].is_stale and not alone[1].is_stale
    requantize_model(model)
    assert not refused(model) and model[0].weight is model[1].weight
    assert torch.equal(alone[1].weight.float(), model[1].weight.float())


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("made", [requantize_model, dequantize_model])
def test_layers_with_one_weight_that_have_originals_of_their_own(number: int, made: Any) -> None:
    """As `.to()` leaves them: what was changed counts, whichever of them it is."""
    model = twins()
    for layer in model:
        layer._keep(layer.original.clone())
    in_place(model[number])
    wanted = model[number].original.clone()
    torn = copy.deepcopy(model)
    with torch.no_grad():
        torn[1 - number].original[3].mul_(7)
    with pytest.raises(UnsupportedError, match="different values"):
        made(torn)
    same = copy.deepcopy(model)
    in_place(same[1 - number])
    for each in (model, same):
        made(each)
        assert each[0].weight is each[1].weight
        assert torch.equal(dequantize_model(each)[1 - number].weight, wanted)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("backend", ["weight_only", "scaled_mm"])
@pytest.mark.parametrize("originals", ORIGINALS)
@pytest.mark.parametrize("grad", [True, False])
def test_compiled(backend: str, originals: str, grad: bool) -> None:
    torch.compiler.reset()
    model = quantize_model(mlp(), originals=originals, backend=backend)
    plain = quantize_model(mlp(), backend=backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = X.clone().requires_grad_(grad)
    out = compiled(x)
    assert torch.equal(out, plain(X)) and counter.frame_count == 1
    if grad:
        out.sum().backward()
        assert x.grad is not None
    for change in (in_place, other_data):
        change(model[0])
        with pytest.raises(StaleError, match="16 to 32 features"):
            compiled(x)
        assert counter.frame_count <= 2
        requantize_model(model)
        assert torch.equal(compiled(x), model(X))
    another_tensor(model[0])
    with pytest.raises(StaleError):
        compiled(x)


def test_layers_compiled_one_by_one_share_the_code() -> None:
    """Whatever the versions of their weights."""
    torch.compiler.reset()
    layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(12))
    for number, layer in enumerate(layers):
        for _ in range(number):
            with torch.no_grad():
                layer.weight.mul_(1)
    quantize_model(layers, originals="keep")
    counter = CompileCounterWithBackend("aot_eager")
    for layer in layers:
        layer.compile(fullgraph=True, backend=counter)
        layer(X)
    assert counter.frame_count <= 3
    in_place(layers[7])
    assert refused(layers[7]) and not refused(layers[8])


def test_compiled_code_takes_kept_weights_for_what_stays_in_its_place() -> None:
    """As parameters: CUDA graphs would copy other inputs in each replay, and the copies would look changed."""
    torch.compiler.reset()
    seen = []

    def backend(graph: Any, inputs: Any) -> Any:
        for node in graph.graph.find_nodes(op="placeholder"):
            seen.append((node.meta["example_value"].shape, node.meta["tensor_dict"].get("_dynamo_static_input_type")))
        return graph

    torch.compile(quantized("keep"), fullgraph=True, backend=backend)(X)
    floats = [kind for shape, kind in seen if shape == (32, 16)]
    assert len(floats) == 3 and None not in floats  # codes, the original, what they were made of


def test_exported_programs_do_not_hold_the_float_weight() -> None:
    model = quantized()
    program = torch.export.export(model, (X,))
    held = [*program.state_dict.values(), *program.constants.values()]
    assert not [t for t in held if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.shape == (32, 16)]
    assert torch.equal(program.module()(X), run(model))


def test_transformers_models_are_not_saved(tmp_path: Path) -> None:
    model = quantize_model(tiny_llama(), "FP8_WEIGHT_ONLY", originals="keep")
    layer: Any = model.get_submodule("model.layers.1.mlp.up_proj")
    in_place(layer)
    for use in (lambda: model.save_pretrained(tmp_path / "x"), lambda: logits(model)):
        with pytest.raises(StaleError, match=r"model\.layers\.1\.mlp\.up_proj"):
            use()
    requantize_model(model)
    model.save_pretrained(tmp_path / "x")
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("into", ["quantized", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_leaves_the_weight_before_alone(dtype: torch.dtype, into: str) -> None:
    """It was written to: unmerging gave a layer whose codes and float weight were not of one weight."""
    model: Any = quantize_model(mlp(dtype), "FP8_WEIGHT_ONLY", originals="keep")
    base, weight = model[0], model[0].original.clone()
    before = run(model, X.to(dtype))
    peft = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False, lora_alpha=64))
    adapted = run(peft, X.to(dtype))
    with merging(into):
        peft.merge_adapter()
    assert torch.equal(base.original, weight) and not base.is_stale
    if into == "quantized":
        assert not model[0].base_layer.is_stale and not torch.equal(model[0].base_layer.original, weight)
        assert (run(peft, X.to(dtype)) - adapted).norm() < (before - adapted).norm() / 2
    peft.unmerge_adapter()
    assert model[0].base_layer is base and torch.equal(base.original, weight)
    # A change is there when adapters are merged; and without them the old codes are still refused.
    in_place(base)
    assert refused(peft, X.to(dtype))
    with merging(into):
        peft.merge_adapter()
    assert not refused(peft, X.to(dtype))
    peft.unmerge_adapter()
    assert refused(peft, X.to(dtype))


def test_what_a_layer_gives_is_a_copy() -> None:
    model = quantized()
    for dense in (model[0].to_linear(torch.float32), model[0].to_dense(torch.float32)):
        dense.weight.data.mul_(3)
    assert torch.equal(model[0].original, mlp()[0].weight)


def test_changed_weights_do_not_become_int8() -> None:
    model = quantized()
    in_place(model[0])
    with pytest.raises(StaleError):
        model[0].requantize_int8()
    assert model[0].weight.dtype == FP8
