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
    """GB of anonymous memory before, and the most meanwhile; seconds."""

    before: float
    peak: float
    seconds: float = 0.0

    @property
    def used(self) -> float:
        return self.peak - self.before


def anonymous() -> float:
    """Anonymous memory of this process in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e6


def held_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    held = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in held.values())


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
    start = time.perf_counter()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - start
        done.set()
        thread.join()
