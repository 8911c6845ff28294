"""`bench`: mteb's tasks into mteb's folder, gone on with, shared by processes, each failure named."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.mocks import MOCK_TASK_TEST_GRID
from numpy.typing import NDArray

from embedwright.evaluation.bench import run as bench
from embedwright.evaluation.bench.run import Bench, size
from embedwright.evaluation.mteb import MtebEncoder

TASKS = {task.metadata.name: task for task in MOCK_TASK_TEST_GRID}
SOME = ["MockRetrievalTask", "MockSTSTask", "MockClassificationTask", "MockMultilingualRetrievalTask"]


class Toy:
    """Vectors of the letters in a text; the instruction counts."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift, self.texts = shift, list[str]()

    def fingerprint(self) -> dict[str, str]:
        return {"weights": f"toy {self.shift}"}

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        self.texts += texts
        counts = [[f"{task or ''}{text}".lower().count(letter) + self.shift for letter in "abcdefgh"] for text in texts]
        vectors = np.array(counts, np.float32).reshape(len(texts), 8) + 0.1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield


def bench_of(out: Path, model: Any = None, **options: Any) -> Bench:
    return Bench(MtebEncoder(model or Toy(), name="toys/letters", **options), out)


def scores(work: Bench) -> dict[str, Any]:
    return {file.stem: json.loads(file.read_text())["scores"] for file in work.folder.glob("Mock*.json")}


def test_results_lie_as_mteb_writes_them(tmp_path: Path) -> None:
    work = bench_of(tmp_path / "ours")
    assert work.run([TASKS[name] for name in SOME]) == {}
    theirs = mteb.ResultCache(tmp_path / "theirs")
    for name in SOME:  # new objects: a task's random generator goes on from run to run
        mteb.evaluate(work.encoder, type(TASKS[name])(), cache=theirs, show_progress_bar=False, co2_tracker=False)  # type: ignore[arg-type]
    plain = theirs.get_task_result_path("x", work.meta).parent
    assert work.folder == tmp_path / "ours/results/toys__letters" / str(work.meta.revision)
    assert {f.name for f in work.folder.iterdir() if f.suffix != ".npz"} == {f.name for f in plain.iterdir()}
    for name in SOME:
        ours, other = (json.loads((folder / f"{name}.json").read_text()) for folder in (work.folder, plain))
        for split in other["scores"]:
            assert [s["main_score"] for s in ours["scores"][split]] == [s["main_score"] for s in other["scores"][split]]
        assert ours["mteb_version"] == other["mteb_version"] and ours["dataset_revision"] == other["dataset_revision"]
    assert (work.folder / "model_meta.json").read_text() == (plain / "model_meta.json").read_text()
    lines = [sorted((f / "run_settings.jsonl").read_text().splitlines()) for f in (work.folder, plain)]
    assert lines[0] == lines[1]
    loaded = theirs.load_results(include_remote=False)
    assert {result.task_name for result in loaded[0].task_results} == set(SOME)
    assert not (tmp_path / "ours/unfinished").exists()


def test_a_second_run_does_what_is_left(tmp_path: Path) -> None:
    first, second, model = list[str](), list[str](), Toy()
    bench_of(tmp_path).run([TASKS[name] for name in SOME[:2]], say=first.append)
    work = bench_of(tmp_path, model)
    work.run([TASKS[name] for name in SOME], say=second.append)
    assert first[0] == "2 tasks, 0 of them done before" and second[0] == "4 tasks, 2 of them done before"
    assert [line.partition("]")[0] for line in second[1:]] == ["[3/4", "[4/4"]
    own = Toy()
    bench_of(tmp_path / "other", own).run([TASKS[name] for name in SOME[2:]])
    assert sorted(model.texts) == sorted(own.texts)
    model.texts.clear()
    assert work.run([TASKS[name] for name in SOME]) == {} and not model.texts


def test_a_failed_task_is_named_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def broken(**_: Any) -> None:
        raise RuntimeError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr(TASKS["MockSTSTask"], "load_data", broken)
        failed = bench_of(tmp_path).run([TASKS[name] for name in SOME], say=said.append)
    assert failed == {"MockSTSTask": "RuntimeError: disk on fire"}
    assert sum("MockSTSTask: failed" in line for line in said) == 1
    work = bench_of(tmp_path)
    assert {file.stem for file in work.folder.glob("Mock*.json")} == set(SOME) - {"MockSTSTask"}
    assert work.run([TASKS[name] for name in SOME]) == {} and len(scores(work)) == 4


def test_a_data_set_out_of_reach_says_how_to_bring_it(tmp_path: Path) -> None:
    failed = bench_of(tmp_path).run([mteb.get_task("NanoSciFactRetrieval"), TASKS["MockSTSTask"]])
    (reason,) = failed.values()
    assert "mteb/NanoSciFactRetrieval cannot be opened" in reason
    assert "datasets--mteb--NanoSciFactRetrieval" in reason
    assert "hf download mteb/NanoSciFactRetrieval --repo-type dataset --revision 8c5f7bbe" in reason
    assert len(scores(bench_of(tmp_path))) == 1


def test_a_task_that_is_not_about_text_is_refused(tmp_path: Path) -> None:
    images = mteb.get_task("CIFAR10")
    assert "not one of texts" in bench_of(tmp_path).run([images])["CIFAR10"]


def test_other_models_and_revisions_lie_beside(tmp_path: Path) -> None:
    works = [bench_of(tmp_path), bench_of(tmp_path, Toy(1.0)), bench_of(tmp_path, instructions={"MockSTSTask": ""})]
    for number, work in enumerate(works):
        assert work.result(TASKS["MockSTSTask"]) is None
        assert sum(map(len, work.others().values())) == number
        work.run([TASKS["MockSTSTask"]])
    assert len({work.folder for work in works}) == 3
    assert all(tasks == ["MockSTSTask"] for tasks in works[0].others().values())


def test_another_version_of_mteb_has_another_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bench_of(tmp_path)
    before.run([TASKS["MockSTSTask"]])
    monkeypatch.setattr("embedwright.evaluation.mteb.version", lambda package: "3.0")
    after = bench_of(tmp_path)
    assert after.result(TASKS["MockSTSTask"]) is None
    assert after.others() == {before.folder.name: ["MockSTSTask"]}


def test_an_aggregate_task_keeps_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [type(TASKS[name])() for name in ("MockRetrievalTask", "MockRetrievalDialogTask")]
    whole = mteb.get_task("CQADupstackRetrieval")
    assert isinstance(whole, AbsTaskAggregate)
    fields = {"tasks": parts, "eval_splits": ["test"], "name": "MockAggregate"}
    monkeypatch.setattr(whole, "metadata", whole.metadata.model_copy(update=fields), raising=False)
    monkeypatch.setattr(whole, "taskname_to_task", {part.metadata.name: part for part in parts})
    work = bench_of(tmp_path)
    assert work.run([whole]) == {}
    by_part = [work.result(part).get_score(splits=["test"]) for part in parts]  # type: ignore[union-attr]
    assert work.result(whole).get_score() == pytest.approx(np.mean(by_part), abs=1e-9)  # type: ignore[union-attr]
    model = Toy()
    assert bench_of(tmp_path, model).run([whole]) == {} and not model.texts


def test_the_size_of_a_task_is_that_of_its_splits_and_subsets() -> None:
    stats = mteb.get_task("ArguAna").metadata.descriptive_stats
    assert stats is not None and size(mteb.get_task("ArguAna")) == stats["test"]["number_of_characters"]  # type: ignore[index]
    assert 0 < size(mteb.get_task("STS17", languages=["eng"])) < size(mteb.get_task("STS17"))
    assert size(TASKS["MockSTSTask"]) == bench._UNKNOWN_SIZE
    assert size(mteb.get_task("CQADupstackRetrieval")) > 10 * size(mteb.get_task("CQADupstackPhysicsRetrieval"))


def test_a_broken_file_of_a_killed_process_is_done_again(tmp_path: Path) -> None:
    work = bench_of(tmp_path)
    task = TASKS["MockRetrievalTask"]
    inside = work.work / "MockRetrievalTask" / "results" / work.folder.parent.name / work.folder.name
    for file in (
        inside / "MockRetrievalTask.json",
        work.work / "MockRetrievalTask/predictions" / task.prediction_file_name,
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"half": ')
    work.folder.mkdir(parents=True)
    (work.folder / ".MockRetrievalTask.0123456789ab.json").write_text('{"half": ')
    assert work.run([task]) == {} and not list(work.folder.glob(".*"))
    assert len(work.cache.load_results(include_remote=False)[0].task_results) == 1
    assert work.run([task]) == {} and work.result(task) is not None


def test_unfinished_work_of_other_tasks_is_kept(tmp_path: Path) -> None:
    work = bench_of(tmp_path)
    shard = work.work / "MSMARCO" / "vectors" / "shard-00000.arrow"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"vectors")
    assert work.run([TASKS["MockSTSTask"]]) == {}
    assert [file for file in work.work.rglob("*") if file.is_file()] == [shard]


def test_a_file_that_another_command_is_writing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, real, kept = bench_of(tmp_path), bench.write_items, list[bool]()
    pool = ThreadPoolExecutor(1)

    def writing(file: Path, *rest: Any) -> None:
        monkeypatch.setattr(bench, "write_items", real)
        temp = file.with_name(".MockSTSTask.0123456789ab.items.npz")
        temp.parent.mkdir(parents=True)
        temp.write_bytes(b"half")
        other = pool.submit(bench_of(tmp_path).run, [type(TASKS["MockClassificationTask"])()])
        wait([other], timeout=0.5)
        kept.append(temp.exists())
        temp.unlink(missing_ok=True)
        real(file, *rest)
        ends.append(other)

    ends: list[Future[dict[str, str]]] = []
    monkeypatch.setattr(bench, "write_items", writing)
    with pool:
        assert work.run([type(TASKS["MockSTSTask"])()]) == {}
        assert ends[0].result(timeout=60) == {} and kept == [True]
    assert set(scores(work)) == {"MockSTSTask", "MockClassificationTask"} and not (tmp_path / "unfinished").exists()


def test_two_commands_do_not_run_one_task_at_once(tmp_path: Path) -> None:
    second, ends = Toy(), list[Future[dict[str, str]]]()

    class First(Toy):
        def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
            if not ends:
                ends.append(pool.submit(bench_of(tmp_path, second).run, [type(TASKS["MockSTSTask"])()]))
                wait(ends, timeout=0.5)
            return super().encode(texts, task)

    with ThreadPoolExecutor(1) as pool:
        assert bench_of(tmp_path, First()).run([type(TASKS["MockSTSTask"])()]) == {}
        assert ends[0].result(timeout=60) == {} and not second.texts


def test_a_task_that_ends_without_a_whole_result_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, said = type(TASKS["MockMultilingualRetrievalTask"])(), list[str]()
    real = mteb.evaluate
    monkeypatch.setattr(mteb, "evaluate", lambda m, t, **o: real(m, type(t)().filter_languages(["eng"]), **o))
    failed = bench_of(tmp_path).run([task], say=said.append)
    assert failed == {"MockMultilingualRetrievalTask": "mteb ended without the results of test: fra; val: fra"}
    assert said[-1].endswith("MockMultilingualRetrievalTask: failed")
