"""Original float weights that are kept together with their codes, and the check whether they were changed since."""

from __future__ import annotations

import torch

from ..errors import StaleError


def kept(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as a plain tensor in the same memory, without gradient, with a version counter even under inference mode."""
    if weight.requires_grad or isinstance(weight, torch.nn.Parameter):
        weight = weight.detach()
    if weight.is_inference():
        with torch.inference_mode(False):
            place = weight.storage_offset(), weight.shape, weight.stride()
            weight = torch.empty(0, dtype=weight.dtype, device=weight.device).set_(weight.untyped_storage(), *place)
    return _static(weight)


def as_it_is(original: torch.Tensor) -> torch.Tensor:
    """A snapshot to compare with `original` later: a tensor in the same memory with a frozen version counter.

    It is a tensor instead of a number, as compiled code treats numbers as constants and would be recompiled for each. It
    holds the same memory, so that the allocator cannot give the memory to another tensor.
    """
    with torch.inference_mode(False):
        snapshot = original.data
    torch._C._autograd._unsafe_set_version_counter((snapshot,), (original._version,))
    return _static(snapshot)


def _static(tensor: torch.Tensor) -> torch.Tensor:
    """`torch._dynamo.mark_static_address`, which is slow to import; without it CUDA graphs copy the tensor at each replay."""
    tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return tensor


def is_changed(original: torch.Tensor, snapshot: torch.Tensor | None) -> bool:
    """Whether `original` was written to after `snapshot`, or has other memory now (`.data = ...`); True if that is None.

    Writes that bypass the version counter (through `.data`, numpy or an external kernel) are not detected, as in torch.
    """
    if snapshot is None or original._version != snapshot._version:
        return True
    return original.data_ptr() != snapshot.data_ptr()


def refuse_changed(original: torch.Tensor, snapshot: torch.Tensor | None, layer: str) -> None:
    """Raise StaleError if the codes of `layer` were not computed from the present values of its original."""
    if is_changed(original, snapshot):
        how = "replaced" if snapshot is None else "changed"
        raise StaleError(
            f"the float weight of {layer} (`original`, {'x'.join(map(str, original.shape))} in {original.dtype}) was {how} "
            "after its codes were computed, so they are out of date: call hf_fp8.requantize_model(model) to compute them "
            "again, or hf_fp8.dequantize_model(model) to continue with the float weights"
        )
