"""Models and configs go through `pickle`, `torch.save` and `copy`, into other processes, and are the same there."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.build import KEEP, differing, load, logits, tensors, tiny_llama
from support.checkpoints import checkpoint
from support.kernels import limit_as_of_large_layers
from support.moe import gpt_oss, qwen3_moe
from transformers import AutoModelForCausalLM

import hf_fp8
from hf_fp8 import FP8Config, explain, quantize_model
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.quantized_weight.tensor import QuantizedWeight
from hf_fp8.kernels import thresholds


def from_data(name: str, **options: Any) -> Callable[[Path], torch.nn.Module]:
    return lambda path: load(checkpoint(name, path), FP8Config(**options))


def while_loading(scheme: str) -> Callable[[Path], torch.nn.Module]:
    def make(path: Path) -> torch.nn.Module:
        tiny_llama().save_pretrained(path / "dense")
        model = AutoModelForCausalLM.from_pretrained(path / "dense", quantization_config=FP8Config(scheme))
        if scheme == "FP8":
            with hf_fp8.calibrate(model):
                logits(model)
        return model

    return make


def zero_points(path: Path) -> torch.nn.Module:
    """Tensors that no module holds, in FP8 too, travel with the quantizer."""
    folder = checkpoint("llama-dyn", path)
    state = load_file(folder / "model.safetensors")
    points = {name[: -len("scale")] + "zero_point": tensor for name, tensor in state.items() if name.endswith("weight_scale")}
    points = {name: torch.zeros_like(tensor).to(FP8) for name, tensor in points.items()}
    save_file(state | points, folder / "model.safetensors", metadata={"format": "pt"})
    return load(folder)


def with_adapters(make: Callable[[Path], torch.nn.Module], merged: bool = False) -> Callable[[Path], torch.nn.Module]:
    def adapted(path: Path) -> torch.nn.Module:
        model = get_peft_model(make(path), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
        if merged:
            model.merge_adapter()
        return model

    return adapted


KEPT = from_data("llama-dyn", backend="weight_only")
MODELS: dict[str, Callable[[Path], torch.nn.Module]] = {
    "weight_only": KEPT,
    "scaled_mm": from_data("llama-block", backend="scaled_mm"),
    "int8": from_data("llama-dyn", backend="int8"),
    "multiplied out": from_data("llama-dyn"),
    "cache scales": from_data("llama-static-kv", backend="scaled_mm"),
    "zero points": zero_points,
    "merged projections": from_data("phi3-dyn", backend="weight_only"),
    "experts": from_data("mixtral-hub-static", backend="scaled_mm", experts="fp8"),
    "experts multiplied out": from_data("qwen3moe-dyn", backend="weight_only"),
    "while loading": while_loading("FP8_DYNAMIC"),
    "while loading, static": while_loading("FP8"),
    "in place": lambda path: quantize_model(tiny_llama(tie_word_embeddings=True), originals="keep"),
    "in place, int8": lambda path: quantize_model(tiny_llama(), "INT8"),
    "in place, experts": lambda path: quantize_model(qwen3_moe()),
    "in place, interleaved experts": lambda path: quantize_model(gpt_oss()),
    "adapters": with_adapters(KEPT),
    "adapters, merged": with_adapters(KEPT, merged=True),
    "adapters, int8": with_adapters(from_data("llama-dyn", backend="int8")),
}


def through_torch_save(model: torch.nn.Module) -> torch.nn.Module:
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    found: torch.nn.Module = torch.load(buffer, weights_only=False)
    return found


WAYS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "oldest pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": through_torch_save,
    "deepcopy": copy.deepcopy,
}


def use(model: torch.nn.Module, path: Path) -> tuple[torch.Tensor, str]:
    """Everything that can be told of a model: what it computes, `explain`, and the files it saves."""
    model.save_pretrained(path)
    return logits(model), str(explain(model))


def use_pickled(pickled: bytes, path: Path) -> tuple[torch.nn.Module, torch.Tensor, str]:
    """`use`, in another process; and the model, which comes back by the way that processes send tensors."""
    torch.set_num_threads(1)
    thresholds.Int8Cost.limit = limit_as_of_large_layers  # type: ignore[method-assign]  # as tests/conftest.py does
    model = pickle.loads(pickled)
    return (model, *use(model, path))


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def files(path: Path) -> dict[str, bytes]:
    """PEFT writes sets into its config, and time into its card: of adapters, the tensors."""
    names = [file for file in path.rglob("*") if file.is_file() and file.name not in ("adapter_config.json", "README.md")]
    return {str(file.relative_to(path)): file.read_bytes() for file in names}


@pytest.mark.thinned(9)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, tmp_path: Path, processes: ProcessPoolExecutor) -> None:
    model = MODELS[name](tmp_path)
    twins = {way: through(model) for way, through in WAYS.items()}  # before its first forward
    wanted, said = use(model, tmp_path / "model")
    twins |= {f"{way}, after a forward": through(model) for way, through in WAYS.items()}
    back, elsewhere, said_elsewhere = processes.submit(use_pickled, pickle.dumps(model), tmp_path / "elsewhere").result(300)
    assert torch.equal(elsewhere, wanted) and said_elsewhere == said
    assert files(tmp_path / "elsewhere") == files(tmp_path / "model")
    twins["sent back"] = back
    for way, twin in twins.items():
        found, said_of_twin = use(twin, tmp_path / way)
        assert torch.equal(found, wanted) and said_of_twin == said, way
        assert files(tmp_path / way) == files(tmp_path / "model"), way
        ours, theirs = ([module for module in m.modules() if isinstance(module, hf_fp8.QuantizedLinear)] for m in (model, twin))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert (
                (a.original is None) == (b.original is None)
                and a.original_dtype == b.original_dtype
                and a.shares_input == b.shares_input
            )
            assert type(b.weight) is QuantizedWeight and b.weight.data_ptr() != a.weight.data_ptr()


def test_what_is_shared_stays_shared() -> None:
    layer = torch.nn.Linear(32, 32, bias=False)
    net = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Linear(32, 32, bias=False), layer)
    net[2].weight = layer.weight
    quantize_model(net)
    assert net[2].weight is net[0].weight and net[3] is net[0]
    for through in WAYS.values():
        twin: Any = through(net)
        assert twin[2].weight is twin[0].weight and twin[2].weight_scale is twin[0].weight_scale and twin[3] is twin[0]


def test_models_of_other_libraries(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 1), torch.nn.GELU(), torch.nn.Conv2d(32, 16, 1)).eval()
    quantize_model(net, conv1x1=True, compute_dtype=torch.bfloat16, originals="offload")
    x = torch.randn(2, 16, 4, 4)
    for through in WAYS.values():
        twin = through(net)
        assert torch.equal(twin(x), net(x)) and isinstance(twin[0], hf_fp8.QuantizedConv1x1)
        assert torch.equal(hf_fp8.dequantize_model(twin)[0].weight, net[0].original.view(32, 16, 1, 1))


def test_quantizers_and_what_they_know(tmp_path: Path) -> None:
    """A quantizer that was pickled saves a model as the one that loaded it does."""
    model = load(checkpoint("llama-static-kv", tmp_path))
    model.save_pretrained(tmp_path / "before")
    for number, through in enumerate(WAYS.values()):
        model.hf_quantizer = through(model.hf_quantizer)
        model.config.quantization_config = model.hf_quantizer.quantization_config
        model.save_pretrained(tmp_path / str(number))
        assert files(tmp_path / str(number)) == files(tmp_path / "before")


@pytest.mark.slow
def test_a_process_that_knows_nothing(fp8: Path, tmp_path: Path) -> None:
    """Neither `import hf_fp8` nor anything else is needed before a pickle is read."""
    model = load(fp8)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    (tmp_path / "state.pkl").write_bytes(pickle.dumps(dict(model.state_dict())))
    code = (
        "import pickle, sys, torch; torch.set_num_threads(1); read = lambda name: pickle.load(open(name, 'rb'));"
        "state = read('state.pkl'); assert 'hf_fp8' not in sys.modules;"
        "model = read('model.pkl'); assert 'hf_fp8' in sys.modules;"
        "torch.save((state, model(torch.arange(24).reshape(2, 12), use_cache=False).logits.detach()), 'found.pt');"
        "model.save_pretrained('saved')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    state, found = torch.load(tmp_path / "found.pt")
    assert torch.equal(found, logits(model)) and differing(state, dict(model.state_dict())) == []
    assert differing(tensors(tmp_path / "saved"), tensors(fp8)) == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_tensors(dtype: torch.dtype, protocol: int) -> None:
    """Of FP8, and of what torch writes in the same way."""
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6).to(dtype)
    for tensor in (whole, whole[1:, ::2], whole.t(), torch.nn.Parameter(whole, requires_grad=False), whole.to("meta")):
        twin = pickle.loads(pickle.dumps(tensor, protocol))
        assert (type(twin), twin.dtype, twin.shape, twin.stride(), twin.device) == (
            type(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.device
        )  # fmt: skip
        assert tensor.is_meta or torch.equal(twin.to(torch.float32), tensor.to(torch.float32))
    first, part = pickle.loads(pickle.dumps((whole, whole[1:]), protocol))
    assert part.data_ptr() == first[1:].data_ptr()


def test_calls_of_pickle_after_unregister(fp8: Path) -> None:
    """What was written could not be read otherwise."""
    model = load(fp8)
    hf_fp8.unregister()
    try:
        twin = pickle.loads(pickle.dumps(model))
    finally:
        hf_fp8.register()
    assert torch.equal(logits(twin), logits(model))


def test_tensors_go_between_processes(processes: ProcessPoolExecutor) -> None:
    tensor = torch.arange(16, dtype=torch.float32).to(FP8)
    assert torch.equal(processes.submit(torch.clone, tensor).result(300).float(), tensor.float())


def test_mixed_with_int4_copies(tmp_path: Path) -> None:
    model = load(checkpoint("llama-mixed", tmp_path), KEEP)
    model.save_pretrained(tmp_path / "model")
    for index, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        twin.save_pretrained(tmp_path / f"twin {index}")
        assert files(tmp_path / f"twin {index}") == files(tmp_path / "model")
        assert torch.equal(logits(twin), logits(model))
