"""Numbers and printed commands of docs/quantizing.md, from SmolLM2 and from checkpoints of 2.2 GB with random weights."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import build
import compressed_tensors
import smollm2
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from loguru import logger as loguru
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import hf_fp8
from hf_fp8 import FP8Config

CALIBRATION_TOKENS = 8192  # from the end of the prose, beside the first 2,048
SCHEMES = {"dynamic": "FP8_DYNAMIC", "block": "FP8_BLOCK", "static": "FP8"}


def shown(*arguments: str, folder: Path) -> str:
    """A command as it is typed and what it prints, 110 columns wide."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "hf-fp8"), *arguments],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"},
    )  # fmt: skip
    lines = (done.stdout + done.stderr).rstrip().splitlines()
    text = "\n".join(line.rstrip().replace(f"{folder.resolve()}/", "") for line in lines)
    return f"```\n$ hf-fp8 {' '.join(arguments)}\n{text}\n```\n"


def commands(work: Path, dense: Path) -> str:
    """The session that the page shows. Paths are those of the reader: dense, fp8, ..."""
    (work / "dense").symlink_to(dense.resolve())
    tokenizer = AutoTokenizer.from_pretrained(dense)
    prose = smollm2.prose(tokenizer)  # of which the evaluation takes some from 2,048 on
    ids = torch.cat([prose[: smollm2.CALIBRATION_TOKENS], prose[-CALIBRATION_TOKENS:]])
    (work / "prose.txt").write_text(tokenizer.decode(ids))
    session = [
        ("--help",),
        ("quantize", "--help"),
        ("quantize", "dense", "fp8"),
        ("quantize", "dense", "static", "--scheme", "FP8", "--calibrate", "prose.txt"),
        ("quantize", "dense", "block", "--scheme", "FP8_BLOCK"),
        ("quantize", "dense", "fp8"),
        ("inspect", "fp8"),
        ("inspect", "dense"),
        ("verify", "static"),
        ("dequantize", "fp8", "back"),
    ]
    return "\n".join(shown(*arguments, folder=work) for arguments in session)


def lost(path: Path) -> int:
    """How many weights compressed-tensors decompresses to other values than hf_fp8 multiplies out."""
    state = load_file(path / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(path).quantization_config
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

    def logits(config: object) -> torch.Tensor:
        options = {} if config is None else {"quantization_config": config}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
        torch.nn.Module.float(model)  # the host refuses its own of models that were quantized
        with torch.no_grad():
            found: torch.Tensor = model(ids, use_cache=False).logits
        return found

    wanted = logits(ours)
    hf_fp8.unregister()
    try:
        return build.error(logits(theirs), wanted)
    finally:
        hf_fp8.register()


def equal(work: Path, folder: Path, tokens: int) -> list[str]:
    dense = folder / "dense"
    tokenizer = AutoTokenizer.from_pretrained(dense)
    text = smollm2.evaluation(smollm2.prose(tokenizer), tokens)

    def perplexity(path: Path, **options: object) -> float:
        return smollm2.perplexity(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options), text)

    base, lines = perplexity(dense), []
    for kind, scheme in SCHEMES.items():
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
        cells = " | ".join(f"{value:.3f} ({100 * (value / base - 1):+.2f}%)" for value in found)
        lines.append(f"| {scheme} | {said} | {lost(path)} | {dequantized:.1e} | {rounded} | {cells} | {base:.3f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="how much prose to measure perplexity on")
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="where SmolLM2's checkpoints are kept")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity(50)
    loguru.remove()
    dense = smollm2.write_dense(options.folder / "dense")
    memory = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "quantize_memory.py")], check=True, capture_output=True, text=True
    ).stdout
    with tempfile.TemporaryDirectory() as work:
        session = commands(Path(work), dense)
        table = equal(Path(work), options.folder, options.tokens)
        shutil.rmtree(work, ignore_errors=True)
        Path(work).mkdir()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    versions = (
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, compressed-tensors {compressed_tensors.__version__}; commit {commit}"
    )
    text = (ROOT / "docs" / "quantizing.template.md").read_text()
    found = {
        "VERSIONS": versions, "COMMANDS": session, "EQUAL": "\n".join(table), "MEMORY": memory.rstrip(),
        "TOKENS": f"{options.tokens:,}",
    }  # fmt: skip
    for name, value in found.items():
        text = text.replace(f"<!-- {name} -->", value)
    (ROOT / "docs" / "quantizing.md").write_text(text)


if __name__ == "__main__":
    main()
