"""Where conversions are kept, and whose files are trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from embedwright.cache import cache_folder, check_private
from embedwright.errors import InputError


def test_the_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path))
    assert cache_folder("a", "b") == tmp_path / "a" / "b" and not (tmp_path / "a").exists()


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
