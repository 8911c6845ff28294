from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from embedwright.config import ConfigError
from embedwright.model.embedder import Embedder
from embedwright.model.formats.base import new_contract
from embedwright.model.pooling import Kind
from embedwright.processes import Processes
from embedwright.text import TextTokenizer, load_tokenizer
from embedwright.training.batches.feed import batch_of_step, local_batch
from embedwright.training.batches.sources import open_sources
from embedwright.training.lengths import Lengths, stand_ins, summary, tokens_of
from embedwright.training.recipe import Recipe
from embedwright.training.run.start import tokenizer_and_contract
from embedwright.training.train import train

TASK = {"name": "own", "instruction": "Answer the question"}
ROWS = 6


@pytest.fixture
def asked(tiny_decoder: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """`asked(pooling="latent", bos=False, **of the stage)`: a recipe over six pairs with two negatives each."""
    file = tmp_path / "pairs.jsonl"
    with file.open("w") as lines:
        for i in range(ROWS):
            row = {"query": f"where is {i}" + " really" * i, "positives": [f"{i} is here" + " indeed" * (3 * i)]}
            row |= {"id": str(i), "task": "own", "negatives": ["no one knows", f"{i} is far from here"]}
            lines.write(json.dumps(row) + "\n")

    def make(pooling: str = "latent", bos: bool = False, max_tokens: int = 256, **stage: Any) -> Recipe:
        base = {"name": "one", "data": [{"path": str(file), "task": TASK}], "in_batch_negatives": "all"}
        base |= {"hard_negatives": 2, "optim": {"lr": 1e-3, "steps": 3, "batch_queries": ROWS}}
        model = {"base": str(tiny_decoder("llama", bos)), "pooling": pooling, "max_tokens": max_tokens}
        return Recipe.parse({"name": "x", "model": model, "stages": [base | stage], "run": {"out": "runs/x"}})

    return make


def one(recipe: Recipe) -> Any:
    [tokens] = tokens_of(recipe, [[Path(entry.path).exists() for entry in recipe.stages[0].data]])
    return tokens


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pooling", get_args(Kind))
def test_the_contract_is_that_of_the_model(asked: Any, pooling: str, bos: bool) -> None:
    recipe = asked(pooling, bos, max_tokens=77)
    folder = recipe.model.base
    model = Embedder.from_decoder(folder, pooling=pooling, latents=4, heads=2, max_tokens=77)
    assert new_contract(load_tokenizer(folder), recipe.model.pooling, recipe.model.max_tokens) == model.contract


@pytest.mark.parametrize("max_tokens", [256, 24])
def test_a_step_is_counted_as_the_model_reads_it(asked: Any, max_tokens: int) -> None:
    recipe = asked(max_tokens=max_tokens)
    model = Embedder.from_decoder(recipe.model.base, latents=4, heads=2, max_tokens=max_tokens)
    count = lambda text, task=None: len(model.tokenize([text], task=task).ids_T)  # noqa: E731
    queries = [count(f"where is {i}" + " really" * i, TASK["instruction"]) for i in range(ROWS)]
    positives = [count(f"{i} is here" + " indeed" * (3 * i)) for i in range(ROWS)]
    negatives = [count("no one knows"), *(count(f"{i} is far from here") for i in range(ROWS))]  # equal texts are one
    tokens = one(recipe)  # each step has all rows
    assert tokens.step == tokens.largest == sum(queries + positives + negatives)
    documents = positives + negatives
    assert tokens.padded == len(queries) * max(queries) + len(documents) * max(documents)
    assert tokens.rows == 3 * ROWS
    for kind, expected in (("queries", queries), ("positives", positives), ("negatives", negatives)):
        seen = tokens.kinds[kind]
        assert (seen.mean, seen.longest) == (pytest.approx(sum(expected) / len(expected)), max(expected))
        assert seen.median == sorted(expected)[(len(expected) - 1) // 2]
        assert seen.median <= seen.most <= seen.longest <= max_tokens
    if max_tokens == 24:
        assert max(positives) == 24


@pytest.mark.parametrize("in_batch", ["all", "none"])
@pytest.mark.parametrize("count", [1, 2, 3, ROWS, 40])
def test_the_fullest_part_is_what_a_process_of_the_run_encodes(asked: Any, in_batch: str, count: int) -> None:
    """Lengths differ threefold, no text can be cut, and every row has the negative `no one knows`."""
    recipe = asked(in_batch_negatives=in_batch)
    [tokens] = tokens_of(recipe, [[True]], count)
    tokenizer, contract = tokenizer_and_contract(recipe.model)
    own = TextTokenizer(tokenizer.backend_tokenizer)
    steps = [batch_of_step(recipe, 0, open_sources(recipe)[0], contract, step) for step in range(3)]
    encoded = [
        sum(len(local.tokens[text].ids) for text in local.texts[rank])
        for batch in steps
        for rank in range(count)
        for local in [local_batch(batch, own, contract, Processes(rank, count))]
    ]
    assert tokens.fullest == max(encoded)
    assert tokens.largest == one(recipe).largest == one(recipe).fullest
    assert count == 1 or tokens.fullest > tokens.largest / count


def test_these_are_the_tokens_that_training_sees(asked: Any, tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    rows = [{"id": str(i), "task": "own", "query": f"q {i}"} for i in range(9)]
    for i, row in enumerate(rows):  # one of three positives and two of three negatives are drawn
        words = [" ".join([f"w{i}{j}"] * (1 + 4 * j)) for j in range(6)]
        file.open("a").write(json.dumps(row | {"positives": words[:3], "negatives": words[3:]}) + "\n")
    optim = {"lr": 1e-3, "steps": 4, "batch_queries": 3}
    recipe = asked("mean", data=[{"path": str(file), "task": TASK}], optim=optim)
    run = {"out": str(tmp_path / "run"), "tracker": "none", "checkpoint_every": 100}
    recipe = Recipe.parse(recipe.model_dump() | {"run": run})
    seen: list[int] = []
    train(recipe, on_step=lambda record: seen.append(record["tokens"]))
    tokens = one(recipe)
    assert (tokens.step, tokens.largest) == (sum(seen) / 4, max(seen)) and len(set(seen)) > 1
    assert seen[tokens.largest_step] == max(seen)


def test_the_spread_of_lengths() -> None:
    assert summary([*range(1, 100), 1000]) == Lengths(59.5, 50, 95, 1000)


def test_no_more_steps_are_sampled_than_there_are_or_than_it_takes(asked: Any) -> None:
    few = {"lr": 1e-3, "steps": 2, "batch_queries": 3}
    assert one(asked(optim=few)).rows == 6
    assert one(asked(optim=few | {"steps": 10_000, "batch_queries": 100})).rows == 600


def test_what_is_not_there_is_taken_at_its_longest(asked: Any, tmp_path: Path) -> None:
    absent = {"path": str(tmp_path / "absent.parquet"), "task": TASK}
    recipe = asked(data=[absent], hard_negatives=3, max_tokens=100)
    tokens = one(recipe)
    texts = ROWS * 5
    assert (tokens.rows, tokens.kinds) == (0, {"texts": Lengths(100, 100, 100, 100)})
    assert (tokens.step, tokens.largest) == (100 * texts, 100 * texts)
    both = asked(data=[absent, {"path": str(tmp_path / "pairs.jsonl"), "task": TASK}])
    assert one(both).rows == 3 * ROWS  # the file that is there stands for all


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"mine": {"teacher": "bm25"}}, "none of its data can be mined"),
        ({"loss": {"distill": {"score_weight": 1.0}}}, "no row has positive_scores"),
    ],
)
def test_what_no_data_is_for_is_refused_once_all_of_it_is_there(
    asked: Any, tmp_path: Path, stage: dict[str, Any], says: str
) -> None:
    there = {"path": str(tmp_path / "pairs.jsonl"), "task": TASK | {"symmetric": True}}
    assert one(asked(data=[there, {"path": "absent.jsonl"}], **stage)).rows
    with pytest.raises(ConfigError, match=says):
        one(asked(data=[there], **stage))


def test_data_that_training_would_refuse_is_refused(asked: Any) -> None:
    with pytest.raises(ConfigError, match="it would train nothing"):
        one(asked(in_batch_negatives="none", hard_negatives=0))


def test_other_documents_stand_in_the_place_of_negatives_that_the_run_mines(asked: Any, tmp_path: Path) -> None:
    rows = [{"id": str(i), "task": "own", "query": f"where is {i}", "positives": [f"{i} is here"]} for i in range(9)]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    optim = {"lr": 1e-3, "steps": 2, "batch_queries": 3}
    recipe = asked(data=[{"path": str(tmp_path / "bare.jsonl"), "task": TASK}], optim=optim, mine={"negatives": 3})
    assert one(recipe).kinds["negatives"].mean > 0
    stage, [sources] = recipe.stages[0], open_sources(recipe)
    [stood_in] = stand_ins(stage, sources)
    example = stood_in.row(8).example
    assert example.query == "where is 8" and [text.text for text in example.negatives] == ["0 is here", "1 is here"]
    assert stand_ins(stage.model_copy(update={"mine": None}), sources) == sources


def test_scored_pairs_count_as_cosent_reads_them_also_where_the_run_mines(asked: Any, tmp_path: Path) -> None:
    rows = [{"text1": f"text {i}", "text2": f"other {i}" + " longer" * i, "score": i} for i in range(6)]
    (tmp_path / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    optim = {"lr": 1e-3, "steps": 1, "batch_queries": 12}
    data = [{"path": str(tmp_path / "sts.jsonl"), "task": {"name": "own"}}]
    recipe = asked("mean", data=data, optim=optim, loss={"scored": "cosent"})
    model = Embedder.from_decoder(recipe.model.base, pooling="mean")
    total = sum(len(model.tokenize([row[key]]).ids_T) for row in rows for key in ("text1", "text2"))
    assert one(recipe).step == total  # in both directions, and equal texts of a step count once
    assert one(asked("mean", data=data, optim=optim, loss={"scored": "cosent"}, mine={"negatives": 3})).step == total
    few = one(asked("mean", data=data, optim=optim | {"batch_queries": 4}))
    high = sum(len(model.tokenize([row[key]]).ids_T) for row in rows[4:] for key in ("text1", "text2"))
    assert few.step == high
