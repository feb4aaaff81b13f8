"""What README.md and docs/ show: fenced blocks, code within lines, commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "gpu_day" / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}\S.*\n)+")


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of the page, where its first line of code stands."""

    language: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    return [Block(found[1], found[2], text[: found.start(2)].count("\n") + 1) for found in FENCE.finditer(text)]


def spans(text: str) -> list[str]:
    """Code within lines, its white space in one piece."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def code(text: str) -> list[str]:
    """All code of a page: spans, and the lines of its blocks."""
    shown = [block.code for block in blocks(text)] + INDENTED.findall(FENCE.sub("", text))
    return spans(text) + [line.strip() for found in shown for line in found.splitlines()]


def commands(text: str) -> list[list[str]]:
    """What a page tells people to type, in words: scripts/..., hf-fp8 ..., pytest ..., without what follows a `#`."""
    found = []
    for line in code(text):
        for command in line.removeprefix("$ ").removeprefix(".venv/bin/python ").split("&&"):
            if re.match(r"(scripts/[\w.]+|hf-fp8|pytest)(\s|$)", command.strip()):
                found.append(shlex.split(command, comments=True))
    return found
