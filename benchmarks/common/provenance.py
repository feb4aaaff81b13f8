"""When, where, and of what something was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

import torch

from .. import ROOT


def version(package: str) -> str:
    """That of an installed package, "" if it is not."""
    try:
        return installed(package)
    except PackageNotFoundError:
        return ""


def cpu() -> str:
    """Its name, with what it has for int8, and what oneDNN was held to."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    has = [name for name in ("amx_int8", "avx512_vnni") if name in text]
    held = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{next(names, platform.processor())} ({', '.join(has)}{f'; oneDNN held to {held}' if held else ''})"


def commit() -> str:
    """The commit that is checked out, with "+" behind it if the package is not as it was committed; "" without git."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    if found.returncode != 0:
        return ""
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "hf_fp8"], cwd=ROOT).returncode
    return found.stdout.strip() + ("+" if changed else "")


def measured_with(*packages: str) -> str:
    """For people: the day, the machine, the versions of torch, transformers, compressed-tensors and `packages`, the commit."""
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "compressed-tensors", *packages)]
    count = torch.get_num_threads()
    at = commit().replace("+", ", with changes to the package") or "unknown"
    return (
        f"measured on {datetime.date.today().isoformat()}: {cpu()}, {count} thread{'s' * (count > 1)}; Python "
        f"{platform.python_version()}, {', '.join(versions)}; commit {at}"
    )
