from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedwright.config import ConfigError
from embedwright.data.sources.catalog import find_entry
from embedwright.training.batches.blend import rows_at
from embedwright.training.batches.sources import data_fingerprint, open_sources
from embedwright.training.cost import GB, GPUS, Device, Memory, flops_of, memory_of, sizes_of
from embedwright.training.plan import Estimate, estimate, plan, render, render_cost, report, with_tokens
from embedwright.training.recipe import Recipe

OPTIM = {"lr": 1e-3, "steps": 50, "batch_queries": 4}
CONTENT: dict[str, Any] = {
    "name": "small",
    "model": {"base": "no/such-decoder"},
    "stages": [
        {"name": "one", "data": [], "in_batch_negatives": "all", "hard_negatives": 3, "optim": OPTIM},
        {"name": "two", "data": [], "in_batch_negatives": "all", "hard_negatives": 0, "optim": OPTIM | {"steps": 10}},
    ],
    "run": {"out": "runs/small"},
}


def recipe(one: list[dict[str, Any]], two: list[dict[str, Any]], **more: Any) -> Recipe:
    content = copy.deepcopy(CONTENT) | more
    content["stages"][0]["data"], content["stages"][1]["data"] = one, two
    return Recipe.parse(content)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"query": f"q{i}", "positive": f"p{i}"}) + "\n" for i in range(30)))
    return str(file)


def test_rows_are_counted_where_the_file_is_there_else_said_by_recipe_or_catalogue(pairs: str, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.parquet")
    found = plan(
        recipe(
            [
                {"path": pairs, "task": "own", "rows": 7, "weight": 2.0},
                {"path": absent, "rows": 40},
                {"path": str(tmp_path / "msmarco.parquet")},
                {"path": absent, "task": "fiqa"},
                {"path": str(tmp_path / "other.parquet")},
            ],
            [{"path": pairs, "task": "own"}],
        )
    )
    counted = [(share.rows, share.counted) for share in found[0].shares]
    samples = [find_entry(name).samples for name in ("msmarco", "fiqa")]
    assert counted == [
        (30, "counted"),
        (40, "recipe"),
        (samples[0], "catalogue, recalled"),
        (samples[1], "catalogue, recalled"),
        (None, "unknown"),
    ]
    total = 60 + 40 + samples[0] + samples[1]
    assert [share.share for share in found[0].shares] == pytest.approx(
        [60 / total, 40 / total, samples[0] / total, samples[1] / total, 0]
    )
    assert found[0].rows == 70 + samples[0] + samples[1]


def test_shares_follow_the_stages_sampling(pairs: str, tmp_path: Path) -> None:
    small = recipe([{"path": pairs}, {"path": str(tmp_path / "absent.parquet"), "rows": 120}], [{"path": pairs}])
    [one, two] = small.stages
    even = small.model_copy(update={"stages": (one.model_copy(update={"sampling_alpha": 0.5}), two)})
    assert [part.share for part in plan(small)[0].shares] == [0.2, 0.8]
    assert [part.share for part in plan(even)[0].shares] == pytest.approx([1 / 3, 2 / 3])


def test_steps_give_queries_texts_and_passes(pairs: str) -> None:
    one, two = plan(recipe([{"path": pairs, "task": "own"}], [{"path": pairs, "task": "own"}]))
    assert (one.steps, one.queries, one.texts, one.passes) == (50, 200, 200 * 5, 200 / 30)
    assert (two.steps, two.queries, two.texts, two.passes) == (10, 40, 40 * 2, 40 / 30)
    text = render(recipe([{"path": pairs}], [{"path": pairs}]), [one, two])
    assert "together: 60 steps, 240 queries, 1,080 texts" in text
    assert "50 steps, 200 queries (6.67 passes), 1,000 texts" in text


def test_a_file_of_unknown_size_is_said_to_be_one(pairs: str, tmp_path: Path) -> None:
    small = recipe([{"path": str(tmp_path / "absent.jsonl")}], [{"path": pairs, "task": "own"}])
    text = render(small, plan(small))
    assert "0 rows of 1 files (1 of unknown size)" in text


def test_mining_inside_the_run_is_said_and_not_counted(pairs: str) -> None:
    content = copy.deepcopy(CONTENT)
    content["stages"][0]["data"] = content["stages"][1]["data"] = [{"path": pairs, "task": "own"}]
    content["stages"].insert(0, {"kind": "mine", "every": 20})
    small = Recipe.parse(content)
    lines = [line for line in render(small, plan(small)).splitlines() if "mined" in line]
    assert len(lines) == 1 and "mined before it and every 20 steps by" in lines[0]


def test_provenance_is_printed_with_the_values(pairs: str) -> None:
    small = recipe([{"path": pairs, "task": "own"}], [{"path": pairs, "task": "own"}])
    said = dict.fromkeys(small.values_by_key(), "guess: ours")
    small = recipe([{"path": pairs}], [{"path": pairs}], provenance=said)
    lines = [line.split() for line in render(small, plan(small)).splitlines()]
    assert ["stages.one.optim.steps", "50", "guess:", "ours"] in lines
    assert ["stages.two.data", "1", "files", "guess:", "ours"] in lines


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.latents": None}, "says nothing of model.latents"),
        ({"model.latentz": "paper"}, "no value 'model.latentz' (did you mean 'model.latents'?)"),
        ({"model.latents": "recalled"}, "'recalled' is none of paper, released code, sister model, guess"),
    ],
)
def test_provenance_is_complete_and_of_known_sources(change: dict[str, str | None], said: str) -> None:
    data = [{"path": "data.jsonl"}]
    provenance = dict.fromkeys(recipe(data, data).values_by_key(), "paper") | change
    with pytest.raises(ConfigError) as caught:
        recipe(data, data, provenance={key: value for key, value in provenance.items() if value})
    assert said in str(caught.value)


def test_provenance_and_expected_rows_do_not_change_the_hash() -> None:
    data = [{"path": "data.jsonl"}]
    plain = recipe(data, data)
    said = dict.fromkeys(plain.values_by_key(), "paper")
    assert recipe([{**data[0], "rows": 5}], data, provenance=said).hash() == plain.hash()
    assert recipe([{**data[0], "weight": 2.0}], data).hash() != plain.hash()


def test_tasks_are_found_in_the_file_beside_the_rows_and_in_the_catalogue(tmp_path: Path) -> None:
    made, known = tmp_path / "made.jsonl", tmp_path / "known.jsonl"
    kinds = {"a": "classification", "b": "retrieval", "c": "retrieval", "d": "retrieval"}
    rows = [{"id": n + str(i), "task": n, "query": f"q{n}{i}", "positives": ["p"]} for n in kinds for i in range(3)]
    made.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known.write_text(json.dumps(rows[0] | {"task": "fiqa"}) + "\n")
    tasks = [{"name": n, "family": family, "instruction": f"Find {n}"} for n, family in kinds.items()]
    (tmp_path / "made.jsonl.tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    own = {"path": str(known), "task": {"name": "d", "instruction": "The recipe's own word"}}
    small = recipe([{"path": str(made)}, {"path": str(known)}, own], [own])
    found = open_sources(small)[0]
    # tasks of one kind are one source: thousands of synthetic ones would be slow to share slots out to
    assert [(source.task.family, len(source.rows), len(source.tasks)) for source in found[:2]] == [
        ("classification", 3, 0),
        ("retrieval", 6, 2),
    ]
    assert [source.task.instruction for source in found[2:]] == [
        "The recipe's own word",
        find_entry("fiqa").instructions[0],
        find_entry("fiqa").instructions[0],
    ]
    drawn = rows_at(found, 0, batch_queries=14, batching="blended", seed=0, stage="one")
    said = {row.example.id: row.task.instruction for row in drawn if row.example.id in {r["id"] for r in rows}}
    assert {id[0]: instruction for id, instruction in said.items()}["c"] == "Find c"
    assert all(instruction == f"Find {id[0]}" for id, instruction in said.items() if id[0] in "bc")
    before = data_fingerprint([found])
    (tmp_path / "made.jsonl.tasks.jsonl").write_text("".join(json.dumps(t | {"licence": "MIT"}) + "\n" for t in tasks))
    assert data_fingerprint([open_sources(small)[0]]) != before


# ---- what it costs

SLOW = Device("slow, 1 GB", "cuda", GB, {"fp32": 1e9, "bf16": 2e9}, {"fp32": 0.5, "bf16": 0.5}, "made up")


@pytest.fixture
def tiny(pairs: str, tiny_decoder: Callable[..., Path]) -> Callable[..., Recipe]:
    """`tiny(**run)`: both stages over the same pairs, on a tiny decoder."""

    def make(pooling: str = "latent", one: str = pairs, **run: Any) -> Recipe:
        model = {"base": str(tiny_decoder("llama")), "pooling": pooling, "latents": 6, "heads": 2, "max_tokens": 64}
        task = {"name": "own", "instruction": "Answer"}
        data = [{"path": one, "task": task}]
        return recipe(data, [{"path": pairs, "task": task}], model=model, run={"out": "runs/small"} | run)

    return make


def test_a_step_costs_its_tokens(tiny: Any) -> None:
    small = tiny()
    stages, sizes = with_tokens(small, plan(small)), sizes_of(small)
    [found] = estimate(small, stages, sizes, devices=[SLOW])
    for stage, seconds in zip(stages, found.seconds, strict=True):
        assert stage.tokens.step > 4 * 2 * 3
        flops = flops_of(small, sizes, stage.tokens.step, stage.tokens.squares, again=0)
        assert seconds == pytest.approx((flops.decoder + flops.head) / 0.5e9)
    largest = max(stage.tokens.largest for stage in stages)
    assert found.memory == memory_of(small, sizes, largest, "cuda", scores=4 * 4 * 4)
    shared = estimate(small, stages, sizes, devices=[SLOW], processes=2)[0]
    assert shared.seconds == pytest.approx([seconds / 2 for seconds in found.seconds])
    assert shared.memory.activations < 0.6 * found.memory.activations


def test_a_batch_beyond_batch_tokens_takes_less_memory_and_a_second_forward_of_what_is_beyond(tiny: Any) -> None:
    whole, parts = tiny(), tiny(batch_tokens=40)
    stages, sizes = with_tokens(whole, plan(whole)), sizes_of(whole)
    assert min(stage.tokens.step for stage in stages) > 40 > max(k.longest for k in stages[0].tokens.kinds.values())
    [of_whole], [of_parts] = (estimate(one, stages, sizes, devices=[SLOW]) for one in (whole, parts))
    for stage, before, now in zip(stages, of_whole.seconds, of_parts.seconds, strict=True):
        twice = 1 - 40 / stage.tokens.step  # the first part keeps its graph
        flops = flops_of(whole, sizes, stage.tokens.step, stage.tokens.squares, again=twice)
        assert now == pytest.approx((flops.decoder + flops.head) / 0.5e9) and 1.1 * before < now < 1.5 * before
    assert of_parts.memory == memory_of(parts, sizes, 40, "cuda", scores=4 * 4 * 4)
    alone = [replace(stage, tokens=replace(stage.tokens, shared=False)) for stage in stages]
    assert estimate(parts, alone, sizes, devices=[SLOW])[0].seconds == of_whole.seconds
    # a text that is longer than batch_tokens goes through by itself
    long = estimate(tiny(batch_tokens=1), stages, sizes, devices=[SLOW])[0].memory
    longest = max(kind.longest for kind in stages[0].tokens.kinds.values())
    assert long.activations == memory_of(whole, sizes, longest, "cuda").activations


def test_the_cost_is_laid_out_in_lines(tiny: Any) -> None:
    small = tiny(parallel="fsdp")
    stages, sizes = with_tokens(small, plan(small)), sizes_of(small)
    memory = Memory(GB, 2 * GB, 3 * GB, 4 * GB, 5 * GB, 6 * GB)
    estimates = [
        Estimate(SLOW, memory, (0.0123, 70.0)),
        Estimate(replace(SLOW, name="large", memory=21 * GB), memory, (4.0, 7000.0)),
    ]
    text = render_cost(small, stages, sizes, estimates, processes=4)
    lines = [line.split() for line in text.splitlines()]
    assert f"parameters: {sizes.decoder + sizes.adapters + sizes.head:,}, of which {sizes.trained:,} train" in text
    assert "each of 4 devices (fsdp)" in text
    assert ["slow,", "1", "GB", "1.00", "2.00", "3.00", "4.00", "5.00", "6.00", "21.0", "1", "no"] in lines
    assert ["large", "1.00", "2.00", "3.00", "4.00", "5.00", "6.00", "21.0", "21", "yes"] in lines
    in_all = [50 * 0.0123 + 10 * 70.0, 50 * 4 + 10 * 7000.0]
    assert ["slow,", "1", "GB", "12.3", "ms", "70", "s", f"{in_all[0] / 60:.1f}", "min", "0.001", "50%"] in lines
    assert ["large", "4.0", "s", "116.7", "min", f"{in_all[1] / 3600:.1f}", "h", "0.001", "50%"] in lines


def test_the_report_has_it_all(tiny: Any) -> None:
    small = tiny()
    text = report(small)
    [stage, _] = with_tokens(small, plan(small))
    assert render(small, [stage, _]) in text
    tokens = stage.tokens
    assert f"{tokens.step:,.0f} tokens a step, {50 * tokens.step:,.0f} in all; padded {tokens.padded:,.0f}" in text
    assert f"{1 - tokens.step / tokens.padded:.0%} saved" in text
    queries = tokens.kinds["queries"]
    row = next(line.split() for line in text.splitlines() if line.startswith("  queries "))
    assert row[1:] == [f"{queries.mean:.1f}", *map(str, (queries.median, queries.most, queries.longest))]
    assert all(text.count(f"  {device.name}") == 2 for device in GPUS) and text.count("  this CPU") == 2
    assert "<=" not in text and "GPUs are not measured" in text
    many = report(small, processes=8)
    assert "each of 8 devices (ddp)" in many and "this CPU" not in many


def test_the_report_gives_a_bound_where_no_file_is_there(tiny: Any, tmp_path: Path) -> None:
    small = tiny(one=str(tmp_path / "absent.parquet"))
    lines = report(small).splitlines()
    most = 4 * 5 * 64  # queries, with a positive and three negatives each, of 64 tokens
    assert lines[2].startswith(f"  at most {most:,} tokens a step, {50 * most:,} in all: no file is there to count")
    row = next(line for line in lines if line.startswith("  L4, 24 GB") and "ms" in line)
    assert row.count("<=") == 2  # of this stage and of all: the other stage's file is there


def test_a_base_that_is_not_here_leaves_the_cost_unknown(pairs: str) -> None:
    small = recipe([{"path": pairs, "task": "own"}], [{"path": pairs, "task": "own"}])
    text = report(small)
    assert text.startswith(render(small, plan(small)))
    assert "unknown (recipe small: model.base: no/such-decoder is not on this disk" in text.splitlines()[-1]


def test_the_plan_of_nv_embed_v2_names_every_set_of_the_catalogue() -> None:
    file = Path(__file__).parents[3] / "recipes" / "nv-embed-v2.yaml"
    stages = yaml.safe_load(file.read_text())["stages"]
    named = [{entry.get("task") for entry in stage["data"]} - {None} for stage in stages]
    entries = [entry for entry in map(find_entry, sorted(named[1])) if "v2" in entry.target]
    assert {entry.name for entry in entries} == named[1] and len(entries) == 42
    assert named[0] == {entry.name for entry in entries if entry.family == "retrieval"}
    one, two = plan(Recipe.load(file))
    assert one.rows == sum(entry.samples or 0 for entry in entries if entry.family == "retrieval") + 120_000
    assert two.rows == sum(entry.samples or 0 for entry in entries) + 120_000
    assert (one.steps, two.steps) == (20_000, 18_000)
