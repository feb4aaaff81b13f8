"""Runs cases in processes of their own, under limits of time and memory that hold whatever the code does."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import logging
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import loguru
import torch
import transformers

from .cases import Case
from .judging import DIED, FAULT, HANGS, HOSTS_ERROR, MEMORY, SECONDS, Outcome, host_hangs, run_case

GRACE = 2.0  # seconds that a process has to end by itself what is over its time


def quiet() -> None:
    """Nothing is downloaded, and nothing is said but by the fuzzer."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    loguru.logger.remove()


def work(connection: Connection, setup: str, seconds: float, log: str) -> None:
    """The process: receives seeds, sends phases and outcomes. setup: "module:function" that is called before, for tests."""
    trace = open(log, "w")  # noqa: SIM115 (for as long as the process lives)
    os.dup2(trace.fileno(), 2)  # progress bars, what Triton has not freed; and why the process ends, if it does
    faulthandler.enable(trace)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()
    if setup:
        module, _, function = setup.partition(":")
        getattr(importlib.import_module(module), function)()
    gc.collect()
    gc.freeze()
    connection.send(("ready", None))
    while True:
        asked = connection.recv()
        if asked is None:
            return
        seed, only_host = asked
        case = Case.of(seed)
        if only_host:
            connection.send(("host", None))
            connection.send(("done", host_hangs(case, seconds)))
            continue

        def phase(name: str) -> None:
            trace.seek(0)
            trace.truncate()
            faulthandler.cancel_dump_traceback_later()
            if name == "ours":
                faulthandler.dump_traceback_later(seconds + GRACE / 2, file=trace)
            connection.send((name, None))

        connection.send(("done", run_case(case, phase, seconds)))
        faulthandler.cancel_dump_traceback_later()


def anonymous(pid: int | None) -> float:
    """Bytes of memory of a process that are no mapped files, 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0) * 1e3
    except OSError:
        return 0.0


@dataclass(frozen=True)
class Job:
    """A case to run; or, of one whose process had to be ended (how, with what traceback), whether that is the host's doing."""

    seed: int
    ended: tuple[str, str] | None = None

    def outcome(self, host: bool) -> Outcome:
        assert self.ended is not None
        kind, trace = self.ended
        lines = [line.strip() for line in trace.splitlines() if "hf_fp8" in line or "transformers" in line]
        detail = f"config or files: {kind}" if host else (lines or [""])[0]
        return Outcome(self.seed, HOSTS_ERROR if host else kind, detail, str(Case.of(self.seed)), "", trace)


class Worker:
    def __init__(self, setup: str, seconds: float, memory: float) -> None:
        self.seconds, self.memory = seconds, memory
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        handle, self.log = tempfile.mkstemp(suffix=".trace")
        os.close(handle)
        self.process = context.Process(target=work, args=(theirs, setup, seconds, self.log), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.enter("starting")

    def ask(self, job: Job) -> None:
        self.job = job
        self.connection.send((job.seed, job.ended is not None))

    def enter(self, phase: str) -> None:
        self.phase, self.since, self.before = phase, time.monotonic(), anonymous(self.process.pid)

    def excess(self) -> str:
        """Which limit the process has gone beyond, "" if none."""
        allowed = {"starting": 100.0, "ours": self.seconds, "judging": 4 * self.seconds, "host": 3 * self.seconds}
        if time.monotonic() - self.since > allowed.get(self.phase, self.seconds) + GRACE:
            return HANGS
        return MEMORY if anonymous(self.process.pid) - self.before > self.memory else ""

    def end(self) -> str:
        """Ask it to end, or kill it if it is at work; the last traceback that it left."""
        with suppress(OSError):
            self.connection.send(None)
        if self.job is None:
            self.process.join(timeout=10)
        self.process.kill()
        self.process.join()
        self.connection.close()
        text = Path(self.log).read_text(errors="replace")
        Path(self.log).unlink()
        return text


def run(
    seeds: Iterable[int], jobs: int = 2, *, setup: str = "", seconds: float = SECONDS, memory: float = 1e9
) -> Iterator[Outcome]:
    """The outcomes of cases, as they come. A process is used again until it has to be ended.

    seconds, memory: what a case may take to load and run (bytes, beyond what the process had). setup: see `work`. Raises
    RuntimeError if no process starts.
    """
    left, again = iter(seeds), list[Job]()
    workers = [Worker(setup, seconds, memory) for _ in range(jobs)]
    try:
        while True:
            for worker in (worker for worker in workers if worker.job is None):
                seed = None if again else next(left, None)
                if again or seed is not None:
                    worker.ask(again.pop() if seed is None else Job(seed))
            if all(worker.job is None for worker in workers):
                return
            ready = wait([worker.connection for worker in workers], timeout=0.05)
            for place, worker in enumerate(workers):
                job, over = worker.job, ""
                if worker.connection in ready:
                    try:
                        name, value = worker.connection.recv()
                    except (EOFError, ConnectionResetError):
                        over = DIED
                    else:
                        worker.enter(name)
                        if name == "done" and job is not None:
                            worker.job = None
                            yield value if job.ended is None else job.outcome(host=value)
                elif job is not None:
                    over = worker.excess()
                if not over:
                    continue
                phase, trace = worker.phase, worker.end()
                if phase == "starting" or job is None:
                    raise RuntimeError(f"a process of the fuzzer did not start ({over})\n{trace}")
                workers[place] = Worker(setup, seconds, memory)
                if job.ended is not None:
                    yield job.outcome(host=over == job.ended[0])
                elif phase == "ours":
                    again.append(Job(job.seed, (over, trace)))
                else:
                    yield Outcome(job.seed, FAULT, f"{over} in judging", str(Case.of(job.seed)), "", trace)
    finally:
        for worker in workers:
            worker.end()
