"""Search the docstrings of a few modules with the own stores of LangChain and of LlamaIndex, over the packaged MiniLM.

Run it: .venv/bin/python examples/framework_search.py [MODEL [INSTRUCTION]]

Needs pip install 'embedwright[langchain,llamaindex]', or one of them. Queries and documents each get what the model
wants in front of them. A model without an instruction of its own for queries wants one here.
"""

import inspect
import json
import shutil
import sys
import textwrap
from importlib.util import find_spec

QUERY = "remove a folder and everything in it"
Hits = list[tuple[float, str]]  # score and name


def with_langchain(texts: dict[str, str], model: str, task: list[str]) -> Hits:
    from langchain_core.vectorstores import InMemoryVectorStore

    from embedwright.frameworks.langchain import EmbedwrightEmbeddings

    store = InMemoryVectorStore(EmbedwrightEmbeddings(model, *task))
    store.add_texts(list(texts.values()), [{"name": name} for name in texts])
    found = store.similarity_search_with_score(QUERY, k=3)
    return [(score, document.metadata["name"]) for document, score in found]


def with_llama_index(texts: dict[str, str], model: str, task: list[str]) -> Hits:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode

    from embedwright.frameworks.llama_index import EmbedwrightEmbedding

    nodes = [TextNode(text=text, id_=name) for name, text in texts.items()]
    index = VectorStoreIndex(nodes, embed_model=EmbedwrightEmbedding(model, *task))
    found = index.as_retriever(similarity_top_k=3).retrieve(QUERY)
    return [(hit.score, hit.node.id_) for hit in found]


def main() -> None:
    model, *task = sys.argv[1:] or ["minilm"]
    functions = [pair for module in (shutil, json, textwrap) for pair in inspect.getmembers_static(module)]
    texts = {name: inspect.cleandoc(one.__doc__) for name, one in functions if inspect.isfunction(one) and one.__doc__}
    for package, search in (("langchain_core", with_langchain), ("llama_index", with_llama_index)):
        if not find_spec(package):
            print(f"{package} is not installed: pip install 'embedwright[langchain,llamaindex]'")
            continue
        print(f"{package}: {QUERY}")
        for score, name in search(texts, model, task):
            print(f"  {score:.4f}  {name:16} {texts[name].splitlines()[0]}")


if __name__ == "__main__":
    main()
