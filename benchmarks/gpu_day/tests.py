"""The tests that need a GPU, `pytest -m gpu`, in six processes."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from .machine import Machine

ALL_SKIPPED = 5  # pytest's exit code


def run(out: Path, machine: Machine) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", "--tb=short", "--durations=5"]
    command += ["-n", "6"] if find_spec("xdist") and not machine.dry else []
    with (out / "tests.log").open("w") as log:
        code = subprocess.run(
            [*command, "tests/kernels/test_gpu.py", "tests/kernels/test_gpu_experts.py"], stdout=log, stderr=log
        ).returncode
    sys.exit(0 if machine.dry and code == ALL_SKIPPED else code)
