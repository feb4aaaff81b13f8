"""Pages that programs write (benchmarks/pages): whole or not at all, and each is what its template says."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
from support.markdown import PAGES, ROOT

from benchmarks.pages import page as pages
from benchmarks.pages.page import TEMPLATES, Page, PageError, fill, whole

pytestmark = pytest.mark.hostless

NAMES = sorted(path.name.removesuffix(".template.md") for path in TEMPLATES.glob("*.template.md"))


def page_of(name: str) -> type[Page]:
    """The page that `scripts/page NAME` writes, by its class."""
    module: ModuleType = importlib.import_module(f"benchmarks.pages.{name}")
    (found,) = (c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Page) and c is not Page)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_placeholder_is_left(path: Path) -> None:
    text = path.read_text()
    assert pages.left_over(text) == []
    assert re.findall(r"\{\{.*?\}\}|\b(?:TODO|TBD|FIXME)\b", text) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_template_has_the_placeholders_that_its_program_fills(name: str) -> None:
    page = page_of(name)
    assert page.name == name and f"`scripts/page {name}`" in page.template()
    page.check()


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_its_template_filled(name: str) -> None:
    """Who edits one of them has to edit the other."""
    page, template = (ROOT / "docs" / f"{name}.md").read_text(), page_of(name).template()
    assert fill(template, pages.read(template, page)) == page


@pytest.mark.parametrize(
    ("template", "values", "named"),
    [
        ("<!-- A --> and <!-- B -->", {"A": "1"}, "B"),
        ("<!-- A -->", {"A": "1", "B": "2"}, "B"),
        ("<!-- A -->", {"A": " \n"}, "A"),
        ("<!-- A --> <!-- of two words -->", {"A": "1"}, "of two words"),
        ("<!-- A --> <!-- B", {"A": "1"}, "<!-- B"),
        ("<!-- A -->", {"A": "1 <!-- B -->"}, "B"),
    ],
)
def test_what_does_not_fit_is_an_error(template: str, values: dict[str, str], named: str) -> None:
    with pytest.raises(PageError, match=re.escape(named)):
        fill(template, values)


def test_placeholders_are_found_however_they_are_wrapped() -> None:
    assert fill("on <!-- TOKENS\n--> tokens, <!--A-->, <!--\nA -->", {"TOKENS": "4", "A": "<b>"}) == "on 4 tokens, <b>, <b>"


def test_what_a_page_shows_is_read_back() -> None:
    template = "# T\n\n<!-- A --> and <!-- B -->, <!-- A -->.\n<!-- C -->\nEnd\n"
    values = {"A": "1", "B": "x, y", "C": "| a |\n| b |"}
    page = fill(template, values)
    assert pages.read(template, page.replace("x, y", "x")) == {**values, "B": "x"}
    for wrong in (page.replace("# T", "# U"), page.replace(" and ", " or "), page.replace(", 1.", ", 2."), page + "more\n"):
        with pytest.raises(PageError):
            pages.read(template, wrong)


@dataclass(frozen=True)
class Small(Page):
    name = "small"
    versions: str
    table: str


def test_nothing_is_written_unless_all_of_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "TEMPLATES", tmp_path)
    template, page = tmp_path / "small.template.md", tmp_path / "small.md"
    template.write_text("<!-- VERSIONS -->: <!-- TABLE -->")
    page.write_text("old")
    good = Small("1", "| a |")

    def draw(path: Path) -> None:
        assert path.suffix == ".svg"
        path.write_text("new")

    def broken(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    def state() -> dict[str, str]:
        return {path.name: path.read_text() for path in tmp_path.iterdir() if path != template}

    with pytest.raises(PageError, match="TABLE"):
        replace(good, table="").write(tmp_path, {"small.svg": draw})
    with pytest.raises(OSError, match="disk full"):
        good.write(tmp_path, {"small.svg": broken})
    assert state() == {"small.md": "old"}
    template.write_text("<!-- VERSIONS -->: <!-- TABLE --> <!-- MORE -->")
    for attempt in (good.check, lambda: good.write(tmp_path)):
        with pytest.raises(PageError, match="MORE"):
            attempt()
    template.write_text("<!-- VERSIONS -->")
    with pytest.raises(PageError, match="TABLE"):
        good.check()
    assert state() == {"small.md": "old"}
    template.write_text("<!-- VERSIONS -->: <!-- TABLE -->")
    good.write(tmp_path, {"small.svg": draw})
    assert state() == {"small.md": "1: | a |", "small.svg": "new"}


def test_a_file_that_was_not_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.md"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
