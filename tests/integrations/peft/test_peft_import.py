"""PEFT is taught what quantized layers are whenever it is imported, and not imported for it."""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path

import pytest
import torch
from support.build import load
from support.fresh import run_fresh

import hf_fp8
from hf_fp8.integrations import import_hook

# A model with the codes of a quantized layer, and what adapters have to be on it: of floats, and merged by hf_fp8.
START = """
import copy, pickle, sys, torch
torch.set_num_threads(1)

def check(model):
    from peft import LoraConfig, get_peft_model
    from hf_fp8 import QuantizedLinear
    name = next(name for name, module in model.named_modules() if isinstance(module, QuantizedLinear))
    made = get_peft_model(model, LoraConfig(target_modules=[name], init_lora_weights=False), autocast_adapter_dtype=False)
    layer = made.base_model.model.get_submodule(name)
    assert layer.lora_A["default"].weight.dtype != torch.float8_e4m3fn
    made.merge_adapter()
    assert isinstance(layer.base_layer, QuantizedLinear) and layer.merged
    made.unmerge_adapter()
    print("taught")

def net():
    return torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
"""
WAYS = {
    "peft first": "import peft, hf_fp8; check(hf_fp8.quantize_model(net()))",
    "peft last": "import hf_fp8; model = hf_fp8.quantize_model(net()); assert 'peft' not in sys.modules; check(model)",
    "unpickled, and copied": (
        "model = pickle.load(open('model.pkl', 'rb')); assert 'peft' not in sys.modules;"
        "check(copy.deepcopy(model)); check(model)"
    ),
    "unpickled, peft first": "from peft.tuners.lora import layer; check(pickle.load(open('model.pkl', 'rb')))",
    "a layer of one's own": (
        "from hf_fp8.nn.linear import QuantizedLinear\n"
        "from hf_fp8.formats.scheme import SCHEMES\n"
        "model = net()\n"
        "model[0] = QuantizedLinear(32, 32, SCHEMES['FP8_DYNAMIC'])\n"
        "model[0].weight_scale.data.fill_(1.0); model[0].weight.data.view(torch.uint8).fill_(56)\n"
        "check(model)"
    ),
    "load_quantized": "import hf_fp8; check(hf_fp8.load_quantized(net(), 'portable'))",
    "from_pretrained, and the host's adapters": (
        "import hf_fp8\n"
        "from transformers import AutoModelForCausalLM\n"
        "from transformers.integrations import peft as host\n"
        "host.check_peft_version = lambda *args, **kwargs: None  # 5.24 asks for one that is not published\n"
        "config = hf_fp8.FP8Config(backend='weight_only')\n"
        "model = AutoModelForCausalLM.from_pretrained('fp8', quantization_config=config)\n"
        "assert 'peft' not in sys.modules\n"
        "model.load_adapter('adapter')\n"
        "layer = model.model.layers[0].self_attn.q_proj\n"
        "assert layer.lora_A['default'].weight.dtype != torch.float8_e4m3fn\n"
        "layer.merge(); assert isinstance(layer.base_layer, hf_fp8.QuantizedLinear)\n"
        "print('taught')"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint, a pickled model, one that `save_quantized` wrote, and an adapter."""
    from peft import LoraConfig, get_peft_model
    from support.build import tiny_llama, write

    path = tmp_path_factory.mktemp("models")
    write(tiny_llama(), path / "fp8")
    get_peft_model(load(path / "fp8"), LoraConfig(target_modules=["q_proj"], r=4)).save_pretrained(path / "adapter")
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    (path / "model.pkl").write_bytes(pickle.dumps(hf_fp8.quantize_model(net)))
    hf_fp8.save_quantized(net, path / "portable")
    return path


@pytest.mark.slow
def test_quantized_models_are_known_to_peft(folder: Path) -> None:
    said = run_fresh({way: f"{START}\n{code}" for way, code in WAYS.items()}, folder)
    assert said.keys() == WAYS.keys() and all("taught\n" in text for text in said.values()), said


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A library to be imported."""
    (tmp_path / "some_library").mkdir()
    (tmp_path / "some_library" / "__init__.py").write_text("from . import part\nwhole = True\n")
    (tmp_path / "some_library" / "part.py").write_text("import some_library\nassert not hasattr(some_library, 'whole')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("some_library", "some_library.part"):
        monkeypatch.setitem(sys.modules, name, sys)  # so that it is taken out again
        monkeypatch.delitem(sys.modules, name)
    return "some_library"


def test_called_at_the_end_of_an_import(library: str) -> None:
    calls = []
    finders = list(sys.meta_path)
    import_hook.after_import(library, lambda: calls.append(sys.modules[library].whole))
    try:
        import_hook.after_import(library, lambda: calls.append("not this one"))  # harmless when repeated
        spec = importlib.util.find_spec(library)
        assert spec is not None and spec.loader is not None and spec.loader.name == library and not calls
        module = importlib.import_module(f"{library}.part")
        assert calls == [True]
        whole = sys.modules[library]
        assert type(whole.__loader__) is type(module.__loader__) and whole.__spec__.loader is whole.__loader__
        importlib.import_module(library)
        assert calls == [True]
        import_hook.after_import(library, lambda: calls.append("at once"))
        assert calls == [True, "at once"]
        del sys.modules[library]
        importlib.import_module(library)
        assert calls == [True, "at once", True]
    finally:
        import_hook.cancel(library)
        import_hook.cancel(library)
    assert sys.meta_path == finders


def test_an_import_that_fails_is_its_own_error(library: str, tmp_path: Path) -> None:
    calls: list[int] = []
    (tmp_path / "some_library" / "__init__.py").write_text("raise RuntimeError('broken')\n")
    import_hook.after_import(library, lambda: calls.append(1))
    try:
        with pytest.raises(RuntimeError, match="broken"):
            importlib.import_module(library)
        assert not calls and library not in sys.modules
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("some_library_that_is_not_there")
    finally:
        import_hook.cancel(library)


ENDS = {
    "unregistered before PEFT is imported": (
        "import sys, hf_fp8; hf_fp8.unregister(); assert not any('import_hook' in type(f).__module__ for f in sys.meta_path);"
        "from peft.tuners.tuners_utils import BaseTuner; own = BaseTuner.inject_adapter;"
        "assert 'hf_fp8' not in own.__code__.co_filename; hf_fp8.register();"
        "assert BaseTuner.inject_adapter.__wrapped__ is own;"
        "hf_fp8.unregister(); assert BaseTuner.inject_adapter is own"
    ),
    "functions that were imported before by any name": (
        "import peft; from peft import prepare_model_for_kbit_training as prepare; own = prepare; import hf_fp8;"
        "assert prepare is peft.prepare_model_for_kbit_training is peft.utils.other.prepare_model_for_kbit_training;"
        "assert prepare.__wrapped__ is not None; hf_fp8.unregister(); assert not hasattr(prepare, '__wrapped__')"
    ),
}


@pytest.mark.slow
def test_what_unregistering_leaves() -> None:
    run_fresh(ENDS)
