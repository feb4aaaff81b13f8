"""When, where, and of what something was measured."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def version(package: str) -> str:
    """That of an installed package, "" if it is not."""
    try:
        return installed(package)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that is checked out, with "+" behind it if the package is not as it was committed."""
    short = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "hf_fp8"], cwd=ROOT).returncode
    return short + ("+" if changed else "")


def measured_with(*packages: str) -> str:
    """For people: the day, the machine, the versions of torch, transformers, compressed-tensors and `packages`, the commit."""
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "compressed-tensors", *packages)]
    at = commit().replace("+", ", with changes to the package")
    return (
        f"measured on {datetime.date.today().isoformat()} on an {platform.machine()} CPU, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, {', '.join(versions)}; commit {at}"
    )
