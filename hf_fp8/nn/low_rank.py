"""LoRA on stacks of experts: rows times the two small matrices of the expert that they were routed to."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.integrations import moe

from ..kernels import Groups
from ..kernels import torch_grouped as grouped_mm

# Elements of a row that a grouped matmul wants to be a multiple of: 16 bytes of 16-bit numbers.
ALIGNED = 8


class LowRank(NamedTuple):
    """What is added to a stack (E, N, K): ``scaling * b @ a``. a: (E, r, K), b: (E, N, r), rows as the stack's."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def product(x: torch.Tensor, factors: LowRank, groups: Groups) -> torch.Tensor:
    """(S, N) in the dtype of x (R, K): for each output of `groups` its row times its expert's a and b; 0 where there is none.

    Gradients flow to x, a and b. What is kept for them is the rows, sorted, and (S, r).
    """
    n_experts, rank, _ = factors.a.shape
    groups = groups if groups.ends is not None else grouped_mm.sort(groups, n_experts)
    assert groups.ends is not None
    a, b = factors.a.to(x.dtype), (factors.b * factors.scaling).to(x.dtype)
    if fill := -rank % ALIGNED:
        a, b = F.pad(a, (0, 0, 0, fill)), F.pad(b, (0, fill))
    a, b = a.contiguous(), b.contiguous()  # PEFT's are views that grouped matmuls refuse
    # Behind the last expert's rows nothing would be written, nor in the backward pass: it takes those of nobody, too.
    ends = groups.ends.clone()
    ends[-1:] = groups.experts.shape[0]
    out = _grouped_linear(_grouped_linear(groups.gather(x), a, ends), b, ends)
    out = torch.where((groups.experts < n_experts).unsqueeze(1), out, 0.0)
    return out if groups.slots is None else torch.zeros_like(out).index_copy(0, groups.slots, out)


def _grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The host's; one expert after the other in float64, for which torch has no grouped matmul."""
    if x.dtype == torch.float64:
        out: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight.transpose(1, 2), ends)
    else:
        out = moe._grouped_linear(x, weight, ends)
    return out
