"""Grouped kernels: exact on exact operands, near the multiplied-out experts on random ones; Triton's in its interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.build import error
from support.grouped import IDS, INTERPRETED, SCHEMES, TRITON, forced, grid

from hf_fp8 import kernels
from hf_fp8.errors import InputError, KernelError
from hf_fp8.formats import native, numerics
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.scheme import FP8_BLOCK, FP8_DYNAMIC, FP8_STATIC, FP8_WEIGHT_ONLY
from hf_fp8.kernels import ExpertWeights, Problem, Routing, select_grouped
from hf_fp8.kernels import torch_grouped as grouped_mm
from hf_fp8.kernels.probing import exact_experts
from hf_fp8.nn.grouped import known, route, scaled_grouped_linear

pytestmark = pytest.mark.hostless

CPU = torch.device("cpu")
# (kernel, scheme): the interpreter takes seconds for each, so that CPUs run what Triton's kernels take of the schemes.
RUNS = [(kernel, name) for name in SCHEMES for kernel in ("grouped_dequantize", "grouped_weight_only")] + [
    (kernel, name) for kernel, why in TRITON.items() for name, scheme in SCHEMES.items() if INTERPRETED and not why(scheme)
]


@pytest.mark.thinned(16)
@pytest.mark.parametrize(("kernel", "name"), RUNS)
def test_exact(kernel: str, name: str) -> None:
    scheme = SCHEMES[name]
    for case, (n, k) in zip(IDS, ((72, 256), (33, 149), (64, 128), (48, 128)), strict=True):
        x, weights, scales, routing, wanted = exact_experts(scheme, torch.float32, n, k, IDS[case])
        static = torch.full((5, 1), 0.5) if scheme.has_static_input else None
        for dtype in (torch.float32, torch.bfloat16) if n == 72 else (torch.bfloat16,):
            for given in (routing, routing._replace(offsets=None)):  # sorted, and as they come
                with forced(kernel):
                    found = scaled_grouped_linear(x.to(dtype), weights, grid(scales, scheme), scheme, given, input_scale=static)
                assert torch.equal(found, wanted.to(dtype)), (case, n, k, dtype, given.offsets is None)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("kernel", ["grouped_weight_only", *TRITON])
@pytest.mark.parametrize("name", SCHEMES)
def test_parts_have_grids_of_their_own(kernel: str, name: str) -> None:
    """gate over up, where the block divides neither: what one grid over both would get wrong."""
    scheme, (n, k) = SCHEMES[name], (100, 192)
    if kernel in TRITON and (not INTERPRETED or TRITON[kernel](scheme)):
        pytest.skip("not for this scheme")
    granularity = scheme.weight.granularity
    torch.manual_seed(0)
    dense = torch.randn(3, 2, n, k)
    scales = [[numerics.compute_scale(part, granularity) for part in expert] for expert in dense]
    codes = [
        [numerics.quantize(p, s, granularity) for p, s in zip(*pair, strict=True)] for pair in zip(dense, scales, strict=True)
    ]
    out = [
        torch.cat([numerics.dequantize(q, s, granularity) for q, s in zip(*pair, strict=True)])
        for pair in zip(codes, scales, strict=True)
    ]
    weight = torch.stack([torch.cat(parts) for parts in codes])
    scale = torch.stack([torch.cat([s.reshape(-1, s.shape[-1]) for s in parts]) for parts in scales])
    scale = scale.reshape(3, 2) if granularity.is_tensor else scale
    x, ids = torch.randint(-8, 9, (9, k)).float(), torch.randint(0, 3, (9, 2))
    x[:, ::32] = 448.0  # codes of themselves, whatever the scale covers: the interpreter rounds to E4M3 in its own way
    first, second = route(known(ids, 3)[0], 3, sort=True)
    routing = first._replace(slots=second.slots)
    static = torch.ones(3, 2) if scheme.has_static_input else None
    with forced(kernel):
        found = scaled_grouped_linear(x, weight, scale, scheme, routing, parts=2, input_scale=static)
    wanted = torch.stack([out[e] @ x[i // 2] for i, e in enumerate(ids.flatten().tolist())])
    assert error(found, wanted) < 1e-6


def test_tokens_are_quantized_once_and_as_the_reference_does() -> None:
    """Before they are copied, where a scale is a row's alone; with the expert's where it is of a tensor."""
    x, ids = torch.randn(6, 256), torch.tensor([[0, 1]] * 3 + [[1, 2]] * 3)
    routing = route(known(ids, 3)[0], 3, sort=True)[0]
    for scheme in (FP8_DYNAMIC, FP8_BLOCK):
        given, after = grouped_mm.quantize(x, routing, scheme.input, None, 3)  # type: ignore[arg-type]
        codes, scale = numerics.quantize_input(x, scheme.input, None)  # type: ignore[arg-type]
        assert after is routing and torch.equal(given.x.float(), codes.float())
        assert given.scale is not None and torch.equal(given.scale, scale)
    static = torch.tensor([[0.5], [0.25], [0.125]])
    given, after = grouped_mm.quantize(x, routing, FP8_STATIC.input, static, 3)  # type: ignore[arg-type]
    assert after.rows is None and given.x.shape == (12, 256) and given.scale is not None
    assert given.scale.flatten().tolist() == [0.5] * 3 + [0.25] * 6 + [0.125] * 3


def test_routing() -> None:
    ids = torch.tensor([[2, 0], [7, 2], [-1, 0]])
    first, second = route(known(ids, 3)[0], 3, sort=True)
    assert first.experts.tolist() == [0, 0, 2, 2, 3, 3] and first.offsets is not None
    assert first.offsets.tolist() == [2, 2, 4] and first.offsets.dtype == torch.int32
    assert first.rows is not None and (first.rows // first.share).tolist() == [0, 2, 0, 1, 1, 2]
    assert second.rows is None and second.slots is not None and second.slots.tolist() == [1, 5, 0, 3, 2, 4]
    first, second = route(known(ids, 3)[0], 3, sort=False)
    assert first.experts.tolist() == [2, 0, 3, 2, 3, 0] and first.offsets is None and second.slots is None
    assert first.gather(torch.arange(3)).tolist() == [0, 0, 1, 1, 2, 2]


def test_kernels_and_tiles_are_for_the_rows_that_experts_get() -> None:
    """Of 16 copies of 65 tokens, 65 rows are an expert's: 5 for each, not 65."""
    nobodys = torch.full((16 * 65,), 16)
    assert Routing(nobodys, expected=65).rows_each(16) == 5
    assert Routing(nobodys).rows_each(16) == 65
    assert Routing(torch.zeros(8, dtype=torch.long)).rows_each(128) == 1
    assert Routing(torch.zeros(0, dtype=torch.long)).rows_each(4) == 0


def test_selection_with_the_library_of_cpu_kernels() -> None:
    if native.why_not() is not None:
        pytest.skip(str(native.why_not()))
    for scheme in (FP8_DYNAMIC, FP8_WEIGHT_ONLY):
        choice = select_grouped(Problem(CPU, scheme, 256, 128, torch.bfloat16))
        assert choice.kernel.name == "native_grouped_weight_only"
    assert select_grouped(Problem(CPU, FP8_DYNAMIC, 256, 128, torch.bfloat16), "scaled_mm").kernel.name == "grouped_dequantize"


@pytest.mark.usefixtures("no_native")
def test_selection() -> None:
    problem = Problem(CPU, FP8_DYNAMIC, 256, 128, torch.bfloat16)
    assert select_grouped(problem).kernel.name == "grouped_weight_only"
    assert "CPUs have no FP8 units" in select_grouped(problem).reason
    assert select_grouped(problem, "scaled_mm").kernel.name == "grouped_dequantize"
    assert "scaled_grouped_mm" in select_grouped(problem, "scaled_mm").reason
    assert select_grouped(Problem(CPU, FP8_WEIGHT_ONLY, 256, 128, torch.bfloat16)).kernel.name == "grouped_weight_only"
    with pytest.raises(KernelError, match="not 'int8'"):
        select_grouped(problem, "int8")
    with kernels.use("triton_grouped_scaled_mm"), pytest.raises(KernelError, match="Triton does not compile for cpu"):
        select_grouped(problem)
    with kernels.use("grouped_dequantize"):  # linears take no notice
        assert kernels.select(problem).reason != "forced"
        assert select_grouped(problem).reason == "forced"
    with kernels.use("dequantize"):
        assert select_grouped(problem).reason != "forced"


def test_inputs_that_do_not_fit() -> None:
    weight, scale = torch.zeros(3, 8, 16).to(FP8), torch.ones(3, 8, 1)
    routing = Routing(torch.zeros(2, dtype=torch.long))
    for x, words in ((torch.ones(2, 15), "take"), (torch.ones(2, 16).to(FP8), "inputs in"), (torch.ones(1, 2, 16), "take")):
        with pytest.raises(InputError, match=words):
            scaled_grouped_linear(x, weight, scale, FP8_DYNAMIC, routing)
    with pytest.raises(InputError, match=r"weight_scale has shape \(3, 4, 1\).*it is \(3, 8, 1\)"):
        scaled_grouped_linear(torch.ones(2, 16), weight, scale[:, :4], FP8_DYNAMIC, routing)
    with pytest.raises(InputError, match="one expert for each row"):
        scaled_grouped_linear(torch.ones(2, 16), weight, scale, FP8_DYNAMIC, torch.tensor([1]))


def test_an_expert_for_each_row() -> None:
    """The way to call it without knowing of `Routing`: outputs are in the order of rows."""
    x, weights, scales, _, _ = exact_experts(FP8_DYNAMIC, torch.float32, 24, 32)
    ids = torch.tensor([3, 0, 9, 3, 1, 4])
    found = scaled_grouped_linear(x, weights, scales, FP8_DYNAMIC, ids, backend="weight_only")
    for row, e in enumerate(ids.tolist()):
        wanted = weights[e].float() * scales[e] @ x[row] if e < 5 else torch.zeros(24)
        assert torch.equal(found[row], wanted)


def test_float64_and_gradients_of_the_op() -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 8, 16)
    scale = torch.stack([numerics.compute_scale(m, FP8_DYNAMIC.weight.granularity) for m in w])
    weight = torch.stack([numerics.quantize(m, s, FP8_DYNAMIC.weight.granularity) for m, s in zip(w, scale, strict=True)])
    ids = torch.tensor([[0, 2], [2, 3], [1, 0]])
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    for sort in (True, False):
        first, second = route(known(ids, 3)[0], 3, sort=sort)
        routing = first._replace(slots=second.slots)

        def call(x: torch.Tensor, routing: Routing = routing) -> Any:
            return scaled_grouped_linear(x, weight, scale, FP8_DYNAMIC, routing, backend="weight_only")

        held = ExpertWeights(weight, scale, FP8_DYNAMIC)
        out = call(x)
        for slot, e in enumerate(ids.flatten().tolist()):
            whole = torch.cat([p for p, _, _ in grouped_mm.pieces(held, e, 16, torch.float64)]) if e < 3 else torch.zeros(8, 16)
            assert torch.allclose(out[slot], whole.double() @ x[slot // 2], rtol=1e-12)
        grad = torch.randn(6, 8, dtype=torch.float64)
        (found,) = torch.autograd.grad(out, x, grad)
        wanted = torch.zeros(3, 16, dtype=torch.float64)
        for slot, e in enumerate(ids.flatten().tolist()):
            if e < 3:
                wanted[slot // 2] += grad[slot] @ torch.cat([p for p, _, _ in grouped_mm.pieces(held, e, 16, torch.float64)])
        assert error(found, wanted) < 1e-6
    torch.library.opcheck(
        torch.ops.hf_fp8.scaled_grouped_linear.default,
        (
            x.detach().float(),
            weight,
            scale,
            None,
            first.experts,
            first.rows,
            None,
            None,
            False,
            2,
            1,
            FP8_DYNAMIC.text,
            "weight_only",
        ),
        test_utils="test_faketensor",  # its check of schemas multiplies codes
    )
