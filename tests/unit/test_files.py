"""Writing whole or not at all: failures, links, mount points and modes."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from embedwright.errors import InputError, OutputExistsError
from embedwright.files import (
    append_line,
    check_file,
    check_folder,
    check_new_folder,
    file_name,
    locked,
    remove_leftovers,
    whole_file,
    whole_folder,
    whole_lines,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyError), whole_file(tmp_path / "a.txt") as temp:
        temp.write_text("half")
        raise KeyError
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_file_keeps_its_mode_and_its_link(tmp_path: Path) -> None:
    target = tmp_path / "real" / "a.json"
    write_json(target, {"a": 1})
    target.chmod(0o640)
    (tmp_path / "link.json").symlink_to(target)
    write_json(tmp_path / "link.json", {"a": 2})
    assert (tmp_path / "link.json").is_symlink()
    assert target.read_text() == '{\n  "a": 2\n}\n'
    assert target.stat().st_mode & 0o777 == 0o640


def test_the_temporary_name_keeps_the_suffixes(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.jsonl.gz") as temp:
        assert temp.name.startswith(".a.")
        assert temp.name.endswith(".jsonl.gz")
        temp.write_bytes(b"")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with whole_folder("~/model") as temp:
        (temp / "config.json").write_text("{}")
    assert names(tmp_path) == ["model"]


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_folder(tmp_path / "out") as temp:
        (temp / "half").write_text("")
        raise KeyError
    assert names(tmp_path) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_others_may_read_what_the_umask_allows_whichever_writer_made_it(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "one.safetensors") as temp:
            save_file({"a": torch.zeros(1)}, temp)  # makes its files with mode 0o600
        with whole_folder(tmp_path / "model") as folder:
            save_file({"a": torch.zeros(1)}, folder / "weights.safetensors")
            (folder / "run.sh").touch(0o755)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("one.safetensors", "model/weights.safetensors")]
    assert modes == [mode, mode]
    assert (tmp_path / "model/run.sh").stat().st_mode & 0o777 == 0o755 & ~umask


def test_an_empty_folder_keeps_its_mode_also_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole_folder(tmp_path / "link") as temp:
        (temp / "config.json").write_text("{}")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["config.json"]
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o750
    assert names(tmp_path) == ["link", "real"]


def test_a_mount_point_is_filled_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mount)
    before = mount.stat().st_ino
    with whole_folder(mount) as temp:
        (temp / "config.json").write_text("{}")
        (temp / "sub").mkdir()
        (temp / "sub" / "weights").write_text("w")
    assert names(mount) == ["config.json", "sub"]
    assert mount.stat().st_ino == before


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), lambda p: (p.mkdir(), (p / "x").write_text(""))])
def test_a_place_that_holds_something_is_refused_first(tmp_path: Path, make: object) -> None:
    make(tmp_path / "out")  # type: ignore[operator]
    with pytest.raises(OutputExistsError, match="out"):
        check_new_folder(tmp_path / "out")
    with pytest.raises(OutputExistsError), whole_folder(tmp_path / "out"):
        pytest.fail("nothing may be done before the check")


def test_a_folder_that_was_filled_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="another process"), whole_folder(tmp_path / "out") as temp:
        (temp / "mine").write_text("")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["theirs"]


def test_parents_that_were_made_go_with_a_failed_write(tmp_path: Path) -> None:
    for write in (whole_file, whole_folder):
        with pytest.raises(KeyError), write(tmp_path / "a" / "b" / "out"):
            raise KeyError
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["rename", "chmod"])
def test_a_full_disk_leaves_an_empty_folder_empty(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir(mode=0o750)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, call, full)
    with pytest.raises(OSError, match="No space") as raised, whole_folder(tmp_path / "out") as temp:
        (temp / "config.json").write_text("{}")
    assert not isinstance(raised.value, InputError)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == []


def test_a_mount_point_gets_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    rename = Path.rename

    def stop_at_json(self: Path, target: Path) -> Path:
        if self.suffix == ".json":
            raise OSError(errno.EIO, "disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop_at_json)
    with pytest.raises(OSError, match="disk"), whole_folder(tmp_path) as temp:
        (temp / "config.json").write_text("{}")
        (temp / "sub").mkdir()
        (temp / "weights").write_text("w")
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for check in (check_new_folder, check_folder, check_file):
        with pytest.raises(InputError, match="file is a file"):
            check(tmp_path / "file" / "below" / "out")
        with pytest.raises(InputError, match="loop"):
            check(tmp_path / "loop" / "out")
    with pytest.raises(OutputExistsError, match="is a folder"):
        check_file(tmp_path)
    with pytest.raises(OutputExistsError, match="it is a file"):
        check_folder(tmp_path / "file")
    assert check_folder(tmp_path) == check_new_folder(tmp_path / "new").parent == tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    for check in (check_new_folder, check_folder, check_file):
        with pytest.raises(InputError, match="no permission"):
            check(tmp_path / "new" / "out")
    assert names(tmp_path) == ["file", "loop"]


def test_a_file_that_grows_has_whole_lines_only(tmp_path: Path) -> None:
    file = tmp_path / "new" / "log.jsonl"
    assert whole_lines(file) == []
    for line in ("one", "zwölf \u2028 parts", ""):
        append_line(file, line)
    assert whole_lines(file) == ["one", "zwölf \u2028 parts", ""]
    whole = file.read_bytes()
    for torn in (b"thr", "ö".encode()[:1]):
        file.write_bytes(whole + torn)
        assert whole_lines(file) == ["one", "zwölf \u2028 parts", ""] and file.read_bytes() == whole + torn
        append_line(file, "three")
        assert file.read_bytes() == whole + b"three\n"


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [".hidden", ".gitignore", ".cache.json", "a.0123456789ab", "deep/.x"]
    (tmp_path / "deep").mkdir()
    for name in kept:
        (tmp_path / name).write_text("")
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a kill cleans up nothing
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with whole_file(tmp_path / "deep" / "a.tar.gz") as temp, whole_folder(tmp_path / "b") as folder:
            temp.write_text("x")
            (folder / "inside").write_text("x")
            raise ZeroDivisionError
    assert temp.exists() and folder.exists()
    remove_leftovers(tmp_path)
    assert not temp.exists() and not folder.exists()
    assert all((tmp_path / name).exists() for name in kept)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("minilm", "minilm"),
        ("org/model-7B", "org__model-7B"),
        ("../runs/a b/model/", "runs__a_b__model"),
        ("http://127.0.0.1:8000/v1#m", "http_____127.0.0.1_8000__v1_m"),
        ("x" * 300 + "end", "x" * 197 + "end"),
        (".", "_"),
    ],
)
def test_any_name_becomes_a_name_of_a_file(name: str, written: str, tmp_path: Path) -> None:
    assert file_name(name) == written
    write_text(tmp_path / written, "there")


def test_a_lock_lets_one_in_at_a_time_and_leaves_no_file(tmp_path: Path) -> None:
    inside, most = 0, list[int]()

    def enter() -> None:
        nonlocal inside
        for _ in range(20):
            with locked(tmp_path / "new" / ".lock"):
                inside += 1
                most.append(inside)
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 80 and not list((tmp_path / "new").iterdir())


def test_without_locks_on_a_file_system_nobody_is_held_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*given: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with locked(tmp_path / ".lock"), locked(tmp_path / ".lock2"):
        pass
    monkeypatch.setattr("fcntl.flock", lambda *given: (_ for _ in ()).throw(OSError(errno.EIO, "the disk failed")))
    with pytest.raises(OSError, match="failed"), locked(tmp_path / ".lock"):
        pass
