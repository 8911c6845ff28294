"""Search the docstrings of a few modules with LlamaIndex's own index, over the packaged MiniLM.

Run it: .venv/bin/python examples/llama_index_search.py [MODEL [INSTRUCTION]]

Needs pip install 'embedwright[llamaindex]'. Queries and documents each get what the model wants in front of them. A
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
    if not find_spec("llama_index"):
        print("skipped: pip install 'embedwright[llamaindex]'")
        return
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode

    from embedwright.frameworks.llama_index import EmbedwrightEmbedding

    model, *task = sys.argv[1:] or ["minilm"]
    functions = (
        inspect.getmembers_static(shutil) + inspect.getmembers_static(json) + inspect.getmembers_static(textwrap)
    )
    texts = {name: inspect.cleandoc(one.__doc__) for name, one in functions if inspect.isfunction(one) and one.__doc__}
    nodes = [TextNode(text=text, id_=name) for name, text in texts.items()]
    index = VectorStoreIndex(nodes, embed_model=EmbedwrightEmbedding(model, *task))
    print(QUERY)
    for found in index.as_retriever(similarity_top_k=3).retrieve(QUERY):
        print(f"  {found.score:.4f}  {found.node.id_:16} {found.node.get_content().splitlines()[0]}")


if __name__ == "__main__":
    main()
