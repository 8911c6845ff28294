from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear

from embedwright.config import ConfigError
from embedwright.evaluation.results import Results
from embedwright.evaluation.suite import evaluate
from embedwright.model.adapters.lora import has_lora
from embedwright.model.embedder import Embedder
from embedwright.model.pooling import Kind
from embedwright.training import steps as steps_module
from embedwright.training import train as loop
from embedwright.training.batches.blend import rows_at
from embedwright.training.batches.make import make_batch
from embedwright.training.batches.sources import open_sources
from embedwright.training.engine.optim import learning_rate
from embedwright.training.recipe import Recipe, expand
from embedwright.training.run import distill
from embedwright.training.run import scores as judge
from embedwright.training.run.signals import Interrupted
from embedwright.training.run.start import start_model
from embedwright.training.train import train

TEXTS = ["how do tides work?", "the moon", "a dog that does not mind, and a longer text behind it"]
WORDS = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox", "lazy", "quick", "brown"]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sentence(random: np.random.Generator, about: str) -> str:
    return " ".join(random.permutation([about, *random.choice(WORDS, 4)]))


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Callable[..., Path]) -> Iterator[dict[str, Any]]:
    """A recipe of two stages over 40 pairs and 36 labelled texts, of 12 and 6 steps.

    The order of rows follows the path as it is written: with a variable in it, every run of these tests is the same.
    """
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    names = [f"{a}{b}" for a in "abcdefgh" for b in "vwxyz"]
    pairs = [{"query": sentence(random, n), "positives": [sentence(random, n), sentence(random, n)]} for n in names]
    pairs = [row | {"negatives": [pairs[i - k]["positives"][0] for k in (3, 7, 11)]} for i, row in enumerate(pairs)]
    labelled = [{"text": sentence(random, f"kind{i % 4}"), "label": f"kind {i % 4}"} for i in range(36)]
    scored = [{"text1": p["query"], "text2": pairs[i % 9]["query"], "score": i % 6} for i, p in enumerate(pairs)]
    (folder / "suite").mkdir()
    write(folder / "suite" / "sts.jsonl", scored)
    write(folder / "pairs.jsonl", pairs)
    write(folder / "labels.jsonl", labelled)
    task = {"name": "pairs", "instruction": "Find its answer"}
    recipe = {
        "name": "tiny",
        "seed": 7,
        "model": {"base": str(tiny_decoder("llama")), "latents": 8, "heads": 4, "multiple": 1, "max_tokens": 40},
        "tune": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "stages": [
            {
                "name": "retrieval",
                "data": [{"path": "${EMBEDWRIGHT_TEST_DATA}/pairs.jsonl", "task": task}],
                "in_batch_negatives": "all",
                "hard_negatives": 1,
                "temperature": 0.1,
                "optim": {"lr": 1e-2, "steps": 12, "batch_queries": 8, "warmup_steps": 2},
            },
            {
                "name": "generalist",
                "data": [{"path": "${EMBEDWRIGHT_TEST_DATA}/labels.jsonl"}],
                "in_batch_negatives": "none",
                "hard_negatives": 2,
                "temperature": 0.1,
                "optim": {"lr": 1e-2, "steps": 6, "batch_queries": 8},
            },
        ],
        "run": {"out": str(folder / "unset"), "checkpoint_every": 5, "tracker": "none"},
        "eval": {"suites": []},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBEDWRIGHT_TEST_DATA", str(folder))
        yield recipe


def short(content: dict[str, Any], out: Path, steps: int = 2, **tune: Any) -> dict[str, Any]:
    """Its first stage alone, cut to a few steps."""
    tree = copy.deepcopy(content)
    tree["stages"] = tree["stages"][:1]
    tree["stages"][0]["optim"] |= {"steps": steps, "warmup_steps": 0}
    tree["run"]["out"] = str(out)
    tree["tune"] |= tune
    return tree


def contrast(model: Embedder, content: dict[str, Any]) -> float:
    """The mean loss of all pairs, each positive against all others: single steps vary too much to see it fall."""
    rows = [json.loads(line) for line in expand(content["stages"][0]["data"][0]["path"]).read_text().splitlines()]
    model.network.eval()
    queries = model.encode([row["query"] for row in rows], task="Find its answer")
    scores = queries @ model.encode([row["positives"][0] for row in rows]).T / 0.1
    return float(np.mean(np.log(np.exp(scores).sum(axis=1)) - scores.diagonal()))


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_seconds(out: Path) -> list[dict[str, Any]]:
    """Nor those waited for a batch, nor the peak of memory, which is this process's."""
    return [{k: v for k, v in record.items() if k not in ("seconds", "waited", "peak_mb")} for record in metrics(out)]


def evaluated(out: Path) -> list[tuple[str, int]]:
    records = map(json.loads, (out / "evaluations.jsonl").read_text().splitlines())
    return [(record["stage"], record["step"]) for record in records]


@dataclass
class Run:
    recipe: Recipe
    out: Path
    model: Embedder
    records: list[dict[str, Any]]
    said: list[str]
    vectors: np.ndarray


@pytest.fixture(scope="module")
def run(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole recipe in one go; leave it as it is."""
    out = tmp_path_factory.mktemp("run") / "deep" / "out"
    tree = copy.deepcopy(content)
    tree["run"] |= {"out": str(out), "tracker": "tensorboard"}
    tree["eval"] = {"every": 5, "suites": ["${EMBEDWRIGHT_TEST_DATA}/suite"]}
    recipe = Recipe.parse(tree)
    records: list[dict[str, Any]] = []
    said: list[str] = []
    model = train(recipe, on_step=records.append, on_evaluation=said.append)
    return Run(recipe, out, model, records, said, model.encode(TEXTS, task="Find its answer"))


# ---- one run


def test_the_log_has_one_record_a_step(run: Run) -> None:
    assert metrics(run.out) == run.records
    keys = {"stage", "step", "loss", "chance", "lr", "grad_norm", "tokens", "seconds", "waited", "peak_mb", "ids"}
    looked = {"head_change", "head_entropy"}
    for record in run.records:
        assert record.keys() - looked == keys
        last = {"retrieval": 12, "generalist": 6}[record["stage"]]
        assert (looked <= record.keys()) == (record["step"] in (1, 11, last))
    assert run.records[0]["head_change"] == 0 < run.records[-1]["head_change"]  # the head starts as the identity
    place = [(record["stage"], record["step"]) for record in run.records]
    assert place == [*(("retrieval", i) for i in range(1, 13)), *(("generalist", i) for i in range(1, 7))]
    assert all(record["grad_norm"] > 0 and record["seconds"] > 0 for record in run.records)


def test_the_folder_says_what_the_run_was(run: Run) -> None:
    assert Recipe.load(run.out / "recipe.yaml").hash() == run.recipe.hash()
    described = json.loads((run.out / "data.json").read_text())
    assert [stage["stage"] for stage in described["stages"]] == ["retrieval", "generalist"]
    assert json.loads((run.out / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    card = (run.out / "README.md").read_text()
    assert 'Embedder.load("model")' in card and "| retrieval | 12 |" in card
    [last] = [r for r in map(json.loads, (run.out / "evaluations.jsonl").read_text().splitlines()) if r["step"] == 6]
    assert f"{last['results']['rows'][0]['value']:.4f}" in card


@pytest.mark.parametrize(
    "asked",
    [
        {"loss": {"mask_above": -0.5}},
        {"loss": {"hardness": 5.0}},
        {"loss": {"focal": 1.0}},
        {"loss": {"same_tower": "both"}},
        {"loss": {"dims": [8]}},
        {"loss": {"distill": {"vector_weight": 1.0, "teacher": "teacher"}}},
    ],
    ids=lambda asked: next(iter(asked["loss"])),
)
def test_what_a_stage_asks_of_its_loss_reaches_every_step(
    content: dict[str, Any], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    monkeypatch.setattr(distill, "open_encoder", lambda name: run.model)
    tree = short(content, tmp_path)
    tree["stages"][0] |= asked
    found = losses(Recipe.parse(tree))
    plain = losses(Recipe.parse(short(content, tmp_path / "plain")))
    assert abs(found[0] - plain[0]) > 1e-3 and all(np.isfinite(found))


def test_a_record_tells_the_step_as_the_recipe_defines_it(run: Run) -> None:
    sources = open_sources(run.recipe)
    for number, stage in enumerate(run.recipe.stages):
        records = [record for record in run.records if record["stage"] == stage.name]
        for step, record in enumerate(records):
            assert record["lr"] == learning_rate(stage.optim, step)
            rows = rows_at(sources[number], step, batch_queries=8, batching="blended", seed=7, stage=stage.name)
            batch = make_batch(
                rows,
                run.model.contract,
                hard_negatives=stage.hard_negatives,
                in_batch=stage.in_batch_negatives,
                rng=np.random.default_rng([7, number, step]),
            )
            assert record["ids"] == batch.ids_hash()
            texts = {*batch.queries, *batch.candidates}
            assert record["tokens"] == sum(len(run.model.tokenize([t], prefix=p).ids_T) for p, t in texts)


def test_the_loss_falls_in_both_stages(content: dict[str, Any], run: Run, tmp_path: Path) -> None:
    first = Recipe.parse(short(content, tmp_path, 24))
    before, after = contrast(start_model(first), content), contrast(train(first), content)
    assert after < 0.6 * before and after < 0.75 * np.log(40)  # a model that knows nothing has the logarithm
    losses = [record["loss"] for record in run.records[12:]]
    assert np.mean(losses[-2:]) < 0.95 * np.mean(losses[:2])


def test_what_comes_back_is_a_merged_embedder(run: Run, tmp_path: Path) -> None:
    network = run.model.network
    assert not has_lora(network.backbone) and not network.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())
    np.testing.assert_allclose(np.linalg.norm(run.vectors, axis=1), 1, atol=1e-6)
    assert np.abs(run.vectors - start_model(run.recipe).encode(TEXTS, task="Find its answer")).max() > 0.05
    run.model.save(tmp_path / "saved")
    loaded = Embedder.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.encode(TEXTS, task="Find its answer"), run.vectors, atol=1e-6)


def test_suites_are_evaluated_at_the_start_every_so_often_and_at_the_end_of_stages(run: Run) -> None:
    wanted = [
        ("start", 0),
        ("retrieval", 5),
        ("retrieval", 10),
        ("retrieval", 12),
        ("generalist", 5),
        ("generalist", 6),
    ]
    assert evaluated(run.out) == wanted
    records = [json.loads(line) for line in (run.out / "evaluations.jsonl").read_text().splitlines()]
    results = [Results.from_json(json.dumps(record["results"])) for record in records]
    assert all(record["suite"] == run.recipe.eval.suites[0] for record in records)
    assert len({result.rows[0].value for result in results}) > 4  # the last step is too small to change an order
    after = evaluate(run.model, expand(run.recipe.eval.suites[0])).rows[0]
    assert results[-1].rows[0].value == pytest.approx(after.value, abs=1e-3)
    assert len(run.said) == 2 * len(wanted)


def test_tensorboard_has_the_losses(run: Run) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(run.out / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(i, pytest.approx(record["loss"])) for i, record in enumerate(run.records, start=1)]


def test_the_newest_checkpoints_are_kept(run: Run) -> None:
    assert sorted(p.name for p in (run.out / "checkpoints").iterdir()) == ["01-0000005", "01-0000006"]


def test_a_finished_run_returns_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (run.out / name).read_bytes() for name in ("metrics.jsonl", "evaluations.jsonl")}
    monkeypatch.setattr(judge, "run_suite", lambda *_, **__: pytest.fail("evaluated again"))
    monkeypatch.setattr(steps_module, "accumulate", lambda *_, **__: pytest.fail("trained again"))
    model = train(run.recipe)
    assert np.array_equal(model.encode(TEXTS, task="Find its answer"), run.vectors)
    assert before == {name: (run.out / name).read_bytes() for name in before}


# ---- one run in several goes


class Stop(Exception):  # noqa: N818
    pass


def stop_at(stage: str, step: int) -> Callable[[dict[str, Any]], None]:
    def on_step(record: dict[str, Any]) -> None:
        if (record["stage"], record["step"]) == (stage, step):
            raise Stop

    return on_step


def test_a_run_in_pieces_equals_the_run_in_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = run.recipe.with_out(tmp_path)
    places = [
        ("retrieval", 3),
        ("retrieval", 5),
        ("retrieval", 8),
        ("retrieval", 12),
        ("generalist", 1),
        ("generalist", 6),
    ]
    for place in places:
        with pytest.raises(Stop):
            train(recipe, on_step=stop_at(*place))
    model = train(recipe)
    assert without_seconds(tmp_path) == without_seconds(run.out)
    assert np.array_equal(model.encode(TEXTS, task="Find its answer"), run.vectors)
    assert evaluated(tmp_path) == evaluated(run.out)

    (newest,) = (tmp_path / "checkpoints").glob("01-0000006")
    (newest / "weights.safetensors").write_bytes(b"torn")
    assert np.array_equal(train(recipe).encode(TEXTS, task="Find its answer"), run.vectors)
    assert without_seconds(tmp_path) == without_seconds(run.out)
    assert evaluated(tmp_path) == evaluated(run.out)


def test_an_evaluation_that_was_broken_off_is_made_up_for(run: Run, tmp_path: Path) -> None:
    def on_evaluation(said: str) -> None:
        seen.append(said)
        if len(seen) == 3:  # the first line of the evaluation at step 5, whose checkpoint stands
            raise Stop

    seen: list[str] = []
    recipe = run.recipe.with_out(tmp_path)
    with pytest.raises(Stop):
        train(recipe, on_evaluation=on_evaluation)
    with (tmp_path / "evaluations.jsonl").open("a") as stream:
        stream.write('{"stage": "retr')  # as a kill may leave it
    train(recipe)
    assert evaluated(tmp_path) == evaluated(run.out)


def test_a_trained_model_is_never_recorded_as_the_start(run: Run, content: dict[str, Any], tmp_path: Path) -> None:
    tree = short(content, tmp_path)
    train(Recipe.parse(tree))
    train(Recipe.parse(tree | {"eval": {"suites": run.recipe.eval.suites}}))
    assert evaluated(tmp_path) == [("retrieval", 2)]


def test_evaluations_of_a_run_without_a_checkpoint_do_not_stand_for_another_run(
    run: Run, content: dict[str, Any], tmp_path: Path
) -> None:
    tree = short(content, tmp_path) | {"eval": {"suites": run.recipe.eval.suites}}
    with pytest.raises(Stop):
        train(Recipe.parse(tree), on_step=stop_at("retrieval", 1))
    before = (tmp_path / "evaluations.jsonl").read_text()
    tree["model"]["layers"] = 1
    tree["stages"][0]["name"] = "renamed"
    train(Recipe.parse(tree))
    assert evaluated(tmp_path) == [("start", 0), ("renamed", 2)]
    assert before not in (tmp_path / "evaluations.jsonl").read_text()


def test_another_recipe_or_other_data_in_the_same_folder_is_refused(
    run: Run, content: dict[str, Any], tmp_path: Path
) -> None:
    tree = short(content, tmp_path)
    pairs = tmp_path / "pairs.jsonl"
    rows = expand(content["stages"][0]["data"][0]["path"]).read_text()
    pairs.write_text(rows)
    tree["stages"][0]["data"][0]["path"] = str(pairs)
    train(Recipe.parse(tree))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = copy.deepcopy(tree)
    other["stages"][0]["optim"]["lr"] = 1e-3
    said = r"holds a run of another recipe \(stages\.0\.optim\.lr: 0\.01 -> 0\.001\): choose another run\.out"
    with pytest.raises(ConfigError, match=said):
        train(Recipe.parse(other))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    pairs.write_text(rows.replace("moon", "Mars"))
    with pytest.raises(ConfigError, match=r"holds a run of another data \(retrieval/0#pairs: \w+ -> \w+\)"):
        train(Recipe.parse(tree))
    pairs.write_text(rows)
    tree["name"], tree["run"]["checkpoint_every"] = "renamed", 1
    train(Recipe.parse(tree))  # neither decides the weights


def test_bad_data_is_refused_before_a_model_is_made(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "start_model", lambda *_: pytest.fail("a model was made"))
    tree = short(content, tmp_path / "out")
    tree["stages"].append(copy.deepcopy(tree["stages"][0]) | {"name": "second", "data": [{"path": "absent.jsonl"}]})
    with pytest.raises(FileNotFoundError, match=r"stages\.second\.data\.0"):
        train(Recipe.parse(tree))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [{3}, {2, 3, 5, 6, 8}, {3, 4, 5}])
def test_a_step_that_is_not_finite_moves_nothing_and_three_in_a_row_stop_the_run(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, bad: set[int]
) -> None:
    tree = short(content, tmp_path, steps=9)
    tree["run"]["checkpoint_every"] = 1
    accumulate, weights = steps_module.accumulate, []

    def broken(replica: Any, *args: Any, **kwargs: Any) -> tuple[float, int]:
        parameters = [p for p in replica.embed.__self__.parameters() if p.requires_grad]
        weights.append([p.detach().clone() for p in parameters])
        loss, tokens = accumulate(replica, *args, **kwargs)
        if len(weights) not in bad:
            return loss, tokens
        if what == "gradient":
            next(p for p in parameters if p.grad is not None).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
        return (float("nan") if what == "loss" else loss), tokens

    monkeypatch.setattr(steps_module, "accumulate", broken)
    if bad == {3, 4, 5}:
        with pytest.raises(FloatingPointError, match=rf"^stage retrieval, step 5: .*{what}.* for the third step in"):
            train(Recipe.parse(tree))
        assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3, 4]
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()]
    else:
        train(Recipe.parse(tree))
        assert {record["step"] for record in metrics(tmp_path) if record["grad_norm"] is None} == bad
    for step in range(1, len(weights)):
        same = all(torch.equal(a, b) for a, b in zip(weights[step - 1], weights[step], strict=True))
        assert same == (step in bad)
    kept = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == sorted(bad) and all(len(row["ids"]) == 8 for row in kept)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_order_of_rows_is_the_same_from_any_step_and_with_any_workers(
    content: dict[str, Any], run: Run, tmp_path: Path, workers: int
) -> None:
    tree = copy.deepcopy(content)
    tree["run"] |= {"out": str(tmp_path), "workers": workers, "checkpoint_every": 1, "keep": 1}
    for stop in (("retrieval", 3), ("retrieval", 11), ("generalist", 1), ("generalist", 4)):
        with pytest.raises(Stop):
            train(Recipe.parse(tree), on_step=stop_at(*stop))
    train(Recipe.parse(tree))
    assert [r["ids"] for r in metrics(tmp_path)] == [r["ids"] for r in run.records]
    assert [r["loss"] for r in metrics(tmp_path)] == [r["loss"] for r in run.records]


def test_weights_that_stand_still_stop_the_run(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate = steps_module.accumulate

    def unplugged(replica: Any, *args: Any, **kwargs: Any) -> tuple[float, int]:
        found = accumulate(replica, *args, **kwargs)
        replica.embed.__self__.head.latents.grad = None
        return found

    monkeypatch.setattr(steps_module, "accumulate", unplugged)
    with pytest.raises(RuntimeError, match=r"1 of \d+ .* had no gradient in 10 updates, e\.g\. head\.latents"):
        train(Recipe.parse(short(content, tmp_path, steps=12)))


# ---- ways to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_behind_its_step_and_the_rest_is_the_same(
    content: dict[str, Any], run: Run, tmp_path: Path, number: signal.Signals
) -> None:
    tree = copy.deepcopy(content)
    tree["run"] |= {"out": str(tmp_path), "checkpoint_every": 100}
    before = signal.getsignal(number)

    def ask(record: dict[str, Any]) -> None:
        if (record["stage"], record["step"]) == ("retrieval", 7):
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=rf"{number.name} after stage retrieval, step 7"):
        train(Recipe.parse(tree), on_step=ask)
    assert signal.getsignal(number) == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00-0000007"]
    model = train(Recipe.parse(tree))
    assert without_seconds(tmp_path) == without_seconds(run.out)
    np.testing.assert_array_equal(model.encode(TEXTS), run.model.encode(TEXTS))


# ---- ways to train


def losses(recipe: Recipe) -> list[float]:
    records: list[dict[str, Any]] = []
    train(recipe, on_step=records.append)
    return [record["loss"] for record in records]


def test_gradient_checkpointing_gives_the_same_losses(content: dict[str, Any], tmp_path: Path) -> None:
    plain = losses(Recipe.parse(short(content, tmp_path / "plain", 4)))
    tree = short(content, tmp_path / "saving", 4, gradient_checkpointing=True)
    saving = Recipe.parse(tree)
    assert losses(saving) == pytest.approx(plain, rel=1e-5)
    forwards: list[int] = []
    model = start_model(saving)
    layer = model.network.backbone.layers[1].mlp.act_fn
    layer.register_forward_hook(lambda *_: forwards.append(1))
    model.embed(model.tokenize(TEXTS)).sum().backward()
    assert len(forwards) == 2  # and it is on: the layer runs once more in the backward pass


def test_what_changes_no_row_may_change_when_a_run_goes_on(content: dict[str, Any], tmp_path: Path) -> None:
    """As after running out of memory."""
    tree = short(content, tmp_path / "whole", 6, dropout=0.0)
    plain = losses(Recipe.parse(tree))
    tree["run"] |= {"out": str(tmp_path / "changed"), "checkpoint_every": 2}
    with pytest.raises(Stop):
        train(Recipe.parse(tree), on_step=stop_at("retrieval", 4))
    tree["run"] |= {"batch_tokens": 60, "workers": 0, "checkpoint_every": 1, "keep": 1, "tracker": "tensorboard"}
    tree["tune"]["gradient_checkpointing"] = True
    tree["eval"]["every"] = 2
    [entry] = tree["stages"][0]["data"]  # and on another machine
    tree["model"]["base"] = str(shutil.copytree(tree["model"]["base"], tmp_path / "base"))
    entry["path"] = str(shutil.copy(expand(entry["path"]), tmp_path))
    assert len(losses(Recipe.parse(tree))) == 4  # from the step after its checkpoint
    after = metrics(tmp_path / "changed")
    assert [record["loss"] for record in after] == pytest.approx(plain, rel=1e-4)
    assert [record["ids"] for record in after] == [record["ids"] for record in metrics(tmp_path / "whole")]


def test_the_token_budget_changes_no_loss(content: dict[str, Any], tmp_path: Path) -> None:
    tree = copy.deepcopy(content)
    tree["tune"]["dropout"] = 0.0
    tree["run"]["out"] = str(tmp_path / "whole")
    whole = losses(Recipe.parse(tree))
    tree["run"] |= {"out": str(tmp_path / "parts"), "batch_tokens": 100}
    assert losses(Recipe.parse(tree)) == pytest.approx(whole, rel=1e-3)


def test_bf16_freezes_the_base_in_bf16_and_trains_in_float32(content: dict[str, Any], tmp_path: Path) -> None:
    tree = short(content, tmp_path / "bf16", 6)
    plain = losses(Recipe.parse(short(content, tmp_path / "fp32", 6)))
    tree["run"]["precision"] = "bf16"
    recipe = Recipe.parse(tree)
    for name, parameter in start_model(recipe).network.named_parameters():
        trained = "lora_" in name or name.startswith("head.")
        assert parameter.requires_grad == trained
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16)
    assert losses(recipe) == pytest.approx(plain, rel=0.1)
    model = train(recipe)
    assert all(p.dtype == torch.float32 for p in model.network.parameters())
    assert np.isfinite(model.encode(TEXTS)).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_tuning_moves_every_weight(content: dict[str, Any], tmp_path: Path, precision: str) -> None:
    tree = short(content, tmp_path, 4, method="full")
    tree["run"]["precision"] = precision
    tree["stages"][0]["optim"]["lr"] = 5e-4
    recipe = Recipe.parse(tree)
    before = dict(start_model(recipe).network.named_parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in before.values())
    records: list[dict[str, Any]] = []
    model = train(recipe, on_step=records.append)
    after = dict(model.network.named_parameters())
    assert {n for n in before if torch.equal(before[n], after[n])} == set()
    assert contrast(model, content) < contrast(start_model(recipe), content)
    with pytest.raises(Stop):
        train(recipe.with_out(tmp_path / "again"), on_step=stop_at("retrieval", 2))
    again = train(recipe.with_out(tmp_path / "again"))
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("pooling", get_args(Kind))
def test_every_pooling_trains(content: dict[str, Any], tmp_path: Path, pooling: str, attention: str) -> None:
    tree = short(content, tmp_path, 1)
    tree["model"] |= {"pooling": pooling, "attention": attention}
    recipe = Recipe.parse(tree)
    before = start_model(recipe)
    assert before.network.training
    model = train(recipe)
    assert model.network.pooling.kind == pooling
    assert model.network.backbone.config.is_causal == (attention == "causal")
    assert np.abs(model.encode(TEXTS) - before.encode(TEXTS)).max() > 1e-4
    assert len(metrics(tmp_path)) == 1


def test_adapters_are_merged_under_proof(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda layer, name: 2 * right(layer, name))
    with pytest.raises(RuntimeError, match=r"merging changed what .* this model is lost"):
        train(Recipe.parse(short(content, tmp_path)))


def test_a_trained_model_is_saved_before_it_takes_new_adapters(content: dict[str, Any], tmp_path: Path) -> None:
    tree = short(content, tmp_path)
    tree["run"]["save"] = "none"
    model = train(Recipe.parse(tree))
    expected = model.encode(TEXTS)
    new = Embedder(copy.deepcopy(model.network), model.tokenizer).add_lora(2)
    with pytest.raises(ValueError, match=r"the weights below the adapters are not those of .*llama any more"):
        new.save(tmp_path / "adapter")
    model.save(tmp_path / "base")
    model.add_lora(2).save(tmp_path / "adapter")
    np.testing.assert_allclose(Embedder.load(tmp_path / "adapter").encode(TEXTS), expected, atol=1e-6)


def test_a_resumed_run_says_where_it_stands(
    content: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = short(content, tmp_path, 3)
    tree["run"]["checkpoint_every"] = 2
    with pytest.raises(Stop):
        train(Recipe.parse(tree), on_step=stop_at("retrieval", 3))
    with caplog.at_level(logging.INFO, logger="embedwright"):
        train(Recipe.parse(tree))
    assert f"resuming {tmp_path} at stage 0, step 2" in caplog.text
