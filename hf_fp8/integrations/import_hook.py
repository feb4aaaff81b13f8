"""Calls a function after a library is imported: now if it is imported already, else by a finder on `sys.meta_path`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Finder(MetaPathFinder):
    """Lets the other finders find the library, and wraps its loader so that `then` is called at the end of the import."""

    def __init__(self, library: str, then: Callable[[], None]) -> None:
        self.library, self.then = library, then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.library:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.then)
        return spec


class _Loader(Loader):
    """Wraps the library's own loader, which is unchanged because it may load other modules, too; calls `then` after it."""

    def __init__(self, loader: Any, then: Callable[[], None]) -> None:
        self._loader, self._then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._then()


_finders: dict[str, _Finder] = {}


def after_import(library: str, then: Callable[[], None]) -> None:
    """Call `then` after `library`, a package or a module in one, is imported, before the importing code continues.

    If it is imported already, call `then` now; and again if the library is imported again.
    """
    if library not in _finders:
        _finders[library] = _Finder(library, then)
        sys.meta_path.insert(0, _finders[library])
    if sys.modules.get(library) is not None:
        then()


def cancel(library: str) -> None:
    """Undo `after_import`. Harmless when repeated."""
    finder = _finders.pop(library, None)
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)
