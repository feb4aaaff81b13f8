"""The library of CPU kernels: its own check (native/check), and what is built with and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from hf_fp8.formats import native

pytestmark = pytest.mark.hostless

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "native/check/check.cpp"
COMPILERS = ("c++", "g++", "clang++")


def output_of(*command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    env, both = {**os.environ, **(env or {})}, subprocess.STDOUT
    done = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=both)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def program(*names: str) -> str:
    for name in names:
        if (found := shutil.which(name)) is not None:
            return found
    pytest.skip(f"needs {' or '.join(names)}")


def says_right(output: str) -> set[str]:
    """The instruction sets that the check found right."""
    lines = [line.split(": ") for line in output.splitlines()]
    assert lines[-1][0] == "scalar", output
    return {name for name, found in lines if found.endswith(" are right")}


def check_library(library: Path, folder: Path) -> set[str]:
    if sys.platform != "linux":
        pytest.skip("only Linux links programs to a library that is made for being loaded")
    compiler, out = program(*COMPILERS), folder / "check"
    output_of(compiler, "-std=c++17", "-O2", CHECK, library, f"-Wl,-rpath,{library.parent}", "-pthread", "-o", out)
    return says_right(output_of(out))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build needs, so that it leaves nothing in the original."""
    for name in ("native", "hf_fp8"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    return tmp_path / "tree"


def build(tree: Path, kind: str, **env: str) -> tuple[Path, str]:
    """(the wheel or sdist, what was printed), as pip builds it from `tree`, with the setuptools that is here."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    output = output_of(sys.executable, "-c", code, cwd=tree, env=env)
    (found,) = (tree / "dist").iterdir()
    return found, output


def test_installed_library_agrees_with_plain_loops(tmp_path: Path) -> None:
    if not native.FILE.exists():
        pytest.skip(str(native.why_not()))
    assert "scalar" in check_library(native.FILE, tmp_path)


@pytest.mark.slow
def test_wheel_for_every_python_of_a_platform(tree: Path, tmp_path: Path) -> None:
    program(*COMPILERS)
    wheel, _ = build(tree, "wheel")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    zipfile.ZipFile(wheel).extract("hf_fp8/formats/_native.so", tmp_path)
    assert "scalar" in check_library(tmp_path / "hf_fp8/formats/_native.so", tmp_path)


def test_without_a_compiler_there_is_a_wheel_without_the_library(tree: Path, tmp_path: Path) -> None:
    nothing = program("false")
    wheel, output = build(tree, "wheel", CC=nothing, CXX=nothing)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert 'warning: BuildLibrary: building extension "hf_fp8.formats._native" failed' in output
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "import hf_fp8.formats.native as n; print(n.__file__, n.why_not(), sep='\\n')"
    env = {"PYTHONPATH": str(tmp_path / "installed"), native.VARIABLE: ""}
    file, why = output_of(sys.executable, "-c", code, cwd=tmp_path, env=env).splitlines()[-2:]
    assert Path(file).is_relative_to(tmp_path) and "without its library of CPU kernels" in why


def test_sdist_has_the_sources(tree: Path) -> None:
    sdist, _ = build(tree, "sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "native").rglob("*") if path.suffix in (".cpp", ".h")}
    assert {"native/common.h", "native/interface.cpp"} <= sources <= names
    assert "setup.py" in names and not any(name.endswith(".so") for name in names)


@pytest.mark.slow
def test_neon_in_an_emulator(tmp_path: Path) -> None:
    compiler, emulator = program("aarch64-linux-gnu-g++"), program("qemu-aarch64", "qemu-aarch64-static")
    sources = sorted((ROOT / "native").glob("*.cpp"))
    out = tmp_path / "check"
    output_of(compiler, "-std=c++17", "-O2", "-static", *sources, CHECK, "-pthread", "-o", out)
    assert says_right(output_of(emulator, out)) == {"neon", "scalar"}
