"""Runs scripts in interpreters that have not imported hf_fp8 yet, nor PEFT: forks of one that has imported transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Each script runs in a fork, which writes what it prints and how it ends to a file.
_FORKS = """
import json, os, sys, traceback
import torch, transformers, transformers.modeling_utils
torch.set_num_threads(1)
found = {}
for name, code in json.load(sys.stdin).items():
    assert not {"hf_fp8", "peft"} & sys.modules.keys()
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        os.dup2(write, 1)
        os.dup2(write, 2)
        try:
            exec(compile(code, name, "exec"), vars(sys.modules["__main__"]))
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os.close(write)
    with os.fdopen(read, errors="replace") as output:
        said = output.read()
    found[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
json.dump(found, sys.__stdout__)
"""


def run_fresh(scripts: Mapping[str, str], folder: Path | None = None, **env: str) -> dict[str, str]:
    """Name of a script -> what it printed. Fails with the traceback of the first that raises. folder: where they run. env: what
    is added to the environment.
    """
    command = [sys.executable, "-W", "ignore", "-c", _FORKS]
    env, given = {**os.environ, **env}, json.dumps(dict(scripts))
    done = subprocess.run(command, cwd=folder, env=env, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (code, said) in found.items():
        assert code == 0, f"{name}: {said}"
    return {name: said for name, (_, said) in found.items()}
