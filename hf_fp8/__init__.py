"""FP8 for Hugging Face models, native to the compressed-tensors format.

``import hf_fp8``, then plain ``from_pretrained``: checkpoints with FP8 groups load, run and save.
"""

from . import kernels
from .config import FP8Config
from .convert import dequantize_model
from .errors import (
    CheckpointError,
    ConfigError,
    CorruptFileError,
    FP8Error,
    InputError,
    KernelError,
    MismatchError,
    MissingTensorError,
    ScaleError,
    UnsupportedError,
    UnusedTensorError,
)
from .experts import FP8Experts
from .explain import explain
from .functional import scaled_linear
from .grouped import scaled_grouped_linear
from .linear import FP8Linear
from .quantizer import FP8HfQuantizer
from .registration import register, unregister
from .scheme import (
    FP8_BLOCK,
    FP8_DYNAMIC,
    FP8_STATIC,
    FP8_WEIGHT_ONLY,
    Granularity,
    Scheme,
    TensorScheme,
)
from .version import __version__

__all__ = [
    "FP8_BLOCK",
    "FP8_DYNAMIC",
    "FP8_STATIC",
    "FP8_WEIGHT_ONLY",
    "CheckpointError",
    "ConfigError",
    "CorruptFileError",
    "FP8Config",
    "FP8Error",
    "FP8Experts",
    "FP8HfQuantizer",
    "FP8Linear",
    "Granularity",
    "InputError",
    "KernelError",
    "MismatchError",
    "MissingTensorError",
    "ScaleError",
    "Scheme",
    "TensorScheme",
    "UnsupportedError",
    "UnusedTensorError",
    "__version__",
    "dequantize_model",
    "explain",
    "kernels",
    "register",
    "scaled_grouped_linear",
    "scaled_linear",
    "unregister",
]

register()
