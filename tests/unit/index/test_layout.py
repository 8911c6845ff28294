from __future__ import annotations

from pathlib import Path

import pytest

from embedwright.index.layout import Layout, Part


def test_a_layout_comes_back(tmp_path: Path) -> None:
    assert Layout.read(tmp_path) is None
    layout = Layout(chunk_tokens=5, metadata={"n": "int"}, parts=(Part(folder=".", deleted=(3, 1)),))
    layout.write(tmp_path)
    assert Layout.read(tmp_path) == layout
    with pytest.raises(ValueError, match="has overlap 0, this is 2"):
        layout.check_same(tmp_path, chunk_tokens=5, overlap=2)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"parts": [{"folder": "."}], "more": 1}'])
def test_another_file_is_no_layout(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match="not the index of this version"):
        Layout.read(tmp_path)
