from __future__ import annotations

import json
import logging
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from embedwright.errors import InputError
from embedwright.training.run.checkpoint import (
    RunState,
    newest,
    read_state,
    restore_optimizer,
    restore_weights,
    save_checkpoint,
)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    weights, rest = ([p for p in model.parameters() if (p.ndim == 2) == two] for two in (True, False))
    return torch.optim.AdamW(
        [
            {"params": weights, "lr": 1e-2, "lr_ratio": 1.0, "weight_decay": 0.1},
            {"params": rest, "lr": 3e-3, "lr_ratio": 0.3, "weight_decay": 0.0},
        ]
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        model(torch.randn(6, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, step: int, *, stage: int = 0, keep: int = 9, seed: int = 0) -> Path:
    model = network(seed)
    optimizer = adamw(model)
    train(model, optimizer, range(1))
    state = RunState(stage=stage, step=step, recipe="r", data="d")
    return save_checkpoint(folder, state, dict(model.named_parameters()), optimizer, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model = network()
    optimizer = adamw(model)
    train(model, optimizer, range(5))
    state = RunState(stage=1, step=5, recipe="abc", data="def")
    optimizer.param_groups[0]["lr"] = 1 / 3  # a number whose decimals do not end
    folder = save_checkpoint(tmp_path, state, dict(model.named_parameters()), optimizer, keep=2)
    assert newest(tmp_path) == folder and read_state(folder) == state

    other = network(seed=1)
    fresh = adamw(other)
    restore_weights(folder, dict(other.named_parameters()))
    restore_optimizer(folder, fresh)
    saved, restored = optimizer.state_dict(), fresh.state_dict()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert saved["state"].keys() == restored["state"].keys() and len(saved["state"]) == 6
    for index, values in saved["state"].items():
        assert values.keys() == restored["state"][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in values.items():
            assert value.dtype == restored["state"][index][name].dtype
            assert torch.equal(value, restored["state"][index][name])
    for a, b in zip(saved["param_groups"], restored["param_groups"], strict=True):
        assert {**a, "betas": list(a["betas"])} == {**b, "betas": list(b["betas"])}
    for run, its in ((model, optimizer), (other, fresh)):
        train(run, its, range(5, 9))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_keep_their_precision(tmp_path: Path) -> None:
    weights = {"a": torch.randn(3, 4, dtype=torch.bfloat16), "b": torch.randn(4, 3).T, "c": torch.tensor(1.5)}
    state = RunState(0, 1, "r", "d")
    folder = save_checkpoint(tmp_path, state, weights, torch.optim.SGD([torch.zeros(1)], lr=1.0), keep=1)
    found = load_file(folder / "weights.safetensors")  # by the library that defines the format
    assert found.keys() == weights.keys()
    assert all(found[n].dtype == weights[n].dtype and torch.equal(found[n], weights[n]) for n in weights)
    own = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
    restore_weights(folder, own)
    assert all(torch.equal(own[n], weights[n]) for n in weights)
    with pytest.raises(InputError, match=r"checkpoint and model differ in \['d'\]"):
        restore_weights(folder, own | {"d": torch.ones(1)})


@pytest.mark.parametrize(("written", "read"), [(True, None), (None, True)])
def test_the_kernel_of_the_optimizer_is_that_of_the_device_at_hand(
    tmp_path: Path, written: bool | None, read: bool | None
) -> None:
    model, other = network(), network()
    made, fresh = (
        torch.optim.AdamW(model.parameters(), fused=written),
        torch.optim.AdamW(other.parameters(), fused=read),
    )
    train(model, made, range(3))
    folder = save_checkpoint(tmp_path, RunState(0, 3, "r", "d"), dict(model.named_parameters()), made, keep=1)
    restore_weights(folder, dict(other.named_parameters()))
    restore_optimizer(folder, fresh)
    assert [group["fused"] for group in fresh.param_groups] == [read]
    for run, its in ((model, made), (other, fresh)):
        train(run, its, range(3, 6))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(ValueError, match="group"):
        restore_optimizer(folder, torch.optim.AdamW(network().parameters()))


# ---- damage


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(bytes(content))


def missing(file: Path) -> None:
    file.unlink()


def emptied(file: Path) -> None:
    file.write_bytes(b"")


FILES = ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
DAMAGES = [(d, f) for d in (truncated, flipped, missing, emptied) for f in FILES if (d, f) != (flipped, FILES[3])]


@pytest.mark.parametrize(("damage", "file"), DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], file: str
) -> None:
    first, second = save(tmp_path, 10), save(tmp_path, 20)
    damage(second / file)
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == first
    assert str(second) in caplog.text and "damaged" in caplog.text
    assert file in caplog.text or file == "manifest.json"
    assert not second.exists() and len(list(tmp_path.glob("00-0000020.damaged-*"))) == 1
    caplog.clear()
    assert newest(tmp_path) == first and not caplog.text
    again = save(tmp_path, 20)  # the run comes there once more
    assert newest(tmp_path) == again == second


def test_a_flipped_byte_in_the_manifest_never_lets_other_content_through(tmp_path: Path) -> None:
    first, second = save(tmp_path, 10), save(tmp_path, 20)
    content = (second / "manifest.json").read_bytes()
    recipe = range(content.index(b'"recipe": "r"') + 11, len(content))  # what the run is, state.json says
    for i in range(len(content)):
        if i in recipe or content[i : i + 1].isspace():
            continue
        (second / "manifest.json").write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
        found = newest(tmp_path)
        if found == second:
            assert json.loads((second / "manifest.json").read_bytes())["files"] == json.loads(content)["files"]
            continue
        assert found == first
        (aside,) = tmp_path.glob("*.damaged-*")
        aside.rename(second)


def test_with_nothing_whole_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") is None
    for step in (1, 2):
        truncated(save(tmp_path, step) / "state.json")
    assert newest(tmp_path) is None and len(names(tmp_path)) == 2


@pytest.mark.parametrize("room", [0, 100, 900, 1400, 3000])
def test_a_full_disk_leaves_what_is_there(tmp_path: Path, room: int) -> None:
    """The kernel's limit on a file stands for the disk's: a write fails in the middle, with what fits written."""
    first = save(tmp_path, 1)
    largest = max(file.stat().st_size for file in first.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        if room > largest:
            save(tmp_path, 2)
        else:
            with pytest.raises(OSError, match=r"00-0000002 could not be written .*the one before is intact"):
                save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if room <= largest:
        assert newest(tmp_path) == first and names(tmp_path) == [first.name]
    assert save(tmp_path, 3) == newest(tmp_path)


def test_the_manifest_says_how_many_processes_there_were(tmp_path: Path) -> None:
    manifest = json.loads((save(tmp_path, 1) / "manifest.json").read_text())
    assert manifest["processes"] == 1 and manifest["recipe"] == "r"
    assert sorted(manifest["files"]) == sorted(set(FILES) - {"manifest.json"})


# ---- which are kept


def test_the_newest_are_kept_over_the_border_of_a_stage(tmp_path: Path) -> None:
    for stage, step in ((0, 9), (0, 100), (1, 5), (1, 10)):
        save(tmp_path, step, stage=stage, keep=2)
        assert newest(tmp_path) == tmp_path / f"{stage:02d}-{step:07d}"
    assert names(tmp_path) == ["01-0000005", "01-0000010"]
    save(tmp_path, 15, stage=1, keep=1)
    assert names(tmp_path) == ["01-0000015"]


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=0)
    before: dict[str, Tensor] = load_file(tmp_path / "00-0000001" / "weights.safetensors")
    folder = save(tmp_path, 1, seed=1)
    assert names(tmp_path) == ["00-0000001"] and newest(tmp_path) == folder
    assert not torch.equal(load_file(folder / "weights.safetensors")["0.weight"], before["0.weight"])


def test_what_a_kill_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(tmp_path, 1)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # a kill cleans up nothing
        patch.setattr(Path, "rename", killed)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert len(names(tmp_path)) == 2
    assert newest(tmp_path) == first and names(tmp_path) == [first.name]


def test_between_stages_there_is_no_optimizer(tmp_path: Path) -> None:
    weights = {"a": torch.ones(3)}
    folder = save_checkpoint(tmp_path, RunState(1, 0, "r", "d"), weights, None, keep=1)
    assert newest(tmp_path) == folder and torch.equal(load_file(folder / "weights.safetensors")["a"], weights["a"])


def test_a_checkpoint_is_whole_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    rename, write = Path.rename, Path.write_text

    def renamed(self: Path, target: Any) -> Path:
        order.append("rename")
        assert {p.name for p in self.iterdir()} == set(FILES)
        return rename(self, target)

    def wrote(self: Path, *args: Any, **kwargs: Any) -> int:
        order.append(self.name)
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "write_text", wrote)
    monkeypatch.setattr("os.fsync", lambda _: order.append("fsync"))
    save(tmp_path, 1)
    assert order == ["manifest.json", *["fsync"] * 5, "rename", "fsync"]
