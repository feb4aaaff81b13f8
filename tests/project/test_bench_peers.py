"""Peers of the benchmarks: the GGUF file that is written for llama.cpp is the same model, and what is not installed is said."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.build import IDS, error, load, tiny_llama, write
from transformers import AutoModelForCausalLM

from benchmarks import model as bench
from benchmarks.common import gguf_files, llamacpp, peers, timing
from hf_fp8 import FP8Config

pytestmark = pytest.mark.hostless
pytest.importorskip("gguf")


def dense(path: Path) -> torch.nn.Module:
    return load(path, FP8Config(dequantize=True)).requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_has_the_weights_of_the_checkpoint(tmp_path: Path, tied: bool) -> None:
    """As transformers reads them."""
    write(tiny_llama(tie_word_embeddings=tied), tmp_path / "fp8")
    file = gguf_files.write(tmp_path / "fp8", "F32", "F32", tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    expected = dense(tmp_path / "fp8")
    found = read.state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, msg=name)
    assert error(read(IDS).logits, expected(IDS).logits) < 1e-5


def test_a_gguf_file_is_written_once(tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path / "fp8")
    file = gguf_files.write(tmp_path / "fp8", "Q8_0", "F16", tmp_path)
    before = file.stat().st_mtime_ns
    assert gguf_files.write(tmp_path / "fp8", "Q8_0", "F16", tmp_path) == file and file.stat().st_mtime_ns == before
    assert gguf_files.write(tmp_path / "fp8", "Q8_0", "Q8_0", tmp_path) != file


@pytest.mark.parametrize(("kind", "most"), [("F32", 5e-3), ("Q8_0", 6e-2)])
def test_llama_cpp_computes_the_same_logits(kind: str, most: float, tmp_path: Path) -> None:
    """Of a prompt, and of tokens one by one after it; keys and values are float16 there. With q and k in another order: 0.4."""
    pytest.importorskip("llama_cpp")
    write(tiny_llama(), tmp_path / "fp8")
    expected = dense(tmp_path / "fp8")(IDS).logits[0]
    ids = IDS[0].tolist()
    model = llamacpp.Model(gguf_files.write(tmp_path / "fp8", kind, kind, tmp_path), 1, len(ids), repacked=False)
    model(ids)
    assert error(model.logits(), expected) < most
    model(ids[:4])
    for i in range(4, len(ids)):
        model([ids[i]], i)
        assert error(model.logits(), expected[i : i + 1]) < most


def test_what_is_not_installed_is_said() -> None:
    for module in ("llama_cpp", "torchao"):
        missing = ModuleNotFoundError(f"No module named {module!r}", name=module)
        assert peers.why_not(missing).startswith("not installed: ") and "pip install" in peers.why_not(missing)
    assert peers.why_not(ImportError("libtorch.so")) == "ImportError: libtorch.so"


def test_lines_of_a_table() -> None:
    """Medians of what passes and of CPU time, ratios to those who take part, the error of the others."""
    first = {"load_s": 1.0, "load_cpu_s": 0.5, "load_peak_gb": 3.0, "held_gb": 2.0, "dtype": "float32", "note": "compiled"}
    costs = [timing.Cost(wall, 2 * wall) for wall in (0.001, 0.004, 0.1)]
    halved = [timing.Cost(0.5 * cost.wall, cost.cpu) for cost in costs]
    found = [
        (SimpleNamespace(name="stock dequantize=True", found=first, error=""), {"decode": costs}),
        (SimpleNamespace(name="hf_fp8 auto", found=first, error=""), {"decode": halved}),
        (SimpleNamespace(name="llama.cpp Q8_0", found=None, error="not installed"), {"decode": []}),
    ]
    _, ours, absent = bench.lines("decode", found)  # type: ignore[arg-type]
    ms, cpu_ms, to_dense, to_peer, gb = ours.cells
    assert (ms, cpu_ms, to_dense, gb) == (2, 8, 2, 2) and math.isnan(to_peer)
    assert ours.row["note"] == "CPU 8 ms, compiled" and ours.row["ratio_to_dense"] == 2
    assert absent.error == "not installed" and not absent.cells
    assert bench.lines("load", found)[0].cells[:2] == [1000, 500]  # type: ignore[arg-type]


@pytest.mark.slow
def test_peers_are_contenders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are there have numbers, the others a line that says why not."""
    monkeypatch.setattr(bench, "CHECKPOINTS", tmp_path)
    write(tiny_llama(), tmp_path / "fp8")
    names = ["hf_fp8 auto", "torchao int8 weight-only", "llama.cpp Q8_0"]
    file = tmp_path / "rows.csv"
    options = ["--rounds", "1", "--tokens", "8", "--threads", "1", "--device", "cpu", "--dtype", "float32"]
    bench.main([str(tmp_path / "fp8"), *options, "--csv", str(file), "--contenders", *names])
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    printed = capsys.readouterr().out
    for name in names:
        mine = [row for row in rows if row["contender"] == name]
        if not mine:
            assert not name.startswith("hf_fp8") and printed.count("not measured: not installed") >= 3
            continue
        assert [row["benchmark"] for row in mine] == ["load", "prefill", "decode"]
        for row in mine:
            assert math.isfinite(float(row["ms"])) and row["threads"] == "1"
            assert float(row["note"].removeprefix("CPU ").partition(" ms")[0]) > 0, row
