"""LangChain's own store over our embeddings: the right side for queries and documents, the ranking of numpy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedwright.model.embedder import Embedder

pytest.importorskip("langchain_core", reason="pip install 'embedwright[langchain]'")
from langchain_core.vectorstores import InMemoryVectorStore

from embedwright.frameworks.langchain import EmbedwrightEmbeddings

TEXTS = ["the moon pulls the sea", "a dog that does not mind", "numbers such as 3.14", "a question on its own line"]
QUERY, TASK = "how do tides work?", "Given a question, retrieve passages that answer it"


def test_langchains_store_ranks_as_numpy_does(tmp_path: Path, tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("mean")
    model.save(tmp_path / "model")
    embeddings = EmbedwrightEmbeddings(str(tmp_path / "model"), TASK)
    np.testing.assert_allclose(embeddings.embed_query(QUERY), model.encode([QUERY], TASK)[0], atol=1e-6)
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), model.encode(TEXTS), atol=1e-6)
    store = InMemoryVectorStore(embeddings)
    store.add_texts(TEXTS)
    score_N = model.encode(TEXTS) @ model.encode([QUERY], TASK)[0]
    found = store.similarity_search_with_score(QUERY, k=4)
    assert [document.page_content for document, _ in found] == [TEXTS[i] for i in np.argsort(-score_N)]
    assert [score for _, score in found] == pytest.approx(sorted(score_N, reverse=True), abs=1e-6)
    assert asyncio.run(embeddings.aembed_query(QUERY)) == embeddings.embed_query(QUERY)


def test_an_instruction_is_asked_for_before_any_document(
    tiny_embedder: Callable[..., Embedder], family_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match="no instruction of its own"):
        EmbedwrightEmbeddings(tiny_embedder("mean"))
    family = Embedder.load(family_folder("qwen3-embedding"))
    own = EmbedwrightEmbeddings(family).embed_query(QUERY)
    np.testing.assert_allclose(own, family.encode([QUERY], family.contract.default_task)[0], atol=1e-6)
