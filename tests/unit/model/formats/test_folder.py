"""What the one reader of model folders refuses, before any weight is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from embedwright.errors import InputError
from embedwright.model.formats.folder import ADAPTER, INDEX, SINGLE, check_floats, check_folder, tensors_of, weights_in

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def save(file: Path, *names: str, dtype: torch.dtype = torch.float32) -> None:
    save_file({name: torch.zeros(2, 3, dtype=dtype) for name in names}, file)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two tensors in two files, with the index."""
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder / FIRST, "a")
    save(folder / SECOND, "b")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}))
    return folder


def map_to(folder: Path, **places: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": SECOND} | places}))


def test_shards_and_a_single_file_are_read_alike(shards: Path, tmp_path: Path) -> None:
    save(tmp_path / SINGLE, "a", "b", dtype=torch.bfloat16)
    found, single = weights_in(shards), weights_in(tmp_path)
    assert {name: stored.file.name for name, stored in found.items()} == {"a": FIRST, "b": SECOND}
    assert {stored.dtype for stored in found.values()} == {"F32"}
    assert {stored.dtype for stored in single.values()} == {"BF16"}
    assert {stored.shape for stored in [*found.values(), *single.values()]} == {(2, 3)}


def test_safetensors_of_other_names_are_not_read(shards: Path) -> None:
    (shards / "consolidated.safetensors").write_bytes(b"not even safetensors")
    assert weights_in(shards).keys() == {"a", "b"}


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/out.safetensors", "sub/out.safetensors", "..\\out.safetensors", ".out.safetensors"]
)
def test_an_index_names_files_of_its_folder_alone(name: str, shards: Path) -> None:
    save(shards.parent / "out.safetensors", "a")
    map_to(shards, a=name)
    with pytest.raises(InputError, match=r"a is in .* which is not a \.safetensors file of this folder"):
        weights_in(shards)


@pytest.mark.parametrize("name", [3, None, ["x"], "pytorch_model.bin", ""])
def test_an_index_names_safetensors_alone(name: Any, shards: Path) -> None:
    map_to(shards, a=name)
    with pytest.raises(InputError, match=r"not a \.safetensors file"):
        weights_in(shards)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: (f / SECOND).unlink(), f"has no {SECOND}, which {INDEX} names"),
        (lambda f: (f / INDEX).unlink(), f"has no {SINGLE}, and no {INDEX}"),
        (lambda f: save(f / SINGLE, "a", "b"), f"both {SINGLE} and {INDEX}"),
        (lambda f: save(f / "model-00003-of-00003.safetensors", "c"), "model-00003-of-00003.safetensors, which is no"),
        (lambda f: save(f / SECOND, "a", "b"), f"a is in {SECOND}, but {INDEX} puts it into {FIRST}|a is in both"),
        (lambda f: save(f / SECOND, "b", "c"), f"c is in {SECOND}, but {INDEX} does not name it"),
        (lambda f: save(f / SECOND, "c"), "c is in"),
        (lambda f: map_to(f, c=SECOND), f"puts c into {SECOND}, which does not hold it"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "weight_map must name"),
        (lambda f: (f / INDEX).write_text('{"weight_map": [1]}'), "weight_map must name"),
        (lambda f: (f / INDEX).write_text("[]"), "must hold a JSON object"),
        (lambda f: (f / INDEX).write_text("{"), "is not valid JSON"),
        (lambda f: (f / INDEX).write_text("[" * 100_000), "is not valid JSON"),
        (lambda f: (f / INDEX).write_bytes(b"\xff\xfe"), "is not valid JSON"),
        (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-1]), "is not a whole safetensors file"),
        (lambda f: (f / SECOND).write_bytes(b""), "is not a whole safetensors file"),
        (lambda f: (f / SECOND).write_bytes(b"\xff" * 100), "is not a whole safetensors file"),
        (lambda f: ((f / SECOND).unlink(), (f / SECOND).mkdir()), f"has no {SECOND}"),
    ],
)
def test_weights_that_do_not_belong_together(change: Callable[[Path], Any], match: str, shards: Path) -> None:
    change(shards)
    with pytest.raises(InputError, match=match):
        weights_in(shards)


def test_left_over_shards_of_another_save(tmp_path: Path) -> None:
    save(tmp_path / SINGLE, "a")
    save(tmp_path / FIRST, "a")
    with pytest.raises(InputError, match=f"{FIRST}, which is not part of the model in {SINGLE}: move it away"):
        weights_in(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_whole_numbers_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path / SINGLE, "a.weight", dtype=dtype)
    stored = weights_in(tmp_path)
    check_floats(stored, [])
    for names in (None, ["a.weight"]):
        with pytest.raises(InputError, match=r"a\.weight is stored as"):
            check_floats(stored, names)


# ---- links


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json", "1_Pooling/config.json"])
def test_no_link_leaves_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / name).parent.mkdir(parents=True)
    (folder / "modules.json").write_text('[{"path": "1_Pooling", "type": "x.Pooling"}]')
    save(folder / SINGLE, "a")
    save(tmp_path / SINGLE, "a")
    (tmp_path / "secret.json").write_text("{}")
    target = tmp_path / (SINGLE if name == SINGLE else "secret.json")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(InputError, match="outside of its folder"):
        check_folder(folder)
    (folder / name).unlink()
    inside = folder / f"real{target.suffix}"
    inside.write_bytes(target.read_bytes())
    (folder / name).symlink_to(inside)
    check_folder(folder)
    assert weights_in(folder).keys() == {"a"}


def test_a_folder_of_modules_that_is_a_link_out(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (folder / "modules.json").write_text('[{"path": "1_Pooling", "type": "x.Pooling"}]')
    (folder / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="outside of its folder"):
        check_folder(folder)


def test_a_link_to_the_folder_and_the_hubs_own_links_are_followed(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(shards)
    assert weights_in(tmp_path / "link").keys() == {"a", "b"}
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    shards.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    check_folder(snapshot)
    assert weights_in(snapshot).keys() == {"a", "b"}
    (snapshot / "config.json").symlink_to("../../../elsewhere.json")
    with pytest.raises(InputError, match="outside of its folder"):
        check_folder(snapshot)


@pytest.mark.parametrize("name", ["config.json", "modules.json"])
def test_what_is_no_file_is_never_opened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)  # opening it would wait for ever
    with pytest.raises(InputError, match="not a regular file"):
        check_folder(tmp_path)


# ---- settings


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "3", "must hold a JSON object"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("embedwright.json", "null", "must hold a JSON object"),
        ("config.json", '{"transformers_weights": "../x.safetensors"}', "transformers_weights"),
        ("modules.json", "{}", "must hold a list"),
        ("modules.json", "[3]", "needs a path and a type"),
        ("modules.json", '[{"path": "a"}]', "needs a path and a type"),
        ("modules.json", '[{"path": "../a", "type": "t"}]', "leaves the folder"),
        ("modules.json", '[{"path": "/a", "type": "t"}]', "leaves the folder"),
        ("modules.json", '[{"path": "a/../../b", "type": "t"}]', "leaves the folder"),
    ],
)
def test_settings_that_cannot_be_read(name: str, content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=match):
        check_folder(tmp_path)


@pytest.mark.parametrize("weights", [SINGLE, INDEX])
def test_an_adapter_beside_a_whole_model(weights: str, tmp_path: Path) -> None:
    (tmp_path / weights).write_text("{}")
    (tmp_path / ADAPTER).write_text("{}")
    with pytest.raises(InputError, match=f"{ADAPTER} beside {weights}"):
        check_folder(tmp_path)


def test_a_file_of_tensors_lies_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    save(tmp_path / SINGLE, "a")
    (tmp_path / "adapter" / SINGLE).symlink_to(tmp_path / SINGLE)
    with pytest.raises(InputError, match="outside of its folder"):
        tensors_of(tmp_path / "adapter" / SINGLE)
    assert tensors_of(tmp_path / SINGLE).keys() == {"a"}
