"""Fixtures of the tests of kernels: each instruction set of the CPU library, Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hf_fp8.errors import KernelError
from hf_fp8.formats import native
from hf_fp8.kernels.triton import support as triton_support


def supported() -> list[str]:
    if native.why_not() is not None:
        return ["none"]
    found = []
    for name in native.names()[0]:
        try:
            with native.use(name):
                found.append(name)
        except KernelError:
            pass
    return found


@pytest.fixture(params=supported())
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use(request.param):
        yield request.param


@pytest.fixture
def interpreter() -> Iterator[None]:
    with triton_support.interpreted():
        yield
