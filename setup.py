"""Builds the library of CPU kernels in native/ and puts it into the wheel; everything else is in pyproject.toml.

The library has a plain C interface and is loaded with ctypes, so that one wheel for a platform (py3-none-<platform>) serves
every version of Python and of torch. Without a C++ compiler hf-fp8 installs without it, and weights are dequantized on CPUs.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# -O3: kernels rely on their inner loops being unrolled. No exceptions: they would have to cross C. No LTO, which some Pythons
# are built with: each file is for other instructions. No trapping math: selections of floats become vectors. -w: GCC 12 warns
# of its own AVX-512 headers, in 24 000 lines.
COMPILE = [
    "-std=c++17", "-O3", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-fno-lto", "-g0", "-w",
]  # fmt: skip
# Plain C++ multiplies at a tenth of dense speed however it is compiled, and took a third of the time: 47 s, with -O1 13.
ALSO = {"scalar.cpp": ["-O1"]}
LIBRARY = Extension(
    "hf_fp8.formats._native",
    sources=sorted(str(path) for path in Path("native").glob("*.cpp")),
    depends=["setup.py", *sorted(str(path) for path in Path("native").glob("*.h"))],
    extra_compile_args=COMPILE,
    extra_link_args=["-Wl,--as-needed", "-s"] if sys.platform == "linux" else [],
    language="c++",
    optional=True,  # a failure is a warning
)


class BuildLibrary(build_ext):
    """A shared library without Python's interface."""

    def get_ext_filename(self, ext_name: str) -> str:
        return os.path.join(*ext_name.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        """Compile all files at once: one after the other takes two minutes."""
        one_by_one = self.compiler.compile

        def compile_all(sources: list[str], *, extra_postargs: list[str], **options: object) -> list[str]:
            def compile_one(source: str) -> list[str]:
                return one_by_one([source], extra_postargs=[*extra_postargs, *ALSO.get(Path(source).name, [])], **options)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [path for paths in pool.map(compile_one, sources) for path in paths]

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        except Exception:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # one of another time would get into the wheel
            raise
        finally:
            self.compiler.compile = one_by_one

    def copy_extensions_to_source(self) -> None:
        """Beside native.py, where `pip install -e` looks for it; none at all rather than that of another time."""
        Path(self.get_ext_fullpath(LIBRARY.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """A wheel for every Python; for every platform, too, if the library could not be built."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        library = Path(self.bdist_dir).rglob("_native.so")
        return "py3", "none", platform if any(library) else "any"


setup(ext_modules=[LIBRARY], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
