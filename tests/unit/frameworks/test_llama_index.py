"""LlamaIndex's own index over our embedding: the right side for queries and documents, the ranking of numpy."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedwright.model.embedder import Embedder

pytest.importorskip("llama_index.core", reason="pip install 'embedwright[llamaindex]'")
from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore

from embedwright.frameworks.llama_index import EmbedwrightEmbedding

TEXTS = ["the moon pulls the sea", "a dog that does not mind", "numbers such as 3.14", "a question on its own line"]
QUERY, TASK = "how do tides work?", "Given a question, retrieve passages that answer it"


def test_llama_indexs_index_ranks_as_numpy_does(tmp_path: Path, tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("mean")
    model.save(tmp_path / "model")
    embedding = EmbedwrightEmbedding(str(tmp_path / "model"), TASK)
    index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=embedding)
    score_N = model.encode(TEXTS) @ model.encode([QUERY], TASK)[0]
    for found in (
        index.as_retriever(similarity_top_k=4).retrieve(QUERY),
        asyncio.run(index.as_retriever(similarity_top_k=4).aretrieve(QUERY)),
    ):
        assert [node.node.get_content() for node in found] == [TEXTS[i] for i in np.argsort(-score_N)]
        assert [node.score for node in found] == pytest.approx(sorted(score_N, reverse=True), abs=1e-6)
    texts = asyncio.run(embedding.aget_text_embedding_batch(TEXTS))
    np.testing.assert_allclose(texts, model.encode(TEXTS), atol=1e-6)
    assert embedding.to_dict()["task"] == TASK


def test_an_instruction_is_asked_for_before_any_document(tiny_embedder: Callable[..., Embedder]) -> None:
    with pytest.raises(ValueError, match="no instruction of its own"):
        EmbedwrightEmbedding(tiny_embedder("mean"))
    np.testing.assert_allclose(
        EmbedwrightEmbedding(tiny_embedder("mean"), "").get_query_embedding(QUERY),
        tiny_embedder("mean").encode([QUERY])[0],
        atol=1e-6,
    )


def test_a_shared_cache_tells_models_apart(tiny_embedder: Callable[..., Embedder]) -> None:
    class Constant:
        def __init__(self, value: float) -> None:
            self.value = value

        def encode(self, texts: list[str], task: str | None = None) -> np.ndarray:
            return np.full((len(texts), 3), self.value, np.float32)

    cache = IngestionCache()
    for first, second in ((Constant(1), Constant(2)), (tiny_embedder("mean"), tiny_embedder("latent"))):
        for model in (first, second):
            pipeline = IngestionPipeline(transformations=[EmbedwrightEmbedding(model, TASK)], cache=cache)
            [node] = pipeline.run(nodes=[TextNode(text="a text", id_="n")])
            np.testing.assert_allclose(node.embedding, model.encode(["a text"])[0], atol=1e-6)
    digests = {EmbedwrightEmbedding(tiny_embedder("mean"), TASK).model_digest for _ in range(2)}
    assert len(digests) == 1  # the same model finds what it has encoded before


def test_it_is_made_anew_from_a_dictionary_with_the_same_model_alone(
    tmp_path: Path, tiny_embedder: Callable[..., Embedder]
) -> None:
    model = tiny_embedder("mean")
    model.save(tmp_path / "model")
    first = EmbedwrightEmbedding(str(tmp_path / "model"), TASK, embed_batch_size=7)
    again = EmbedwrightEmbedding.from_dict(first.to_dict())
    assert again.to_dict() == first.to_dict() and again.embed_batch_size == 7
    assert again.get_query_embedding(QUERY) == first.get_query_embedding(QUERY)
    assert EmbedwrightEmbedding.from_json(first.to_json()).to_dict() == first.to_dict()
    given = EmbedwrightEmbedding(model, TASK)
    assert given.model_digest == first.model_digest
    handed_over = EmbedwrightEmbedding.from_dict(given.to_dict(), model=model)
    assert handed_over.get_text_embedding(QUERY) == given.get_text_embedding(QUERY)
    shutil.rmtree(tmp_path / "model")
    tiny_embedder("latent").save(tmp_path / "model")  # trained anew, under the same name
    with pytest.raises(ValueError, match="another model than the one that was written down"):
        EmbedwrightEmbedding.from_dict(first.to_dict())


def test_a_cache_by_text_alone_is_refused(tiny_embedder: Callable[..., Embedder]) -> None:
    with pytest.raises(ValueError, match="by its text alone"):
        EmbedwrightEmbedding(tiny_embedder("mean"), TASK, embeddings_cache=SimpleKVStore())


def test_no_model_computes_in_the_event_loop() -> None:
    threads = []

    class Seen:
        def encode(self, texts: list[str], task: str | None = None) -> np.ndarray:
            threads.append(threading.get_ident())
            return np.ones((len(texts), 3), np.float32)

    async def ask(embedding: EmbedwrightEmbedding) -> None:
        for asked in (
            embedding.aget_text_embedding("a text"),
            embedding.aget_text_embedding_batch(["a text", "another"]),
            embedding.aget_query_embedding("a query"),
        ):
            await asked

    embedding = EmbedwrightEmbedding(Seen(), TASK)
    anew = EmbedwrightEmbedding.from_dict(embedding.to_dict(), model=Seen())
    assert anew.model_digest != embedding.model_digest  # nothing tells whether both are one model
    threads.clear()
    asyncio.run(ask(embedding))
    assert len(threads) == 3 and threading.get_ident() not in threads
