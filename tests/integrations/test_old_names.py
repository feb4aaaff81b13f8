"""What scripts and pickles of earlier versions call things."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest
import torch
from support.fresh import run_fresh
from torch import nn

import hf_fp8
from hf_fp8.integrations import old_names


@pytest.mark.parametrize("old", old_names.MODULES)
def test_modules(old: str) -> None:
    sys.modules.pop(f"hf_fp8.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"hf_fp8\.{old} is hf_fp8\.{old_names.MODULES[old]} now"):
        found = importlib.import_module(f"hf_fp8.{old}")
    assert found is importlib.import_module(f"hf_fp8.{old_names.MODULES[old]}")
    assert found.__spec__ is not None
    assert found.__spec__.name == found.__name__ == f"hf_fp8.{old_names.MODULES[old]}"


@pytest.mark.slow
def test_scripts() -> None:
    scripts = [
        "from hf_fp8 import numerics; from hf_fp8.scheme import ROW; numerics.quantize, ROW.cols",
        "import hf_fp8; hf_fp8.numerics.quantize; hf_fp8.linear.FP8Linear",
        "import hf_fp8.linear; assert hf_fp8.linear.FP8Linear is hf_fp8.FP8Linear is hf_fp8.QuantizedLinear",
        "import hf_fp8; assert callable(hf_fp8.explain); import hf_fp8.kernels; hf_fp8.kernels.select",
    ]
    run_fresh({script: script for script in scripts})


@pytest.mark.parametrize("old", old_names.ATTRIBUTES)
def test_attributes_of_modules(old: str) -> None:
    module, _, leaf = old.rpartition(".")
    alias = next(name for name, place in old_names.MODULES.items() if place == module)
    sys.modules.pop(f"hf_fp8.{alias}", None)
    with pytest.warns(DeprecationWarning):
        found = importlib.import_module(f"hf_fp8.{alias}")
    place, _, name = old_names.ATTRIBUTES[old].rpartition(".")
    assert getattr(found, leaf) is getattr(importlib.import_module(f"hf_fp8.{place}"), name)


@pytest.mark.parametrize("old", old_names.NAMES)
def test_names(old: str) -> None:
    module, _, leaf = old_names.NAMES[old].rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"hf_fp8\.{old} is hf_fp8\."):
        found = getattr(hf_fp8, old)
    assert found is getattr(importlib.import_module(f"hf_fp8.{module}"), leaf)
    assert old not in hf_fp8.__all__


def test_the_warning_is_about_the_line_that_has_the_name() -> None:
    with pytest.warns(DeprecationWarning) as caught:
        from hf_fp8 import FP8Linear  # noqa: F401
    assert "hf_fp8.FP8Linear is hf_fp8.QuantizedLinear now" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_the_warning_of_a_module_is_about_the_line_that_imports_it() -> None:
    for code in ("import hf_fp8.linear", "from hf_fp8.linear import FP8Linear", "import hf_fp8; hf_fp8.linear"):
        sys.modules.pop("hf_fp8.linear", None)
        vars(hf_fp8).pop("linear", None)
        with pytest.warns(DeprecationWarning) as caught:
            exec(compile(code, "a script", "exec"), {})
        assert [warning.filename for warning in caught] == ["a script"], code


def test_modules_of_an_old_package() -> None:
    for old, new in (("fidelity.report", "evaluation.report"), ("fidelity.run", "evaluation.running")):
        sys.modules.pop(f"hf_fp8.{old}", None)
        with pytest.warns(DeprecationWarning, match=rf"hf_fp8\.{old} is hf_fp8\.{new} now"):
            found = importlib.import_module(f"hf_fp8.{old}")
        assert found is importlib.import_module(f"hf_fp8.{new}")


def test_what_never_was_there() -> None:
    with pytest.raises(AttributeError, match="module 'hf_fp8' has no attribute 'nothing'"):
        hf_fp8.nothing  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hf_fp8.nothing")


def test_a_pickled_layer() -> None:
    """Pickles name the modules of classes; those written before the packages were there load."""
    layer = hf_fp8.quantize_model(nn.Linear(32, 16), backend="weight_only")
    written = pickle.dumps(layer, protocol=0)
    for old, new in old_names.MODULES.items():
        written = written.replace(f"chf_fp8.{new}\n".encode(), f"chf_fp8.{old}\n".encode())
    written = written.replace(b"QuantizedLinear\n", b"FP8Linear\n").replace(b"original_dtype", b"made_of")
    assert b"chf_fp8.linear\nFP8Linear\n" in written
    assert b"original_dtype" not in written
    assert b"chf_fp8.nn.linear\n" not in written
    loaded = pickle.loads(written)
    assert type(loaded) is type(layer)
    assert loaded.original_dtype == torch.float32
    x = torch.randn(3, 32)
    assert torch.equal(loaded(x), layer(x))
