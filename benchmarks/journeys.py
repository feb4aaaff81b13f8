"""What of the package each thing that users do runs through, `scripts/bench journeys`: the table in docs/design.md.

For each journey: files, functions, and pairs of files and of packages of which one calls the other. What only happens on import
is left out. `--package FOLDER` traces another version of hf_fp8, as far back as it has these calls.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


@dataclass
class Trace:
    """functions: those of the package that ran. calls: (file of the caller, file of the called), where they differ."""

    package: str
    functions: set[CodeType] = field(default_factory=set)
    calls: set[tuple[str, str]] = field(default_factory=set)

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self.package) or code.co_name.startswith("<"):
            return
        self.functions.add(code)
        caller = frame.f_back
        while caller is not None and caller.f_code.co_name.startswith("<"):  # a comprehension, or a lambda
            caller = caller.f_back
        file = "" if caller is None else caller.f_code.co_filename
        if file.startswith(self.package) and file != code.co_filename:
            self.calls.add((file, code.co_filename))

    def row(self) -> tuple[int, int, int, int]:
        """(files, functions, pairs of files, pairs of packages)."""
        packages = {pair for call in self.calls if len(set(pair := tuple(map(self._package_of, call)))) == 2}
        return len({code.co_filename for code in self.functions}), len(self.functions), len(self.calls), len(packages)

    def _package_of(self, file: str) -> str:
        return file.removeprefix(self.package).lstrip("/").partition("/")[0]


@contextmanager
def traced(package: str) -> Iterator[Trace]:
    trace = Trace(package)
    threading.setprofile(trace.note)
    sys.setprofile(trace.note)
    try:
        yield trace
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def journeys(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, what is traced); each is run before the next one is asked for."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from hf_fp8 import FP8Config
    from hf_fp8.cli import app

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes))
    moe = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_key_value_heads=2, **sizes)
    )
    for name, model in (("llama", llama), ("moe", moe)):
        model.to(torch.bfloat16).save_pretrained(folder / name)
        quantized = AutoModelForCausalLM.from_pretrained(
            folder / name, quantization_config=FP8Config("FP8_DYNAMIC"), dtype=torch.bfloat16
        )
        quantized.save_pretrained(folder / f"{name}-fp8")
    ids = torch.arange(12)[None]
    loaded: dict[str, Any] = {}

    def load(name: str, **options: Any) -> None:
        config = FP8Config(backend="weight_only", **options)
        loaded[name] = AutoModelForCausalLM.from_pretrained(
            folder / f"{name}-fp8", quantization_config=config, dtype=torch.bfloat16
        )

    yield "load a dense FP8 Llama, kept in FP8", lambda: load("llama")
    yield "its first forward", lambda: loaded["llama"](ids)
    yield "load an MoE model with FP8 experts", lambda: load("moe", experts="fp8")
    yield "its first forward (MoE)", lambda: loaded["moe"](ids)
    command = ["quantize", str(folder / "llama"), str(folder / "written")]
    yield "`hf-fp8 quantize`", lambda: app(command, standalone_mode=False)

    def adapt() -> None:
        loaded["peft"] = get_peft_model(loaded["llama"], LoraConfig(target_modules=["q_proj", "down_proj"]))

    yield "`get_peft_model`", adapt
    yield "forward and backward over LoRA", lambda: loaded["peft"](input_ids=ids, labels=ids).loss.backward()
    yield "`merge_and_unload`", lambda: loaded["peft"].merge_and_unload()
    yield "`save_pretrained`", lambda: loaded["moe"].save_pretrained(folder / "saved")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="journeys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", metavar="FOLDER", help="a checkout of another version, whose hf_fp8 is traced")
    return parser


def main() -> None:
    given = arguments().parse_args()
    if given.package:
        sys.path.insert(0, str(Path(given.package).resolve()))
    warnings.filterwarnings("ignore")
    import hf_fp8

    package = str(Path(hf_fp8.__file__).parent)
    print("| journey | files | functions | pairs of files | pairs of packages |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, run in journeys(Path(folder)):
            with traced(package) as trace:
                run()
            print(f"| {name} | {' | '.join(map(str, trace.row()))} |")


if __name__ == "__main__":
    main()
