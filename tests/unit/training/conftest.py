"""The folders of other authors that the tests of models make."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("models", Path(__file__).parents[1] / "model" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_models)
family_folder = _models.family_folder
