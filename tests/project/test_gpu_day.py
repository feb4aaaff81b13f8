"""The day on a GPU (benchmarks/gpu_day), dry: each step runs on a CPU with tiny sizes, and its rows have numbers."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.markdown import ROOT

from benchmarks.gpu_day import day

pytest.importorskip("triton")

# Columns with numbers, of each row without an error.
NUMBERS = {
    "ceilings": ("value",),
    "linears": ("eager_us", "graph_us", "eager_x", "graph_x", "tbs"),
    "experts": ("ms", "ratio_to_dense", "tflops", "gbs", "roofline_pct"),
    "model": ("ms", "x"),
    "training": ("ms", "ratio_to_dense", "gb"),
    "sweep": ("us", "tbs", "tflops"),
}
# (step, what may say why it is not measured) -> how that begins, or None where it has to be measured.
ERRORS = {
    ("linears", "raw block-wise"): "ValueError: Invalid scaling configuration",  # no CPU has such a matmul
    ("linears", "torchao"): None if find_spec("torchao") else "not installed",
}
# What has to be among the rows: (columns, values).
WANTED = {
    "ceilings": (("what",), {("device",), ("transformers",)}),
    "linears": (
        ("scheme", "contender"),
        {(s, c) for s in ("channel", "block") for c in ("dense", "hf_fp8 auto", "triton_scaled_mm", "triton_weight_only")}
        | {("channel", "stock FP8 linear"), ("channel", "raw row-wise, fast_accum=False")},
    ),
    "experts": (
        ("scheme", "contender"),
        {
            (s, c)
            for s in ("channel", "block")
            for c in ("dense grouped_mm", "hf_fp8 auto", "triton_grouped_scaled_mm", "triton_grouped_weight_only")
        },
    ),
    "model": (
        ("contender", "what"),
        {
            (c, w)
            for c in ("BF16", "hf_fp8 auto")
            for w in ("prefill of 8", "decode, eager", "decode, in a graph", "decode of 4 layers, compiled")
        }
        | {("stock FP8 linear", "prefill of 8")},
    ),
    "training": (("contender",), {("BF16",), ("hf_fp8 scaled_mm",), ("hf_fp8 scaled_mm, backward quantized",)}),
    "sweep": (
        ("kernel", "scheme"),
        {("triton_weight_only", "channel"), ("triton_scaled_mm", "block"), ("triton_scaled_mm", "channel")},
    ),
}  # fmt: skip


def dry(step: str, out: Path) -> str:
    """What the command prints for one step."""
    command = ["bash", str(ROOT / "benchmarks" / "gpu_day" / "day.sh"), str(out), "--dry", "--only", step, "--seconds", "800"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    log = (out / "day.log").read_text() if (out / "day.log").exists() else ""
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-1000:]}\n{log[-4000:]}"
    return done.stdout


def test_every_step_is_tested() -> None:
    assert set(day.STEPS) == {"tests", *NUMBERS} and set(WANTED) == set(NUMBERS)


@pytest.mark.slow
@pytest.mark.parametrize("step", NUMBERS)
def test_step(step: str, tmp_path: Path) -> None:
    printed = dry(step, tmp_path)
    with (tmp_path / f"{step}.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns, wanted = WANTED[step]
    assert {tuple(row[column] for column in columns) for row in rows} >= wanted
    for row in rows:
        if step == "ceilings" and row["what"] in ("device", "torch", "triton", "transformers"):
            assert row["value"]
        elif error := row.get("error"):
            expected = ERRORS.get((step, row["contender"] if step == "linears" else ""))
            assert expected is not None and error.startswith(expected), row
        else:
            assert all(math.isfinite(float(row[column])) for column in NUMBERS[step]), row
    assert len(printed.partition(f"== {step}")[2].splitlines()) > 2, printed


@pytest.mark.slow
def test_tests(tmp_path: Path) -> None:
    """They are found, and skip for want of a GPU."""
    dry("tests", tmp_path)
    assert "2 skipped" in (tmp_path / "tests.log").read_text()


def test_a_step_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(day, "run", lambda name, *_: {"ceilings": 1, "model": "stopped"}.get(name, 0))
    monkeypatch.setattr(sys, "argv", ["day", str(tmp_path), "--only", "ceilings", "model", "sweep"])
    with pytest.raises(SystemExit) as ended:
        day.main()
    said = capsys.readouterr().out
    assert ended.value.code and "ceilings: 0 s, 1" in said and "model: 0 s, stopped" in said and "sweep: 0 s, done" in said
