from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright.config import ConfigError
from embedwright.data.schema import Task
from embedwright.errors import InputError
from embedwright.training.batches.blend import Source, rows_at
from embedwright.training.batches.sources import corpus_of, data_fingerprint, is_mined, open_sources
from embedwright.training.plan import plan
from embedwright.training.recipe import Recipe
from embedwright.training.run.folder import data
from embedwright.vectors.corpus import encode_corpus

ONE = {"name": "one", "instruction": "Find one", "licence": "MIT"}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(n: int, *, negatives: int = 1, **more: Any) -> list[dict[str, Any]]:
    made = (
        {"query": f"q{i}", "positives": [f"p{i}"], "negatives": [f"n{i}.{k}" for k in range(negatives)]}
        for i in range(n)
    )
    return [row | more for row in made]


def stage(*data: dict[str, Any], name: str = "first", **change: Any) -> dict[str, Any]:
    optim = {"lr": 1e-3, "steps": 2, "batch_queries": 2}
    return {"name": name, "data": data, "in_batch_negatives": "all", "hard_negatives": 1, "optim": optim} | change


def recipe(*stages: dict[str, Any], **change: Any) -> Recipe:
    return Recipe.parse({"name": "r", "model": {"base": "b"}, "run": {"out": "o"}, "stages": list(stages)} | change)


def open_one(*data: dict[str, Any], **change: Any) -> list[Source]:
    (sources,) = open_sources(recipe(stage(*data, **change)))
    return sources


def test_a_file_becomes_a_source_for_each_of_its_tasks(tmp_path: Path) -> None:
    mixed = [*rows(3, task="one"), *rows(2, task="two"), *rows(1, task="one"), *rows(4)]
    path = write(tmp_path / "mixed.jsonl", *mixed)
    sources = open_one({"path": path, "weight": 2.5, "task": ONE})
    one = Task(**ONE)
    assert [s.name for s in sources] == ["0#one", "0#two"]  # no path: it keys the order of rows
    assert [s.task for s in sources] == [one, Task(name="two")]
    assert [s.rows.tolist() for s in sources] == [[0, 1, 2, 5, 6, 7, 8, 9], [3, 4]]  # rows without a task are `one`
    assert [s.sampling_weight for s in sources] == [2.5 * 8, 2.5 * 2]
    assert sources[1].table[3].query == "q0"


def test_paths_take_variables_and_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_TEST_DATA", str(tmp_path))
    write(tmp_path / "x.jsonl", {"query": "q", "positives": [{"id": "d1"}]})
    write(tmp_path / "corpus.jsonl", {"_id": "d1", "text": "from the corpus"})
    entry = {"path": "${EMBEDWRIGHT_TEST_DATA}/x.jsonl", "corpus": "${EMBEDWRIGHT_TEST_DATA}/corpus.jsonl"}
    (source,) = open_one(entry)
    assert source.table[0].positives[0].text == "from the corpus"
    assert source.name == "0#x"  # order of rows does not depend on where data lies
    monkeypatch.delenv("EMBEDWRIGHT_TEST_DATA")
    with pytest.raises(ConfigError, match="EMBEDWRIGHT_TEST_DATA"):
        open_one(entry)


def test_labelled_rows_get_the_negatives_that_the_stage_asks_for(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.jsonl", *({"text": f"t{i}", "label": f"l{i % 6}"} for i in range(30)))
    for asked in (0, 1, 4):
        (source,) = open_one({"path": path}, hard_negatives=asked)
        assert set(source.table.negatives_per_row()) == {max(asked, 1)}


def test_a_task_that_nobody_describes_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = write(tmp_path / "a.jsonl", *rows(2, task="odd")), write(tmp_path / "b.jsonl", *rows(2, task="odd"))
    c = write(tmp_path / "c.jsonl", *rows(2))
    with caplog.at_level(logging.WARNING):
        first, second = open_sources(
            recipe(stage({"path": a}, {"path": b}), stage({"path": a}, {"path": c, "task": ONE}, name="second"))
        )
    assert [s.task for s in first] == [Task(name="odd")] * 2 and second[1].task == Task(**ONE)
    (record,) = caplog.records
    assert "'odd' is not described" in record.message and "stages.first.data.0" in record.message


def test_two_files_of_one_name_are_named_unless_a_task_says_what_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("x", "y", "z"):
        (tmp_path / folder).mkdir()
    x, y, z = (write(tmp_path / folder / "train.jsonl", *rows(2)) for folder in ("x", "y", "z"))
    write(tmp_path / "z" / "train.jsonl.tasks.jsonl", {"name": "train", "instruction": "Find"})

    def warned(*entries: dict[str, Any]) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            open_one(*entries)
        return [record.message for record in caplog.records if "is not described" not in record.message]

    (message,) = warned({"path": x}, {"path": y})
    assert "stages.first.data.1" in message and x in message and y in message and "`task`" in message
    assert not warned({"path": x}, {"path": y, "task": ONE})
    assert not warned({"path": x, "task": ONE}, {"path": y, "task": "one"})  # one task, by their words
    assert not warned({"path": x}, {"path": z})


def test_a_bare_name_is_looked_up_in_the_recipe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", *rows(2))
    other = write(tmp_path / "b.jsonl", *rows(2))
    with caplog.at_level(logging.WARNING):
        first, second = open_sources(
            recipe(stage({"path": path, "task": "one"}), stage({"path": other, "task": ONE}, name="second"))
        )
    assert first[0].task == second[0].task == Task(**ONE) and not caplog.records


def test_each_stage_has_its_own_description_of_a_task(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *rows(2))
    off = ONE | {"in_batch_negatives": "none"}
    first, second = open_sources(
        recipe(stage({"path": path, "task": ONE}), stage({"path": path, "task": off}, name="second"))
    )
    assert first[0].task.in_batch_negatives is None and second[0].task.in_batch_negatives == "none"


# ---- shares


def test_an_entry_changes_what_it_says_of_a_task_and_the_file_says_the_rest(tmp_path: Path) -> None:
    """As `data pairs` leaves its rows: of two tasks, both described beside them."""
    path = write(tmp_path / "docs.jsonl", *rows(2, task="docs-title"), *rows(2, task="docs-classes"))
    title = {"name": "docs-title", "instruction": "Of the file", "licence": "MIT"}
    classes = {"name": "docs-classes", "family": "clustering", "symmetric": True, "licence": "MIT"}
    write(tmp_path / "docs.jsonl.tasks.jsonl", title, classes)
    off = {"name": "docs-classes", "in_batch_negatives": "none"}
    first, second = open_sources(recipe(stage({"path": path}), stage({"path": path, "task": off}, name="second")))
    assert [source.task for source in first] == [Task(**title), Task(**classes)]  # not what the other stage says
    assert [source.task for source in second] == [Task(**title), Task(**classes, in_batch_negatives="none")]
    for task, said in ((off | {"name": "docs"}, "'docs'"), ("other", "'other'")):
        with pytest.raises(
            ConfigError, match=rf"data\.0\.task: no row is of task {said}.* 'docs-title', 'docs-classes'"
        ):
            open_one({"path": path, "task": task})


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_draws_follow_the_sampling(tmp_path: Path, alpha: float) -> None:
    """990 rows and 10, for 400 draws: exact to one, since each source gets its share of every prefix of slots."""
    many, few = write(tmp_path / "many.jsonl", *rows(990)), write(tmp_path / "few.jsonl", *rows(10))
    asked = recipe(stage({"path": many}, {"path": few}, sampling_alpha=alpha))
    [sources] = open_sources(asked)
    drawn = Counter(
        row.task.name
        for step in range(50)
        for row in rows_at(sources, step, batch_queries=8, batching="blended", seed=0, stage="first")
    )
    expected = 400 * 10**alpha / (10**alpha + 990**alpha)
    assert drawn["few"] == pytest.approx(expected, abs=1) and sum(drawn.values()) == 400
    [planned] = plan(asked)
    [told] = data(asked, [sources])["stages"]
    for shares in ([part.share for part in planned.entries], [part["share"] for part in told["sources"]]):
        assert shares == pytest.approx([1 - expected / 400, expected / 400], abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_rows_that_are_left_out_count_for_no_share(tmp_path: Path, alpha: float) -> None:
    """`half` has 200 rows of two tasks, of which 100 can be drawn: 75 of one, 25 of the other."""
    two = [*rows(75, task="one"), *rows(25, task="two"), *rows(100, negatives=0, task="one")]
    half, whole = write(tmp_path / "half.jsonl", *two), write(tmp_path / "whole.jsonl", *rows(16))
    asked = recipe(
        stage({"path": half, "weight": 2.0}, {"path": whole}, in_batch_negatives="none", sampling_alpha=alpha)
    )
    [sources] = open_sources(asked)
    shares = np.array([source.sampling_weight for source in sources])
    sizes = np.array([2 * 100.0**alpha * 0.75, 2 * 100.0**alpha * 0.25, 16.0**alpha])
    np.testing.assert_allclose(shares / shares.sum(), sizes / sizes.sum(), rtol=1e-12)
    [planned] = plan(asked)
    assert [part.rows for part in planned.entries] == [100, 16]
    np.testing.assert_allclose(
        [p.share for p in planned.entries], [(shares[0] + shares[1]) / shares.sum(), shares[2] / shares.sum()]
    )


# ---- what is refused


@pytest.mark.parametrize("lacks", ["instruction", "licence"])
def test_strict_wants_instruction_and_licence(tmp_path: Path, lacks: str) -> None:
    path = write(tmp_path / "a.jsonl", *rows(2))
    task = {key: value for key, value in ONE.items() if key != lacks}
    entries = stage({"path": path, "task": ONE}, {"path": path, "task": task | {"name": "two"}})
    open_sources(recipe(entries))
    with pytest.raises(ConfigError, match=rf"stages\.first\.data\.1: task 'two' has no {lacks}, and the recipe is str"):
        open_sources(recipe(entries, strict=True))
    open_sources(recipe(stage({"path": path, "task": ONE}), strict=True))


def test_rows_that_would_train_nothing_are_left_out_with_their_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", *rows(5), *rows(3, negatives=0))
    (whole,) = open_one({"path": path, "task": ONE})
    assert len(whole.rows) == 8 and not caplog.text
    (alone,) = open_one({"path": path, "task": ONE}, in_batch_negatives="none")
    assert alone.rows.tolist() == [0, 1, 2, 3, 4] and alone.sampling_weight == pytest.approx(5)
    assert "stages.first.data.0: 3 of 8 rows of task 'one' have no negatives: left out" in caplog.text
    (alone,) = open_one({"path": path, "task": ONE | {"in_batch_negatives": "none"}})  # the task goes before the stage
    assert len(alone.rows) == 5
    follows = {"distill": {"vector_weight": 1.0, "teacher": "t"}}
    (alone,) = open_one({"path": path, "task": ONE}, in_batch_negatives="none", loss=follows)
    assert len(alone.rows) == 8  # each follows the teacher


def test_a_task_that_would_train_nothing_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *rows(3, negatives=0))
    with pytest.raises(ConfigError, match=r"stages\.first\.data\.0: task 'one' .* none of its 3 rows has negatives"):
        open_one({"path": path, "task": ONE}, in_batch_negatives="none")
    whole = write(tmp_path / "b.jsonl", *rows(5))
    open_one({"path": whole, "task": ONE}, in_batch_negatives="none")
    with pytest.raises(ConfigError, match="hard_negatives is 0"):
        open_one({"path": whole, "task": ONE}, in_batch_negatives="none", hard_negatives=0)
    on = ONE | {"in_batch_negatives": "same_task"}
    open_one({"path": whole, "task": on}, in_batch_negatives="none", hard_negatives=0)


def test_cosent_gets_all_scored_pairs_and_info_nce_those_with_a_positive(tmp_path: Path) -> None:
    pairs = [{"text1": f"a{i}", "text2": f"b{i}", "score": i} for i in (1, 4, 0, 5, 3)]
    path = write(tmp_path / "sts.jsonl", *pairs)
    for change in ({}, {"in_batch_negatives": "none", "hard_negatives": 0}):
        (all_,) = open_one({"path": path, "task": ONE}, loss={"scored": "cosent"}, **change)
        assert all_.rows.tolist() == list(range(10)) and all_.sampling_weight == 10
    (high,) = open_one({"path": path, "task": ONE})
    assert high.rows.tolist() == [2, 3, 6, 7] and high.sampling_weight == 4
    assert [high.row(i).example.score for i in range(4)] == [4, 4, 5, 5]
    mixed = write(tmp_path / "mixed.jsonl", *rows(3, negatives=0), *rows(2), rows(1, negatives=0)[0] | {"score": 0.5})
    (some,) = open_one(
        {"path": mixed, "task": ONE}, loss={"scored": "cosent"}, in_batch_negatives="none", hard_negatives=1
    )
    assert some.rows.tolist() == [3, 4, 5]  # a negative of its own, or a score
    low = write(tmp_path / "low.jsonl", *(pair | {"score": pair["score"] / 5} for pair in pairs))
    open_one({"path": low, "task": ONE}, loss={"scored": "cosent"})
    with pytest.raises(
        ConfigError, match=r"stages\.first\.data\.0: no scored pair of task 'one' reaches the threshold"
    ):
        open_one({"path": low, "task": ONE})


def test_a_missing_file_names_the_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *rows(2))
    first = stage({"path": path})
    for entry in ({"path": str(tmp_path / "absent.jsonl")}, {"path": path, "corpus": str(tmp_path / "absent.jsonl")}):
        second = stage({"path": path}, entry, name="second")
        with pytest.raises(FileNotFoundError, match=r"recipe r: stages\.second\.data\.1: .*absent\.jsonl"):
            open_sources(recipe(first, second))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "no row has positive_scores and negative_scores"),
        ({"mine": {"teacher": "random", "rule": "naive"}}, "mine with a teacher that has scores"),
        ({"mine": {"teacher": "bm25"}}, None),
    ],
)
def test_scores_to_follow_must_be_there_or_come_by_mining(
    tmp_path: Path, change: dict[str, Any], says: str | None
) -> None:
    path = write(tmp_path / "a.jsonl", *rows(3), rows(1)[0] | {"positive_scores": [0.9]})
    asked = change | {"loss": {"distill": {"score_weight": 1.0}}}
    if says is None:
        open_one({"path": path}, **asked)
    else:
        with pytest.raises(ConfigError, match=rf"r: stages\.first\.loss\.distill\.score_weight: .*{says}"):
            open_one({"path": path}, **asked)
    scored = write(tmp_path / "b.jsonl", rows(1)[0] | {"positive_scores": [0.9], "negative_scores": [0.1]})
    open_one({"path": path}, {"path": scored}, loss=asked["loss"])


# ---- what is mined


@pytest.mark.parametrize(
    ("lines", "folder", "says"),
    [
        ([{"text": "one"}], False, r"\.corpus: .*corpus\.jsonl:1: no id"),
        ([{"id": "d", "text": "one"}, {"id": "d", "text": "two"}], False, r"\.corpus: .*corpus\.jsonl:2: id 'd' twice"),
        ([{"_id": "d", "text": "p"}, {"_id": "e", "txt": "q"}], True, r"\.corpus: .*corpus\.jsonl:2: no text"),
    ],
)
def test_a_corpus_that_cannot_be_mined_is_refused_before_the_first_step(
    tmp_path: Path, lines: list[dict[str, Any]], folder: bool, says: str
) -> None:
    """Rows of pairs name no document by id, so that nothing else reads the corpus."""
    pairs = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(3)]
    entry = {"path": write(tmp_path / "a.jsonl", *pairs), "corpus": write(tmp_path / "corpus.jsonl", *lines)}
    if folder:
        write(tmp_path / "queries.jsonl", {"_id": "q", "text": "q"})
        entry["corpus"] = str(tmp_path)
    mined = stage({"path": entry["path"]}, entry, mine={"teacher": "bm25"}, name="second")
    with pytest.raises(InputError, match=rf"recipe r: stages\.second\.data\.1{says}"):
        open_sources(recipe(stage({"path": entry["path"]}), mined))
    open_one(entry)  # where nothing is mined, nothing of it is read


@pytest.mark.parametrize("rows_name_documents", [True, False])
def test_a_corpus_may_be_what_encode_wrote(tmp_path: Path, rows_name_documents: bool) -> None:
    class Lengths:
        def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
            return np.array([[len(text), 1.0] for text in texts], np.float32)

    documents = [{"_id": f"d{i}", "title": "T", "text": f"document {i}"} for i in range(5)]
    corpus, encoded = write(tmp_path / "corpus.jsonl", *documents), tmp_path / "encoded"
    encode_corpus(Lengths(), Path(corpus), encoded, shard_rows=2)
    named = [{"id": f"d{i}"} if rows_name_documents else f"p{i}" for i in range(3)]
    path = write(tmp_path / "a.jsonl", *({"query": f"q{i}", "positives": [answer]} for i, answer in enumerate(named)))
    tables = []
    for place in (corpus, str(encoded)):
        mined = recipe(stage({"path": path, "corpus": place}, mine={"teacher": "bm25"}))
        ((source,),) = open_sources(mined)
        found = corpus_of(mined.stages[0].data[0])
        assert found is not None and list(found.items()) == [(d["_id"], f"T {d['text']}") for d in documents]
        tables.append([*source.table])
    assert tables[0] == tables[1] and tables[0][2].positives[0].text == (
        "T document 2" if rows_name_documents else "p2"
    )
    (encoded / "shard-00001.arrow").unlink()
    with pytest.raises(InputError, match="encoded"):
        open_sources(mined)


def test_real_rows_are_mined_and_synthetic_ones_are_not(tmp_path: Path) -> None:
    """In one file or folder, of however many tasks; where nothing is mined they stay one source, as they were."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, source in (
        ("nq", "synthetic.jsonl, by rules: title"),
        ("quora", ""),
        ("made", "synthetic: m"),
        ("more", "synthetic: m"),
    ):
        write(folder / f"{name}.jsonl", *rows(2, task=name))
        with (folder / "mixed.tasks.jsonl").open("a") as tasks:
            tasks.write(json.dumps({"name": name, "source": source}) + "\n")
    (folder / "mixed.tasks.jsonl").rename(tmp_path / "mixed.tasks.jsonl")
    mine = {"mine": {"teacher": "bm25"}}
    real, made = open_one({"path": str(folder)}, **mine)
    assert [(s.name, [*s.tasks], is_mined(s)) for s in (real, made)] == [
        ("0#retrieval/False/None", ["nq", "quora"], True),
        ("0#retrieval/False/None/synthetic", ["made", "more"], False),
    ]
    assert [s.table[int(s.rows[0])].task for s in (real, made)] == ["nq", "made"]
    (whole,) = open_one({"path": str(folder)})
    assert whole.name == real.name and len(whole.tasks) == 4
    one = {"path": write(tmp_path / "one.jsonl", *rows(2))}
    write(tmp_path / "one.jsonl.tasks.jsonl", {"name": "one", "source": "synthetic: m"})
    (alone, _) = open_one(one, {"path": str(folder / "nq.jsonl")}, **mine)
    assert alone.name == "0#one" and not is_mined(alone)
    with pytest.raises(ConfigError, match="none of its data can be mined"):
        open_one(one, **mine)


# ---- fingerprint


def test_the_fingerprint_follows_the_rows_that_can_be_drawn(tmp_path: Path) -> None:
    def fingerprint(*entries: dict[str, Any]) -> str:
        return data_fingerprint([open_one(*entries)])

    a, b = write(tmp_path / "a.jsonl", *rows(4)), write(tmp_path / "b.jsonl", *rows(4))
    prints = {fingerprint({"path": a}), fingerprint({"path": a}, {"path": b}), fingerprint({"path": b}, {"path": a})}
    prints.add(fingerprint({"path": a, "task": ONE}))
    before = fingerprint({"path": a})
    assert len(prints) == 4 and before in prints
    write(tmp_path / "a.jsonl", *rows(3), {"query": "q3", "positives": ["p3!"], "negatives": ["n3.0"]})
    assert fingerprint({"path": a}) not in prints
    write(tmp_path / "a.jsonl", *rows(4))
    assert fingerprint({"path": a}) == before
