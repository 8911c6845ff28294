"""Tells which other programs give the right vectors for a saved folder, and for queries, documents or both.

The facts are from the source of the servers, text-embeddings-inference 1.9 and vLLM 0.33. Both take the pooling from
`1_Pooling` and pool every token, the prompt's too. text-embeddings-inference decides attention by
`use_bidirectional_attention`, but by `is_causal` for Qwen2; vLLM by `is_causal`, but by the former for Gemma 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embedwright.model.backbone import READ_BY_FLAG
from embedwright.model.formats.detect import STOCK_SETTINGS, format_of
from embedwright.model.formats.folder import read_object
from embedwright.text import Contract

_BOTH = "queries and documents"
_SERVERS = "text-embeddings-inference and vLLM"
_BIDIRECTIONAL = READ_BY_FLAG | {"qwen2"}  # families that both servers can run so


def check_readers(folder: Path) -> tuple[bool, str] | None:
    """Returns whether no known program is misled by the folder, and a line that names the programs that are right.

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
    misleading, served = _misleading(folder), _served(folder)
    line = f"sentence-transformers: {_BOTH}; AutoModel: token states, to be pooled by hand; {_SERVERS}: "
    return not misleading, line + (f"wrong, {misleading}; save it again" if misleading else served)


def sides(contract: Contract, pooling: str) -> str | None:
    """Returns the texts for which a program is right that pools every token, BOS and the prompt's too; None for none.

    `pooling` is `mean` or `last`.
    """
    if pooling == "last" or contract.mask_rule == "all":
        return _BOTH
    pools_all = not contract.bos_ids and not contract.document_template and contract.mask_rule != "count"
    return "documents alone" if pools_all else None


def _misleading(folder: Path) -> str | None:
    """Returns what in the folder misleads a server, if anything does."""
    config, pooling = _config(folder), read_object(folder / "1_Pooling" / "config.json")
    causal, flag = config.get("is_causal", True), config.get("use_bidirectional_attention") is True
    if causal and flag:
        return "both use_bidirectional_attention and is_causal are true"
    if not causal and config.get("model_type") in READ_BY_FLAG and not flag:
        return "without use_bidirectional_attention it is read as causal"
    if "pooling_mode_mean_tokens" not in pooling:
        return "1_Pooling lacks the older keys: without them a server pools the last token or does not start"
    return None


def _served(folder: Path) -> str:
    """Returns for which texts the servers are right about a stock folder."""
    config, settings = _config(folder), read_object(folder / STOCK_SETTINGS)
    if not config.get("is_causal", True) and config.get("model_type") not in _BIDIRECTIONAL:
        return f"none: they have no setting that makes a {config.get('model_type')!r} model bidirectional"
    served = sides(Contract.model_validate(settings["contract"]), settings["pooling"]["kind"])
    if served == _BOTH:
        return f"{_BOTH}, with their prompts"
    trained = "(pool_prompt trains a model for that)"
    if served is None:
        return f"none: they pool the prompts too {trained}"
    return f"{served}: they pool a query's prompt too {trained}"


def _config(folder: Path) -> dict[str, Any]:
    return read_object(folder / "config.json")
