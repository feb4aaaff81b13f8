from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU, in the tests that ask for it
DATA = Path(__file__).parent / "data"
FOLDERS = sorted(p.name for p in DATA.iterdir() if p.is_dir())


# Files of kernels, numbers, modules and pages: another transformers changes nothing in what they test.
HOSTLESS = {
    "test_adapter_kinds", "test_architecture", "test_calibration", "test_casts", "test_codes_replaced", "test_docs",
    "test_extremes", "test_float64", "test_grouped", "test_int8_inputs", "test_kernels", "test_linear", "test_numerics",
    "test_pages", "test_parallel", "test_peft_helpers", "test_portable", "test_quality", "test_quantized_weight",
    "test_recipes", "test_scheme", "test_selection", "test_shared_input", "test_triton", "test_trl", "test_uncalibrated",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in HOSTLESS:
            item.add_marker(pytest.mark.hostless)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # two workers on two cores: more threads only fight
    import transformers

    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return checkpoint(request.param, tmp_path)


def checkpoint(name: str, tmp_path: Path) -> Path:
    """A copy of a checkpoint of `tests/data`, with its reference beside it, not in it."""
    path = tmp_path / name
    shutil.copytree(DATA / name, path)
    (path / "reference.safetensors").rename(tmp_path / "reference.safetensors")
    return path


@pytest.fixture
def propagated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pytest see what is logged through transformers, which keeps it to itself."""
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_fp8"), "propagate", True)


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A small Llama with channel weights and per-token inputs."""
    from build import tiny_llama, write

    path = tmp_path / "fp8"
    write(tiny_llama(), path)
    return path


@pytest.fixture(scope="session")
def fp8_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint whose head is in FP8, too. Read it only."""
    from build import load, tiny_llama

    from hf_fp8 import FP8Config

    folder = tmp_path_factory.mktemp("head")
    tiny_llama(tie_word_embeddings=False).save_pretrained(folder / "dense")
    config = FP8Config("FP8_DYNAMIC", targets=["Linear", "lm_head"], backend="weight_only")
    load(folder / "dense", config, dtype=torch.float32).save_pretrained(folder / "fp8")
    return folder / "fp8"
