"""One step by itself, python -m benchmarks.gpu_day.step NAME OUT [--dry], as `day` runs it."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path

from hf_fp8.kernels.triton import support

from .machine import Machine


def main() -> None:
    name, out, *options = sys.argv[1:]
    machine = Machine("--dry" in options)
    with support.interpreted() if machine.dry else nullcontext():
        importlib.import_module(f"{__package__}.{name}").run(Path(out), machine)


if __name__ == "__main__":
    main()
