from __future__ import annotations

from embedwright.studies.ablate_table import render


def test_what_is_missing_or_has_failed_is_said() -> None:
    study = {"study": "s", "smoke": False, "failed": {"s/b/seed-1": "failed: hunger"}, "missing": ["b/1"], "cells": []}
    assert render(study).splitlines() == ["s/b/seed-1: failed: hunger", "not whole, missing: b/1"]
    smoke = render(study | {"smoke": True, "missing": [], "failed": {}, "cells": [{"arm": "b"}]})
    assert smoke == "s: smoke test of 1 cells; its scores mean nothing"
