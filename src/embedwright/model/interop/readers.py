"""Which other programs give the vectors of a saved folder, by what stands in it; and for queries, documents or both.

What servers read is by their sources: text-embeddings-inference 1.9 takes the pooling of `1_Pooling`, pools every token
of a text, its prompt included, and decides on attention by `use_bidirectional_attention`, of Qwen2 by `is_causal`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedwright.model.backbone import READ_BY_FLAG
from embedwright.model.formats.folder import ADAPTER
from embedwright.model.formats.storage import STOCK_SETTINGS
from embedwright.model.network import EmbedwrightConfig

_BOTH = "queries and documents"


def others_read(folder: Path) -> tuple[bool, str] | None:
    """Whether nothing in the folder misleads a program that is known to read it, and a line that names who is right.

    None for folders of other authors.
    """
    if (folder / ADAPTER).is_file():
        return True, "adapters: Embedwright alone opens them with their contract; merge them for others"
    config = _json(folder / "config.json")
    if config.get("model_type") == EmbedwrightConfig.model_type:
        return True, (
            f"sentence-transformers and AutoModel once embedwright is imported: {_BOTH}; text-embeddings-inference, "
            "vLLM and llama.cpp do not know this format"
        )
    if not (folder / STOCK_SETTINGS).is_file():
        return None
    server, misled = _server(folder, config)
    line = f"sentence-transformers: {_BOTH}; AutoModel: token states, to be pooled by hand; {server}"
    return not misled, line


def _server(folder: Path, config: dict[str, Any]) -> tuple[str, bool]:
    """What text-embeddings-inference makes of a stock folder; and whether a key is missing that it would read."""
    name, kind = "text-embeddings-inference", config.get("model_type")
    flag = config.get("use_bidirectional_attention") is True
    causal = config.get("is_causal", True)
    if causal and flag:
        return f"{name}: wrong, use_bidirectional_attention is true and is_causal too; save it again", True
    if not causal and kind != "qwen2" and not flag:
        if kind in READ_BY_FLAG:
            return f"{name}: wrong, without use_bidirectional_attention it is read as causal; save it again", True
        return f"{name}: no, of a {kind!r} model it reads no key for bidirectional attention that fits", False
    pooling = _json(folder / "1_Pooling" / "config.json")
    if pooling["pooling_mode"] == "lasttoken" or pooling["include_prompt"]:
        return f"{name}: {_BOTH}, with their prompts", False
    if _json(folder / STOCK_SETTINGS)["contract"]["document_template"]:
        return f"{name}: no, it pools the prompts too (pool_prompt trains a model for that)", False
    return (
        f"{name}: documents alone, it pools the prompt of a query too (pool_prompt trains a model for that)",
        False,
    )


def _json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
