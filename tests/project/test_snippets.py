"""The Python of README.md and docs/ compiles, and runs on tiny local models in the place of those it names."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.build import IDS, differing, tensors, tiny_llama, write
from support.markdown import PAGES, ROOT, Block, blocks
from torch import nn
from transformers import TrainingArguments

from hf_fp8 import FP8Config, QuantizedLinear

# Names of models in the pages -> the folder of a tiny one. Any other cannot be loaded here: no Hub is asked.
LOCAL = {
    "RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic": "quantized",
    "a-compressed-tensors-fp8-checkpoint": "quantized",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "dense",
    "a-bf16-model": "dense",
    "a-dense-model": "dense",
}


def python(path: Path) -> list[Block]:
    return [block for block in blocks(path.read_text()) if block.language == "python"]


class UNet(nn.Module):
    """Of the kinds of layers that the pages speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.conv = nn.Linear(32, 32), nn.Conv2d(32, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(self.attn(x).mT[..., None])
        return out


def given(folder: Path) -> dict[str, Any]:
    """What the reader has: a model, data, a tokenizer."""
    from transformers import AutoModelForCausalLM

    def tokenizer(text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) % 128 for letter in text]])}

    dense, fp8 = (
        AutoModelForCausalLM.from_pretrained(folder / name, **options)
        for name, options in (("dense", {}), ("quantized", {"quantization_config": FP8Config(backend="scaled_mm")}))
    )
    ids = IDS.flatten()
    return {
        "UNet": UNet, "unet": UNet(), "dense_model": dense, "fp8_model": fp8, "ids": ids,
        "batches": [{"input_ids": ids[None, :512]}],
        "tokenizer": tokenizer, "texts": ["some thousand tokens"], "dataset": [{"input_ids": IDS[0], "labels": IDS[0]}],
        "collator": None,
        "args": TrainingArguments(folder / "out", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True),
    }  # fmt: skip


class Local(ast.NodeTransformer):
    """Local models for those that are named; what is given for `name=...`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        found = LOCAL.get(node.value) if isinstance(node.value, str) else None
        return node if found is None else ast.copy_location(ast.Constant(str(self.folder / found)), node)

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        if isinstance(node.value, ast.Constant) and node.value.value is ...:
            return ast.copy_location(ast.keyword(node.arg, ast.copy_location(ast.Name(str(node.arg), ast.Load()), node)), node)
        self.generic_visit(node)
        return node


def run(path: Path, folder: Path) -> dict[str, Any]:
    """The blocks of a page, one after the other, in one namespace, which is returned."""
    names = given(folder)
    for block in python(path):
        tree = Local(folder).visit(ast.parse("\n" * (block.line - 1) + block.code, str(path)))
        exec(compile(tree, str(path), "exec"), names)  # errors say the line of the page
    return names


def test_pages_have_snippets() -> None:
    # Those of distributed.md and diffusion.md run in tests/distributed and tests/integrations/test_diffusers.
    assert {path.name for path in PAGES if python(path)} == {
        "README.md", "quantizing.md", "torchao.md", "qat.md", "training.md", "distributed.md", "diffusion.md",
    }  # fmt: skip


def is_fp8(path: Path) -> bool:
    return torch.float8_e4m3fn in {tensor.dtype for tensor in tensors(path).values()}


def readme(names: dict[str, Any]) -> None:
    assert differing(tensors(Path("quantized")), tensors(Path("copy"))) == []
    assert is_fp8(Path("fp8")) and is_fp8(Path("fp8-unet")) and is_fp8(Path("merged"))
    assert type(names["unet"].attn) is nn.Linear and type(names["unet"].conv) is nn.Conv2d


def quantizing(names: dict[str, Any]) -> None:
    assert is_fp8(Path("smollm2-fp8")) and any("input_scale" in name for name in tensors(Path("smollm2-fp8-static")))
    assert isinstance(names["again"].attn, QuantizedLinear) and type(names["unet"].attn) is nn.Linear
    assert Path("quality.svg").exists() and Path("quality.json").exists()
    assert names["better"].ignore


def training(names: dict[str, Any]) -> None:
    from peft import PeftModel

    assert is_fp8(Path("merged")) and "rounded to codes again" in str(names["report"])
    PeftModel.from_pretrained(names["dense_model"], "adapter")  # "loads on the BF16 base, too"


def torchao(names: dict[str, Any]) -> None:
    assert {m.scheme.text for m in names["dense_model"].modules() if isinstance(m, QuantizedLinear)} == {"1x32sqz|-"}


def qat(names: dict[str, Any]) -> None:
    assert {m.scheme.text for m in names["again"].modules() if isinstance(m, QuantizedLinear)} == {"1x32sq|-"}
    with torch.no_grad():
        assert torch.equal(names["again"](names["ids"][None]).logits, names["model"].eval()(names["ids"][None]).logits)


@pytest.mark.parametrize(
    ("page", "check"),
    [
        ("README.md", readme), ("docs/quantizing.md", quantizing), ("docs/torchao.md", torchao), ("docs/training.md", training),
        ("docs/qat.md", qat),
    ],
)  # fmt: skip
def test_snippets_run(
    page: str, check: Callable[[dict[str, Any]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("dense")
    write(tiny_llama(), Path("quantized"))
    check(run(ROOT / page, tmp_path))
