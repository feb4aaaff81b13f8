from __future__ import annotations

import copy
import dataclasses
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.build import load
from support.kernels import operands

from hf_fp8 import FP8Config, QuantizedLinear, kernels
from hf_fp8.formats.scheme import FP8_DYNAMIC, INT8_DYNAMIC, Scheme
from hf_fp8.nn import shared_input

pytestmark = pytest.mark.hostless


def layer(scheme: Scheme, seed: int, parent: str | None = "attention") -> QuantizedLinear:
    made = QuantizedLinear(64, 48, scheme, backend="scaled_mm")
    made.shares_input = parent
    given = operands(scheme, 1, 48, 64, torch.float32)
    made.weight.data = given["weight"].roll(seed, 0)
    made.weight_scale.data = given["weight_scale"].roll(seed, 0)
    return made


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often an input was quantized."""
    count = [0]
    quantize_once = shared_input.quantize_once

    def counting(kernel: Any, *rest: Any) -> Any:
        def quantize(*args: Any) -> Any:
            count[0] += 1
            return kernel.quantize(*args)

        # The same wrapper for the same kernel: it is part of the key.
        wrapped = wrappers.setdefault(kernel.name, dataclasses.replace(kernel, quantize=quantize))
        return quantize_once(wrapped, *rest)

    wrappers: dict[str, kernels.Kernel] = {}
    monkeypatch.setattr("hf_fp8.nn.functional.quantize_once", counting)
    yield count


@pytest.mark.parametrize("scheme", [FP8_DYNAMIC, INT8_DYNAMIC], ids=["fp8", "int8"])
@torch.no_grad()
def test_siblings_quantize_once(scheme: Scheme, counted: list[int]) -> None:
    q, k, v = (layer(scheme, seed) for seed in range(3))
    x = torch.randn(2, 5, 64)
    alone = [part(x.clone()) for part in (q, k, v)]
    counted[0] = 0
    assert all(torch.equal(part(x), wanted) for part, wanted in zip((q, k, v), alone, strict=True))
    assert counted[0] == 1


@torch.no_grad()
def test_nothing_is_shared_that_may_have_changed(counted: list[int]) -> None:
    q, k = layer(INT8_DYNAMIC, 0), layer(INT8_DYNAMIC, 1)
    x = torch.randn(5, 64)
    q(x)
    x.mul_(2)
    assert torch.equal(k(x), k(x.clone())) and counted[0] == 3
    # The same layer again: even what is changed behind torch's back is seen.
    array = x.numpy()
    q(x)
    array *= 3
    counted[0] = 0
    assert torch.equal(q(x), q(x.clone())) and counted[0] == 2
    # New memory under an old tensor.
    q(x)
    x.data = torch.randn(7, 64)
    assert torch.equal(k(x), k(x.clone()))
    x.data = torch.randn(5, 64)
    # Another tensor of the same memory, or with the same values, is another input.
    counted[0] = 0
    q(x), k(x.view(5, 64)), k(x.clone())
    assert counted[0] == 3


@torch.no_grad()
def test_strangers_share_nothing(counted: list[int]) -> None:
    x = torch.randn(5, 64)
    for one, two in (("a", "b"), (None, None), ("a", None)):
        q, k = layer(INT8_DYNAMIC, 0, one), layer(INT8_DYNAMIC, 1, two)
        q(x)
        x.data.mul_(3)  # behind torch's back
        assert torch.equal(k(x), k(x.clone()))


def test_who_is_a_sibling(fp8: Path) -> None:
    layers = load(fp8, FP8Config(backend="int8")).model.layers[0]
    attention, mlp = layers.self_attn, layers.mlp
    assert attention.q_proj.shares_input == attention.v_proj.shares_input == "model.layers.0.self_attn"
    assert mlp.gate_proj.shares_input == "model.layers.0.mlp" and mlp.down_proj.shares_input is None
    with torch.no_grad():
        x = torch.randn(1, 3, 64)
        together = attention.q_proj(x), attention.k_proj(x)
        assert torch.equal(together[1], copy.deepcopy(attention).k_proj(x.clone()))


@torch.no_grad()
def test_layers_of_other_schemes_share_nothing() -> None:
    fp8, int8 = layer(FP8_DYNAMIC, 0), layer(INT8_DYNAMIC, 0)
    x = torch.randn(5, 64)
    wanted = int8(x.clone())
    fp8(x)
    assert torch.equal(int8(x), wanted)


@torch.no_grad()
def test_codes_go_with_the_input() -> None:
    q = layer(INT8_DYNAMIC, 0)
    x = torch.randn(5, 64)
    q(x)
    assert shared_input._slot.held is not None
    del x
    gc.collect()
    assert shared_input._slot.held is None


def test_inference_mode_and_threads() -> None:
    q, k = layer(INT8_DYNAMIC, 0), layer(INT8_DYNAMIC, 1)
    with torch.inference_mode():
        x = torch.randn(5, 64)
        wanted = k(x)
        q(x)
        x.mul_(2)  # no version counter says so
        assert torch.equal(k(x), wanted * 2)
    x = torch.randn(5, 64)
    found: list[bool] = []

    def run() -> None:
        with torch.no_grad():
            wanted = k(x.clone())
            found.extend(torch.equal(k(x), wanted) for _ in range(50))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 200
