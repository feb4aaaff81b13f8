"""Types of codes and the tensors of a weight, held against what is known of them otherwise."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs

from hf_fp8.formats.code_types import CODE_TYPES, E5M2, FP8, INT4, INT8, CodeType
from hf_fp8.formats.scheme import SCHEMES, Scheme
from hf_fp8.formats.storage import dequantize, format_of, forms_of_stack
from hf_fp8.formats.weights import scale_dtype_of
from hf_fp8.nn.packed_linear import linear_of

pytestmark = pytest.mark.hostless
EVERY = sorted(set(SCHEMES.values()), key=str)


@pytest.mark.parametrize("code", CODE_TYPES.values(), ids=lambda code: code.label)
def test_codes(code: CodeType) -> None:
    """All codes that there are: their steps, and that each is the nearest to itself and to what is near it."""
    every = torch.arange(256, dtype=torch.uint8).view(code.storage)
    values = every.float()
    values = values[values.isfinite() & (values >= code.least) & (values <= code.largest)].unique()
    assert (values[0], values[-1]) == (code.least, code.largest)
    assert code.largest <= code.weight_range <= -code.least
    assert torch.equal(code.round(values.clone()).float(), values)
    above = values[values >= 0]
    gaps = above.diff()
    assert torch.equal(code.step((above[:-1] + above[1:]) / 2), gaps)
    assert torch.equal(code.round(above[:-1] + 0.49 * gaps).float(), above[:-1])
    assert torch.equal(code.round(above[:-1] + 0.51 * gaps).float(), above[1:])


@pytest.mark.parametrize("code", [code for code in CODE_TYPES.values() if code.dtype != E5M2], ids=lambda code: code.label)
def test_they_are_what_compressed_tensors_calls_them(code: CodeType) -> None:
    assert QuantizationArgs(num_bits=code.bits, type=code.kind).pytorch_dtype() == code.storage
    assert code.format in {found.value for found in CompressionFormat}
    assert code.bits <= 8 * code.storage.itemsize


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_texts_of_schemes(scheme: Scheme) -> None:
    assert Scheme.parse(scheme.text) == scheme
    assert {operand.code.dtype for operand in (scheme.weight, scheme.input) if operand is not None} <= {FP8, INT8, INT4}
    for operand in (scheme.weight, scheme.input):
        assert operand is None or operand.code.bits * operand.per_element == 8 * operand.storage.itemsize


@pytest.mark.parametrize("scheme", EVERY, ids=str)
@pytest.mark.parametrize("shape", [(150, 70), (128, 256), (1, 3)])
def test_forms_are_those_of_the_tensors_and_of_layers(scheme: Scheme, shape: tuple[int, int]) -> None:
    stored, weight = format_of(scheme.weight), torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale_dtype = scale_dtype_of(torch.bfloat16, scheme.weight.mx)
    forms = stored.forms(scheme.weight, *shape, scale_dtype)
    made = stored.quantize(weight, scheme.weight)
    assert {role: (form.dtype, form.shape) for role, form in forms.items()} == {
        role: (tensor.dtype, tuple(tensor.shape)) for role, tensor in made.items()
    }
    layer = linear_of(scheme)(shape[1], shape[0], scheme, scale_dtype=scale_dtype)
    assert {name: (p.dtype, tuple(p.shape)) for name, p in layer.named_parameters() if name != "input_scale"} == {
        role: (form.dtype, form.shape) for role, form in forms.items()
    }
    back = dequantize(made, scheme.weight, shape[1], torch.float32)
    assert float((back - weight.float()).norm() / weight.float().norm()) < (0.04 if scheme.weight.code.bits == 8 else 0.15)


@pytest.mark.parametrize("scheme", EVERY, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_forms_of_stacks_are_those_of_each_matrix_joined(scheme: Scheme, parts: int) -> None:
    made = [[format_of(scheme.weight).quantize(torch.randn(72, 150), scheme.weight) for _ in range(parts)] for _ in range(3)]
    joined = {role: torch.stack([torch.cat([part[role] for part in expert]) for expert in made]) for role in made[0][0]}
    forms = forms_of_stack(scheme.weight, (3, 72 * parts, 150), parts, scale_dtype_of(torch.float32, scheme.weight.mx))
    assert {role: (form.dtype, form.shape) for role, form in forms.items()} == {
        role: (tensor.dtype, tuple(tensor.shape)) for role, tensor in joined.items()
    }
