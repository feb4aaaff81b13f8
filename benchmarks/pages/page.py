"""Pages of docs/ that programs write: a template, NAME.template.md, filled with what was measured; whole, or not at all.

A template's placeholders are comments, `<!-- NAME -->`, with white space wherever an editor has put it. A program says what it
fills in as the fields of a `Page`, so that they can be held against the template before anything is measured, and by tests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, TypeVar

from .. import ROOT

DOCS, TEMPLATES = ROOT / "docs", Path(__file__).parent
PLACEHOLDER = re.compile(r"<!--\s*(\w+)\s*-->")
COMMENT = re.compile(r"<!--(?:(?!-->).){0,60}", re.DOTALL)  # the beginning of one, closed or not


class PageError(Exception):
    """A template and what it is to be filled with do not fit."""


def placeholders(template: str) -> set[str]:
    return set(PLACEHOLDER.findall(template))


def left_over(page: str) -> list[str]:
    """Comments in a page, of which it is to have none: placeholders, also those that are not written as such."""
    return [" ".join(found.split()) for found in COMMENT.findall(page)]


def hold(template: str, names: set[str]) -> None:
    """Raises PageError unless `names` are exactly the placeholders of a template, and it has no other comments."""
    wanted = placeholders(template)
    wrong = [f"the template has {name}, which nothing fills" for name in sorted(wanted - names)]
    wrong += [f"{name} is given, and the template has no such placeholder" for name in sorted(names - wanted)]
    wrong += [f"{comment!r} is no placeholder" for comment in left_over(PLACEHOLDER.sub("", template))]
    if wrong:
        raise PageError("; ".join(wrong))


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with each placeholder replaced by its value.

    Raises PageError for placeholders without a value, values without a placeholder, empty ones, and comments that are left.
    """
    hold(template, set(values))
    if empty := sorted(name for name, value in values.items() if not value.strip()):
        raise PageError(f"{', '.join(empty)}: nothing to fill in")
    page = PLACEHOLDER.sub(lambda found: values[found[1]], template)
    if left := left_over(page):
        raise PageError(f"a placeholder is left in the page: {', '.join(map(repr, left))}")
    return page


def read(template: str, page: str) -> dict[str, str]:
    """The values that a page shows in the places of placeholders: `fill(template, read(template, page)) == page`.

    Raises PageError where the page says something else than the template.
    """
    parts = PLACEHOLDER.split(template)  # fixed text, a name, fixed text, ...
    pattern, seen = "", set()
    for place, part in enumerate(parts):
        if place % 2 == 0:
            pattern += re.escape(part)
        else:
            pattern += f"(?P={part})" if part in seen else f"(?P<{part}>.*?)"
            seen.add(part)
    if found := re.fullmatch(pattern, page, re.DOTALL):
        return found.groupdict()
    missing = next((part for part in parts[::2] if part not in page), "all of the template, but in another order")
    raise PageError(f"the page is not its template filled: it lacks {missing!r}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which becomes `path` when the block ends without an error."""
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


P = TypeVar("P", bound="Page")


@dataclass(frozen=True)
class Page:
    """What a page is filled with: a field for each placeholder of its template, of the same name in small letters."""

    name: ClassVar[str]

    @classmethod
    def template(cls) -> str:
        return (TEMPLATES / f"{cls.name}.template.md").read_text()

    @classmethod
    def names(cls) -> set[str]:
        return {field.name.upper() for field in fields(cls)}

    @classmethod
    def check(cls) -> None:
        """Raises PageError if template and fields do not fit: to be called before minutes of measuring."""
        try:
            hold(cls.template(), cls.names())
        except PageError as error:
            raise PageError(f"{cls.name}.template.md: {error}") from None

    @classmethod
    def shown(cls: type[P]) -> P:
        """What the page in docs/ shows now, for what is not measured anew. Raises PageError."""
        values = read(cls.template(), (DOCS / f"{cls.name}.md").read_text())
        return cls(**{field.name: values[field.name.upper()] for field in fields(cls)})

    def write(self, folder: Path = DOCS, pictures: Mapping[str, Callable[[Path], object]] | None = None) -> None:
        """Write `folder`/NAME.md and `pictures`, name of the file -> function that draws it: all of them, or nothing."""
        page = fill(self.template(), {field.name.upper(): str(getattr(self, field.name)) for field in fields(self)})
        with ExitStack() as stack:
            for name, draw in (pictures or {}).items():
                draw(stack.enter_context(whole(folder / name)))
            stack.enter_context(whole(folder / f"{self.name}.md")).write_text(page)
