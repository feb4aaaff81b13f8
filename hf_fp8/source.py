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

from .checkpoint import DENSE_DTYPES, TORCH_DTYPES, Checkpoint
from .errors import CheckpointError, ConfigError, CorruptFileError, MissingTensorError
from .shards import INDEX, WEIGHT_FILES


@dataclass
class Source:
    """`folder` with `config.json`, parsed (`config`) and as it is (`text`); the files with the weights, and their index."""

    folder: Path
    config: PreTrainedConfig
    text: dict[str, Any]
    files: list[str]
    index: Path | None
    trust_remote_code: bool = False

    @property
    def quantization(self) -> dict[str, Any] | None:
        """What `config.json` says of how it is quantized; None if nothing."""
        for part in (self.text, self.text.get("text_config")):
            for key in ("quantization_config", "compression_config"):
                found = part.get(key) if isinstance(part, dict) else None
                if found is not None and not isinstance(found, dict):
                    raise ConfigError(f"{self.folder / 'config.json'}: {key} is {found!r}, not an object")
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
        stored = (info.dtype for info in Checkpoint(self.files).tensors.values() if info.dtype in DENSE_DTYPES)
        return TORCH_DTYPES[next(stored, "BF16")]

    def checkpoint(self) -> Checkpoint:
        """The headers of its files. Raises if the index and the files contradict each other."""
        checkpoint = Checkpoint(self.files)
        index = _weight_map(self.index) if self.index is not None else {}
        for name, file in index.items():
            found = checkpoint.tensors.get(name)
            if found is None:
                raise MissingTensorError(f"{name} is not in {file}, where the index of {self.folder} has it")
            if Path(found.file).name != file:
                raise CheckpointError(f"{name} is in {Path(found.file).name}, and the index of {self.folder} has it in {file}")
        if index and (unlisted := sorted(set(checkpoint.tensors) - set(index))):
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
        """Copy what is no weight, from folders, too: tokenizer, chat templates, generation config, card, code, licence."""
        for file in sorted(self.folder.rglob("*")):
            path = file.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in path.parts)
            if file.is_file() and not hidden and not file.name.endswith(WEIGHT_FILES) and str(path) != "config.json":
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, folder / path)

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


def open_source(source: str, *, trust_remote_code: bool = False) -> Source:
    """A folder, or the name of a repository on the Hub (downloaded, or found in its cache).

    Raises ConfigError if it is neither, CorruptFileError for JSON that cannot be read.
    """
    folder = Path(source)
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise ConfigError(f"{source} is no folder, and no name of a repository on the Hub")
        folder = _from_hub(source)
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder} has no config.json: it is no transformers checkpoint")
    text = _json(path)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return Source(folder, config, text, *_weight_files(folder), trust_remote_code)


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source, ignore_patterns=["*.gguf", "*.onnx", "original/*", "*.pth"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"{source} is no folder, and was not found on the Hub ({error})") from error


def _weight_files(folder: Path) -> tuple[list[str], Path | None]:
    """The files that the host would load, in its order of preference, and their index."""
    for index, single in ((INDEX, "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin")):
        if (folder / single).exists():
            return [str(folder / single)], None
        if (folder / index).exists():
            return [str(folder / name) for name in dict.fromkeys(_weight_map(folder / index).values())], folder / index
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
