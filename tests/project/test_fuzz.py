"""A fixed part of scripts/fuzz; and that the fuzzer sees what it is for: planted faults make it fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.build import error, stock_transformers
from support.checkpoints import checkpoint
from support.fuzzing import judging, workers
from support.fuzzing.bases import BASES, base
from support.fuzzing.cases import MODES, Case
from support.fuzzing.drafts import Change, Draft
from support.fuzzing.judging import ACCEPTED, DIED, FOREIGN, HANGS, MEMORY, REFUSED, RIGHT, WRONG, run_case
from support.fuzzing.meaning import decode
from support.fuzzing.twin import Result, without_quantization
from transformers import AutoModelForCausalLM

from hf_fp8.errors import ConfigError
from hf_fp8.formats import numerics
from hf_fp8.integrations import register as registration

SCALE = "model.layers.0.self_attn.q_proj.weight_scale"


@pytest.mark.slow
def test_mutated_checkpoints_end_in_right_numbers_or_in_our_errors() -> None:
    outcomes = list(workers.run(range(150), jobs=2))
    assert len(outcomes) == 150
    failed = [f"{o.seed}: {o.kind}: {o.detail}\n  {o.case}\n  {o.message}" for o in outcomes if o.failed]
    assert not failed, "replay with scripts/fuzz --case SEED\n" + "\n".join(failed)
    assert sum(outcome.kind == judging.NOT_JUDGED for outcome in outcomes) < 15
    assert sum(outcome.kind == RIGHT for outcome in outcomes) > 20


def case(name: str, mode: str = "default", dtype: str = "float32", *changes: Change) -> Case:
    return Case(0, name, mode, dtype, list(changes), Draft.of(base(name)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_bases_are_right(mode: str) -> None:
    """As they are, under every option: the decoder and the package read the same."""
    ends = {name: run_case(case(name, mode)) for name in BASES}
    assert {name: (end.kind, end.detail, end.trace) for name, end in ends.items() if end.kind != RIGHT} == {}


STORED = [
    "llama-block", "llama-dyn", "llama-mixed", "llama-sharded", "llama-static", "llama-w8a16", "mixtral-dyn", "qwen3moe-dyn",
]  # fmt: skip


@pytest.mark.parametrize("name", STORED)
def test_the_decoder_against_stored_references(name: str, tmp_path: Path) -> None:
    """Logits that were stored with checkpoints of llm-compressor, from decoded tensors and stock transformers alone."""
    folder = checkpoint(name, tmp_path)
    reference = load_file(tmp_path / "reference.safetensors")
    without_quantization(folder, tmp_path / "dense", decode(folder).state)
    with stock_transformers(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
        found = model(reference["input_ids"], use_cache=False).logits
    assert error(found, reference["logits"]) <= (1e-2 if name == "llama-mixed" else 1e-4)


@pytest.mark.parametrize("seed", range(0, 60, 7))
def test_a_case_is_the_same_whenever_it_is_made(seed: int, tmp_path: Path) -> None:
    for folder in ("one", "other"):
        Case.of(seed).write(tmp_path / folder)
    files = [sorted(path for path in (tmp_path / folder).iterdir() if path.is_file()) for folder in ("one", "other")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True) if a.stat().st_size < 2**24)


# -- planted faults --


def scaled(factor: float, element: int | None = None) -> Callable[[Draft], None]:
    """A mutation that changes what one scale is, all of it or one element: legitimate, and of other numbers."""

    def change(draft: Draft) -> None:
        tensor = draft[SCALE].clone()
        tensor.view(-1)[slice(None) if element is None else element] *= factor
        draft.put(SCALE, tensor)

    return change


def mutated(change: Callable[[Draft], Any], mode: str = "default", dtype: str = "float32", name: str = "llama-channel") -> Case:
    made = case(name, mode, dtype, Change("of this test"))
    assert made.draft is not None
    change(made.draft)
    return made


def blind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A loader that reads the checkpoint as it was before it was mutated."""
    real = judging.load_ours
    Draft.of(base("llama-channel")).write(tmp_path / "base")
    monkeypatch.setattr(judging, "load_ours", lambda folder, dtype, options: real(tmp_path / "base", dtype, options))


@pytest.mark.parametrize(("mode", "dtype", "factor", "element"), [
    ("default", "float32", 1.01, 5), ("weight_only", "float32", 0.99, 0), ("dequantize", "float32", 1.01, None),
    ("default", "bfloat16", 2.0, None), ("scaled_mm", "float32", 1.2, None), ("int8", "float32", 4.0, None),
])  # fmt: skip
def test_a_scale_that_is_not_used(
    mode: str, dtype: str, factor: float, element: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = mutated(scaled(factor, element), mode, dtype)
    assert run_case(made).kind == RIGHT
    blind(monkeypatch, tmp_path)
    assert run_case(made).kind == WRONG


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("mode", ["default", "weight_only"])
def test_a_loader_that_ignores_scales(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case(name, mode) for name in ("llama-channel", "llama-block", "mixtral", "gpt-oss-stacked")]
    monkeypatch.setattr(numerics, "dequantize", lambda q, scale, granularity, dtype: q.to(dtype))
    assert all(run_case(each).kind == WRONG for each in cases)


CONTRADICTIONS: dict[str, Callable[[Draft], Any]] = {
    "NaN": scaled(float("nan"), 3), "zero": scaled(0.0, 3), "negative": scaled(-1.0), "gone": lambda d: d.drop(SCALE),
    "shape": lambda d: d.put(SCALE, d[SCALE][:-1].clone()), "ignored": lambda d: d.quantization["ignore"].append("re:.*q_proj"),
    "norm gone": lambda d: d.drop("model.norm.weight"), "a bias that is not there": lambda d: d.config.update(mlp_bias=True),
    "strategy": lambda d: d.groups()[0]["weights"].update(strategy="tensor"), "status": lambda d: d.quantization.update(
        quantization_status="melted"
    ), "weight in int8": lambda d: d.put(SCALE.removesuffix("_scale"), d[SCALE.removesuffix("_scale")].view(torch.int8)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_loader_that_sees_no_contradiction(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blind(monkeypatch, tmp_path)
    assert run_case(mutated(CONTRADICTIONS[name])).kind == ACCEPTED


def test_foreign_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("planted")

    monkeypatch.setattr(registration, "merge", broken)
    outcome = run_case(case("llama-channel"))
    assert outcome.kind == FOREIGN and "KeyError" in outcome.detail and "planted" in outcome.trace


@pytest.mark.parametrize(("key", "value", "where"), [
    ("hidden_size", "wide", "reading config.json"), ("hidden_act", "nonsense", "config"),
    ("num_attention_heads", 0, "reading config.json"),
])  # fmt: skip
def test_what_transformers_refuses_by_itself_is_not_ours(key: str, value: Any, where: str) -> None:
    outcome = run_case(mutated(lambda draft: draft.config.update({key: value})))
    assert outcome.kind == judging.HOSTS_ERROR and outcome.detail.startswith(where)


def test_good_checkpoints_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConfigError("planted")

    made = case("llama-channel", "default", "float32", Change("other spelling", harmless=True))
    assert made.draft is not None
    made.draft.rename(SCALE, f"{SCALE}_inv")
    assert run_case(made).kind == RIGHT
    monkeypatch.setattr(judging, "load_ours", refuse)
    assert run_case(made).kind == REFUSED
    made.changes.append(Change("something else"))
    assert run_case(made).kind == judging.OUR_ERROR


def test_what_is_harmless_is_held_against_the_base() -> None:
    made = case("llama-channel", "default", "float32", Change("not what it says", harmless=True))
    assert made.draft is not None
    scaled(2.0)(made.draft)
    assert run_case(made).kind == judging.FAULT


def test_hangs_that_python_can_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # sooner than the limit, which the host keeps whole
        time.sleep(60)

    monkeypatch.setattr(judging, "load_ours", hang)
    outcome = run_case(case("llama-channel"))
    assert outcome.kind == HANGS and "sleep" in outcome.trace


def sick() -> None:
    """For processes of `workers`: the first cases hang where no signal is heard, take memory, and die."""

    def load(folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> Result:
        if seeds[-1] == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(60)
        if seeds[-1] == 1:
            held = torch.ones(2**27)  # half a gigabyte
            time.sleep(60 + held[0].item())
        if seeds[-1] == 2:
            os._exit(3)
        return real(folder, dtype, options)

    def run(made: Case, *args: Any) -> Any:
        seeds.append(made.seed)
        healthy = case("llama-channel")
        healthy.seed = made.seed
        return run_case(healthy, *args)

    def host_hangs(made: Case, seconds: float) -> bool:
        return real_host_hangs(case("llama-channel"), seconds)

    seeds: list[int] = []
    real, real_host_hangs = judging.load_ours, judging.host_hangs
    judging.load_ours, workers.run_case, workers.host_hangs = load, run, host_hangs  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.hostless
def test_limits_of_time_and_memory_and_processes_that_die() -> None:
    outcomes = list(workers.run(range(4), jobs=2, setup="test_fuzz:sick", seconds=6.0, memory=3e8))
    ends = {outcome.seed: outcome.kind for outcome in outcomes}
    assert ends == {0: HANGS, 1: MEMORY, 2: DIED, 3: RIGHT}
    assert "in load" in next(outcome.trace for outcome in outcomes if outcome.seed == 0)
