"""Around a model in memory: sentence-transformers' own trainer on it, and a hub, a real server on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard, constants
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from embedwright.model.embedder import Embedder
from embedwright.model.pooling import FOLDED

TASK = "Given a question, retrieve passages"
TEXTS = ["how do tides work?", "a", "", " leading and trailing ", "naïve 漢字 🙂", "</s> and <s>", "long " * 60]
ANCHORS = [f"question {word} and more?" for word in ("tides", "dogs", "numbers", "names", "the moon", "gravity")]
POSITIVES = [f"{word} are the answer" for word in ("tides", "dogs", "numbers", "names", "the moon", "gravity")]

Make = Callable[..., Embedder]


def difference(model: Embedder, st: SentenceTransformer) -> float:
    """Largest, over documents, an instruction, and raw prefixes that end inside and at the end of a token."""
    pairs = [(model.encode(TEXTS), st.encode(TEXTS)), (model.encode(TEXTS), st.encode_document(TEXTS))]
    for prefix in (model.contract.prefix(TASK), "Query: ", "Query:\n"):
        pairs.append((model.encode(TEXTS, prefix=prefix), st.encode(TEXTS, prompt=prefix, batch_size=3)))
    return max(float(abs(ours - theirs).max()) for ours, theirs in pairs)


def trainer_of(model: Embedder, st: SentenceTransformer, folder: Path, **options: Any) -> SentenceTransformerTrainer:
    settings: dict[str, Any] = {"max_steps": 8, "learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 1}
    settings |= {"per_device_train_batch_size": len(ANCHORS), "report_to": [], "use_cpu": True, "disable_tqdm": True}
    prompts = {"anchor": model.contract.prefix(TASK)}
    return SentenceTransformerTrainer(
        model=st,
        args=SentenceTransformerTrainingArguments(str(folder), prompts=prompts, **{**settings, **options}),
        train_dataset=Dataset.from_dict({"anchor": ANCHORS, "positive": POSITIVES}),
        loss=MultipleNegativesRankingLoss(st, scale=20.0),
    )


def losses(trainer: SentenceTransformerTrainer) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


# ---- sentence-transformers


@pytest.mark.parametrize(
    ("pooling", "bos", "lora"),
    [("latent", True, True), ("mean", False, True), ("last", False, True), ("latent", False, False)],
)
def test_its_trainer_trains_this_model(
    pooling: str, bos: bool, lora: bool, tiny_embedder: Make, tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, "mistral", bos, max_tokens=40)
    if lora:
        model.add_lora(rank=4, alpha=8)
    st = model.to_sentence_transformer()
    assert isinstance(st, SentenceTransformer) and st[0].model is model.network
    assert difference(model, st) < 1e-5
    before = {name: parameter.detach().clone() for name, parameter in model.network.named_parameters()}
    first = model.encode(ANCHORS, task=TASK)
    logits_QC = torch.from_numpy(20 * first @ model.encode(POSITIVES).T)
    expected = float(torch.nn.functional.cross_entropy(logits_QC, torch.arange(len(ANCHORS))))

    trainer = trainer_of(model, st, tmp_path)
    trainer.train()

    seen = losses(trainer)
    assert abs(seen[0] - expected) < 1e-3 and seen[-1] < 0.7 * seen[0]  # the instruction was left out of pooling there
    moved = {name for name, parameter in model.network.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if not lora or "lora_" in name or name.startswith("head.")}
    assert difference(model, st) < 1e-5 and abs(model.encode(ANCHORS, task=TASK) - first).max() > 1e-2
    if lora:
        trained = model.encode(TEXTS)
        model.merge().save(tmp_path / "saved")
        np.testing.assert_allclose(Embedder.load(tmp_path / "saved").encode(TEXTS), trained, rtol=0, atol=1e-5)


def test_dropout_is_no_part_of_a_vector(tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("latent").add_lora(rank=4, dropout=0.5)
    st = model.to_sentence_transformer()
    trainer_of(model, st, tmp_path, max_steps=2).train()
    model.network.train()  # as a trainer may leave it
    vectors = [model.encode(TEXTS) for _ in range(2)]
    assert model.network.training and all(module.training for module in model.network.modules())
    np.testing.assert_array_equal(*vectors)
    assert difference(model, st) < 1e-5


@pytest.mark.parametrize("pooling", ["latent", "last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_it_saves_is_a_whole_model_with_adapters_merged(
    pooling: str, dtype: str, tiny_embedder: Make, tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, dtype=dtype).add_lora(rank=4)
    st = model.to_sentence_transformer()
    trainer_of(model, st, tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=3).train()
    saved = tmp_path / "run" / "checkpoint-3"
    modules = json.loads((saved / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert str(tmp_path) not in (saved / "config.json").read_text()
    vectors = model.encode(TEXTS)  # the model itself still has its adapters
    assert any("lora_" in name for name, _ in model.network.named_parameters())
    plain = Embedder.load(saved)
    assert plain.contract == model.contract and plain.network.dtype == model.network.backbone.dtype
    model.merge()
    for name, parameter in model.network.state_dict().items():
        assert torch.equal(plain.network.state_dict()[name], parameter), name
    if dtype == "float32":
        np.testing.assert_allclose(plain.encode(TEXTS), vectors, rtol=0, atol=1e-5)
    # there the blocks are transformers' own, which round otherwise in bfloat16
    assert difference(plain, SentenceTransformer(str(saved), device="cpu")) < (1e-5 if dtype == "float32" else 2e-2)


def test_its_trainer_goes_on_from_its_checkpoint(tiny_embedder: Make, tmp_path: Path) -> None:
    whole = tiny_embedder("latent")
    straight = trainer_of(whole, whole.to_sentence_transformer(), tmp_path / "straight", max_steps=4)
    straight.train()
    for steps, resumed in ((2, None), (4, str(tmp_path / "halves" / "checkpoint-2"))):
        model = tiny_embedder("latent")
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        trainer = trainer_of(model, model.to_sentence_transformer(), tmp_path / "halves", **options)
        trainer.train(resume_from_checkpoint=resumed)
    assert len(losses(trainer)) == 4
    adapted = tiny_embedder("latent").add_lora(rank=4)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict.*lora_A"):
        trainer_of(adapted, adapted.to_sentence_transformer(), tmp_path / "x").train(resume_from_checkpoint=resumed)


def test_prompts_and_lengths_are_the_contracts(tiny_embedder: Make) -> None:
    model = tiny_embedder("latent", max_tokens=40)
    contract = model.contract.model_copy(update={"document_template": "title: none | text: ", "default_task": "Find"})
    model.network.contract, model.network.config.contract = contract, contract.model_dump()
    model = Embedder(model.network, model.tokenizer)
    st = model.to_sentence_transformer()
    assert (st.max_seq_length, st.get_embedding_dimension(), st.similarity_fn_name) == (40, 32, "cosine")
    np.testing.assert_allclose(st.encode(TEXTS), model.encode(TEXTS), rtol=0, atol=1e-6)
    np.testing.assert_allclose(st.encode_query(TEXTS), model.encode(TEXTS, task="Find"), rtol=0, atol=1e-6)
    np.testing.assert_allclose(st.encode(TEXTS, prompt=""), model.encode(TEXTS, prefix=""), rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [16, None])
def test_a_length_that_was_set_there_is_saved_for_every_door(
    length: int | None, tiny_embedder: Make, tmp_path: Path
) -> None:
    model = tiny_embedder("latent", max_tokens=40)
    st = model.to_sentence_transformer()
    st.max_seq_length = length
    st.save(str(tmp_path / "saved"))
    loaded, again = Embedder.load(tmp_path / "saved"), SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert loaded.max_tokens == again.max_seq_length == (length or 40)
    for door in (st, again):
        np.testing.assert_allclose(loaded.encode(TEXTS), door.encode(TEXTS), rtol=0, atol=1e-5)
    assert model.max_tokens == 40 and model.network.config.contract["max_tokens"] == 40


def test_a_length_that_only_the_tokenizer_knows_is_refused(tiny_embedder: Make, tmp_path: Path) -> None:
    tiny_embedder("latent").save(tmp_path / "whole")
    st = SentenceTransformer(str(tmp_path / "whole"), device="cpu")  # not around an Embedder: its own classes save it
    st.max_seq_length = 16
    st.save(str(tmp_path / "saved"))
    with pytest.raises(
        ValueError, match=r"config.json: contract.max_tokens is 512, .* tokenizer_config.json 16: .*both"
    ):
        Embedder.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("key", "name", "query", "document"),
    [
        ("prompts.query", None, "Instruct: Find a fact\nQuery: ", ""),
        ("prompts.document", None, "own", "passage: "),
        ("default_prompt_name", "query", "own", ""),
        (None, "document", "own", ""),  # another name of the same prompt
    ],
)
@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_a_prompt_that_was_set_there_is_refused(
    pooling: str, key: str | None, name: str | None, query: str, document: str, tiny_embedder: Make, tmp_path: Path
) -> None:
    tiny_embedder(pooling, default_task="Find").save(tmp_path / "model")
    st, saved = SentenceTransformer(str(tmp_path / "model"), device="cpu"), tmp_path / "model"
    st.prompts = {"query": st.prompts["query"] if query == "own" else query, "document": document, "tides": "T: "}
    st.default_prompt_name = name
    st.save(str(saved))  # where a stock folder keeps our settings
    if key is None:
        Embedder.load(saved)
        return
    with pytest.raises(ValueError, match=rf"config_sentence_transformers.json: {key} .*: .*both"):
        Embedder.load(saved)


def test_a_query_prompt_set_there_for_a_model_without_one_contradicts_nothing(
    tiny_embedder: Make, tmp_path: Path
) -> None:
    st = tiny_embedder("latent").to_sentence_transformer()
    st.prompts["query"] = "Instruct: Find a fact\nQuery: "
    st.save(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="no instruction of its own"):
        Embedder.load(tmp_path / "saved").encode_query(["a"])


def test_what_cannot_be_trained_or_saved_is_refused(tiny_embedder: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=FOLDED):
        tiny_embedder("latent").fold().to_sentence_transformer()
    model = tiny_embedder("latent").add_lora(rank=2)
    st = model.to_sentence_transformer()
    for module in model.network.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    with pytest.raises(ValueError, match="switched off"):
        st.save(str(tmp_path / "saved"))
    model = tiny_embedder("latent")
    model.network.longest = 64  # as of a model whose rotary frequencies go by the longest text
    st = model.to_sentence_transformer()
    st.max_seq_length = 65
    with pytest.raises(ValueError, match="max_tokens=65"):
        st.save(str(tmp_path / "long"))


# ---- the hub


class Hub:
    """The endpoints that an upload and a download of a model ask for; weights travel by the LFS protocol."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[tuple[str, bool]] = []  # name, whether private
        self.tokens: set[str | None] = set()
        self.blobs: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.tokens.add(self.headers.get("Authorization"))
                self.answer(json.dumps(hub.post(self.path.split("?")[0], body)).encode())

            def do_PUT(self) -> None:
                hub.blobs[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(b"")

            def do_GET(self) -> None:
                content = hub.get(self.path.split("?")[0])
                etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": SHA}
                self.answer(content, etag)

            def do_HEAD(self) -> None:
                self.do_GET()

            def answer(self, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(200)
                for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *given: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def post(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            # older clients say `private`, newer ones `visibility`
            self.created.append((name, asked.get("private", asked.get("visibility") == "private")))
            self.repositories.setdefault(name, {})
            return {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{self.url}/blobs/{o['oid']}"}}} for o in objects]
            return {"transfer": "basic", "objects": actions}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {
                "files": [{"path": f["path"], "uploadMode": self.mode(f["path"]), "shouldIgnore": False} for f in files]
            }
        assert path.endswith("/commit/main"), path
        name = path.removeprefix("/api/models/").removesuffix("/commit/main")
        repository = self.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository[value["path"]]
        return {"commitUrl": f"{self.url}/{name}/commit/{SHA}", "commitOid": SHA, "success": True}

    def mode(self, path: str) -> str:
        return "lfs" if path.endswith(".safetensors") else "regular"

    def get(self, path: str) -> bytes:
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            files = self.repositories[name]
            if "/tree/" in path:
                tree = [{"type": "file", "path": p, "size": len(c), "oid": SHA} for p, c in files.items()]
                return json.dumps(tree).encode()
            siblings = [{"rfilename": path} for path in files]
            return json.dumps({"id": name, "modelId": name, "sha": SHA, "siblings": siblings}).encode()
        _, owner, name, _, _, file = path.split("/", 5)
        return self.repositories[f"{owner}/{name}"][file]


SHA = "a" * 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """As HF_ENDPOINT, HF_HUB_DISABLE_XET and HF_HUB_CACHE would set it; nothing of the user's is read."""
    hub = Hub()
    thread = threading.Thread(target=hub.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)  # made when it is imported
    values = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    values |= {"HF_HUB_DISABLE_XET": True}
    for name, value in {**values, "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setattr(constants, name, value)
    yield hub
    hub.http.shutdown()
    thread.join()
    hub.http.server_close()


@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_what_is_pushed_opens_again_by_its_name(pooling: str, tiny_embedder: Make, hub: Hub) -> None:
    model = tiny_embedder(pooling)
    card = {"base": "me/base", "license": "apache-2.0", "data": [{"task": "docs", "rows": 3, "licence": "MIT"}]}
    url = model.push_to_hub("me/tiny", private=True, token="hf_secret", card=card)
    assert url == f"{hub.url}/me/tiny" and hub.tokens == {"Bearer hf_secret"}
    assert hub.created == [("me/tiny", True)]
    readme = ModelCard(hub.repositories["me/tiny"]["README.md"].decode())
    assert (readme.data.base_model, readme.data.license) == ("me/base", "apache-2.0")
    assert 'Embedder.load("me/tiny")' in readme.text and "| docs | 3 | MIT |" in readme.text
    loaded = Embedder.load("me/tiny")
    assert loaded.contract == model.contract
    np.testing.assert_array_equal(loaded.encode(TEXTS, task=TASK), model.encode(TEXTS, task=TASK))


def test_a_card_may_be_ones_own_text(tiny_embedder: Make, hub: Hub) -> None:
    text = "---\nlicense: mit\n---\n\n# mine: naïve 漢字\n"
    tiny_embedder("mean").push_to_hub("me/tiny", token="hf_secret", card=text)
    assert hub.repositories["me/tiny"]["README.md"].decode() == text and hub.created == [("me/tiny", False)]


def test_adapters_go_where_their_base_can_be_opened(tiny_embedder: Make, hub: Hub, tmp_path: Path) -> None:
    base = tiny_embedder("latent")
    base.save(tmp_path / "base")
    adapted = Embedder.load(tmp_path / "base").add_lora(2)
    with pytest.raises(ValueError, match=f"a base on this machine, {tmp_path / 'base'}, which others cannot open"):
        adapted.push_to_hub("me/adapter", token="hf_secret")
    assert hub.created == []
    base.push_to_hub("me/base", token="hf_secret")
    model = Embedder.load("me/base").add_lora(2)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    model.push_to_hub("me/adapter", token="hf_secret")
    assert "LoRA adapters" in hub.repositories["me/adapter"]["README.md"].decode()
    assert sum(map(len, hub.repositories["me/adapter"].values())) < sum(map(len, hub.repositories["me/base"].values()))
    np.testing.assert_allclose(Embedder.load("me/adapter").encode(TEXTS), model.encode(TEXTS), rtol=0, atol=1e-6)


def test_adapters_of_a_family_stay_where_their_base_is(
    family_folder: Callable[[str], Path], hub: Hub, tmp_path: Path
) -> None:
    base = shutil.copytree(family_folder("e5-mistral"), tmp_path / "models@v1" / "mine")
    model = Embedder.load(f"e5-mistral:{base}").add_lora(2)
    origin: Any = model.network.origin
    assert (origin.name, origin.revision) == (f"e5-mistral:{base}", None)
    with pytest.raises(ValueError, match=f"a base on this machine, {base}, which others cannot open"):
        model.push_to_hub("me/adapter", token="hf_secret")
    assert hub.created == []


def test_what_is_pushed_again_takes_the_place_of_what_was_there(tiny_embedder: Make, hub: Hub, tmp_path: Path) -> None:
    tiny_embedder("latent").push_to_hub("me/base", token="hf_secret")
    stock, ours, adapted = tiny_embedder("mean"), Embedder.load("me/base"), Embedder.load("me/base").add_lora(2)
    own = {"notes.md": b"mine", "compression.json": b"{}", "onnx/config.json": b"{}"}
    hub.repositories["me/tiny"] = dict(own)
    for n, model in enumerate((adapted, stock, ours, adapted)):
        model.push_to_hub("me/tiny", token="hf_secret", card="# mine")
        model.save(alone := tmp_path / str(n))
        written = {file.relative_to(alone).as_posix() for file in alone.rglob("*.*")}
        assert hub.repositories["me/tiny"].keys() == {*written, "README.md", *own}
    assert own.items() <= hub.repositories["me/tiny"].items()
    np.testing.assert_array_equal(Embedder.load("me/tiny").encode(TEXTS), adapted.encode(TEXTS))


def test_a_folded_model_is_not_pushed(tiny_embedder: Make, hub: Hub) -> None:
    with pytest.raises(ValueError, match=FOLDED):
        tiny_embedder("latent").fold().push_to_hub("me/tiny", token="hf_secret")
    assert hub.created == []
