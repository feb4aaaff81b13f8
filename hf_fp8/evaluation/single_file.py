"""`hf-fp8 inspect` and `verify` of a single file with FP8 weights as ComfyUI stores them; no model is known."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..checkpoint.dialects import comfyui
from ..checkpoint.reader import Checkpoint
from ..checkpoint.stored_weight import wrong_values
from ..checkpoint.writer import nbytes
from ..errors import CheckpointError, FP8Error, MissingTensorError, ScaleError, UnusedTensorError
from ..formats.storage import WEIGHT
from ..quantization.files import total_bytes
from .inspection import GroupFound, Inspection, sizes_of
from .verify import refuse_not_finite

# Names of embeddings, which may be cast to FP8 without a scale in a file where Linears have scales.
_EMBEDDING = re.compile(r"embed|shared|wte")


def inspect_file(file: str) -> Inspection:
    """Inspect a .safetensors file by its header. Raises CheckpointError only if that cannot be read."""
    checkpoint = Checkpoint([file])
    found = Inspection(file, "state dict", [file], total_bytes(checkpoint), sizes_of(checkpoint))
    try:
        described = _described(checkpoint)
    except FP8Error as error:
        found.error = str(error)
        return found
    by_scheme: dict[str, list[comfyui.Layer]] = {}
    for layer in described.layers.values():
        by_scheme.setdefault(layer.scheme.describe(), []).append(layer)
    for number, (scheme, layers) in enumerate(by_scheme.items()):
        names = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name) for layer in layers)
        size = sum(nbytes(checkpoint.tensors[key]) for layer in layers for key in layer.keys.values())
        found.groups.append(GroupFound(f"group_{number}", scheme, list(names), len(layers), size))
    forms = {
        comfyui.SCALED_FP8: "FP8 in ComfyUI's scaled_fp8 form",
        comfyui.COMFY_QUANT: "FP8 in ComfyUI's comfy_quant form",
        comfyui.CAST: "values that were cast to FP8, without scales",
    }
    found.summary = (
        f"{forms[described.form]}: hf_fp8.load_fp8_state_dict(model, file) loads it"
        if described.layers
        else "no FP8 weights, and no scales"
    )
    return found


def verify_file(file: str, tick: Callable[[int], Any] = lambda count: None) -> list[str]:
    """Check what is known without a model: names, dtypes, shapes and values of scales, and codes for NaN.

    tick: called with the number of bytes that were checked. Returns a line for each check that passed; raises a
    CheckpointError, naming the tensor, for the first that fails.
    """
    checkpoint = Checkpoint([file])
    described = _described(checkpoint)
    if not described.layers:
        raise CheckpointError(f"{file} has no FP8 weights. It is a file: of a checkpoint with a config.json pass the folder")
    codes = {layer.keys[WEIGHT] for layer in described.layers.values()}
    scales = {key for layer in described.layers.values() for key in layer.keys.values()} - codes
    for key, info in checkpoint.tensors.items():
        if key in scales and (wrong := wrong_values(checkpoint.load(key))) is not None:
            raise ScaleError(f"{key} {wrong}: the dequantized weights would be wrong")
        if key in codes:
            refuse_not_finite(key, checkpoint.load(key))
        tick(nbytes(info))
    kinds = Counter(layer.scheme.describe() for layer in described.layers.values())
    return [
        f"1 file, {len(checkpoint.tensors):,} tensors, {total_bytes(checkpoint) / 1e9:.2f} GB",
        *(f"{count:,} FP8 weights: {kind}" for kind, count in kinds.items()),
        "scales have right shapes, dtypes, values; none without its weight",
        "no NaN among the codes",
    ]


def _described(checkpoint: Checkpoint) -> comfyui.Description:
    """`comfyui.describe`, and the check that all scales are used."""
    (file,) = checkpoint.files
    described = comfyui.describe(checkpoint.metadata(file), checkpoint.tensors, checkpoint.load)
    bare = [layer for layer in described.layers.values() if described.form == comfyui.SCALED_FP8 and len(layer.keys) == 1]
    if lacking := [layer.name for layer in bare if not _EMBEDDING.search(layer.name)]:
        raise MissingTensorError(
            f"{lacking[0]}.scale_weight is not in the file, but {lacking[0]}.{WEIGHT} is in FP8, and the file is marked as one "
            f"with scales ({comfyui.MARKER})"
        )
    used = {key for layer in described.layers.values() for key in layer.keys.values()} | described.markers
    unused = [key for key in checkpoint.tensors if comfyui.is_beside(key) and key not in used]
    if unused:
        raise UnusedTensorError(
            f"{unused[0]} belongs to no FP8 weight that the file describes (form {described.form!r}): its weight, the marker "
            f"{comfyui.MARKER!r} or the metadata is missing, or it is of a format that hf_fp8 does not read here. "
            "Of a checkpoint with a config.json pass the folder"
        )
    return described
