from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedwright.model.embedder import Embedder
from embedwright.model.formats.open import open_embedder
from embedwright.model.verify import selftest
from embedwright.model.verify.probe import ProbeError


@pytest.fixture
def model(tiny_embedder: Callable[..., Embedder]) -> Embedder:
    return tiny_embedder("latent")


@pytest.fixture
def folder(model: Embedder, tmp_path: Path) -> Path:
    selftest.write(model.network, model.text_tokenizer, tmp_path)
    return tmp_path


def no_reload(dtype: torch.dtype) -> Any:
    raise AssertionError(f"loaded again in {dtype}")


def loaded_compared(model: Embedder, folder: Path) -> tuple[bool, str]:
    """Whether it is the recorded model, and what is said of it."""
    reload = lambda dtype: open_embedder(folder, dtype=dtype)[0]  # noqa: E731
    found = selftest.compare(model.network, model.text_tokenizer, folder, reload)
    assert found is not None
    return found


def compared(model: Embedder, folder: Path) -> tuple[bool, str]:
    found = selftest.compare(model.network, model.text_tokenizer, folder, no_reload)
    assert found is not None
    return found


def difference(found: tuple[bool, str]) -> float:
    return float(found[1].removeprefix("largest difference "))


def test_what_is_recorded_is_what_encode_gives(model: Embedder, folder: Path) -> None:
    stored = json.loads((folder / selftest.FILE).read_text())
    assert stored["dtype"] == "float32" and [row["text"] for row in stored["texts"]] == [t for t, _ in selftest.TEXTS]
    for row, (text, is_query) in zip(stored["texts"], selftest.TEXTS, strict=True):
        task = selftest.TASK if is_query else None
        packed = model.tokenize([text], task)
        assert row["ids"] == packed.ids_T.tolist() and row["pooled"] == int(packed.pool_mask_T.sum())
        np.testing.assert_allclose(row["vector"], model.encode([text], task)[0, : len(row["vector"])], atol=1e-6)


def test_the_same_model_is_the_same(model: Embedder, folder: Path) -> None:
    found = compared(model, folder)
    assert found[0] and difference(found) < 1e-6
    selftest.check(model.network, model.text_tokenizer, folder, no_reload)


TYPES = [
    ("latent", "float32", "bfloat16"),
    ("mean", "float32", "float16"),
    ("latent", "bfloat16", "bfloat16"),
    ("mean", "bfloat16", "float32"),
    ("latent", "float16", "bfloat16"),
]


@pytest.mark.parametrize(("pooling", "stored", "asked"), TYPES)
def test_in_another_type_a_wrong_weight_is_found(
    pooling: str, stored: str, asked: str, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    tiny_embedder(pooling, dtype=stored).save(tmp_path / "model")
    model = Embedder.load(tmp_path / "model", dtype=asked)
    found = loaded_compared(model, tmp_path / "model")
    assert found[0] and difference(found) < 1e-5
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights[name][3] *= 1.5  # one row of one weight
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ProbeError, match="saved with"):
        Embedder.load(tmp_path / "model", dtype=asked)


def test_a_weight_that_changed_on_its_way_to_another_type_is_named(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    tiny_embedder("latent").save(tmp_path / "model")
    model = Embedder.load(tmp_path / "model", dtype="bfloat16")
    with torch.no_grad():
        model.network.backbone.layers[1].mlp.up_proj.weight[3, 5] *= 1.1
    ok, detail = loaded_compared(model, tmp_path / "model")
    assert not ok and "layers.1.mlp.up_proj.weight is not what is stored" in detail


def test_the_record_is_not_of_the_machine(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    """Computed in float32 from weights in 16 bits: as a float32 model of the same weights gives it."""
    model = tiny_embedder("latent", dtype="bfloat16")
    selftest.write(model.network, model.text_tokenizer, tmp_path)
    before = (tmp_path / selftest.FILE).read_text()
    assert {p.dtype for p in model.network.backbone.parameters()} == {torch.bfloat16}  # as it was
    for parameter in model.network.parameters():
        parameter.data = parameter.data.float()
    rows = json.loads(before)["texts"]
    for row, (text, is_query) in zip(rows, selftest.TEXTS, strict=True):
        vector = model.encode([text], selftest.TASK if is_query else None)[0, : len(row["vector"])]
        np.testing.assert_allclose(row["vector"], vector, atol=1e-5)


@pytest.mark.parametrize("delta", [3e-3, float("nan")])
def test_other_weights_are_refused(model: Embedder, folder: Path, delta: float) -> None:
    with torch.no_grad():
        model.network.backbone.layers[0].mlp.down_proj.weight += delta
    with pytest.raises(ProbeError, match="does not give the vectors that it was saved with"):
        selftest.check(model.network, model.text_tokenizer, folder, no_reload)


def test_other_ids_are_named(model: Embedder, folder: Path) -> None:
    model.network.contract = model.contract.model_copy(update={"eos_id": 7})
    assert compared(model, folder) == (False, "other token ids than when saved, for 'How do tides work?'")


def test_other_pool_masks_are_found(model: Embedder, folder: Path) -> None:
    file = folder / selftest.FILE
    stored = json.loads(file.read_text())
    stored["texts"][1]["pooled"] += 1
    file.write_text(json.dumps(stored))
    ok, detail = compared(model, folder)
    assert not ok and repr(selftest.TEXTS[1][0]) in detail


def test_nothing_recorded_nothing_compared(model: Embedder, tmp_path: Path) -> None:
    assert selftest.compare(model.network, model.text_tokenizer, tmp_path, no_reload) is None


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_put_back(model: Embedder, folder: Path, training: bool) -> None:
    model.network.train(training)
    assert compared(model, folder)[0] and model.network.training == training


@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_saving_records_and_loading_checks(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path, pooling: str
) -> None:
    tiny_embedder(pooling).save(tmp_path / "model")
    file = tmp_path / "model" / selftest.FILE
    Embedder.load(tmp_path / "model")
    stored = json.loads(file.read_text())
    stored["texts"][0]["vector"][3] += 0.1
    file.write_text(json.dumps(stored))
    with pytest.raises(ProbeError, match="saved with"):
        Embedder.load(tmp_path / "model")


@pytest.mark.long
def test_a_deep_model_saved_in_float32_opens_in_16_bits(smollm2_folder: Path, tmp_path: Path) -> None:
    """Thirty untrained layers, where rounding alone turns short texts."""
    Embedder.from_decoder(smollm2_folder, pooling="mean").save(tmp_path / "model")
    for dtype in ("bfloat16", "float16"):
        found = loaded_compared(Embedder.load(tmp_path / "model", dtype=dtype), tmp_path / "model")
        print(dtype, found)
        assert found[0]
