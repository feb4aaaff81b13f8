"""What README.md and docs/ say of the program: names, options, commands, and what commands print exist as they are shown."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from support.build import IDS, load, tiny_llama, write
from support.commands import run
from support.markdown import PAGES, ROOT, blocks, commands, spans

import hf_fp8
from benchmarks.pages import quantizing
from hf_fp8 import FP8Config, cli, errors
from hf_fp8.formats import native
from hf_fp8.quantization.observers import OBSERVERS

pytestmark = pytest.mark.hostless

every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


# --- paths and names ---


@every_page
def test_paths_exist(path: Path) -> None:
    text = path.read_text()
    for found in re.findall(r"(?<![\w/.-])((?:scripts|benchmarks|docs|tests|hf_fp8)/[\w./-]*\w)(?:::(\w+))?", text):
        assert (ROOT / found[0]).exists() or (ROOT / f"{found[0]}.py").exists(), found
        assert not found[1] or f"def {found[1]}(" in (ROOT / found[0]).read_text(), found
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (path.parent / picture).exists(), picture


def resolve(dotted: str) -> Any:
    """What `hf_fp8.a.b` is. Raises AttributeError, ModuleNotFoundError."""
    found: Any = hf_fp8
    for part in dotted.split(".")[1:]:
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(f"{found.__name__}.{part}")
    return found


@every_page
def test_names_of_the_package_exist(path: Path) -> None:
    for dotted in re.findall(r"(?<![\w/`-])`?(hf_fp8(?:\.[A-Za-z_]\w*)+)", path.read_text()):
        resolve(dotted)


@cache
def words() -> set[str]:
    """Every word of the sources: a name that is shown, and is none of them, was renamed or never was."""
    files = (file for folder in ("hf_fp8", "benchmarks", "tests") for file in (ROOT / folder).rglob("*.py"))
    return {word for file in files if file != Path(__file__) for word in re.findall(r"\w+", file.read_text())}


@every_page
def test_identifiers_are_words_of_the_sources(path: Path) -> None:
    shown = {span for span in spans(path.read_text()) if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*(\(\))?", span)}
    assert {span for span in shown if not set(re.findall(r"\w+", span)) <= words()} == set()


def test_the_tables_of_the_design_name_every_module() -> None:
    tables = (ROOT / "docs" / "design.md").read_text().partition("## Packages and modules")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `([\w/]+)` \|", tables, re.MULTILINE)
    files = [path.relative_to(ROOT / "hf_fp8") for path in (ROOT / "hf_fp8").rglob("*.py")]
    modules = {path.with_suffix("").as_posix() for path in files if path.name != "__init__.py"}
    assert sorted(named) == sorted({*modules, "kernels"})


@every_page
def test_rows_of_a_table_have_its_columns(path: Path) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", path.read_text() + "\n", re.MULTILINE):
        rows = [re.sub(r"`[^`]*`", "", row).count("|") for row in table.splitlines()]
        assert len(set(rows)) == 1, table


def test_errors_in_the_table_of_formats_exist() -> None:
    text = (ROOT / "docs" / "formats.md").read_text().partition("## What is refused")[2].partition("\n## ")[0]
    named = re.findall(r"\| `(\w+)` \|$", text, re.MULTILINE)
    assert {name for name in named if not issubclass(getattr(errors, name), hf_fp8.FP8Error)} == set()
    assert [issubclass(getattr(errors, name), ValueError) for name in named[:6]] == [True] * 6
    assert {kind.__name__ for kind in errors.CheckpointError.__subclasses__()} == set(named[:6])


# --- options ---

PUBLIC = {
    name: value
    for name, value in ((name, getattr(hf_fp8, name)) for name in hf_fp8.__all__)
    if callable(value) and not (isinstance(value, type) and issubclass(value, Exception))
}
# Keywords of others.
FOREIGN = {
    "ep_size", "fsdp_size", "fsdp_version", "fullgraph", "init_lora_weights",
    "quantization_config", "safe_merge", "pp_size", "state_dict",
    "tp_size", "use_kernels", "weights_only",
}  # fmt: skip


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """(name, call) of whatever the package offers that a piece of code calls: FP8Config(...), hf_fp8.merging(...), ..."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in PUBLIC or re.fullmatch(r"hf_fp8[\w.]+", name):
                yield f"hf_fp8.{name.removeprefix('hf_fp8.')}", node


def literal(node: ast.expr) -> bool:
    """Whether an argument is a value, and not `...` or a name."""
    try:
        return ... not in [ast.literal_eval(node)]
    except ValueError:
        return False


@every_page
def test_options_in_calls_exist(path: Path) -> None:
    text = path.read_text()
    for source in [*spans(text), *(block.code for block in blocks(text))]:
        for name, call in calls(source):
            given = [word.arg for word in call.keywords if word.arg]
            parameters = inspect.signature(resolve(name)).parameters
            assert {word for word in given if word not in parameters} == set(), f"{name} in {source!r}"
            if name == "hf_fp8.FP8Config" and all(literal(value) for value in (*call.args, *(w.value for w in call.keywords))):
                FP8Config(*map(ast.literal_eval, call.args), **{str(w.arg): ast.literal_eval(w.value) for w in call.keywords})


@every_page
def test_keywords_exist_with_the_values_shown(path: Path) -> None:
    """`backend="int8"` and the like, in lines of text and in tables."""
    offered = {word for function in PUBLIC.values() for word in inspect.signature(function).parameters}
    of_config = set(inspect.signature(FP8Config).parameters)
    for span in spans(path.read_text()):
        if not (found := re.fullmatch(r"([a-z]\w*)=(.*)", span)):
            continue
        name, value = found.groups()
        assert name in offered | FOREIGN, span
        if name in of_config and value and literal(ast.parse(value, mode="eval").body):
            scheme = {"scheme": "FP8_DYNAMIC"} if name in ("ignore", "targets") else {}
            FP8Config(**scheme, **{name: ast.literal_eval(value)})


def choices(option: str) -> set[str]:
    """The values that FP8Config names when it is given another."""
    with pytest.raises(hf_fp8.errors.ConfigError) as error:
        FP8Config(**{option: "other"})
    return set(re.split(r",\s*", str(error.value).rpartition("one of ")[2]))


def test_the_tables_of_options_in_the_readme_are_complete() -> None:
    text = (ROOT / "README.md").read_text()
    rows = {cells[1].strip(): text for text in text.splitlines() if len(cells := text.split("|")) > 3}
    assert FP8Config().get_loading_attributes() == {
        "dequantize": False, "backend": "auto", "experts": "auto", "backward": "exact",
    }  # fmt: skip
    assert {"nothing", "`dequantize=True`"} | {f'`backend="{name}"`' for name in choices("backend") - {"auto"}} <= set(rows)
    assert {'`"auto"` (nothing)'} | {f'`"{name}"`' for name in choices("experts") - {"auto"}} <= set(rows)
    for span in spans(text):
        if span.startswith('{"'):
            FP8Config(**ast.literal_eval(span))


def test_schemes_and_observers_in_docs_exist() -> None:
    text = (ROOT / "docs" / "quantizing.md").read_text()
    table = text.partition("| scheme | weights |")[2].partition("\n\n")[0]
    named = {name for name in re.findall(r"`(\w+)`", table) if name.startswith(("FP8", "INT8", "MX", "W4", "W8"))}
    assert {hf_fp8.SCHEMES[name] for name in named} == set(hf_fp8.SCHEMES.values())  # some have two names
    sentence = text.partition("`calibrate(model, observer=...)`")[2].partition(" or ")[0]
    assert set(re.findall(r'"(\w+)"', sentence)) == set(OBSERVERS)


# --- commands ---


@every_page
def test_commands_are_taken(path: Path) -> None:
    """Scripts and `hf-fp8` know every subcommand, option and choice that is shown."""
    for given in commands(path.read_text()):
        if "..." in given:  # an option of which any value may stand there
            given = given[: given.index("...") - 1]
        name, *arguments = given
        if name == "pytest":
            (marker,) = re.findall(r"-m (\w+)", " ".join(arguments))
            assert f'"{marker}: ' in (ROOT / "pyproject.toml").read_text(), given
        elif arguments:
            (taken_by_cli if name == "hf-fp8" else taken_by_script)(name, arguments)


def taken_by_cli(_: str, arguments: list[str]) -> None:
    command: Any = typer.main.get_command(cli.app)
    if not arguments[0].startswith("-"):
        assert arguments[0] in command.commands, arguments
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if arguments and not {"--help", "--version"} & set(arguments):
        command.make_context("hf-fp8", arguments)  # raises for what it does not know, or lacks


def taken_by_script(script: str, arguments: list[str]) -> None:
    """By the program that the script runs, `python -m MODULE "$@"`, or a module of the name that comes first."""
    (module,) = re.findall(r'^exec \.venv/bin/python -m "?([\w.$]+)', (ROOT / script).read_text(), re.MULTILINE)
    if module.endswith("$1"):
        module, arguments = module.replace("$1", arguments[0]), arguments[1:]
    try:
        importlib.import_module(module).arguments().parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{script} does not take {shlex.join(arguments)}")


# --- what `hf-fp8` prints ---


def shown() -> list[tuple[str, str]]:
    """(command, what the page shows that it prints), in the order of the page; one command is there twice."""
    text = (ROOT / "docs" / "quantizing.md").read_text()
    session = [block.code.partition("\n")[::2] for block in blocks(text) if block.code.startswith("$ hf-fp8 ")]
    return [(command.removeprefix("$ hf-fp8 "), printed) for command, printed in session]


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def without_numbers(text: str) -> list[str]:
    """Words; numbers that depend on the model and the machine are all the same, and so are MB and GB."""
    text = re.sub(r"(?<![\w.])[+-]?\d[\d.,]*(?:e[+-]\d+)?x?\b", "0", text)
    return re.sub(r"\b[MG]B\b", "bytes", text).split()


def help_of(text: str) -> tuple[list[str], dict[str, tuple[list[str], list[str]]]]:
    """(words outside of boxes, name -> (choices and ranges, words about it)) of what `--help` prints.

    Boxes, columns, names of types, and whether a default of None is said, differ between versions of typer and Rich.
    """
    outside: list[str] = []
    entries: dict[str, tuple[list[str], list[str]]] = {}
    about: list[str] = []
    for line in re.sub(r" \[default: None\]", "", plain(text)).splitlines():
        row = re.fullmatch(r"\s*[│|] ?(.*)[│|]\s*", line)
        if row is None:
            outside += [] if re.match(r"\s*[╭╰+]", line) else re.findall(r"[\w.,:;'-]+", line)
        elif row[1].startswith(" "):  # goes on from the line above
            about += re.split(r"\s{2,}", row[1].strip())[-1].split()
        else:
            name, *kind, said = re.split(r"\s{2,}", row[1].strip(" *"))
            about = said.split()
            entries[name.lower()] = re.findall(r"\w+(?=\|)|(?<=\|)\w+|\[x.*?\]", " ".join(kind)), about
    return outside, entries


def test_the_session_is_that_of_the_script() -> None:
    assert [command for command, _ in shown()] == [command for command, _ in quantizing.SESSION]


def test_commands_print_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The session of the page over a tiny model of SmolLM2's kind: every word, all but the numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # or the program would be `python -m pytest...`
    for name, value in quantizing.TERMINAL.items():
        monkeypatch.setenv(name, value)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *"abcdefgh"])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained("dense")
    tiny_llama(tie_word_embeddings=True).save_pretrained("dense")
    Path("prose.txt").write_text("a b c d e f g h " * 40)
    for (command, printed), (_, code) in zip(shown(), quantizing.SESSION, strict=True):
        capsys.readouterr()
        run(*shlex.split(command), code=code)
        found = plain("".join(capsys.readouterr())).replace(f"{tmp_path.resolve()}/", "")
        if "--help" in command:
            (words_found, entries), (words_shown, shown_entries) = help_of(found), help_of(printed)
            assert words_found == words_shown, command
            assert set(entries) == set(shown_entries), command
            assert {name: entry for name, entry in entries.items() if entry != shown_entries[name]} == {}, command
        elif "would run:" in printed and native.why_not() is not None:  # the page shows what runs with it
            found, printed = (text.partition("would run:")[0] for text in (found, printed))
            assert without_numbers(found) == without_numbers(printed), command
        else:
            assert without_numbers(found) == without_numbers(printed), command


def test_a_report_of_quality_prints_what_is_shown(tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path / "fp8")
    model = load(tmp_path / "fp8", FP8Config(backend="scaled_mm"))
    report = hf_fp8.quality(tiny_llama().float(), model, [{"input_ids": IDS}], text=IDS.flatten(), window=12)
    table, footer = (block.code for block in blocks((ROOT / "docs" / "quality.md").read_text()))
    assert without_numbers(report.footer()) == without_numbers(footer)
    assert report.footer().splitlines()[-1] == footer.splitlines()[-1]  # with the numbers of the rule
    found = str(report.worst(10)).splitlines()
    assert found[0].split() == table.splitlines()[0].split()
    assert {len(line.split()) for line in found[1:]} == {len(line.split()) for line in table.splitlines()[1:]}
