"""The processes that tests run in end with each file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import ranks


@pytest.fixture(scope="module", autouse=True)
def _processes() -> Iterator[None]:
    yield
    ranks.close()
