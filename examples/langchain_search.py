"""Search the docstrings of a few modules with LangChain's own store, over the packaged MiniLM.

Run it: .venv/bin/python examples/langchain_search.py [MODEL [INSTRUCTION]]

Needs pip install 'embedwright[langchain]'. Queries and documents each get what the model wants in front of them. A
model that was trained here wants an instruction.
"""

import inspect
import json
import shutil
import sys
import textwrap
from importlib.util import find_spec

QUERY = "remove a folder and everything in it"


def main() -> None:
    if not find_spec("langchain_core"):
        print("skipped: pip install 'embedwright[langchain]'")
        return
    from langchain_core.vectorstores import InMemoryVectorStore

    from embedwright.frameworks.langchain import EmbedwrightEmbeddings

    model, *task = sys.argv[1:] or ["minilm"]
    functions = (
        inspect.getmembers_static(shutil) + inspect.getmembers_static(json) + inspect.getmembers_static(textwrap)
    )
    texts = {name: inspect.cleandoc(one.__doc__) for name, one in functions if inspect.isfunction(one) and one.__doc__}
    store = InMemoryVectorStore(EmbedwrightEmbeddings(model, *task))
    store.add_texts(list(texts.values()), [{"name": name} for name in texts])
    print(QUERY)
    for document, score in store.similarity_search_with_score(QUERY, k=3):
        print(f"  {score:.4f}  {document.metadata['name']:16} {document.page_content.splitlines()[0]}")


if __name__ == "__main__":
    main()
