"""Tells which other programs give the right vectors for a saved folder, and for queries, documents or both.

The facts are from the source of the server: text-embeddings-inference 1.9 takes the pooling of `1_Pooling`, pools every
token including the prompt's, and decides on attention by `use_bidirectional_attention`, for Qwen2 by `is_causal`.
"""

from __future__ import annotations

from pathlib import Path

from embedwright.model.backbone import READ_BY_FLAG
from embedwright.model.formats.detect import STOCK_SETTINGS, format_of
from embedwright.model.formats.folder import read_object

_BOTH = "queries and documents"


def check_readers(folder: Path) -> tuple[bool, str] | None:
    """Says whether no known program is misled by the folder, and a line that names the programs that are right.

    None for a folder that this package did not write.
    """
    form = format_of(folder, "")
    if form == "adapter":
        return True, "adapters: Embedwright alone opens them with their contract; merge them for others"
    if form == "ours":
        return True, (
            f"sentence-transformers and AutoModel once embedwright is imported: {_BOTH}; text-embeddings-inference, "
            "vLLM and llama.cpp do not know this format"
        )
    if form != "stock":
        return None
    server, misled = _server(folder)
    line = f"sentence-transformers: {_BOTH}; AutoModel: token states, to be pooled by hand; {server}"
    return not misled, line


def _server(folder: Path) -> tuple[str, bool]:
    """Returns what text-embeddings-inference makes of a stock folder, and whether a key misleads it."""
    config = read_object(folder / "config.json")
    name, kind = "text-embeddings-inference", config.get("model_type")
    flag = config.get("use_bidirectional_attention") is True
    causal = config.get("is_causal", True)
    if causal and flag:
        return f"{name}: wrong, use_bidirectional_attention is true and is_causal too; save it again", True
    if not causal and kind != "qwen2" and not flag:
        if kind in READ_BY_FLAG:
            return f"{name}: wrong, without use_bidirectional_attention it is read as causal; save it again", True
        return f"{name}: no, of a {kind!r} model it reads no key for bidirectional attention that fits", False
    pooling = read_object(folder / "1_Pooling" / "config.json")
    if pooling["pooling_mode"] == "lasttoken" or pooling["include_prompt"]:
        return f"{name}: {_BOTH}, with their prompts", False
    if read_object(folder / STOCK_SETTINGS)["contract"]["document_template"]:
        return f"{name}: no, it pools the prompts too (pool_prompt trains a model for that)", False
    return (
        f"{name}: documents alone, it pools the prompt of a query too (pool_prompt trains a model for that)",
        False,
    )
