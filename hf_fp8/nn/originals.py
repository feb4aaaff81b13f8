"""Float weights that are kept beside the codes made of them: whether they have been changed since."""

from __future__ import annotations

import torch

from ..errors import StaleError


def kept(weight: torch.Tensor) -> torch.Tensor:
    """`weight`, or a tensor in its memory: no parameter, and one that counts its changes, though made under inference mode."""
    if weight.requires_grad or isinstance(weight, torch.nn.Parameter):
        weight = weight.detach()
    if weight.is_inference():
        with torch.inference_mode(False):
            place = weight.storage_offset(), weight.shape, weight.stride()
            weight = torch.empty(0, dtype=weight.dtype, device=weight.device).set_(weight.untyped_storage(), *place)
    return _static(weight)


def as_it_is(original: torch.Tensor) -> torch.Tensor:
    """What codes were made of, to be compared with `original` later: its memory, with a count of changes that stands still.

    A tensor and no number, since compiled code has numbers for constants, and would be compiled anew for each. It is in the
    same memory, so that this is not given to another tensor meanwhile.
    """
    with torch.inference_mode(False):
        snapshot = original.data
    torch._C._autograd._unsafe_set_version_counter((snapshot,), (original._version,))
    return _static(snapshot)


def _static(tensor: torch.Tensor) -> torch.Tensor:
    """As `torch._dynamo.mark_static_address`, whose import takes long: CUDA graphs would copy it in each replay."""
    tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return tensor


def is_changed(original: torch.Tensor, snapshot: torch.Tensor | None) -> bool:
    """Whether `original` was written to since `snapshot` (None: it never was it), or is in other memory now (`.data = ...`).

    What this does not see, like torch itself, are values written behind the version counter: through `.data`, numpy or a
    foreign kernel.
    """
    if snapshot is None or original._version != snapshot._version:
        return True
    return original.data_ptr() != snapshot.data_ptr()


def refuse_changed(original: torch.Tensor, snapshot: torch.Tensor | None, layer: str) -> None:
    """Raise StaleError for a float weight of `layer` that is not what its codes were made of."""
    if is_changed(original, snapshot):
        how = "replaced" if snapshot is None else "changed"
        raise StaleError(
            f"the float weight of {layer} (`original`, {'x'.join(map(str, original.shape))} in {original.dtype}) was {how} "
            "after its codes were made, and they are those of the weight before: hf_fp8.requantize_model(model) makes them "
            "anew, hf_fp8.dequantize_model(model) goes on with the float weights"
        )
