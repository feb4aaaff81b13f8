"""Writes docs/quantizing.md, `scripts/page quantizing`: what commands print, checkpoints compared, and peak memory."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from support import build
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import hf_fp8
from hf_fp8 import FP8Config

from .. import CHECKPOINTS
from ..common import smollm2
from ..common.provenance import measured_with
from ..common.references import logits
from ..quantize_memory import table as memory_table
from .page import Page, PageError

CALIBRATION_TOKENS = 8192  # from the end of the prose, beside the first 2,048
TERMINAL = {"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}
# What the page shows, in this order, in a folder with a checkpoint `dense` and a text `prose.txt`.
# Each with the code that it exits with.
SESSION = [
    ("--help", 0),
    ("quantize --help", 0),
    ("quantize dense fp8", 0),
    ("quantize dense static --scheme FP8 --calibrate prose.txt", 0),
    ("quantize dense block --scheme FP8_BLOCK", 0),
    ("quantize dense fp8", 1),
    ("inspect fp8", 0),
    ("inspect dense", 0),
    ("verify static", 0),
    ("dequantize fp8 back", 0),
]


@dataclass(frozen=True)
class Quantizing(Page):
    name = "quantizing"
    versions: str
    printed: str
    commands: str
    equal: str
    memory: str
    tokens: str


def shown(command: str, code: int, folder: Path) -> str:
    """A command as it is typed and what it prints. Raises PageError if it does not exit with `code`."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "hf-fp8"), *shlex.split(command)],
        capture_output=True, text=True, cwd=folder, env={**os.environ, **TERMINAL},
    )  # fmt: skip
    if done.returncode != code:
        raise PageError(f"hf-fp8 {command} ended with {done.returncode}, not {code}: {done.stdout}{done.stderr}")
    lines = (done.stdout + done.stderr).rstrip().splitlines()
    text = "\n".join(line.rstrip().replace(f"{folder.resolve()}/", "") for line in lines)
    return f"```\n$ hf-fp8 {command}\n{text}\n```"


def commands(work: Path, dense: Path) -> str:
    """The session that the page shows. Paths are those of the reader: dense, fp8, ..."""
    (work / "dense").symlink_to(dense.resolve())
    tokenizer = AutoTokenizer.from_pretrained(dense)
    prose = smollm2.prose(tokenizer)  # of which the evaluation takes some from 2,048 on
    ids = torch.cat([prose[: smollm2.CALIBRATION_TOKENS], prose[-CALIBRATION_TOKENS:]])
    (work / "prose.txt").write_text(tokenizer.decode(ids))
    return "\n\n".join(shown(command, code, work) for command, code in SESSION)


def lost(path: Path) -> int:
    """How many weights compressed-tensors decompresses to other values than hf_fp8."""
    state = load_file(path / "model.safetensors")
    config = AutoConfig.from_pretrained(path).quantization_config
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(str(getattr(group.format, "value", group.format)))
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=FP8Config(dequantize=True), dtype=torch.bfloat16)
    count = 0
    for name, weight in model.state_dict().items():
        scale = state.get(f"{name}_scale")
        if scale is not None:
            found = compressor.decompress({"weight": state[name], "weight_scale": scale}, group)["weight"]
            count += not torch.equal(found.to(weight.dtype), weight)
    return count


def stock(path: Path, ids: torch.Tensor, dtype: torch.dtype, ours: FP8Config, theirs: object = None) -> float:
    """The error of stock transformers' logits against ours; models loaded in `dtype`, computing in float32."""

    def found(config: object) -> torch.Tensor:
        options = {} if config is None else {"quantization_config": config}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
        torch.nn.Module.float(model)  # the host refuses its own of models that were quantized
        return logits(model, ids)

    wanted = found(ours)
    with build.stock_transformers():
        return build.error(found(theirs), wanted)


def equal(work: Path, folder: Path, tokens: int) -> list[str]:
    dense = folder / "dense"
    tokenizer = AutoTokenizer.from_pretrained(dense)
    text = smollm2.evaluation(smollm2.prose(tokenizer), tokens)

    def perplexity(path: Path, **options: object) -> float:
        return hf_fp8.perplexity(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options), text)

    base, lines = perplexity(dense), []
    for kind, scheme in smollm2.KINDS.items():
        path = work / {"dynamic": "fp8"}.get(kind, kind)
        theirs = smollm2.write_fp8(dense, folder / kind, kind)
        differing = build.differing(build.tensors(path), build.tensors(theirs))
        weights = [name for name in differing if not name.endswith("input_scale")]
        said = f"{len(weights)}" + (f" ({len(differing) - len(weights)} input scales)" if len(differing) > len(weights) else "")
        found = [perplexity(path, quantization_config=FP8Config(backend=b)) for b in ("weight_only", "scaled_mm")]
        ids = text[None, :64]
        dequantized = stock(path, ids, torch.bfloat16, FP8Config(dequantize=True), CompressedTensorsConfig(dequantize=True))
        try:
            rounded = f"{stock(path, ids, torch.float32, FP8Config(backend='scaled_mm')):.1e}"
        except RuntimeError as error:  # its emulation wants groups of 128 to divide 576
            rounded = f"raises ({str(error).split(chr(10))[0][:60]}...)"
        cells = " | ".join(f"{value:.3f} ({value / base - 1:+.2%})" for value in found)
        lines.append(f"| {scheme} | {said} | {lost(path)} | {dequantized:.1e} | {rounded} | {cells} | {base:.3f} |")
        print(lines[-1], flush=True)
    return lines


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="how much prose to measure perplexity on")
    parser.add_argument("--folder", type=Path, default=CHECKPOINTS, help="where SmolLM2's checkpoints are kept")
    parser.add_argument("--commands", action="store_true", help="run the commands shown anew, and keep what was measured")
    return parser


def main() -> None:
    options = arguments().parse_args()
    Quantizing.check()
    options.folder.mkdir(parents=True, exist_ok=True)
    smollm2.quiet()
    dense = smollm2.write_dense(options.folder / "dense")
    with tempfile.TemporaryDirectory() as work:
        session = commands(Path(work), dense)
        if options.commands:
            return replace(Quantizing.shown(), printed=measured_with(), commands=session).write()
        table = equal(Path(work), options.folder, options.tokens)
    memory = "\n".join(memory_table())
    page = Quantizing(
        versions=measured_with(), printed=measured_with(), commands=session, equal="\n".join(table), memory=memory,
        tokens=f"{options.tokens:,}",
    )  # fmt: skip
    return page.write()


if __name__ == "__main__":
    main()
