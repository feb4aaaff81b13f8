"""FP8 for Hugging Face models, native to the compressed-tensors format.

``import hf_fp8``, then plain ``from_pretrained``: checkpoints with FP8 groups load, run and save.
"""

from typing import Any

from . import kernels
from .errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    CorruptFileError,
    FP8Error,
    InputError,
    KernelError,
    MismatchError,
    MissingTensorError,
    ScaleError,
    StaleError,
    UnsupportedError,
    UnusedTensorError,
)
from .evaluation import QualityReport, perplexity, quality
from .evaluation.explain import explain
from .formats.scheme import (
    FP8_BLOCK,
    FP8_DYNAMIC,
    FP8_STATIC,
    FP8_TENSOR,
    FP8_WEIGHT_ONLY,
    INT8_DYNAMIC,
    INT8_WEIGHT_ONLY,
    SCHEMES,
    Granularity,
    Scheme,
    TensorScheme,
)
from .integrations import old_names
from .integrations.config import FP8Config
from .integrations.peft.merge_policy import MergedLayer, MergeReport, merging
from .integrations.quantizer import FP8HfQuantizer
from .integrations.register import register, unregister
from .nn.conv import FP8PointwiseConv
from .nn.experts import FP8Experts
from .nn.functional import scaled_linear
from .nn.grouped import scaled_grouped_linear
from .nn.linear import FP8Linear
from .nn.swap import dequantize_model
from .quantization.calibration import apply_scales, calibrate
from .quantization.model import quantize_model, requantize_model
from .quantization.observers import Amax, Mse, Observer, Percentile
from .quantization.portable import load_quantized, save_quantized
from .recipes import FP8GemmOptions, enable_fp8_gemm, quantize_
from .version import __version__

__all__ = [
    "FP8_BLOCK",
    "FP8_DYNAMIC",
    "FP8_STATIC",
    "FP8_TENSOR",
    "FP8_WEIGHT_ONLY",
    "INT8_DYNAMIC",
    "INT8_WEIGHT_ONLY",
    "SCHEMES",
    "Amax",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "CorruptFileError",
    "FP8Config",
    "FP8Error",
    "FP8Experts",
    "FP8GemmOptions",
    "FP8HfQuantizer",
    "FP8Linear",
    "FP8PointwiseConv",
    "Granularity",
    "InputError",
    "KernelError",
    "MergeReport",
    "MergedLayer",
    "MismatchError",
    "MissingTensorError",
    "Mse",
    "Observer",
    "Percentile",
    "QualityReport",
    "ScaleError",
    "Scheme",
    "StaleError",
    "TensorScheme",
    "UnsupportedError",
    "UnusedTensorError",
    "__version__",
    "apply_scales",
    "calibrate",
    "dequantize_model",
    "enable_fp8_gemm",
    "explain",
    "kernels",
    "load_quantized",
    "merging",
    "perplexity",
    "quality",
    "quantize_",
    "quantize_model",
    "register",
    "requantize_model",
    "save_quantized",
    "scaled_grouped_linear",
    "scaled_linear",
    "unregister",
]

register()
old_names.install()


def __getattr__(name: str) -> Any:
    """Modules by the names of earlier versions."""
    if (module := old_names.module_named(name)) is not None:
        return module
    raise AttributeError(f"module 'hf_fp8' has no attribute {name!r}")
