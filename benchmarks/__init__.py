"""Benchmarks, and the programs that write the measured pages of docs/.

Each file of this folder is a program: `scripts/bench NAME`, or `python -m benchmarks.NAME` from the root of the repository; -h
shows its options. `common` is what they share. `pages` has the programs that write pages, with their templates: `scripts/page
NAME`. `gpu_day` measures everything on a CUDA machine without network.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / ".demo"  # where models are kept from run to run

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
sys.path.append(str(ROOT / "tests"))  # support: small models
