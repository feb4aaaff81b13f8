"""The names and signatures that users have in their code: a change here is a change for them."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch

import hf_fp8
from hf_fp8.integrations import old_names

# What each name of `hf_fp8` is; of functions and classes how they are called; and where old names are.
# Written by `python tests/project/test_public_api.py`.
WRITTEN = Path(__file__).parents[1] / "data" / "public_api.txt"
OPS = ("dense_linear", "scaled_grouped_linear", "scaled_linear", "scaled_linear_inference", "times_weight")


def described() -> list[str]:
    lines = []
    for name in sorted(hf_fp8.__all__):
        value = getattr(hf_fp8, name)
        if isinstance(value, type) and issubclass(value, Exception):
            lines.append(f"{name}: {value.__mro__[1].__name__}")
        elif callable(value):
            lines.append(f"{name}{inspect.signature(value)}")
        else:
            lines.append(f"{name}: {type(value).__name__}")
    # Compiled code in inductor's cache calls ops by these.
    lines += [str(getattr(torch.ops.hf_fp8, name).default._schema) for name in OPS]
    return lines + [f"{name}: deprecated, {place}" for name, place in sorted(old_names.NAMES.items())]


def test_names_and_signatures() -> None:
    assert described() == WRITTEN.read_text().splitlines()


def test_everything_public_says_what_it_is() -> None:
    unsaid = [name for name in hf_fp8.__all__ if callable(v := getattr(hf_fp8, name)) and not (inspect.getdoc(v) or "").strip()]
    assert unsaid == []


if __name__ == "__main__":
    WRITTEN.write_text("\n".join(described()) + "\n")
