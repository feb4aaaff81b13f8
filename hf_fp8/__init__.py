"""FP8 for Hugging Face models, in the compressed-tensors format.

After ``import hf_fp8``, plain ``from_pretrained`` loads checkpoints with FP8 groups; they run and save in FP8.
"""

from typing import Any

from . import errors, kernels, recipes
from .errors import FP8Error
from .evaluation import perplexity, quality
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
    W4A8,
    W4A16,
    W4A16_ASYM,
    W4AFP8,
    W8A16,
    Granularity,
    Scheme,
    TensorScheme,
)
from .integrations import old_names
from .integrations.config import FP8Config
from .integrations.peft.merge_policy import merging
from .integrations.register import register, unregister
from .nn.conv import QuantizedConv1x1
from .nn.experts import QuantizedExperts
from .nn.linear import QuantizedLinear
from .nn.packed_linear import PackedLinear
from .nn.swap import dequantize_model
from .quantization.calibration import apply_scales, calibrate
from .quantization.model import quantize_model, requantize_model
from .quantization.portable import load_quantized, save_quantized
from .quantization.qat import convert_qat, prepare_qat
from .quantization.single_file import load_fp8_state_dict
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
    "W4A8",
    "W4A16",
    "W4A16_ASYM",
    "W4AFP8",
    "W8A16",
    "FP8Config",
    "FP8Error",
    "Granularity",
    "PackedLinear",
    "QuantizedConv1x1",
    "QuantizedExperts",
    "QuantizedLinear",
    "Scheme",
    "TensorScheme",
    "__version__",
    "apply_scales",
    "calibrate",
    "convert_qat",
    "dequantize_model",
    "errors",
    "explain",
    "kernels",
    "load_fp8_state_dict",
    "load_quantized",
    "merging",
    "perplexity",
    "prepare_qat",
    "quality",
    "quantize_model",
    "recipes",
    "register",
    "requantize_model",
    "save_quantized",
    "unregister",
]

register()
old_names.install()


def __getattr__(name: str) -> Any:
    """Names of earlier versions (`old_names`)."""
    return old_names.found(name)
