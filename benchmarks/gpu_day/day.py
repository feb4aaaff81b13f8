"""Everything that matters on a CUDA machine, in one command: `day.sh OUT [--dry] [--only STEP ...] [--seconds N]`.

Each step is a process of its own with a time limit, writes its rows as it goes, and needs no other step. --dry runs the same
code on a CPU with tiny sizes, to see that nothing is misspelt. A table of it all comes last.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .. import ROOT
from .report import report

# In order of importance, each with its longest time in seconds; NAME.py does it.
STEPS = {"ceilings": 40, "tests": 130, "linears": 140, "experts": 90, "model": 120, "training": 80, "sweep": 110}


def run(name: str, out: Path, dry: bool, limit: float) -> int | str:
    """The exit code of a step, or "stopped" if it was not done within `limit` seconds."""
    command = [sys.executable, "-m", f"{__package__}.step", name, str(out.resolve()), *["--dry"][:dry]]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if dry else {})
    with (out / "day.log").open("a") as log:
        print(f"== {name}", file=log, flush=True)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "stopped"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seconds", type=int, default=500, help="for all steps together")
    return parser


def main() -> None:
    args = arguments().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end, took = time.monotonic() + args.seconds, {}
    for name in args.only:
        limit = min(STEPS[name] * (10 if args.dry else 1), end - time.monotonic())
        if limit < 5:
            took[name] = "no time left"
            continue
        start = time.monotonic()
        code = run(name, args.out, args.dry, limit)
        took[name] = f"{time.monotonic() - start:.0f} s, {'done' if code == 0 else code}"
        print(f"{name}: {took[name]}", flush=True)
    report(args.out, took)
    sys.exit(any(not how.endswith("done") for how in took.values()))


if __name__ == "__main__":
    main()
