"""How much memory models hold, and how much anonymous memory something takes at most (mapped files do not count). Linux."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Watched:
    """GB of anonymous memory before, and the most meanwhile; seconds, and those of all threads together."""

    before: float
    peak: float
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def used(self) -> float:
        return self.peak - self.before


def anonymous() -> float:
    """Anonymous memory of this process in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e6


def held_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, each counted once; of torchao's weights, of the tensors that they consist of."""
    held = {t.data_ptr(): t for tensor in (*model.parameters(), *model.buffers()) for t in _parts(tensor)}
    return sum(t.numel() * t.element_size() for t in held.values())


def _parts(tensor: Any) -> Iterator[Any]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


@contextmanager
def watched(every: float = 0.003) -> Iterator[Watched]:
    """What it is given is right after the block. every: seconds between two looks."""
    before = anonymous()
    found, done = Watched(before, before), threading.Event()

    def watch() -> None:
        while not done.wait(every):
            found.peak = max(found.peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield found
    finally:
        found.seconds, found.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        done.set()
        thread.join()
