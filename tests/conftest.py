from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import FOLDERS, checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU, in the tests that ask for it


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked `thinned(n)`, one in n is not `slow`. The longest tests are first: then no worker waits."""
    items.sort(key=lambda item: "tests/project" not in item.nodeid)
    seen: Counter[object] = Counter()
    for item in items:
        if (thinned := item.get_closest_marker("thinned")) is not None:
            test = item.nodeid.partition("[")[0]
            if seen[test] % thinned.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # two workers on two cores: more threads only fight
    import transformers

    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def real_int8_limit() -> Iterator[Callable[..., Any]]:
    """int8 quantizes inputs of the tests' small layers from as few rows as those of large ones. Yields what is replaced."""
    from support.kernels import limit_as_of_large_layers

    from hf_fp8.kernels import thresholds

    real = thresholds.Int8Cost.limit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds.Int8Cost, "limit", limit_as_of_large_layers)
        yield real


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return checkpoint(request.param, tmp_path)


@pytest.fixture
def no_native() -> Iterator[None]:
    """As on a machine without the library of CPU kernels: FP8 checkpoints are dequantized by default on its CPU."""
    from hf_fp8.formats import native

    with native.use(None):
        yield


@pytest.fixture
def propagated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pytest see what is logged through transformers, which keeps it to itself."""
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_fp8"), "propagate", True)


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A small Llama with channel weights and per-token inputs."""
    from support.build import tiny_llama, write

    path = tmp_path / "fp8"
    write(tiny_llama(), path)
    return path


@pytest.fixture(scope="session")
def fp8_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint whose head is in FP8, too. Read it only."""
    from support.build import load, tiny_llama

    from hf_fp8 import FP8Config

    folder = tmp_path_factory.mktemp("head")
    tiny_llama(tie_word_embeddings=False).save_pretrained(folder / "dense")
    config = FP8Config("FP8_DYNAMIC", targets=["Linear", "lm_head"], backend="weight_only")
    load(folder / "dense", config, dtype=torch.float32).save_pretrained(folder / "fp8")
    return folder / "fp8"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hub on this machine, with an empty cache (`support.hub_server`)."""
    from support.hub_server import serving, use

    with serving() as server:
        use(monkeypatch, server.url, tmp_path / "cache")
        yield server
