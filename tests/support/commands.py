"""The command line, called as a user calls it."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging as host

from hf_fp8 import cli


def run(*arguments: object, code: int = 0) -> None:
    """`hf-fp8 arguments`, in this process."""
    handler, level, verbosity = signal.getsignal(signal.SIGTERM), logging.getLogger("hf_fp8").level, host.get_verbosity()
    sys.argv = ["hf-fp8", *map(str, arguments)]
    try:
        cli.main()
        found = 0
    except SystemExit as done:
        found = int(done.code or 0)
    finally:
        signal.signal(signal.SIGTERM, handler)
        logging.getLogger("hf_fp8").setLevel(level)
        host.set_verbosity(verbosity)
        host.enable_progress_bar()
    assert found == code


def saved(model: PreTrainedModel, path: Path, **options: object) -> Path:
    model.save_pretrained(path, **options)
    (path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return path


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())
