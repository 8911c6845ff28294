"""The model card, as huggingface_hub reads it, and its code, run as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from embedwright.locate import PACKAGED, PUBLISHED
from embedwright.model.embedder import Embedder
from embedwright.model.interop.card import facts, history_lines, model_card
from embedwright.model.verify.selftest import TASK

Make = Callable[..., Embedder]


def card_of(model: Embedder, name: str = "me/model", **more: Any) -> ModelCard:
    return ModelCard(model_card(name, **{**facts(model.network, model.text_tokenizer), **more}))


def sections(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^## (.+)\n\n([^#]+(?:#(?!#)[^#]*)*)", card.text, flags=re.M))


def rows(section: str) -> list[list[str]]:
    return [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in section.strip().splitlines()]


# ---- the front matter


def test_the_front_matter_is_what_the_hub_reads(tiny_embedder: Make) -> None:
    data = [
        {"task": "docs", "rows": 10, "licence": "PSF-2.0", "source": "standard library"},
        {"task": "scifact", "rows": 20, "licence": "CC-BY-4.0", "source": "mteb/scifact"},
        {"task": "again", "rows": 20, "licence": None, "source": "https://huggingface.co/datasets/mteb/scifact"},
    ]
    card = card_of(
        tiny_embedder("latent"), base="HuggingFaceTB/SmolLM2-135M", license="apache-2.0", language=["en"], data=data
    )
    assert card.data.to_dict() == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "datasets": ["mteb/scifact"],
        "language": ["en"],
        "library_name": "embedwright",
        "license": "apache-2.0",
        "pipeline_tag": "feature-extraction",
        "tags": ["embedwright", "text-embeddings", "sentence-transformers"],
    }
    assert rows(sections(card)["Data"])[2:] == [
        ["docs", "10", "PSF-2.0", "standard library"],
        ["scifact", "20", "CC-BY-4.0", "mteb/scifact"],
        ["again", "20", "not stated", "https://huggingface.co/datasets/mteb/scifact"],
    ]


def test_what_nobody_said_is_not_in_it(tiny_embedder: Make) -> None:
    card = card_of(tiny_embedder("latent"))
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert sections(card).keys() == {"Use", "What it reads"} and "None" not in card.content


@pytest.mark.parametrize(("base", "in_front"), [("me/base", True), ("mine-135m", False), ("a/path/of/mine", False)])
def test_a_base_that_is_on_no_hub_stands_in_the_text_alone(base: str, in_front: bool, tiny_embedder: Make) -> None:
    card = card_of(tiny_embedder("latent"), base=base)
    assert card.data.base_model == (base if in_front else None) and f"made from {base}" in card.text


def test_an_adapter_on_a_packaged_base_is_one_on_the_hub_too(tiny_embedder: Make) -> None:
    assert PUBLISHED.keys() == PACKAGED.keys()
    commands = ["embedwright train recipe.yaml", "embedwright eval MODEL dev"]
    card = card_of(tiny_embedder("mean").add_lora(2), base="smollm2-135m", commands=commands, path="results/s1")
    assert card.data.to_dict() == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "library_name": "embedwright",
        "pipeline_tag": "feature-extraction",
        "tags": ["embedwright", "text-embeddings", "peft", "lora"],
    }
    assert "made from smollm2-135m (HuggingFaceTB/SmolLM2-135M-Instruct, licence apache-2.0):" in card.text
    told = sections(card)["Commands"].strip()
    assert told == "```sh\nembedwright train recipe.yaml\nembedwright eval results/s1 dev\n```"


def test_a_folder_of_this_machine_is_nobodys_business(
    tiny_embedder: Make, tiny_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_embedder("latent")
    assert str(tiny_decoder("llama")) not in card_of(model).content
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert card_of(model, base="models/mine").data.base_model is None


# ---- what it says


def test_it_says_what_the_model_reads(tiny_embedder: Make) -> None:
    model = tiny_embedder("latent", max_tokens=77)
    said = dict(rows(sections(card_of(model))["What it reads"])[2:])
    assert said == {
        "in front of a query": '`"Instruct: {task}\\nQuery: "`',
        "in front of a document": "nothing",
        "end of a text": "EOS (id 1), also after a text that is cut",
        "longest text": "77 tokens, every one counted; cut on the right",
        "attention": "bidirectional",
        "pooling": "latent, all tokens but the instruction's",
    }
    contract = model.contract.model_copy(
        update={
            "document_template": "title: none | text: ",
            "query_suffix": "\n?",
            "default_task": "Find",
            "eos_id": None,
        }
    )
    said = dict(
        rows(sections(card_of(model, contract=contract, attention="causal", pooling="last"))["What it reads"])[2:]
    )
    assert said["in front of a document"] == '`"title: none \\| text: "`'
    assert said["after a query"] == '`"\\n?"`' and said["end of a text"] == "nothing"
    assert said["instruction of a query without one"] == "Find"
    assert (said["attention"], said["pooling"]) == ("causal", "last, the last token")
    counted = model.contract.model_copy(update={"mask_rule": "count"})
    assert "cut off with the rest" in card_of(model, contract=counted).text


def test_tables_have_the_keys_of_their_rows(tiny_embedder: Make) -> None:
    stages = [{"name": "one", "steps": 300, "lr": 2e-5}, {"name": "two | b", "temperature": 0.02}]
    scores = [{"task": "docs", "metric": "nDCG@10", "before": 0.25, "after": 0.5}]
    found = sections(card_of(tiny_embedder("latent"), stages=stages, scores=scores))
    assert rows(found["Training"]) == [
        ["name", "steps", "lr", "temperature"],
        ["---"] * 4,
        ["one", "300", "2.0e-05", ""],
        ["two \\| b", "", "", "0.0200"],
    ]
    assert rows(found["Scores"])[2:] == [["docs", "nDCG@10", "0.2500", "0.5000"]]
    assert "Data" not in found


# ---- its code


@pytest.mark.parametrize("own", ["", "Find it"])
@pytest.mark.parametrize(("pooling", "form"), [("latent", "ours"), ("mean", "stock"), ("last", "stock")])
def test_its_code_runs_and_gives_the_vectors(
    pooling: str, form: str, own: str, tiny_embedder: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_embedder(pooling, default_task=own)
    assert facts(model.network, model.text_tokenizer)["form"] == form
    model.save(tmp_path / "saved")
    card = card_of(model, "a name", path=str(tmp_path / "saved"))
    assert card.data.library_name == ("sentence-transformers" if form == "stock" else "embedwright")
    programs = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
    assert len(programs) == 2 and ("import embedwright " in programs[1]) == (form == "ours")
    for program in programs:
        names: dict[str, Any] = {}
        exec(program, names)
        expected = model.encode(["how do tides work?"], task=own or TASK)
        np.testing.assert_allclose(names["queries"], expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(
            float(capsys.readouterr().out.strip(" []\n")), expected @ names["passages"].T, atol=1e-5
        )


def test_adapters_are_not_said_to_open_in_sentence_transformers(tiny_embedder: Make, tmp_path: Path) -> None:
    base = tiny_embedder("latent")
    base.save(tmp_path / "base")
    model = Embedder.load(tmp_path / "base").add_lora(2)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    model.save(tmp_path / "adapter")
    card = card_of(model, path=str(tmp_path / "adapter"))
    assert card.data.library_name == "embedwright" and "sentence" not in card.content
    [program] = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
    names: dict[str, Any] = {}
    exec(program, names)
    np.testing.assert_allclose(names["queries"], model.encode(["how do tides work?"], task=TASK), atol=1e-6)


def test_a_history_is_told_in_one_order() -> None:
    """Our own format sorts the keys of its settings, and the stock one does not."""
    step = {"step": "distil", "of": "d", "recipe": "r", "stages": "s", "teacher": "t", "data": "x", "loss": "l", "a": 1}
    told = history_lines([step])
    assert told == ["distil: of d, recipe r, stages s, teacher t, data x, loss l, a 1"]
    assert history_lines([dict(sorted(step.items()))]) == told
