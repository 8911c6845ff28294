"""A disk that is full from the n-th step of a save on, for every n: what was there stays, and nothing half is left."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.model.formats import gguf
from embedwright.model.formats.nvembed_export import export_nvembed
from embedwright.model.formats.soup import soup

FIXTURES = Path(__file__).parents[3] / "parity" / "fixtures"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Disk:
    """Counts what is done to files below `root`, and refuses everything from step `full_at` on but removing."""

    root: Path | None = None
    full_at = sys.maxsize
    steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > self.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook: called in front of every file operation of this process."""
        if self.root is None or event not in ("open", "os.rename", "os.mkdir", "os.chmod"):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITING):
            return
        if isinstance(args[0], str | bytes | os.PathLike) and Path(os.fsdecode(args[0])).is_relative_to(self.root):
            self.step()


@pytest.fixture(scope="module")
def hooked() -> Disk:
    disk = Disk()
    sys.addaudithook(disk.hook)  # there is no way to take one away: it does nothing without a root
    return disk


@pytest.fixture
def full_disk(hooked: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    fsync = os.fsync

    def synced(handle: int) -> None:
        if hooked.root is not None:
            hooked.step()
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)

    @contextmanager
    def full(at: int = sys.maxsize) -> Iterator[Disk]:
        hooked.root, hooked.full_at, hooked.steps = tmp_path / "disk", at, 0
        try:
            yield hooked
        finally:
            hooked.root = None

    return full


def listing(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")}


Write = Callable[[Path], Any]


@pytest.fixture(scope="module")
def writers(tiny_embedder: Callable[..., Embedder], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Write]:
    root = tmp_path_factory.mktemp("models")
    ours, stock = tiny_embedder("latent"), tiny_embedder("mean")
    stock.save(root / "a")
    with torch.no_grad():
        stock.network.backbone.norm.weight += 0.1
    stock.save(root / "b")
    adapter = Embedder.load(root / "a").add_lora(rank=2)
    with torch.no_grad():
        for name, parameter in adapter.network.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    released = Embedder.load(FIXTURES / "nvembed-tiny-v1")
    return {
        "ours": ours.save,
        "stock": stock.save,
        "adapter": adapter.save,
        "export": lambda out: export_nvembed(released, out),
        "soup": lambda out: soup([root / "a", root / "b"], out),
    }


@pytest.mark.parametrize("place", ["new", "empty", "below/new"])
@pytest.mark.parametrize("what", ["ours", "stock", "adapter", "export", "soup"])
def test_a_full_disk_leaves_all_or_nothing(
    what: str, place: str, writers: dict[str, Write], full_disk: Any, tmp_path: Path
) -> None:
    disk, write = tmp_path / "disk", writers[what]
    disk.mkdir()
    out = disk / place
    if place == "empty":
        out.mkdir(mode=0o750)
    before = listing(disk)
    with full_disk() as counted:
        write(out)
    steps, whole = counted.steps, set(listing(disk))
    assert steps > 10

    def remove() -> None:
        shutil.rmtree(out)
        if place == "empty":
            out.mkdir(mode=0o750)
        elif place == "below/new":
            out.parent.rmdir()

    def fail(at: int) -> None:
        with pytest.raises(OSError, match="No space left") as raised, full_disk(at):
            write(out)
        assert not isinstance(raised.value, InputError)

    remove()
    # only the first and the last steps depend on the place
    for at in range(steps - 1) if place == "new" else (0, 1, 2, 3, steps // 2, steps - 3, steps - 2):
        fail(at)
        assert listing(disk) == before, f"stopped at step {at} of {steps}"
    write(out)
    assert set(listing(disk)) == whole
    remove()
    fail(steps - 1)  # the sync of the parent folder, after the rename
    assert set(listing(disk)) == whole
    assert not [name for name in whole if name.rpartition("/")[2].startswith(".")]


def test_a_conversion_is_whole_or_not_there(
    writers: dict[str, Write], full_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_embedder: Any
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(disk / "cache"))
    model = tiny_embedder("mean")
    model.network.backbone.config._name_or_path = ""
    monkeypatch.setattr(gguf, "_read", lambda file: (model.network.backbone, model.tokenizer))
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    with full_disk() as counted:
        out = gguf.convert_gguf(file)
    whole = set(listing(disk))
    shutil.rmtree(disk / "cache")
    for at in range(counted.steps - 1):
        with pytest.raises(OSError, match="No space left"), full_disk(at):
            gguf.convert_gguf(file)
        left = set(listing(disk))  # the lock's folder stays; an error after the last rename finds all in place
        assert left <= {"cache", "cache/gguf"} or left == whole, f"stopped at step {at}"
        shutil.rmtree(disk / "cache", ignore_errors=True)
    assert gguf.convert_gguf(file) == out
    assert set(listing(disk)) == whole


def test_a_damaged_conversion_does_not_survive_a_full_disk(
    full_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_embedder: Any
) -> None:
    """A full disk while a damaged conversion is made again leaves none, not the damaged one."""
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "disk"))
    model = tiny_embedder("mean")
    monkeypatch.setattr(gguf, "_read", lambda file: (model.network.backbone, model.tokenizer))
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    out = gguf.convert_gguf(file)
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(OSError, match="No space left"), full_disk(5):
        gguf.convert_gguf(file)
    assert list(out.parent.iterdir()) == []
    assert gguf.convert_gguf(file) == out
