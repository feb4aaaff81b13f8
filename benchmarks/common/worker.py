"""A contender in a process of its own: it is asked by lines, and answers with lines of JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from .. import ROOT

MARK = "answer: "  # libraries print, too


def command(function: Callable[..., None], *arguments: str | int | bool) -> list[str]:
    """What runs a function of a module of `benchmarks` in a process of its own, from the root of the repository."""
    module = function.__globals__["__spec__"].name  # not "__main__", as `__module__` may be
    return [sys.executable, "-c", f"from {module} import {function.__name__} as f; f(*{arguments!r})"]


def serve(first: Any, jobs: Mapping[str, Callable[[], Any]]) -> None:
    """In the process: give the first answer, then one to each line, by the job that it names."""
    _answer(first)
    for line in sys.stdin:
        _answer(jobs[line.strip()]())


def _answer(value: Any) -> None:
    print(MARK + json.dumps(value), flush=True)


class Worker:
    """A process of `function`, which calls `serve`. found: its first answer. error: the last line it said if it has ended."""

    def __init__(self, name: str, function: Callable[..., None], *arguments: str | int | bool) -> None:
        self.name, self.error = name, ""
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command(function, *arguments), cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None and self._process.stderr is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        # stderr is read while the process runs, or a full pipe would stop it.
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._said.extend, args=(self._process.stderr,), daemon=True)
        self._reader.start()
        self.found: Any = self._read()

    def ask(self, job: str) -> Any:
        """The answer; None if there is none, and from then on."""
        if self.error:
            return None
        with suppress(BrokenPipeError):  # it has ended: `_read` finds what it said
            self._in.write(f"{job}\n")
            self._in.flush()
        return self._read()

    def _read(self) -> Any:
        for line in self._out:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        status = self._process.wait()
        self._reader.join(1)
        last = next((line.strip() for line in reversed(self._said) if line.strip()), "no output")
        self.error = (f"ended by {signal.Signals(-status).name} after: {last}" if status < 0 else last)[:160]
        return None

    def stop(self) -> None:
        with suppress(BrokenPipeError):
            self._in.close()
        self._process.wait()
