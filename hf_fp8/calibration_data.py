"""Text to calibrate with, and the input scales of a checkpoint that it gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from .calibration import calibrate
from .config import FP8Config
from .errors import CalibrationError, ConfigError, CorruptFileError
from .observers import Observer
from .source import Source
from .stored import INPUT_SCALE


def texts(file: Path) -> Iterator[str | list[dict[str, Any]]]:
    """The samples of a file: a whole text file; of `.jsonl` each line's "text", or its "messages" for a chat template.

    Raises ConfigError, naming the line, for one that has neither.
    """
    if not file.is_file():
        raise ConfigError(
            f"{file} is no file: calibration takes a text file, or .jsonl with a `text` or `messages` in each line"
        )
    if file.suffix != ".jsonl":
        yield file.read_text(encoding="utf-8")
        return
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise CorruptFileError(f"{file}, line {number}: no JSON ({error})") from error
        found = entry.get("text") or entry.get("messages") if isinstance(entry, dict) else None
        if not isinstance(found, str | list):
            raise ConfigError(f"{file}, line {number}: has no `text` and no `messages`")
        yield found


def windows(file: Path, tokenizer: Any, length: int, tokens: int) -> list[torch.Tensor]:
    """Token ids of up to `tokens` in all, in pieces (1, up to `length`)."""
    pieces: list[torch.Tensor] = []
    left = tokens
    for text in texts(file):
        if isinstance(text, list):
            text = tokenizer.apply_chat_template(text, tokenize=False)
        ids = tokenizer(text, return_tensors="pt").input_ids[0][:left]
        pieces += [ids[None, start : start + length] for start in range(0, len(ids), length)]
        left -= len(ids)
        if left <= 0:
            break
    if not pieces:
        raise CalibrationError(f"{file} has no text to calibrate with")
    return pieces


def measure(
    source: Source,
    config: FP8Config,
    file: Path,
    *,
    observer: str | Observer = "amax",
    tokens: int = 16384,
    length: int = 512,
    device_map: Any = None,
    tick: Callable[[int, int], Any] = lambda done, of: None,
) -> dict[str, torch.Tensor]:
    """Key of each static input scale of the checkpoint that `config` makes of `source` -> its value.

    The model is loaded, quantized on the way, and run on `tokens` of the text, `length` at a time: this takes memory for the
    FP8 model. tick: called with (windows done, of how many).
    """
    tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    pieces = windows(file, tokenizer, length, tokens)
    model = AutoModelForCausalLM.from_pretrained(
        source.folder, quantization_config=config, device_map=device_map, trust_remote_code=source.trust_remote_code
    )
    with torch.no_grad(), calibrate(model, observer, progress=False):
        for done, ids in enumerate(pieces, 1):
            model(ids.to(model.device), use_cache=False)
            tick(done, len(pieces))
    found = {}
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        if name.rpartition(".")[2] == INPUT_SCALE:
            if not bool(tensor.isfinite().all()):
                raise CalibrationError(
                    f"{name}: no token of the text reached this layer; take more text, or put it in `ignore`"
                )
            found[name] = tensor.detach().cpu().clone()
    return found
