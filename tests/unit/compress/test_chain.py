"""Chains of steps by the command: what lies where, what is told, what goes on after a stop, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from stock_layers import TEXTS
from typer.testing import CliRunner

from embedwright.cli.main import app
from embedwright.compress import depth, width
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import history_of

Make = Callable[..., Embedder]


@pytest.fixture
def at(tmp_path: Path, tiny_embedder: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `model`, of mean pooling, and `texts.jsonl`, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    tiny_embedder("mean", "qwen3").save(tmp_path / "model", "bfloat16")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["compress", *map(str, arguments)])
    if result.exit_code:
        raise result.exception or AssertionError(result.output)
    return result.stdout


BOTH = ("model", "out", "--layers", 2, "--width", 0.7, "--texts", "texts.jsonl")


def test_steps_chain_and_every_door_opens_the_result(at: Path) -> None:
    from sentence_transformers import SentenceTransformer

    said = run(*BOTH)
    assert [path.name for path in at.iterdir() if "out" in path.name] == ["out"]  # no steps, no lock
    first, second = history_of(at / "out") or ()
    assert (first["step"], first["of"], first["kept"]) == ("layers", "model", "2 of 3")
    assert first["texts"].startswith("texts.jsonl (sha256 ") and (second["step"], second["by"]) == ("width", "wanda")
    card = (at / "out" / "README.md").read_text()
    assert f"1. layers: of model, kept 2 of 3, removed {first['removed']}, by angular" in card and "1. width: " in card
    assert "# out\n" in card and "layers: of model, kept 2 of 3" in said and str(at) not in card + said
    model = Embedder.load(at / "out")
    assert str(model.network.backbone.dtype) == "torch.bfloat16"
    config = json.loads((at / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 32)
    exact = Embedder.load(at / "out", dtype="float32")
    theirs = SentenceTransformer(str(at / "out"), model_kwargs={"dtype": "float32"}, local_files_only=True)
    np.testing.assert_allclose(exact.encode(TEXTS), theirs.encode(TEXTS, normalize_embeddings=True), atol=1e-5)
    said = CliRunner().invoke(app, ["doctor", "out"]).stdout
    assert "ok " in said and "BAD" not in said


def test_history_travels_with_the_model_and_changes_no_fingerprint(at: Path, tiny_embedder: Make) -> None:
    run("model", "out", "--layers", 2, "--texts", "texts.jsonl")
    model = Embedder.load("out")
    bare = Embedder.load("out")
    bare.network.config.history = None
    assert model.fingerprint() == bare.fingerprint()
    model.save("again")
    assert history_of(at / "again") == history_of(at / "out")
    tiny_embedder("latent").save("latent")
    assert history_of(at / "latent") is None and '"history"' not in (at / "latent" / "config.json").read_text()
    run("latent", "small", "--layers", 2, "--texts", "texts.jsonl", "--by", "influence")
    (did,) = Embedder.load("small").network.config.history
    assert did["by"] == "influence" and history_of(at / "small") == [did]
    run("small", "smaller", "--layers", 1, "--texts", "texts.jsonl")
    assert [step.get("of") for step in history_of(at / "smaller") or ()] == ["latent", None]
    for broken in ("a text", [1], [{"step": ["layers"]}]):
        config = json.loads((at / "small" / "config.json").read_text())
        (at / "small" / "config.json").write_text(json.dumps(config | {"history": broken}))
        with pytest.raises(InputError, match=r"config.json: history must be a list of objects"):
            Embedder.load("small")


def test_a_chain_that_was_stopped_goes_on(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*BOTH)
    (at / "out").rename(at / "unbroken")
    stop = pytest.MonkeyPatch()

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    stop.setattr(width, "choose", killed)
    assert CliRunner().invoke(app, ["compress", *map(str, BOTH)]).exit_code != 0
    stop.undo()
    assert (at / "out.steps" / "1-layers" / "config.json").is_file() and not (at / "out").exists()
    monkeypatch.setattr(depth, "choose", killed)  # it is done
    with pytest.raises(InputError, match=r"out.steps holds steps of another model, or other steps"):
        run(*BOTH, "--by", "influence")
    with pytest.raises(InputError, match=r"out.steps holds steps"):
        (at / "texts.jsonl").write_text('{"text": "another"}\n')
        run(*BOTH)
    (at / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    run(*BOTH)
    for file in (at / "unbroken").rglob("*"):
        if file.is_file() and file.name != "README.md":
            assert (at / "out" / file.relative_to(at / "unbroken")).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("model", ["model", "adapter"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_chain_that_was_stopped_while_it_removed_its_steps_comes_to_its_end(
    at: Path, tiny_embedder: Make, monkeypatch: pytest.MonkeyPatch, model: str, stop: int
) -> None:
    if model == "adapter":
        tiny_embedder("mean").add_lora(rank=4).save("adapter")
    removed, calls = shutil.rmtree, list[object]()

    def stopped(folder: Any, *rest: Any, **how: Any) -> None:
        if (at / "out").exists():
            calls.append(folder)
            if len(calls) == stop:
                raise KeyboardInterrupt
        removed(folder, *rest, **how)

    words = (model, *BOTH[1:])
    monkeypatch.setattr(shutil, "rmtree", stopped)
    assert CliRunner().invoke(app, ["compress", *map(str, words)]).exit_code != 0
    assert (at / "out.steps").exists()
    made = {file: file.read_bytes() for file in (at / "out").iterdir() if file.is_file()}
    assert "out:\n" in run(*words)
    assert [path.name for path in at.iterdir() if "out" in path.name] == ["out"]
    assert made == {file: file.read_bytes() for file in (at / "out").iterdir() if file.is_file()}
    with pytest.raises(InputError, match="out exists and is not an empty folder"):
        run(*words)


def test_what_another_command_left_to_remove_goes_and_its_model_stays(
    at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("embedwright.compress.chain._remove", lambda work: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*BOTH)
    (at / "out").rename(at / "moved")
    run(*BOTH)  # its model is not there any more
    assert history_of(at / "out") == history_of(at / "moved")
    with monkeypatch.context() as patch:
        patch.setattr("embedwright.compress.chain._remove", lambda work: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("model", "small", "--weights", "int8")
    with pytest.raises(InputError, match="small exists and is not an empty folder"):
        run("model", "small", "--weights", "int4")
    assert not (at / "small.steps").exists() and Embedder.load("small")


def test_adapters_are_merged_before_the_first_step(at: Path, tiny_embedder: Make, tiny_decoder: Any) -> None:
    model = tiny_embedder("mean").add_lora(rank=4)
    for name, parameter in model.network.backbone.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save("adapter")
    run("adapter", "out", "--layers", 2, "--texts", "texts.jsonl")
    assert [step["step"] for step in history_of(at / "out") or ()] == ["merged", "layers"]
    small = Embedder.load("adapter").merge()
    removed = int((history_of(at / "out") or ())[1]["removed"]) - 1
    depth.cut_layers(small.network, [removed])
    np.testing.assert_allclose(Embedder.load("out").encode(TEXTS), small.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model", "out"], "no step is asked for: name at least one of --layers"),
        (
            ["model", "out", "--layers", "3", "--texts", "texts.jsonl"],
            "--layers 3: the model has 3 layers; keep at least 1 and at most 2",
        ),
        (["model", "out", "--width", "2", "--texts", "texts.jsonl"], "--width 2.0: that is 0 of 48 channels"),
        (["model", "out", "--layers", "2", "--texts", "nowhere.txt"], "--texts nowhere.txt: there is no such file"),
        (["model", "texts.jsonl", "--layers", "2"], "texts.jsonl exists and is not an empty folder"),
        (["nowhere", "out", "--layers", "2", "--texts", "texts.jsonl"], "nowhere"),
        (["model", "out", "--layers", "2", "--report", "dev-minni"], "no suite 'dev-minni' (did you mean"),
        (["model", "out", "--heal", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        (["model", "out", "--weights", "int8", "--by", "angular"], "--by is of --layers, and none is asked for"),
        (["model", "out", "--layers", "2", "--width-by", "wanda"], "--width-by is of --width, and none is asked for"),
        (["model", "out", "--weights", "int8", "--texts", "texts.jsonl"], "--texts is for --layers, --width by wanda"),
        (
            ["model", "out", "--width", "0.7", "--width-by", "magnitude", "--texts", "texts.jsonl"],
            "--texts is for --layers, --width by wanda and --report",
        ),
        (
            ["model", "out", "--width", "0.7", "--student", "decoder", "--distil", "x.yaml"],
            "--student decoder begins with that decoder",
        ),
    ],
)
def test_mistakes_are_named(at: Path, words: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        run(*words)
    assert said in str(error.value)
    assert not (at / "out").exists()


@pytest.mark.long
def test_without_a_file_docstrings_are_read(at: Path) -> None:
    assert "256 docstrings of numpy and networkx" in run("model", "out", "--layers", 2)


def test_a_mistake_is_corrected_by_another_command(at: Path) -> None:
    """A step that failed has left nothing, so the next command need not ask for it again."""
    with pytest.raises(InputError, match="--layers 3"):
        run("model", "out", "--layers", 3, "--texts", "texts.jsonl")
    with pytest.raises(InputError, match="--width"):
        run("model", "out", "--layers", 2, "--width", 0.01, "--texts", "texts.jsonl")
    run("model", "out", "--layers", 2, "--width", 0.7, "--width-by", "magnitude", "--texts", "texts.jsonl")
    assert [step["step"] for step in history_of(at / "out") or ()] == ["layers", "width"]


def test_sizes_are_checked_before_a_step_takes_its_time(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a step would do its work, or a recipe would train, and the next one would refuse."""

    def begun(*_: Any) -> Any:
        raise AssertionError("a step was begun")

    monkeypatch.setattr("embedwright.compress.chain.Embedder.load", begun)
    for words, said in (
        (["--layers", 3], "--layers 3: the model has 3 layers"),
        (["--layers", 2, "--width", 0.01], "--width 0.01: that is 0 of 48 channels"),
    ):
        with pytest.raises(InputError, match=said):
            run("model", "out", *words, "--texts", "texts.jsonl")
    recipe = Path(__file__).parents[3] / "recipes" / "flagship" / "heal.yaml"
    with pytest.raises(InputError, match="--student 2: the model has 2 layers"):
        run("model", "out", "--layers", 2, "--student", 2, "--distil", recipe, "--texts", "texts.jsonl")
    assert [file.name for file in at.iterdir() if file.name.startswith("out")] == []


def test_a_first_step_that_fails_leaves_nothing(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "choose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*BOTH)
    assert [file.name for file in at.iterdir() if file.name.startswith("out")] == []


def test_quantised_weights_are_compressed_and_exported_from_their_model(at: Path) -> None:
    run("model", "small", "--weights", "int8")
    recipe = Path(__file__).parents[3] / "recipes" / "flagship" / "heal.yaml"
    for words in (["--layers", 2], ["--width", 0.7], ["--student", 1, "--distil", recipe]):
        with pytest.raises(InputError, match=r"^small holds quantised weights: compress the model that they were made"):
            run("small", "out", *words)
    for out, form in (("out", "onnx"), ("out.gguf", "gguf"), ("out", "nvembed")):
        result = CliRunner().invoke(app, ["export", "small", out, "--format", form])
        assert str(result.exception) == "small holds quantised weights: export the model that they were made from"


def test_licence_base_and_data_travel_with_the_card(at: Path) -> None:
    """A licence binds what is made of a model. Scores are those of another model, and stay behind."""
    front = "---\nlicense: cc-by-nc-4.0\nbase_model: google/gemma-3-270m\nlanguage:\n- de\ndatasets:\n- a/b\n---\n"
    table = "| rows | licence |\n| --- | --- |\n| 3 | GPL-3 |"
    sections = f"## Data\n\n{table}\n\n## Scores\n\nthe best\n\n## Commands\n\nrun it\n"
    (at / "model" / "README.md").write_text(f"{front}\n# model\n\n## Use\n\nopen it\n\n{sections}")
    run("model", "small", "--layers", 2, "--texts", "texts.jsonl")
    run("small", "out", "--weights", "int8")
    card = ModelCard((at / "out" / "README.md").read_text())
    told = card.data.to_dict()
    assert told["license"] == "cc-by-nc-4.0" and told["base_model"] == "google/gemma-3-270m"
    assert (told["language"], told["datasets"]) == (["de"], ["a/b"]) and "embedwright" in told["tags"]
    assert f"## Data of model\n\n{table}" in card.text
    assert "## Commands of model\n\nrun it" in card.text and "google/gemma-3-270m, licence gemma" in card.text
    assert "the best" not in card.text and card.text.count("## Data") == 1 and "1. weights: " in card.text
    (at / "model" / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(InputError, match=r"model/README.md has a front matter that cannot be read"):
        run("model", "other", "--weights", "int8")


def test_a_merged_adapter_hands_its_card_on(at: Path) -> None:
    model = Embedder.load("model", dtype="float32").add_lora(2)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.1)
    model.save("adapter")
    front = "---\nlicense: cc-by-nc-4.0\nbase_model: google/gemma-3-270m\ndatasets:\n- a/b\n---\n"
    (at / "adapter" / "README.md").write_text(f"{front}\n# adapter\n\n## Data\n\n3 rows\n")
    merged = CliRunner().invoke(app, ["merge", "adapter", "merged"])
    assert merged.exit_code == 0, merged.output
    run("merged", "out", "--weights", "int8")
    for name in ("merged", "out"):
        card = ModelCard((at / name / "README.md").read_text())
        told = card.data.to_dict()
        assert (told["license"], told["base_model"]) == ("cc-by-nc-4.0", "google/gemma-3-270m")
        assert (
            told["datasets"] == ["a/b"] and "## Data of adapter\n\n3 rows" in card.text and f"# {name}\n" in card.text
        )
        assert "peft" not in told["tags"] and str(at) not in card.text
