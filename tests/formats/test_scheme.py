from __future__ import annotations

import pytest

from hf_fp8.formats.scheme import (
    FP8_BLOCK,
    FP8_DYNAMIC,
    FP8_STATIC,
    FP8_WEIGHT_ONLY,
    ROW,
    TENSOR,
    Granularity,
    Scheme,
    TensorScheme,
    scale_shape,
)

pytestmark = pytest.mark.hostless


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (TENSOR, (1,)),
        (ROW, (300, 1)),
        (Granularity(1, 128), (300, 2)),
        (Granularity(128, 128), (3, 2)),
        (Granularity(7, 500), (43, 1)),
    ],
)
def test_scale_shape(granularity: Granularity, shape: tuple[int, ...]) -> None:
    assert scale_shape(granularity, 300, 200) == shape


@pytest.mark.parametrize("scheme", [FP8_DYNAMIC, FP8_STATIC, FP8_BLOCK, FP8_WEIGHT_ONLY])
def test_text_round_trip(scheme: Scheme) -> None:
    assert Scheme.parse(scheme.text) == scheme
    assert hash(Scheme.parse(scheme.text)) == hash(scheme)


def test_schemes_differ_by_every_part() -> None:
    texts = {
        Scheme(TensorScheme(w), None if i is None else TensorScheme(i, d)).text
        for w in (TENSOR, ROW, Granularity(1, 128), Granularity(128, 128))
        for i, d in ((None, False), (ROW, True), (TENSOR, True), (TENSOR, False))
    }
    assert len(texts) == 16


def test_extent_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        Granularity(0, 128)
