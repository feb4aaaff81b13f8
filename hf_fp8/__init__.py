"""FP8 for Hugging Face models, native to the compressed-tensors format.

``import hf_fp8``, then plain ``from_pretrained``: checkpoints with FP8 groups load, run and save.
"""

from . import kernels
from .calibration import apply_scales, calibrate
from .config import FP8Config
from .convert import dequantize_model
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
from .experts import FP8Experts
from .explain import explain
from .fidelity import QualityReport, perplexity, quality
from .functional import scaled_linear
from .grouped import scaled_grouped_linear
from .in_place import quantize_model, requantize_model
from .linear import FP8Linear
from .merging import MergedLayer, MergeReport, merging
from .observers import Amax, Mse, Observer, Percentile
from .pointwise import FP8PointwiseConv
from .portable import load_quantized, save_quantized
from .quantizer import FP8HfQuantizer
from .recipes import FP8GemmOptions, enable_fp8_gemm, quantize_
from .registration import register, unregister
from .scheme import (
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
