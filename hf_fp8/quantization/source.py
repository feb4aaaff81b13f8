"""Source: a checkpoint folder, local or from the Hub, with its files, its config, and the structure of its model."""

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
from transformers.modeling_utils import local_torch_dtype

from ..checkpoint import hub
from ..checkpoint.dialects.registry import CONFIG_FILES, check_beside, config_beside, dialect_of
from ..checkpoint.files import LOCAL, FileSystem, Stamp, changed, read_json, regular
from ..checkpoint.quantization_spec import CONFIG_KEYS
from ..checkpoint.reader import DENSE_DTYPES, TORCH_DTYPES, Checkpoint
from ..checkpoint.weight_files import WeightFiles, find_weight_files
from ..checkpoint.writer import WEIGHT_FILES
from ..errors import CheckpointError, ConfigError, FP8Error, MissingTensorError, UnsupportedError
from ..integrations.locks import while_changing

# Files that describe the weights of the source, and so are not copied to the written checkpoint.
_ABOUT_WEIGHTS = ("config.json", *CONFIG_FILES)
# Files of a repository that are not downloaded: weights in other formats.
_NOT_READ = ("*.gguf", "*.onnx", "original/*", "*.pth")


@dataclass
class Source:
    """A checkpoint folder.

    config, text: `config.json`, parsed by transformers and as JSON. weights: the files with the weights. rest: other files that
    are copied. stamps: of all these files, taken before they were read. fs: where they are.
    """

    folder: Path
    config: PreTrainedConfig
    text: dict[str, Any]
    weights: WeightFiles
    rest: list[Path]
    stamps: dict[Path, Stamp]
    trust_remote_code: bool = False
    fs: FileSystem = LOCAL

    @property
    def files(self) -> list[str]:
        """The files with the weights."""
        return [str(file) for file in self.weights.files]

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization config in `config.json`, or else in another file that describes it; None if there is none."""
        for part in (self.text, self.text.get("text_config")):
            for key in CONFIG_KEYS:
                found = part.get(key) if isinstance(part, dict) else None
                if found is not None and not isinstance(found, dict):
                    raise ConfigError(f"{self.folder / 'config.json'}: {key} is {reprlib.repr(found)}, not an object")
                if found:
                    self._check_beside(found)
                    return found
        return config_beside(self.folder, self.fs)

    def _check_beside(self, config: dict[str, Any]) -> None:
        """Raise ConfigError if another file contradicts the config in config.json."""
        file = dialect.file if (dialect := dialect_of(config)) is not None else None
        if file is not None and self.fs.is_there(self.folder / file.name):
            check_beside(config, read_json(self.folder / file.name, fs=self.fs))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of dense weights: from the config, otherwise, as in transformers, that of the first one in the files."""
        dtype = self.config.dtype if self.config.dtype is not None else self.config.get_text_config().dtype
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
        stored = (info.dtype for info in self.checkpoint.tensors.values() if info.dtype in DENSE_DTYPES)
        return TORCH_DTYPES[next(stored, "BF16")]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The headers of the files, read once. Raises if the index and the files contradict each other."""
        checkpoint = Checkpoint(self.files, self.fs)
        listed = self.weights.listed
        for name, file in listed.items():
            found = checkpoint.files_with(name)
            if not found:
                raise MissingTensorError(f"{name} is not in {file.name}, where the index of {self.folder} lists it")
            if str(file) not in found:
                raise CheckpointError(
                    f"{name} is in {Path(found[0]).name}, but the index of {self.folder} lists it in {file.name}"
                )
        if listed and (unlisted := sorted(set(checkpoint.tensors) - set(listed))):
            raise CheckpointError(f"{unlisted[0]} is in the files of {self.folder}, but not in their index")
        return checkpoint

    @property
    def model_class(self) -> type[PreTrainedModel] | None:
        """The transformers class that the config names; None if it names none, or one in the checkpoint's code."""
        kind = getattr(transformers, type_of(self), None)
        return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None

    def check_unchanged(self) -> None:
        """Raise CheckpointError, naming the file, if a file has changed since it was read."""
        for path, stamp in self.stamps.items():
            if not self.fs.is_there(path) or self.fs.regular(path) != stamp:
                raise changed(path)

    def structure(self) -> PreTrainedModel:
        """The model on the meta device: modules and shapes, without memory for values.

        Raises CheckpointError, naming config.json, if transformers cannot build it.
        """
        try:
            with while_changing(), torch.device("meta"), local_torch_dtype(self.dtype):
                return self._build()
        except FP8Error:
            raise
        except Exception as error:  # a config with invalid values can raise anything
            raise CheckpointError(
                f"{self.folder / 'config.json'}: transformers cannot build {type_of(self)} from it ({_said(error)})"
            ) from error

    def _build(self) -> PreTrainedModel:
        if (kind := self.model_class) is not None:
            return kind(self.config)
        of = self.text.get("auto_map") or {}  # "AutoModelFor...": "file.Class"
        auto = next((auto for auto, place in of.items() if str(place).endswith(f".{type_of(self)}")), "AutoModelForCausalLM")
        make: Any = getattr(transformers, auto) if of else AutoModel
        model: PreTrainedModel = make.from_config(self.config, trust_remote_code=self.trust_remote_code)
        return model

    def copy_rest(self, folder: Path) -> None:
        """Copy the other files, including subfolders: tokenizer, chat templates, generation config, card, code, licence."""
        for file in self.rest:
            path = folder / file.relative_to(self.folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, path)

    def write_config(self, folder: Path, quantization: dict[str, Any] | None, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` with this quantization config and dtype, without `transformers_weights`, otherwise unchanged."""
        text = {key: value for key, value in self.text.items() if key not in (*CONFIG_KEYS, "transformers_weights")}
        if isinstance(text.get("text_config"), dict):
            text["text_config"] = {key: value for key, value in text["text_config"].items() if key not in CONFIG_KEYS}
        if quantization is not None:
            text["quantization_config"] = quantization
        if dtype is not None:
            keys = [key for key in ("dtype", "torch_dtype") if key in text] or ["dtype"]
            text |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def open_source(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Open a folder, or a repository on the Hub by name (downloaded, or from the cache). revision: of the repository.

    Raises ConfigError if `source` is neither, or if transformers cannot read config.json; CorruptFileError for invalid JSON;
    and as `find_weight_files` does.
    """
    if not _is_on_hub(source, revision):
        return _open(Path(source), trust_remote_code)
    return _open(hub.download(source, revision, _NOT_READ), trust_remote_code)


def open_headers(
    source: str, *, revision: str | None = None, subfolder: str | None = None, trust_remote_code: bool = False
) -> Source:
    """As `open_source`, for a caller that reads only headers: a repository on the Hub is not downloaded, unless it is already.

    subfolder: of the folder or the repository. The headers of pickles on the Hub raise UnsupportedError: they have none.
    """
    if not _is_on_hub(source, revision):
        return _open(Path(source, subfolder or ""), trust_remote_code)
    try:
        remote = hub.HubFolder(source, revision, subfolder)
    except hub.UnreachableError:
        if (folder := hub.cached(source, revision, subfolder)) is None:
            raise
        return _open(folder, trust_remote_code)
    if trust_remote_code:
        remote.download_code()
    found = _open(remote.root, trust_remote_code, remote)
    here = remote.downloaded([*found.weights.files, *([found.weights.index] if found.weights.index else [])])
    return found if here is None else _open(here, trust_remote_code)


def _is_on_hub(source: str, revision: str | None) -> bool:
    """Whether `source` is not a folder. Raises ConfigError if it cannot be the name of a repository either."""
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"{source} is a folder here: only a repository on the Hub has a revision ({revision})")
        return False
    if folder.exists():
        raise ConfigError(f"{source} is a file: pass the folder that contains it")
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ConfigError(f"{source} is neither a folder nor the name of a repository on the Hub")
    return True


def _open(folder: Path, trust_remote_code: bool, fs: FileSystem = LOCAL) -> Source:
    path = folder / "config.json"
    if not fs.is_there(path):
        raise ConfigError(f"{folder} has no config.json: it is not a transformers checkpoint")
    if fs.is_there(folder / "adapter_config.json"):
        raise ConfigError(
            f"{folder} has an adapter_config.json: transformers loads the base model that it names, with the adapter, and not "
            "the weights here. Merge the adapter and save the model; or remove the file if the weights are the whole model"
        )
    rest = {file: regular(file) for file in _rest(folder)} if fs is LOCAL else {}  # elsewhere nothing is copied
    stamp = fs.regular(path)
    text = read_json(path, fs=fs)
    config = _config(path, fs.here(path).parent, text, trust_remote_code)
    weights = find_weight_files(folder, explicit=getattr(config, "transformers_weights", None), fs=fs)
    if weights is None:
        raise ConfigError(f"{folder} has no weights: no model.safetensors, no pytorch_model.bin, and no index of several files")
    return Source(folder, config, text, weights, list(rest), {path: stamp, **weights.stamps, **rest}, trust_remote_code, fs)


def type_of(source: Source) -> str:
    """The name of the model class in the config; the model type if there is none."""
    named = source.config.architectures
    return str((named if isinstance(named, list) and named else [source.config.model_type])[0])


def _config(path: Path, folder: Path, text: dict[str, Any], trust_remote_code: bool) -> PreTrainedConfig:
    """The config that transformers reads from `folder`. path: of the file, for messages."""
    if "_class_name" in text and "model_type" not in text:
        raise ConfigError(
            f"{path} is of diffusers (_class_name {text['_class_name']!r}), and this command takes transformers' checkpoints: "
            "quantize and load it in Python (docs/diffusion.md)"
        )
    try:
        if "configuration_files" in text and (other := get_configuration_file(text["configuration_files"])) != path.name:
            raise UnsupportedError(f"{path} refers to {other}, which transformers reads instead: replace it by that file")
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except FP8Error:
        raise
    except Exception as error:  # invalid values, or a checkpoint's own code, can raise anything
        raise ConfigError(f"{path}: transformers cannot read it ({_said(error)})") from error


def _rest(folder: Path) -> Iterator[Path]:
    """The files of a folder that do not contain or describe weights, and are not hidden."""

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
