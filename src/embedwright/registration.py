"""Registers our model type with transformers once transformers is loaded, and never loads transformers itself.

So after `import embedwright`, `AutoModel` and sentence-transformers open our folders, whichever is imported first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def register_with_transformers() -> None:
    """Registers now if transformers is loaded, else right after it is."""
    if "transformers" in sys.modules:
        import_module("embedwright.model")
    elif not any(isinstance(finder, _WhenLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenLoaded())


class _WhenLoaded(MetaPathFinder):
    """An import hook for transformers alone. It leaves `sys.meta_path` once transformers is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                sys.meta_path.remove(self)
                import_module("embedwright.model")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # only of this spec's own loader
        return spec
