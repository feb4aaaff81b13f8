"""Packages import one way, no module imports itself through others; importing the package starts no GPU and no Triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_fp8

pytestmark = pytest.mark.hostless

PACKAGE = Path(hf_fp8.__file__).parent
# Each imports only from those before it; the files at the top (errors, version first, then cli) have places of their own.
ORDER = (
    "errors", "version", "formats", "kernels", "nn", "checkpoint", "loading", "integrations", "quantization", "evaluation",
    "recipes", "cli", "",
)  # fmt: skip
# From here on transformers may be imported; before, one file does, for the grouped matmul of its experts.
FIRST_WITH_TRANSFORMERS = "loading"
BEFORE_WITH_TRANSFORMERS = {"nn.expert_weights"}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> tuple[set[str], set[str]]:
    """(modules of the package, packages outside) that a file imports, anywhere in it."""
    inside, outside = set(), set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".") if package else []
            base = base[: len(base) - node.level + 1]
            target = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                below = f"{target}.{alias.name}" if target else alias.name
                inside.add(below if below in known else target)
    return inside, outside


def place(name: str) -> int:
    return ORDER.index(name.partition(".")[0])


def test_packages_import_from_those_before_them() -> None:
    for name, path in modules().items():
        for target in imports(name, path)[0]:
            assert place(target) <= place(name), f"{name or 'hf_fp8'} imports {target}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: imports(name, path)[0] - {name} for name, path in modules().items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, with the cycle


def test_who_knows_transformers() -> None:
    found = {name for name, path in modules().items() if "transformers" in imports(name, path)[1]}
    assert {name for name in found if place(name) < ORDER.index(FIRST_WITH_TRANSFORMERS)} <= BEFORE_WITH_TRANSFORMERS


def test_peft_is_known_in_one_place() -> None:
    found = {name for name, path in modules().items() if "peft" in imports(name, path)[1]}
    assert all(name.startswith("integrations.peft") for name in found)


def test_the_top_is_short() -> None:
    found = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(found) <= 14, found


def test_functions_fit_on_a_screen() -> None:
    """60 lines, docstring and signature included. Their complexity is ruff's matter (C901)."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


def test_import_is_lean() -> None:
    code = (
        "import sys, torch; from transformers import CompressedTensorsConfig, PreTrainedModel;"
        "before = torch.cuda.is_initialized(), 'triton' in sys.modules;"
        "import hf_fp8;"
        "assert (torch.cuda.is_initialized(), 'triton' in sys.modules) == before and 'peft' not in sys.modules;"
        "ours = sorted(name for name in sys.modules if name.startswith('hf_fp8.kernels.triton.'));"
        "assert ours == [f'hf_fp8.kernels.triton.{name}' for name in ('entries', 'granularity', 'support')], ours;"
        "print('lean')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "lean\n"
