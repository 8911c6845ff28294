"""Names of classes from the metadata of files, and what happens without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from embedwright.data.files.class_names import class_names
from embedwright.data.labels import LabelRules
from embedwright.data.schema import DataError
from embedwright.data.sources.build import label_file
from embedwright.data.tables.table import open_examples

ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(4)]
NAMES = {"0": "bad", "1": "good"}


def save(folder: Path, form: str) -> Path:
    folder.mkdir()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    data = Dataset.from_list(ROWS, features=features)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if form == "parquet":
        data.to_parquet(folder / "x.parquet")
        return folder / "x.parquet"
    if form == "saved":
        data.save_to_disk(folder / "x")
        return folder / "x"
    (folder / "x.jsonl").write_text(lines)
    if form == "readme":
        head = "dataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names:\n"
        (folder / "README.md").write_text(f"---\n{head}          '0': bad\n          '1': good\n---\n# x\n")
    if form == "info":
        feature = {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}
        (folder / "dataset_info.json").write_text(json.dumps({"features": feature}))
    return folder / "x.jsonl"


@pytest.mark.parametrize("form", ["parquet", "saved", "readme", "info"])
def test_two_classes_train_towards_their_names(form: str, tmp_path: Path) -> None:
    path = save(tmp_path / "in", form)
    assert class_names(path, "label") == NAMES and class_names(path, "text") is None
    label_file(path, tmp_path / "out.jsonl")
    for examples in (open_examples(path), open_examples(tmp_path / "out.jsonl")):
        assert [(e.positives[0].text, e.negatives[0].text) for e in examples] == [("bad", "good"), ("good", "bad")] * 2


@pytest.mark.parametrize("labels", [(0, 1), ("0", "1"), (True, False), (1.0, 2.0), ("True", "False"), ("x", "1")])
def test_labels_that_say_nothing_are_refused(labels: tuple[object, object], tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": labels[i % 2]}) + "\n" for i in range(4)))
    with pytest.raises(DataError, match=r"says nothing: name the classes .*--words"):
        open_examples(path)
    with pytest.raises(DataError, match="--words"):
        label_file(path, tmp_path / "out.jsonl")
    label_file(
        path, tmp_path / "out.jsonl", labels=LabelRules("example")
    )  # texts against texts: the names do not matter
