"""A checkpoint folder, or one on the Hub: its files, its config, and its model by structure alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightTransform
from transformers.modeling_utils import local_torch_dtype

from .checkpoint import Checkpoint
from .errors import CheckpointError, ConfigError, CorruptFileError, MissingTensorError
from .shards import INDEX

# What holds weights, in whatever format: not copied beside the ones that are written.
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".index.json", ".ckpt")


@dataclass
class Source:
    """`folder` with `config.json`, parsed (`config`) and as it is (`text`), and the files that hold the weights."""

    folder: Path
    config: PreTrainedConfig
    text: dict[str, Any]
    files: list[str]
    trust_remote_code: bool = False

    @property
    def quantization(self) -> dict[str, Any] | None:
        """What `config.json` says of how it is quantized; None if nothing."""
        inner = self.text.get("text_config") or {}
        for part in (self.text, inner):
            for key in ("quantization_config", "compression_config"):
                if part.get(key):
                    found: dict[str, Any] = part[key]
                    return found
        return None

    @property
    def dtype(self) -> torch.dtype:
        """What the weights that are dense are meant to be; bfloat16 if the config does not say."""
        dtype = self.config.dtype if self.config.dtype is not None else self.config.get_text_config().dtype
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.bfloat16

    def checkpoint(self) -> Checkpoint:
        """The headers of its files. Raises if the index and the files contradict each other."""
        checkpoint = Checkpoint(self.files)
        for name, file in self._index().items():
            if name not in checkpoint.tensors:
                raise MissingTensorError(f"{name} is not in {file}, where the index of {self.folder} has it")
        if unlisted := sorted(set(checkpoint.tensors) - set(self._index())) if self._index() else []:
            raise CheckpointError(f"{unlisted[0]} is in the files of {self.folder}, but not in their index")
        return checkpoint

    def structure(self) -> PreTrainedModel:
        """The model on the meta device: modules and shapes, no memory."""
        kind: Any = getattr(transformers, (self.config.architectures or [""])[0], None)
        with torch.device("meta"), local_torch_dtype(self.dtype):
            if kind is not None:
                model: PreTrainedModel = kind(self.config)
            else:
                auto = next(iter(self.text.get("auto_map", {})), "AutoModel")
                auto = auto if auto != "AutoConfig" else "AutoModelForCausalLM"
                make: Any = getattr(transformers, auto, AutoModel)
                model = make.from_config(self.config, trust_remote_code=self.trust_remote_code)
        return model

    def conversions(self, model: PreTrainedModel) -> list[WeightTransform]:
        """By which the host would load it."""
        found: list[WeightTransform] = get_model_conversion_mapping(model)
        return found

    def copy_rest(self, folder: Path) -> None:
        """Copy what is no weight: tokenizer, generation config, model card, code, licence."""
        for file in sorted(self.folder.iterdir()):
            name = file.name
            if file.is_file() and not name.startswith(".") and not name.endswith(WEIGHT_FILES) and name != "config.json":
                shutil.copy2(file, folder / name)

    def write_config(self, folder: Path, quantization: dict[str, Any] | None, dtype: torch.dtype | None = None) -> None:
        """`config.json` with another `quantization_config`, and else as it is."""
        text = {key: value for key, value in self.text.items() if key not in ("quantization_config", "compression_config")}
        if isinstance(text.get("text_config"), dict):
            text["text_config"] = {
                key: value
                for key, value in text["text_config"].items()
                if key not in ("quantization_config", "compression_config")
            }
        if quantization is not None:
            text["quantization_config"] = quantization
        if dtype is not None:
            text["dtype" if "torch_dtype" not in text else "torch_dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n")

    def _index(self) -> dict[str, str]:
        for name in (INDEX, "pytorch_model.bin.index.json"):
            if (self.folder / name).exists() and self.files and self.files[0].endswith(name.split(".")[1]):
                return _weight_map(self.folder / name)
        return {}


def open_source(source: str, *, trust_remote_code: bool = False) -> Source:
    """A folder, or the name of a repository on the Hub (downloaded, or found in its cache).

    Raises ConfigError if it is neither, CorruptFileError for JSON that cannot be read.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(source)
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder} has no config.json: it is no transformers checkpoint")
    text = _json(path)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return Source(folder, config, text, _weight_files(folder), trust_remote_code)


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, ignore_patterns=["*.gguf", "*.onnx", "original/*", "*.pth"]))
    except Exception as error:
        raise ConfigError(f"{source} is no folder, and was not found on the Hub ({error})") from error


def _weight_files(folder: Path) -> list[str]:
    for index, single in ((INDEX, "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin")):
        if (folder / index).exists():
            return [str(folder / name) for name in dict.fromkeys(_weight_map(folder / index).values())]
        if (folder / single).exists():
            return [str(folder / single)]
    raise ConfigError(f"{folder} has no model.safetensors, no pytorch_model.bin and no index of several: no weights")


def _weight_map(path: Path) -> dict[str, str]:
    found = _json(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CorruptFileError(f"{path} has no weight_map from tensors to files")
    if bad := [file for file in found.values() if Path(file).name != file]:
        raise CorruptFileError(f"{path} lists {bad[0]!r}, which is not a file of its folder")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CorruptFileError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} holds a {type(found).__name__}, not an object")
    return found
