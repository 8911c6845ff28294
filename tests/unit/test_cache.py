"""Where conversions are kept, and whose files are trusted."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from embedwright.cache import cache_folder, cached, check_private, remove
from embedwright.errors import InputError


def test_the_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path))
    assert cache_folder("a", "b") == tmp_path / "a" / "b" and not (tmp_path / "a").exists()


def test_what_lies_in_the_cache_is_known_with_size_age_and_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path))
    assert cached() == []
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    for name, size in (("data/a.arrow", 10), ("data/.b.lock", 0), ("gguf/model/config.json", 3), ("gguf/model/w/x", 4)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
        os.utime(tmp_path / name, (0, 1000))
    os.utime(tmp_path / "gguf/model/w/x", (0, 5_000_000_000))
    (tmp_path / "data/link").symlink_to(elsewhere)
    with (tmp_path / "gguf/model/w/x").open():
        entries = {entry.name: entry for entry in cached()}
        assert entries["gguf/model"] == ("gguf/model", 7, 5_000_000_000.0, (os.getpid(),))
    assert entries["data/a.arrow"] == ("data/a.arrow", 10, 1000.0, ())
    with (tmp_path / "data/a.arrow").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        os.close(os.dup(file.fileno()))
        assert {entry.name: entry.users for entry in cached()}["data/a.arrow"] == (os.getpid(),)
    for entry in cached():
        remove(entry)
    assert cached() == [] and (elsewhere / "precious").read_text() == "mine"


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o600, 0o444])
def test_what_this_user_alone_can_write_is_trusted(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    file.chmod(mode)
    check_private(file)
    check_private(tmp_path)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_what_others_can_write_is_not_trusted(mode: int, tmp_path: Path) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(InputError, match="other users"):
        check_private(tmp_path)


def test_what_another_user_owns_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(InputError, match="another user"):
        check_private(tmp_path)


def test_a_link_is_not_trusted(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(InputError, match="link"):
        check_private(link)


def test_what_is_not_there_is_no_matter_of_trust(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_private(tmp_path / "none")
