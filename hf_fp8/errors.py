"""The exceptions of hf_fp8. Every error says what was found, what is supported, and what to do."""

from collections.abc import Mapping, Sequence


class FP8Error(Exception):
    """Base class of every error that hf_fp8 raises on purpose."""


class CheckpointError(FP8Error, ValueError):
    """The files or the config of a checkpoint are wrong, or contradict each other."""


class ConfigError(CheckpointError):
    """A key of `quantization_config` has a value that is unknown or makes no sense."""


class MissingTensorError(CheckpointError):
    """A tensor that the config calls for is not in the files."""


class UnusedTensorError(CheckpointError):
    """A scale in the files belongs to no quantized weight."""


class ScaleError(CheckpointError):
    """A scale has the wrong shape or dtype, or a value that is not finite and positive."""


class MismatchError(CheckpointError):
    """A weight is not stored as the config says: it is dense, or in another 8-bit type."""


class CorruptFileError(CheckpointError):
    """A file cannot be read: truncated, or not what its name says."""


class UnsupportedError(FP8Error, NotImplementedError):
    """Valid, but hf_fp8 (or this device) cannot run it correctly."""


class KernelError(FP8Error, RuntimeError):
    """No kernel can run a layer, or a kernel was forced that cannot run it."""


class CalibrationError(FP8Error, RuntimeError):
    """A static scale has not been measured yet, or could not be."""


class StaleError(FP8Error, RuntimeError):
    """The float weight that a layer kept was changed after its codes (stored 8-bit values) were computed from it."""


class StateDictError(FP8Error, RuntimeError):
    """A state dict has codes of another kind than the layer, or values instead of codes."""


class InputError(FP8Error, TypeError):
    """A layer was called with an input of a dtype or shape that it does not support."""


def by_reason(reasons: Mapping[str, str]) -> str:
    """Text for a message: each reason with its count and one name. reasons: name -> reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{len(found)} such as {found[0] or 'itself'} ({reason})" for reason, found in names.items())


def reasons_of(reasons: Mapping[str, str], most: int = 5) -> str:
    """Text for a message: the first names, each with its reason. reasons: name -> reason; the name may be empty."""
    found = [f"{name}: {reason}" if name else reason for name, reason in reasons.items()]
    return "; ".join(found[:most])


def first(names: Sequence[str], most: int = 5) -> str:
    """Text for a message: the first names, and how many more there are ("a, b and 3 more")."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
