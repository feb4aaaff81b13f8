"""A checkpoint folder, or one on the Hub: its files, its config, and its model by structure alone."""

from __future__ import annotations

import json
import os
import reprlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import get_configuration_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightTransform
from transformers.modeling_utils import local_torch_dtype

from ..checkpoint.files import Stamp, changed, is_there, read_json, regular
from ..checkpoint.reader import DENSE_DTYPES, TORCH_DTYPES, Checkpoint
from ..checkpoint.weight_files import WeightFiles, find_weight_files
from ..checkpoint.writer import WEIGHT_FILES
from ..errors import CheckpointError, ConfigError, FP8Error, MissingTensorError, UnsupportedError
from ..integrations.locks import while_changing

_QUANTIZED = ("quantization_config", "compression_config")
# What says how the weights are quantized, in files of their own: nothing of it is true of what is written.
_ABOUT_WEIGHTS = ("config.json", "hf_quant_config.json")


@dataclass
class Source:
    """`folder` with `config.json`, parsed (`config`) and as it is (`text`); the files with the weights, and the rest that goes
    with them. stamps: of all these files, as they were before they were read.
    """

    folder: Path
    config: PreTrainedConfig
    text: dict[str, Any]
    weights: WeightFiles
    rest: list[Path]
    stamps: dict[Path, Stamp]
    trust_remote_code: bool = False

    @property
    def files(self) -> list[str]:
        """The files with the weights."""
        return [str(file) for file in self.weights.files]

    @property
    def quantization(self) -> dict[str, Any] | None:
        """What `config.json` says of how it is quantized; None if nothing."""
        for part in (self.text, self.text.get("text_config")):
            for key in _QUANTIZED:
                found = part.get(key) if isinstance(part, dict) else None
                if found is not None and not isinstance(found, dict):
                    raise ConfigError(f"{self.folder / 'config.json'}: {key} is {reprlib.repr(found)}, not an object")
                if found:
                    return found
        return None

    @property
    def dtype(self) -> torch.dtype:
        """What dense weights are meant to be: by the config, else, as the host has it, by the first in the files."""
        dtype = self.config.dtype if self.config.dtype is not None else self.config.get_text_config().dtype
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
        stored = (info.dtype for info in self.checkpoint().tensors.values() if info.dtype in DENSE_DTYPES)
        return TORCH_DTYPES[next(stored, "BF16")]

    def checkpoint(self) -> Checkpoint:
        """The headers of its files, read once. Raises if the index and the files contradict each other."""
        return self._checkpoint

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        checkpoint = Checkpoint(self.files)
        listed = self.weights.listed
        for name, file in listed.items():
            found = checkpoint.files_with(name)
            if not found:
                raise MissingTensorError(f"{name} is not in {file.name}, where the index of {self.folder} has it")
            if str(file) not in found:
                raise CheckpointError(
                    f"{name} is in {Path(found[0]).name}, and the index of {self.folder} has it in {file.name}"
                )
        if listed and (unlisted := sorted(set(checkpoint.tensors) - set(listed))):
            raise CheckpointError(f"{unlisted[0]} is in the files of {self.folder}, but not in their index")
        return checkpoint

    @property
    def model_class(self) -> type[PreTrainedModel] | None:
        """The class of transformers that the config names; None if it names none, or one of its own code."""
        kind = getattr(transformers, type_of(self), None)
        return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None

    def check_unchanged(self) -> None:
        """Raise CheckpointError, naming the file, if one that was read is not the one any more that it was."""
        for path, stamp in self.stamps.items():
            if not is_there(path) or regular(path) != stamp:
                raise changed(path)

    def structure(self) -> PreTrainedModel:
        """The model on the meta device: modules and shapes, no memory.

        Raises CheckpointError, naming config.json, if transformers cannot build it.
        """
        try:
            with while_changing(), torch.device("meta"), local_torch_dtype(self.dtype):
                return self._build()
        except FP8Error:
            raise
        except Exception as error:  # whatever a config with senseless values leads to
            raise CheckpointError(
                f"{self.folder / 'config.json'}: transformers cannot build {type_of(self)} of it ({_said(error)})"
            ) from error

    def _build(self) -> PreTrainedModel:
        if (kind := self.model_class) is not None:
            return kind(self.config)
        of = self.text.get("auto_map") or {}  # "AutoModelFor...": "file.Class"
        auto = next((auto for auto, place in of.items() if str(place).endswith(f".{type_of(self)}")), "AutoModelForCausalLM")
        make: Any = getattr(transformers, auto) if of else AutoModel
        model: PreTrainedModel = make.from_config(self.config, trust_remote_code=self.trust_remote_code)
        return model

    def conversions(self, model: PreTrainedModel) -> list[WeightTransform]:
        """By which the host would load it."""
        found: list[WeightTransform] = get_model_conversion_mapping(model)
        return found

    def copy_rest(self, folder: Path) -> None:
        """Copy what is no weight, from folders, too: tokenizer, chat templates, generation config, card, code, licence."""
        for file in self.rest:
            path = folder / file.relative_to(self.folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, path)

    def write_config(self, folder: Path, quantization: dict[str, Any] | None, dtype: torch.dtype | None = None) -> None:
        """`config.json` with another `quantization_config`, for weights under the usual names, and else as it is."""
        text = {key: value for key, value in self.text.items() if key not in (*_QUANTIZED, "transformers_weights")}
        if isinstance(text.get("text_config"), dict):
            text["text_config"] = {key: value for key, value in text["text_config"].items() if key not in _QUANTIZED}
        if quantization is not None:
            text["quantization_config"] = quantization
        if dtype is not None:
            keys = [key for key in ("dtype", "torch_dtype") if key in text] or ["dtype"]
            text |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def open_source(source: str, *, trust_remote_code: bool = False) -> Source:
    """A folder, or the name of a repository on the Hub (downloaded, or found in its cache).

    Raises ConfigError if it is neither, or config.json is not one that transformers reads; CorruptFileError for JSON that
    cannot be read; and as `find_weight_files` does.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError(f"{source} is a file: name the folder that it is in")
        if source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise ConfigError(f"{source} is no folder, and no name of a repository on the Hub")
        folder = _from_hub(source)
    path = folder / "config.json"
    if not is_there(path):
        raise ConfigError(f"{folder} has no config.json: it is no transformers checkpoint")
    if is_there(folder / "adapter_config.json"):
        raise ConfigError(
            f"{folder} has an adapter_config.json: transformers loads the model that it names, and the adapter on it, not the "
            "weights here. Merge the adapter and save the model; or take the file away if the weights are the whole model"
        )
    rest = {file: regular(file) for file in _rest(folder)}
    stamp = regular(path)
    text = read_json(path)
    config = _config(folder, text, trust_remote_code)
    weights = find_weight_files(folder, explicit=getattr(config, "transformers_weights", None))
    if weights is None:
        raise ConfigError(f"{folder} has no model.safetensors, no pytorch_model.bin and no index of several: no weights")
    return Source(folder, config, text, weights, list(rest), {path: stamp, **weights.stamps, **rest}, trust_remote_code)


def type_of(source: Source) -> str:
    """The class of the model, as the config names it."""
    named = source.config.architectures
    return str((named if isinstance(named, list) and named else [source.config.model_type])[0])


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source, ignore_patterns=["*.gguf", "*.onnx", "original/*", "*.pth"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"{source} is no folder, and was not found on the Hub ({error})") from error


def _config(folder: Path, text: dict[str, Any], trust_remote_code: bool) -> PreTrainedConfig:
    path = folder / "config.json"
    try:
        if "configuration_files" in text and (other := get_configuration_file(text["configuration_files"])) != path.name:
            raise UnsupportedError(f"{path} refers transformers to {other}: put that in its place")
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except FP8Error:
        raise
    except Exception as error:  # whatever senseless values, or a checkpoint's own code, lead to
        raise ConfigError(f"{path}: transformers cannot read it ({_said(error)})") from error


def _rest(folder: Path) -> Iterator[Path]:
    """The files of a folder that are no weights, say nothing of weights, and are not hidden."""

    def give_up(error: OSError) -> None:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror})") from error

    for place, folders, files in os.walk(folder, onerror=give_up):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(place, name)
            about_weights = name.endswith(WEIGHT_FILES) or (path.parent == folder and name in _ABOUT_WEIGHTS)
            if not name.startswith(".") and not about_weights and path.is_file():
                yield path


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
