"""Other libraries to compare with, which no extra installs: what is not there is a line in the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .timing import first_line

# Module -> how to install it. llama.cpp is compiled for the machine's own instructions, which takes ten minutes or more.
INSTALL = {
    "torchao": "pip install torchao",
    "llama_cpp": "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python",
}


@dataclass(frozen=True)
class TorchAO:
    """A config of torchao.quantization by name, with options. dtype: of the model, if not that of the comparison."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    compiled: bool = False


# On a CPU only int8 weights in a compiled bfloat16 model are multiplied as they are; in float32, and of float8, whole weights
# are dequantized first. (With inductor's `freezing` they would be so once, at the start: dense weights again, not 8 bits.)
TORCHAO = {
    "torchao int8 weight-only": TorchAO("Int8WeightOnlyConfig"),
    "torchao int8 weight-only, bfloat16, compiled": TorchAO("Int8WeightOnlyConfig", {}, "bfloat16", True),
    "torchao int8 dynamic": TorchAO("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8 weight-only": TorchAO("Float8WeightOnlyConfig"),
    "torchao float8 weight-only, bfloat16, compiled": TorchAO("Float8WeightOnlyConfig", {}, "bfloat16", True),
    "torchao float8 dynamic": TorchAO("Float8DynamicActivationFloat8WeightConfig"),
}


def why_not(error: ImportError) -> str:
    """For a table: that a peer is not installed, with how to do it, or what else it says."""
    if isinstance(error, ModuleNotFoundError) and error.name in INSTALL:
        return f"not installed: {INSTALL[error.name]}"
    return first_line(error)


def quantize(model: nn.Module, name: str) -> None:
    """All Linears but `lm_head`, which the FP8 checkpoints leave dense, too."""
    from torchao import quantization

    config = getattr(quantization, TORCHAO[name].config)(**TORCHAO[name].options)
    quantization.quantize_(model, config, lambda module, path: isinstance(module, nn.Linear) and "lm_head" not in path)
