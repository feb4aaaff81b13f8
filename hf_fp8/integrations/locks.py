"""Locks for whoever loads or makes a transformers model: one thread at a time.

Meanwhile transformers changes what the whole process sees: torch's default dtype, `PreTrainedModel.tie_weights` (which does
nothing then), `torch.linspace`. Two threads that do so at once get each other's, and put back each other's, for good.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_loading = threading.RLock()  # re-entrant: models load their parts, and adapters their base
_changing = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other thread is inside such a block."""
    with _loading:
        yield


@contextmanager
def while_changing() -> Iterator[None]:
    """The same, around what changes the process for a moment: a fork waits for its end, too."""
    with one_at_a_time(), _changing:
        yield


def _renew() -> None:
    """In the child of a fork, where the thread that is loading is not."""
    global _loading
    _loading = threading.RLock()
    _changing.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_changing.acquire, after_in_parent=_changing.release, after_in_child=_renew)
