"""Pages that scripts write (scripts/pages.py): whole or not at all, and each is what its frame says."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
from markdown import PAGES, ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import pages
from pages import Page, PageError, fill, whole

FRAMES = sorted(path.name.removesuffix(".template.md") for path in (ROOT / "docs").glob("*.template.md"))


def page_of(name: str) -> type[Page]:
    """The page that scripts/NAME.py writes, by its class."""
    module: ModuleType = importlib.import_module(name)
    (found,) = (c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Page) and c is not Page)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_placeholder_is_left(path: Path) -> None:
    text = path.read_text()
    assert pages.left_over(text) == []
    assert re.findall(r"\{\{.*?\}\}|\b(?:TODO|TBD|FIXME)\b", text) == []


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_has_the_placeholders_that_its_script_fills(name: str) -> None:
    page = page_of(name)
    assert page.name == name and f"`scripts/{name}`" in page.frame() and (ROOT / "scripts" / name).exists()
    page.check()


@pytest.mark.parametrize("name", FRAMES)
def test_a_page_is_its_frame_filled(name: str) -> None:
    """Who edits one of them has to edit the other."""
    page, frame = (ROOT / "docs" / f"{name}.md").read_text(), page_of(name).frame()
    assert fill(frame, pages.read(frame, page)) == page


@pytest.mark.parametrize(
    ("frame", "values", "named"),
    [
        ("<!-- A --> and <!-- B -->", {"A": "1"}, "B"),
        ("<!-- A -->", {"A": "1", "B": "2"}, "B"),
        ("<!-- A -->", {"A": " \n"}, "A"),
        ("<!-- A --> <!-- of two words -->", {"A": "1"}, "of two words"),
        ("<!-- A --> <!-- B", {"A": "1"}, "<!-- B"),
        ("<!-- A -->", {"A": "1 <!-- B -->"}, "B"),
    ],
)
def test_what_does_not_fit_is_an_error(frame: str, values: dict[str, str], named: str) -> None:
    with pytest.raises(PageError, match=re.escape(named)):
        fill(frame, values)


def test_placeholders_are_found_however_they_are_wrapped() -> None:
    assert fill("on <!-- TOKENS\n--> tokens, <!--A-->, <!--\nA -->", {"TOKENS": "4", "A": "<b>"}) == "on 4 tokens, <b>, <b>"


def test_what_a_page_shows_is_read_back() -> None:
    frame = "# T\n\n<!-- A --> and <!-- B -->, <!-- A -->.\n<!-- C -->\nEnd\n"
    values = {"A": "1", "B": "x, y", "C": "| a |\n| b |"}
    page = fill(frame, values)
    assert pages.read(frame, page.replace("x, y", "x")) == {**values, "B": "x"}
    for wrong in (page.replace("# T", "# U"), page.replace(" and ", " or "), page.replace(", 1.", ", 2."), page + "more\n"):
        with pytest.raises(PageError):
            pages.read(frame, wrong)


@dataclass(frozen=True)
class Small(Page):
    name = "small"
    versions: str
    table: str


def test_nothing_is_written_unless_all_of_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    frame, page = tmp_path / "small.template.md", tmp_path / "small.md"
    frame.write_text("<!-- VERSIONS -->: <!-- TABLE -->")
    page.write_text("old")
    good = Small("1", "| a |")

    def draw(path: Path) -> None:
        assert path.suffix == ".svg"
        path.write_text("new")

    def broken(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    def state() -> dict[str, str]:
        return {path.name: path.read_text() for path in tmp_path.iterdir() if path != frame}

    with pytest.raises(PageError, match="TABLE"):
        replace(good, table="").write(tmp_path, {"small.svg": draw})
    with pytest.raises(OSError, match="disk full"):
        good.write(tmp_path, {"small.svg": broken})
    assert state() == {"small.md": "old"}
    frame.write_text("<!-- VERSIONS -->: <!-- TABLE --> <!-- MORE -->")
    for attempt in (good.check, lambda: good.write(tmp_path)):
        with pytest.raises(PageError, match="MORE"):
            attempt()
    frame.write_text("<!-- VERSIONS -->")
    with pytest.raises(PageError, match="TABLE"):
        good.check()
    assert state() == {"small.md": "old"}
    frame.write_text("<!-- VERSIONS -->: <!-- TABLE -->")
    good.write(tmp_path, {"small.svg": draw})
    assert state() == {"small.md": "1: | a |", "small.svg": "new"}


def test_a_file_that_was_not_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.md"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
