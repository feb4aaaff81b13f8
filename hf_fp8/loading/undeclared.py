"""Refuses quantized weights that the config does not declare: their codes (8-bit numbers) would be loaded as values."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform

from ..checkpoint.dialects.registry import READ
from ..checkpoint.reader import TORCH_DTYPES, Checkpoint
from ..checkpoint.scan import companions, module_named
from ..errors import FP8Error, MismatchError
from ..formats.storage import WEIGHT, WEIGHT_SCALE
from .key_map import KeyMap


def refuse_undeclared(
    model: PreTrainedModel, files: Sequence[str], conversions: Sequence[WeightTransform], method: str | None
) -> None:
    """Raise MismatchError for files with FP8 or int8 weights whose scales would not be loaded into `model`.

    conversions: those of the loader. method: the `quant_method` with which transformers loads, None without one. For files
    that cannot be read, the error is left to transformers.
    """
    try:
        checkpoint = Checkpoint(files)
    except FP8Error:
        return
    scales: dict[str, str] = {}
    for key, info in checkpoint.tensors.items():
        is_code = info.dtype == "I8" or info.dtype.startswith("F8_")
        name = module_named(key, info.dtype, len(info.shape)) if is_code else None
        scale = None if name is None else companions(name, key, checkpoint, strict=False).get(WEIGHT_SCALE)
        if scale is not None:
            scales[key] = scale
    if not scales:
        return
    state = model.state_dict()
    keymap = KeyMap({name: tuple(tensor.shape) for name, tensor in state.items()}, model.base_model_prefix, conversions)
    modules = {name for name, _ in model.named_modules()}
    lost = {}
    for key, scale in scales.items():
        (target, pattern), (place, by) = keymap.resolve(key), keymap.resolve(scale)
        held = state.get(target)
        if held is None and target.removesuffix(f".{WEIGHT}") not in modules:
            continue  # a layer that this class of model does not have
        has_place = by is not None or place in state
        # The model may have a parameter for the scale, but none for codes of this dtype.
        is_code = pattern is not None or (held is not None and held.dtype == TORCH_DTYPES[checkpoint.tensors[key].dtype])
        if not (has_place and is_code):
            lost[key] = scale
    if lost:
        key, scale = next(iter(lost.items()))
        kind = "int8" if checkpoint.tensors[key].dtype == "I8" else "FP8"
        said = "config.json has no `quantization_config`" if method is None else f"they are loaded as {method!r}"
        raise MismatchError(
            f"{len(lost)} weights of the files, such as {key}, are {kind} codes with scales ({scale}), but {said}: the scales "
            f"would be dropped or misread, and {type(model).__name__} would use codes as values. hf_fp8 reads FP8 that "
            f"config.json describes (in one of the formats {READ}; docs/formats.md): use such a checkpoint, or add a "
            "`quantization_config` if you know how this one was made"
        )
