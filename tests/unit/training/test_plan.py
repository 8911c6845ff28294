from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, Qwen3Config

from embedwright.config import ConfigError
from embedwright.data.sources.catalog import find_entry, load_catalog
from embedwright.processes import Processes
from embedwright.text import TextTokenizer
from embedwright.training.batches.blend import rows_at
from embedwright.training.batches.feed import batch_of_step, local_batch
from embedwright.training.batches.sources import data_fingerprint, open_sources
from embedwright.training.cost import GB, memory_of, sizes_of
from embedwright.training.lengths import Tokens, tokens_of
from embedwright.training.plan import largest_memory, plan, render, report
from embedwright.training.recipe import Recipe
from embedwright.training.run.start import tokenizer_and_contract
from embedwright.training.stages import DistillPart, LossPart, MinePart

RECIPES = Path(__file__).parents[3] / "recipes"
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
    counted = [(share.rows, share.counted) for share in found[0].entries]
    samples = [find_entry(name).samples for name in ("msmarco", "fiqa")]
    assert counted == [
        (30, "counted"),
        (40, "recipe"),
        (samples[0], "catalogue, recalled"),
        (samples[1], "catalogue, recalled"),
        (None, "unknown"),
    ]
    total = 60 + 40 + samples[0] + samples[1]
    assert [share.share for share in found[0].entries] == pytest.approx(
        [60 / total, 40 / total, samples[0] / total, samples[1] / total, 0]
    )
    assert found[0].rows == 70 + samples[0] + samples[1]


def test_shares_follow_the_stages_sampling(pairs: str, tmp_path: Path) -> None:
    small = recipe([{"path": pairs}, {"path": str(tmp_path / "absent.parquet"), "rows": 120}], [{"path": pairs}])
    [one, two] = small.stages
    even = small.model_copy(update={"stages": (one.model_copy(update={"sampling_alpha": 0.5}), two)})
    assert [part.share for part in plan(small)[0].entries] == [0.2, 0.8]
    assert [part.share for part in plan(even)[0].entries] == pytest.approx([1 / 3, 2 / 3])


def test_steps_give_queries_texts_and_passes(pairs: str) -> None:
    one, two = plan(recipe([{"path": pairs, "task": "own"}], [{"path": pairs, "task": "own"}]))
    assert (one.steps, one.queries, one.texts, one.passes) == (50, 200, 200 * 5, 200 / 30)
    assert (two.steps, two.queries, two.texts, two.passes) == (10, 40, 40 * 2, 40 / 30)
    text = "\n".join(render(recipe([{"path": pairs}], [{"path": pairs}]), [one, two]))
    assert "together: 60 steps, 240 queries, 1,080 texts" in text
    assert "50 steps, 200 queries (6.67 passes), 1,000 texts" in text


def test_a_file_of_unknown_size_is_said_to_be_one(pairs: str, tmp_path: Path) -> None:
    small = recipe([{"path": str(tmp_path / "absent.jsonl")}], [{"path": pairs, "task": "own"}])
    text = "\n".join(render(small, plan(small)))
    assert "0 rows of 1 files (1 of unknown size)" in text


def test_mining_inside_the_run_is_said_and_not_counted(pairs: str) -> None:
    content = copy.deepcopy(CONTENT)
    content["stages"][0]["data"] = content["stages"][1]["data"] = [{"path": pairs, "task": "own"}]
    content["stages"].insert(0, {"kind": "mine", "every": 20})
    small = Recipe.parse(content)
    lines = [line for line in render(small, plan(small)) if "mined" in line]
    assert len(lines) == 1 and "mined before it and every 20 steps by previous: the time is not" in lines[0]
    content["stages"][0] = {"kind": "mine", "teacher": "minilm"}
    lines = render(small := Recipe.parse(content), plan(small))
    assert any("by minilm: the time is not counted, nor that model's memory" in line for line in lines)


def test_a_teacher_is_said_and_its_scores_take_memory(tiny: Any) -> None:
    plain = tiny()
    distill = {"similarity_weight": 1.0, "vector_weight": 1.0, "teacher": ["minilm", "no/such-model"]}
    loss = LossPart(distill=DistillPart(**distill))  # type: ignore[arg-type]
    small = plain.model_copy(update={"stages": tuple(s.model_copy(update={"loss": loss}) for s in plain.stages)})
    lines = [line for line in report(small).splitlines() if "minilm, no/such-model" in line]
    assert len(lines) == 2 and all("encodes each of its texts once" in line for line in lines)
    tokens, sizes = counted(small), sizes_of(small)
    largest = max(stage.largest for stage in tokens)
    found = largest_memory(small, tokens, sizes, "cuda")
    assert found == memory_of(small, sizes, largest, "cuda", scores=2 * 4 * 4 * 4)


def test_provenance_is_printed_with_the_values(pairs: str) -> None:
    small = recipe([{"path": pairs, "task": "own"}], [{"path": pairs, "task": "own"}])
    said = dict.fromkeys(small.values_by_key(), "guess: ours")
    small = recipe([{"path": pairs}], [{"path": pairs}], provenance=said)
    lines = [line.split() for line in render(small, plan(small))]
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
    own = {"path": str(made), "task": {"name": "d", "instruction": "The recipe's own word"}}
    small = recipe([own, {"path": str(known)}], [{"path": str(made)}])
    found, others = open_sources(small)
    assert [(len(source.rows), len(source.tasks)) for source in others] == [(3, 0), (9, 3)]  # `d` as the file says
    # tasks of one kind are one source: thousands of synthetic ones would be slow to share slots out to
    assert [(source.task.family, len(source.rows), len(source.tasks)) for source in found[:2]] == [
        ("classification", 3, 0),
        ("retrieval", 6, 2),
    ]
    assert [source.task.instruction for source in found[2:]] == [
        "The recipe's own word",
        find_entry("fiqa").instructions[0],
    ]
    drawn = rows_at(found, 0, batch_queries=14, batching="blended", seed=0, stage="one")
    said = {row.example.id: row.task.instruction for row in drawn if row.example.id in {r["id"] for r in rows}}
    assert {id[0]: instruction for id, instruction in said.items()}["c"] == "Find c"
    assert all(instruction == f"Find {id[0]}" for id, instruction in said.items() if id[0] in "bc")
    before = data_fingerprint([found])
    (tmp_path / "made.jsonl.tasks.jsonl").write_text("".join(json.dumps(t | {"licence": "MIT"}) + "\n" for t in tasks))
    assert data_fingerprint([open_sources(small)[0]]) != before


# ---- what it takes


@pytest.fixture
def tiny(pairs: str, tiny_decoder: Callable[..., Path]) -> Callable[..., Recipe]:
    """`tiny(**run)`: both stages over the same pairs, on a tiny decoder."""

    def make(pooling: str = "latent", one: str = pairs, **run: Any) -> Recipe:
        model = {"base": str(tiny_decoder("llama")), "pooling": pooling, "latents": 6, "heads": 2, "max_tokens": 64}
        task = {"name": "own", "instruction": "Answer"}
        data = [{"path": one, "task": task}]
        return recipe(data, [{"path": pairs, "task": task}], model=model, run={"out": "runs/small"} | run)

    return make


def counted(small: Recipe, processes: int = 1) -> list[Tokens]:
    return tokens_of(small, [[True], [True]], processes)


def test_the_memory_is_that_of_the_stage_and_batch_that_need_most(tiny: Any) -> None:
    small = tiny()
    tokens, sizes = counted(small), sizes_of(small)
    found = largest_memory(small, tokens, sizes, "cuda")
    largest = max(stage.largest for stage in tokens)
    assert found == memory_of(small, sizes, largest, "cuda", scores=4 * 4 * 4)
    shared = largest_memory(small, counted(small, 2), sizes, "cuda", processes=2)
    assert shared.activations < 0.6 * found.activations


def test_the_search_of_mining_takes_a_gpus_memory_in_the_place_of_a_step(tiny: Any) -> None:
    plain = tiny()
    tokens, sizes = counted(plain), sizes_of(plain)
    search = 4 * 32 * (131_072 + 65_536) + 9 * 2048 * 65_536 + 32 * 16_384 * 32  # at the decoder's width of 32
    alone = largest_memory(plain, tokens, sizes, "cuda")
    for teacher, counts in (("previous", True), ("minilm", True), ("bm25", False)):
        rule = {} if counts else {"rule": "naive"}
        mine = MinePart(teacher=teacher, **rule)  # type: ignore[arg-type]
        small = plain.model_copy(update={"stages": tuple(s.model_copy(update={"mine": mine}) for s in plain.stages)})
        found = largest_memory(small, tokens, sizes, "cuda")
        assert found.activations + found.work == (search if counts else alone.activations + alone.work)
        assert found.weights == alone.weights
        assert largest_memory(small, tokens, sizes, "cpu") == largest_memory(plain, tokens, sizes, "cpu")


def test_texts_that_processes_share_are_encoded_by_each(tiny: Any, tmp_path: Path) -> None:
    """Names of classes belong to many queries of a batch, which several processes share."""
    names = [f"class {i}" for i in range(4)]
    rows = [
        {"query": f"text {i} " + "moon " * (i % 5), "positives": [name], "negatives": [n for n in names if n != name]}
        for i, name in enumerate(names * 6)
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = tiny().model_dump()
    data = [{"path": str(tmp_path / "labels.jsonl"), "task": {"name": "own", "instruction": "Name its class"}}]
    optim = {"lr": 1e-3, "steps": 1, "batch_queries": 24}
    content["stages"] = [
        {"name": "one", "data": data, "in_batch_negatives": "none", "hard_negatives": 3, "optim": optim}
    ]
    small = Recipe.parse(content)
    sizes = sizes_of(small)
    tokenizer, contract = tokenizer_and_contract(small.model)
    batch = batch_of_step(small, 0, open_sources(small)[0], contract, 0)
    assert batch.separable()
    for count in (2, 3):
        own = [
            local_batch(batch, TextTokenizer(tokenizer.backend_tokenizer), contract, Processes(rank, count))
            for rank in range(count)
        ]
        encoded = [sum(len(read.ids) for read in local.tokens.values()) for local in own]
        [tokens] = tokens_of(small, [[True]], count)
        assert sum(encoded) > tokens.largest
        planned = largest_memory(small, [tokens], sizes, "cuda", processes=count)
        assert planned.activations == memory_of(small, sizes, max(encoded), "cuda", processes=count).activations


def test_a_batch_beyond_batch_tokens_takes_less_memory(tiny: Any) -> None:
    whole, parts = tiny(), tiny(batch_tokens=40)
    tokens, sizes = counted(whole), sizes_of(whole)
    assert min(stage.step for stage in tokens) > 40 > max(k.longest for k in tokens[0].kinds.values())
    assert largest_memory(parts, tokens, sizes, "cuda") == memory_of(parts, sizes, 40, "cuda", scores=4 * 4 * 4)
    # a text that is longer than batch_tokens goes through by itself
    long = largest_memory(tiny(batch_tokens=1), tokens, sizes, "cuda")
    longest = max(kind.longest for kind in tokens[0].kinds.values())
    assert long.activations == memory_of(whole, sizes, longest, "cuda").activations


def test_the_report_has_it_all(tiny: Any) -> None:
    small = tiny()
    text = report(small)
    tokens, sizes = counted(small), sizes_of(small)
    stages = [replace(stage, tokens=found) for stage, found in zip(plan(small), tokens, strict=True)]
    assert "\n".join(render(small, stages)) in text
    [first, _] = tokens
    assert f"{first.step:,.0f} tokens a step, {50 * first.step:,.0f} in all; padded {first.padded:,.0f}" in text
    assert f"{1 - first.step / first.padded:.0%} saved" in text
    lines = [line.split() for line in text.splitlines()]
    queries = first.kinds["queries"]
    assert ["queries", f"{queries.mean:.1f}", *map(str, (queries.median, queries.most, queries.longest))] in lines
    assert f"parameters: {sizes.decoder + sizes.adapters + sizes.head:,}, of which {sizes.trained:,} train" in text
    for kind, name in (("cuda", "GPU"), ("cpu", "CPU")):
        memory = largest_memory(small, tokens, sizes, kind)  # type: ignore[arg-type]
        assert [name, *(f"{value / GB:.2f}" for value in (*astuple(memory), memory.total))] in lines
    many = report(tiny(parallel="fsdp"), processes=8)
    cut, copied = (next(line.split() for line in many.splitlines() if f"8 ({way})" in line) for way in ("fsdp", "ddp"))
    assert many.index("8 (fsdp)") < many.index("8 (ddp)") and float(cut[5]) <= float(copied[5])
    total = sizes.decoder + sizes.adapters + sizes.head
    assert f"rank 0 merges and saves on its CPU, in {4 * total / GB:.2f} GB" in many and "  CPU" not in many
    assert "(ddp)" in report(tiny(), processes=8) and "rank 0" not in text


def test_the_report_gives_a_bound_where_no_file_is_there(tiny: Any, tmp_path: Path) -> None:
    lines = report(tiny(one=str(tmp_path / "absent.parquet"))).splitlines()
    most = 4 * 5 * 64  # queries, with a positive and three negatives each, of 64 tokens
    assert lines[2].startswith(f"  at most {most:,} tokens a step, {50 * most:,} in all: no file is there to count")


def test_a_base_that_is_not_here_leaves_tokens_and_memory_unknown(pairs: str) -> None:
    small = recipe([{"path": pairs, "task": "own"}], [{"path": pairs, "task": "own"}])
    text = report(small)
    assert text.startswith("\n".join(render(small, plan(small))))
    assert "unknown (recipe small: model.base: no/such-decoder is not on this disk" in text.splitlines()[-1]


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_has_a_plan_before_its_data_is_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_DATA", "absent")
    monkeypatch.chdir(file.parent)
    recipe = Recipe.load(file)
    text = "\n".join(render(recipe, plan(recipe)))
    assert all(stage.name in text and f"{stage.optim.steps:,}" in text for stage in recipe.stages)


# the decoders' own sizes, as their config.json has them
QWEN = {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16}
QWEN |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": True}
LLAMA = {"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 4, "vocab_size": 32_000}


@pytest.mark.parametrize(
    ("name", "config", "gigabytes"),
    [("qwen3-0.6b", Qwen3Config(**QWEN), 24), ("rehearsal-1b", LlamaConfig(**LLAMA), 80)],
)
def test_a_recipe_fits_the_gpu_that_it_names(
    name: str, config: Any, gigabytes: int, tmp_path: Path, tiny_decoder: Any
) -> None:
    for file in tiny_decoder("llama").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    config.save_pretrained(tmp_path)
    content = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    content["model"]["base"] = str(tmp_path)
    own = Recipe.parse(content)
    tokens = tokens_of(own, [[False] * len(stage.data) for stage in own.stages])
    memory = largest_memory(own, tokens, sizes_of(own), "cuda")
    assert 2 < memory.total / GB < gigabytes


def test_nv_embed_v1_names_every_set_of_its_version() -> None:
    stages = yaml.safe_load((RECIPES / "nv-embed-v1.yaml").read_text())["stages"]
    named = [{entry["task"] for entry in stage["data"]} for stage in stages]
    entries = [entry for entry in load_catalog().values() if "v1" in entry.target]
    assert named[1] == {entry.name for entry in entries}
    assert named[0] == {entry.name for entry in entries if entry.family == "retrieval"}


def test_the_plan_of_nv_embed_v2_names_every_set_of_the_catalogue() -> None:
    file = RECIPES / "nv-embed-v2.yaml"
    stages = yaml.safe_load(file.read_text())["stages"]
    named = [{entry.get("task") for entry in stage["data"]} - {None} for stage in stages]
    entries = [entry for entry in map(find_entry, sorted(named[1])) if "v2" in entry.target]
    assert {entry.name for entry in entries} == named[1] and len(entries) == 43
    assert named[0] == {entry.name for entry in entries if entry.family == "retrieval"}
    one, two = plan(Recipe.load(file))
    assert one.rows == sum(entry.samples or 0 for entry in entries if entry.family == "retrieval") + 120_000
    assert two.rows == sum(entry.samples or 0 for entry in entries) + 120_000
    assert (one.steps, two.steps) == (20_000, 18_000)
