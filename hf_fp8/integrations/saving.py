"""Checks and config updates before saving. "The host" is transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationStatus
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import logging

from ..checkpoint.config_groups import classes_of
from ..checkpoint.dialects.registry import CONFIG_FILES, config_beside
from ..checkpoint.quantization_spec import QuantizationSpec
from ..checkpoint.reader import Checkpoint
from ..checkpoint.stored_weight import HOST_ROLES
from ..errors import CalibrationError, FP8Error, UnsupportedError
from ..formats.storage import WEIGHT
from ..loading.extra_tensors import any_number
from ..loading.layout import Layout
from ..loading.ops import as_read, is_widened, packed_again, unchanged
from ..loading.serving import describe, torn
from ..nn.base import holds_codes
from ..nn.conv import QuantizedConv1x1
from ..nn.linear import QuantizedLinear
from ..nn.swap import submodule
from .config import FP8Config

logger = logging.get_logger(__name__)
# The attribute of a dequantized model that holds the dtypes of the files: parameter -> dtype.
FILE_DTYPES = "_hf_fp8_file_dtypes"


def fit_config(model: nn.Module, config: FP8Config, layout: Layout, carried: Iterable[str] = ()) -> None:
    """Add Linears that are now dense (a new head, a layer that was replaced) to `ignore`, and drop groups without weights.

    carried: keys of the files that are written back although the model has no place for them.
    """
    found, dense = set[str](), _resized(model, layout)
    restored = {name.removesuffix(f".{WEIGHT}") for p in layout.dense.values() for name in (p.name, *p.others)}
    for name, module in model.named_modules():
        group = config.spec.group_of((name,), classes_of(type(module))) if isinstance(module, nn.Linear) else None
        quantized = isinstance(module, QuantizedLinear) or name in restored or hasattr(module, "quantization_scheme")
        if group is not None and not quantized and name not in dense:
            dense.append(name)
    carried = set(carried)
    for weight in [*layout.scan.weights, *layout.scan.host]:
        if weight.module not in dense if weight.target else weight.keys[weight.primary] in carried:
            found.add(weight.group.name)
    gone = {group.name for group in config.spec.groups if group.parsed.weights is not None} - found
    if dense or gone:
        config.spec = config.spec.ignoring(dense, without=gone)


def _resized(model: nn.Module, layout: Layout) -> list[str]:
    """The modules whose dequantized weight was resized since loading (new tokens): they stay dense permanently."""
    found = []
    for name, parameter in list(layout.dense.items()):
        weight = parameter.weights[0] if parameter.weights else None
        if submodule(model, name.rpartition(".")[0]) is None:
            continue  # the layer was removed
        held = model.get_parameter(name)
        if weight is not None and weight.pattern is None and weight.shapes.get(WEIGHT, held.shape) != held.shape:
            del layout.dense[name]
            found.append(weight.module)
    return found


def modules_of_host(layout: Layout) -> dict[str, list[str]]:
    """Group that the host runs -> names of the modules whose weights the files hold in its format. (The group's own patterns
    may match other modules, and matching them may take extremely long.)"""
    found: dict[str, list[str]] = {}
    for weight in layout.scan.host:
        if weight.target and weight.pattern is None:
            found.setdefault(weight.group.name, []).append(weight.module)
    return found


def leave_experts(model: nn.Module, config: FP8Config, layout: Layout) -> bool:
    """Whether experts that were in FP8 are dense now (adapters were merged into them so); then adds them to `ignore`.

    Raises UnsupportedError if only some of them are: the files hold all experts of a model in one form.
    """
    there = {name: module for name in layout.experts if (module := submodule(model, name)) is not None}
    gone = [name for name, module in there.items() if not holds_codes(module)]
    if not gone:
        return False
    if len(gone) < len(there) or layout.dense:
        raise UnsupportedError(
            f"{gone[0]} is dense now, and other experts are in FP8: they cannot be saved together. Merge adapters into all "
            "of them in the same way (hf_fp8.merging), or call model.dequantize() first to save a dense model"
        )
    targets = {stack.target for plan in layout.experts.values() for stack in plan.stacks}
    weights = [weight for weight in layout.scan.weights if weight.target in targets]
    config.spec = config.spec.ignoring([*gone, *sorted({f"re:{any_number(weight.name)}" for weight in weights})])
    layout.experts.clear()
    layout.scan.weights = [weight for weight in layout.scan.weights if weight.target not in targets]
    return True


def is_dense_now(model: nn.Module, layout: Layout) -> bool:
    """Whether the model has no weight left that is written in FP8: all quantized layers have been replaced.

    Not asked of a pipeline's stage, which may have only layers that were never quantized.
    """
    return getattr(model, "_pp_stage", None) is None and not layout.dense and not holds_codes(model)


def refuse_unwritable(model: nn.Module) -> None:
    """Raise for layers that other libraries would misread: CalibrationError for input scales that are not measured yet (NaN),
    UnsupportedError for convolutions, which no config group can describe, StaleError for codes of a weight that was changed."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.refuse_stale(name)
        if isinstance(module, QuantizedConv1x1):
            raise UnsupportedError(
                f"{name} is a convolution in FP8, which the compressed-tensors format cannot describe: save with "
                "hf_fp8.save_quantized, or quantize without conv1x1"
            )
    waiting = [name for name, module in model.named_modules() if getattr(module, "needs_calibration", False)]
    if waiting:
        raise CalibrationError(
            f"{len(waiting)} layers (for example {waiting[0]}) have no input scale yet, and cannot be saved: run data through "
            "the model under `with hf_fp8.calibrate(model):` first"
        )


def warn_of_readers(model: nn.Module, config: FP8Config) -> None:
    """Log a warning if transformers or serving engines cannot load the model that is about to be saved."""
    conversions = getattr(model, "_weight_conversions", None) or ()
    merged = any(isinstance(c, WeightConverter) and any("*" in source for source in c.source_patterns) for c in conversions)
    if merged and (config.backend == "int8" or any(hasattr(module, "quantization_scheme") for module in model.modules())):
        # Up to 5.24, transformers assumes that stacked experts are quantized as soon as any module is, whatever `ignore` says.
        logger.warning(
            "hf_fp8: the Linears of this MoE model are saved quantized, and its experts dense. transformers (at least up to "
            "5.24) cannot load that, as it looks for quantized experts. To load it there, save it in FP8 "
            "(FP8Config(backend='weight_only')), or dense (FP8Config(dequantize=True))."
        )
    schemes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            group = config.spec.group_of((name,), classes_of(type(module)))
            scheme = None if group is None else group.scheme
            schemes[name] = None if group is None else group.name if scheme is None else scheme.describe()
    if found := torn(schemes):  # layers that serving engines run as one
        logger.warning(f"hf_fp8: {describe(found)}")


def restore_dtypes(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    beyond: torch.dtype | None = None,
) -> None:
    """Cast tensors of `state` that the model holds in a wider dtype back to that of the files, if it loses nothing.

    dtypes: name -> dtype in the files. beyond: cast only tensors wider than this one, which is the dtype of a newly quantized
    model, or the one that a user requested. Names that share a tensor (tied weights) still do. Offloaded tensors are read.
    """
    names = [name for name, dtype in dtypes.items() if name in state and is_widened(state[name].dtype, dtype, beyond)]
    if not names:
        return
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    sharing: dict[int, list[str]] = {}
    for name in state.keys() & held.keys():
        sharing.setdefault(id(held[name]), []).append(name)
    for name in names:
        tensor = load_offloaded_parameter(model, name) if state[name].is_meta else state[name]
        restored = as_read(tensor, dtypes[name])
        if restored is not tensor:
            state.update(dict.fromkeys(sharing.get(id(held.get(name)), [name]), restored))


def recompress(model: nn.Module, state: dict[str, torch.Tensor], layout: Layout) -> None:
    """Compress weights of the host's modules again in `state`: the host decompresses them at the first forward."""
    stored = {weight.module: weight for weight in layout.scan.host if weight.target and weight.pattern is None}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or getattr(module, "quantization_status", None) != QuantizationStatus.DECOMPRESSED:
            continue
        own = {key: state.pop(f"{name}.{key}") for key in dict(module.state_dict()) if f"{name}.{key}" in state}
        dense = own[WEIGHT]
        held = unchanged(stored[name], dense, dense.dtype, layout.source) if name in stored else None
        if held is None:
            packed = packed_again(f"{name}.weight", own, scheme, scheme.format, dense.dtype)
        else:
            packed = {key: tensor for key, tensor in own.items() if key not in HOST_ROLES} | held
        state.update({f"{name}.{key}": value for key, value in packed.items()})


def write_file_beside(folder: Path, spec: QuantizationSpec) -> None:
    """Write the other file that the dialect of a checkpoint has for its config, if it was read."""
    if (beside := spec.file_beside()) is not None:
        name, content = beside
        (folder / name).write_text(json.dumps(content, indent=4), encoding="utf-8")  # as ModelOpt formats it


def drop_stale_file(folder: Path, spec: QuantizationSpec | None) -> None:
    """Remove a file that describes the quantization of what was in `folder` before a model was saved to it.

    spec: that of the model that was saved, None for any other than hf_fp8's.
    """
    beside = None if spec is None else spec.file_beside()
    for name in CONFIG_FILES:
        path = folder / name
        if (beside is None or beside[0] != name) and path.is_file():
            with suppress(FP8Error):
                if config_beside(folder) is None:
                    continue  # about the KV cache alone
            path.unlink(missing_ok=True)  # another process of a sharded model may have done it


def reopen(folder: Path, checkpoints: Iterable[Checkpoint | None]) -> list[str]:
    """Make `checkpoints` read the files that were just saved to `folder`; returns these, none if they cannot be read."""
    try:
        new = Checkpoint([str(file) for file in sorted(folder.glob("model*.safetensors"))])
    except (FP8Error, OSError) as error:
        logger.warning(f"hf_fp8: what was saved to {folder} cannot be read again: {error}")
        return []
    for checkpoint in checkpoints:
        if checkpoint is not None:
            checkpoint.become(new)
    return new.files
