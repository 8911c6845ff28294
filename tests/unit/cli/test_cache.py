"""`cache list` and `cache clear`: what is shown, what goes, and what stays and why."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from fake_llm import command

from embedwright.files import locked


@pytest.fixture(autouse=True)
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path))
    for name in ("data/new.arrow", "data/old.arrow", "gguf/model/weights"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 2_000_000)
    os.utime(tmp_path / "data/old.arrow", (0, time.time() - 40 * 86_400))
    return tmp_path


def left(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_list_shows_names_sizes_ages_and_who_uses_them(
    entries: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (entries / "data/new.arrow").open():
        assert command(monkeypatch, "cache", "list") == 0
    new, old, model, total = capsys.readouterr().out.splitlines()
    assert new.split()[:5] == ["2.00", "MB", "0.0", "days", "data/new.arrow"] and str(os.getpid()) in new
    assert old.split() == ["2.00", "MB", "40.0", "days", "data/old.arrow"] and model.endswith("gguf/model")
    assert total.split()[:5] == ["6.00", "MB", "in", "3", "entries"] and str(entries) in total


def test_what_goes_meanwhile_is_not_shown_and_what_is_in_the_making_stays(
    entries: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (entries / "gguf/.other.0123456789ab.5").mkdir()
    found = [*entries.glob("*/*"), entries / "data/.gone.0123456789ab", entries / "gguf/.other.5.lock"]
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: found if pattern == "*/*" else glob(path, pattern))
    with locked(entries / "gguf/.other.5.lock"):
        assert command(monkeypatch, "cache", "list") == 0 and "gone" not in capsys.readouterr().out
        assert command(monkeypatch, "cache", "clear", "gguf") == 0
    said = capsys.readouterr().out
    assert (
        f"gguf/.other.0123456789ab.5 stays: process {os.getpid()}" in said
        and (entries / "gguf/.other.0123456789ab.5").is_dir()
    )
    assert command(monkeypatch, "cache", "clear", "gguf") == 0 and not (entries / "gguf/.other.0123456789ab.5").exists()


def test_clear_removes_what_is_named(
    entries: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "cache", "clear") == 2  # not all of it by accident
    assert command(monkeypatch, "cache", "clear", "data/new.arrow", "models") == 2 and len(left(entries)) == 3
    assert "models: not in the cache" in (error := capsys.readouterr().err) and "holds data, gguf" in error
    assert command(monkeypatch, "cache", "clear", "data/new.arrow", "gguf") == 0
    assert left(entries) == ["data/old.arrow"] and "4.00 MB in 2 entries removed" in capsys.readouterr().out


def test_clear_leaves_what_is_young_or_in_use(
    entries: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "cache", "clear", "data", "gguf", "--days", 30) == 0
    assert left(entries) == ["data/new.arrow", "gguf/model/weights"]
    capsys.readouterr()
    with (entries / "gguf/model/weights").open():
        assert command(monkeypatch, "cache", "clear", "data", "gguf") == 0
    said = capsys.readouterr().out
    assert left(entries) == ["gguf/model/weights"] and f"gguf/model stays: process {os.getpid()} has it open" in said
