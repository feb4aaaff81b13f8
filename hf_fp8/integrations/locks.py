"""Locks for loading or building a transformers model: one thread at a time.

During that, transformers changes global state of the process: torch's default dtype, `PreTrainedModel.tie_weights` (which
does nothing then), `torch.linspace`. Two threads at once would see each other's changes, and restore the wrong values
permanently.
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
    """Wait until no other thread is in such a block."""
    with _loading:
        yield


@contextmanager
def while_changing() -> Iterator[None]:
    """The same for code that changes global state for a moment: a fork waits for its end, too."""
    with one_at_a_time(), _changing:
        yield


def _renew() -> None:
    """Reset the locks in a forked child, where the thread that was loading does not exist."""
    global _loading
    _loading = threading.RLock()
    _changing.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_changing.acquire, after_in_parent=_changing.release, after_in_child=_renew)
