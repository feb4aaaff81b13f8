"""Reads calibration text, and calibrates the input scales of a checkpoint with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from ..errors import CalibrationError, ConfigError, CorruptFileError
from ..formats.storage import INPUT_SCALE
from ..integrations.config import FP8Config
from .calibration import calibrate
from .source import Source

# Tokens in one forward pass.
LENGTH = 512


def texts(file: Path) -> Iterator[str | list[dict[str, Any]]]:
    """The samples of a file: a text file as a whole; from `.jsonl` the "text" of each line, or "messages" for a chat template.

    Raises ConfigError, naming the line, for a line that has neither.
    """
    if not file.is_file():
        raise ConfigError(
            f"{file} is not a file: calibration needs a text file, or .jsonl with a `text` or `messages` in each line"
        )
    if file.suffix != ".jsonl":
        yield _text(file)
        return
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{file}, line {number}: not JSON ({error})") from error
        text, messages = (entry.get("text"), entry.get("messages")) if isinstance(entry, dict) else (None, None)
        if isinstance(text, str):
            yield text
        elif isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
            yield messages
        else:
            raise ConfigError(f"{file}, line {number}: has no `text` (a string) and no `messages` (a list of objects)")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{file} is not UTF-8 text ({error})") from None


def windows(file: Path, tokenizer: Any, length: int, tokens: int) -> list[torch.Tensor]:
    """Token ids of up to `tokens` tokens in total, as tensors (1, up to `length`)."""
    pieces: list[torch.Tensor] = []
    left = tokens
    for text in texts(file):
        chat = isinstance(text, list)
        if chat and tokenizer.chat_template is None:
            raise ConfigError(f"{file} has `messages`, but the checkpoint has no chat template: use `text` instead")
        said = tokenizer.apply_chat_template(text, tokenize=False) if chat else text
        # A chat template already adds the special tokens.
        ids = tokenizer(said, return_tensors="pt", add_special_tokens=not chat).input_ids[0][:left]
        pieces += [ids[None, start : start + length] for start in range(0, len(ids), length)]
        left -= len(ids)
        if left <= 0:
            break
    if not pieces:
        raise CalibrationError(f"{file} has no text to calibrate with")
    return pieces


def _tokenizer(source: Source) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # broken or missing files can raise anything
        raise ConfigError(
            f"{source.folder}: transformers cannot load a tokenizer from it ({type(error).__name__}: {error})"
        ) from error


def measure(
    source: Source,
    config: FP8Config,
    file: Path,
    *,
    observer: str,
    tokens: int,
    device_map: Any,
    tick: Callable[[int, int], Any] = lambda done, of: None,
) -> dict[str, torch.Tensor]:
    """Calibrate the static input scales of the checkpoint that `config` makes from `source`; return them by key.

    The model is quantized while loading, and run on `tokens` tokens of the text, `LENGTH` at a time: this takes memory for the
    FP8 model. It has the class that config.json names, and gets text only: in a multimodal model, layers that only images or
    sound reach are not calibrated. tick: called with (windows done, number of windows).
    """
    next(texts(file), None)  # raises for a file that cannot be read
    pieces = windows(file, _tokenizer(source), LENGTH, tokens)
    kind: Any = source.model_class or AutoModelForCausalLM
    model = kind.from_pretrained(
        source.folder, quantization_config=config, device_map=device_map, trust_remote_code=source.trust_remote_code
    )
    with torch.no_grad(), calibrate(model, observer, progress=False):
        for done, piece in enumerate(pieces, 1):
            ids = piece.to(model.device)
            model(ids, **({"decoder_input_ids": ids} if source.config.is_encoder_decoder else {}))
            tick(done, len(pieces))
    found = {}
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        if name.rpartition(".")[2] == INPUT_SCALE:
            if not bool(tensor.isfinite().all()):
                raise CalibrationError(
                    f"{name}: no token of the text reached this layer; use more text, or add the layer to `ignore`"
                )
            found[name] = tensor.detach().cpu().clone()
    return found
