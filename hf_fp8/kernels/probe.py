"""Hold a kernel against exact numbers on the device at hand before it is trusted there.

Scale layouts and supported types differ between devices and versions, and a kernel that takes the wrong layout
gives wrong numbers without an error.
"""

from __future__ import annotations

from functools import cache

import torch

from .. import numerics
from ..scheme import CODE_MAX, Scheme
from .kernel import Kernel

# 17 rows at least for torch._int_mm on CUDA; sizes that every kernel takes.
M, N, K = 32, 256, 384


@cache
def probe(kernel: Kernel, scheme: Scheme, device: torch.device, dtype: torch.dtype) -> str | None:
    """Run `kernel` on `device` with operands whose result is known exactly.

    Small integers with power-of-two scales that differ along every axis: any correct kernel gives the
    float64 result bit for bit. Returns None, or the reason why the kernel must not be used.
    """
    try:
        x, weight, weight_scale, input_scale, expected = exact_operands(scheme, dtype)
        on = [None if t is None else t.to(device) for t in (x, weight, weight_scale, input_scale)]
        assert on[0] is not None and on[1] is not None and on[2] is not None
        with torch.no_grad(), torch.inference_mode(False):
            found = kernel.run(on[0], on[1], on[2], on[3], None, scheme).cpu()
    except Exception as error:  # Triton's compiler and torch's kernels raise all kinds
        first_line = str(error).strip().split("\n")[0]
        return f"torch {torch.__version__} cannot run it on {device.type} with {dtype} output ({first_line[:120]})"
    if not torch.equal(found, expected):
        return f"it gave wrong numbers on {device.type} with {dtype} output, in a check against exact values"
    return None


def exact_operands(
    scheme: Scheme, dtype: torch.dtype, m: int = M, n: int = N, k: int = K
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(x, weight, weight_scale, input_scale, x @ W.T in `dtype`) on the CPU, exact in any order of summation."""
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randint(-1, 2, (m, k), generator=generator).float()
    w = torch.randint(-1, 2, (n, k), generator=generator).float()
    grid = scheme.weight.granularity.grid(n, k)
    weight_scale = 2.0 ** torch.randint(-3, 1, grid, generator=generator).float()
    row_factor = 2.0 ** torch.randint(-3, 4, (m, 1), generator=generator).float()
    static = None
    if scheme.input is not None:
        # Each block of x has the largest code in it, hence a scale of 1 before the factor below, times a weight of 0.
        step = k if scheme.input.granularity.cols == -1 else scheme.input.granularity.cols
        x[:, ::step] = CODE_MAX[scheme.input.dtype]
        w[:, ::step] = 0.0
        if scheme.has_static_input:
            static = torch.tensor([0.5])
        if scheme.input.granularity.is_tensor:
            row_factor = torch.tensor([[0.5]])
    x = x * row_factor
    wide = numerics.expand_scale(weight_scale, scheme.weight.granularity, n, k)
    expected = (x.double() @ (w.double() * wide.double()).t()).to(dtype)
    return x.to(dtype), w.to(scheme.weight.dtype), weight_scale, static, expected
