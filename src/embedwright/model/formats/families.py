"""How published decoder embedders read a text, as data, so that each opens as an `Embedder`.

Encoders, and EmbeddingGemma with its dense layers, open through sentence-transformers under the prompts of their own
folder (`embedwright.encoders.sentence_transformers`). No remote code: the backbones are stock.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from embedwright.errors import InputError, as_input_error
from embedwright.locate import text_of
from embedwright.model.backbone import AttentionKind, decoder_config
from embedwright.model.formats.base import Outline
from embedwright.model.pooling import WEIGHTLESS, PoolingConfig
from embedwright.text import Contract, load_tokenizer


class Family(NamedTuple):
    """How one family of embedders reads a text. `bos` and `eos` are added by id, whatever the tokenizer adds."""

    name: str  # the last part of a folder or hub id of this family begins with it
    mark: tuple[str, str]  # or else this file of the folder holds this text
    model_types: tuple[str, ...]  # and config.json says one of these
    attention: AttentionKind
    pooling: Literal["last", "mean"]
    query: str
    task: str  # the authors' own instruction, for a query that comes without one
    max_tokens: int  # unless the folder's sentence_bert_config.json says another
    document: str = ""
    suffix: str = ""  # of a query
    bos: str | None = None
    eos: str | None = None
    specials: bool = False  # the templates hold special tokens


_WEB = "Given a web search query, retrieve relevant passages that answer the query"

FAMILIES = {
    family.name: family
    for family in (
        # Model card of Qwen/Qwen3-Embedding-0.6B: last_token_pool, max_length 8192, no space after "Query:". Its
        # config_sentence_transformers.json has the default task. Its tokenizer.json appends <|endoftext|>, not the
        # <|im_end|> that tokenizer_config.json calls EOS (QwenLM/Qwen3-Embedding#54, #122; ggml-org/llama.cpp#14314).
        Family(
            "qwen3-embedding",
            mark=("config_sentence_transformers.json", r'\nQuery:"'),
            model_types=("qwen3",),
            attention="causal",
            pooling="last",
            query="Instruct: {task}\nQuery:",
            task=_WEB,
            max_tokens=8192,
            eos="<|endoftext|>",
        ),
        # Model card of intfloat/e5-mistral-7b-instruct: last_token_pool, max_length 4096, EOS appended to the ids by
        # hand, prompt `web_search_query`. tokenizer_config.json asks for EOS, tokenizer.json adds <s> alone, and
        # transformers 5 follows the latter without a word (embeddings-benchmark/mteb#5237).
        Family(
            "e5-mistral",
            mark=("config_sentence_transformers.json", "web_search_query"),
            model_types=("mistral",),
            attention="causal",
            pooling="last",
            query="Instruct: {task}\nQuery: ",
            task=_WEB,
            max_tokens=4096,
            bos="<s>",
            eos="</s>",
        ),
        # ContextualAI/gritlm, gritlm/gritlm.py: attn "bbcc" (bidirectional for embeddings), mean after the instruction
        # (BOS is left out with it), embed_eos "", max_length 512. README: gritlm_instruction, "<|embed|>\n" alone for
        # documents; the marks are plain text to its tokenizer, which has Mistral's 32,000 tokens.
        Family(
            "gritlm",
            mark=("config.json", "modeling_gritlm"),
            model_types=("mistral", "mixtral"),
            attention="bidirectional",
            pooling="mean",
            query="<|user|>\n{task}\n<|embed|>\n",
            task="",
            max_tokens=512,
            document="<|embed|>\n",
            bos="<s>",
        ),
        # FlagOpen/FlagEmbedding, inference/embedder/decoder_only/icl.py: query_instruction_format, suffix,
        # last_token_pool, max_length 512, <s> and </s> around both sides; the task as in the model card of
        # BAAI/bge-en-icl. Its three marks are added special tokens (a vocabulary of 32,003). That code cuts a query by
        # decoding and encoding it again, which may change its white space: here the ids are those of the whole string.
        Family(
            "bge-en-icl",
            mark=("tokenizer.json", '"<response>"'),
            model_types=("mistral",),
            attention="causal",
            pooling="last",
            query="<instruct>{task}\n<query>",
            task=f"{_WEB}.",
            max_tokens=512,
            suffix="\n<response>",
            bos="<s>",
            eos="</s>",
            specials=True,
        ),
    )
}


def split_family(name: str) -> tuple[Family | None, str]:
    """Splits `e5-mistral:models/mine` into that family and `models/mine`; None and the whole name without a family."""
    front, colon, rest = name.partition(":")
    return (FAMILIES[front], rest) if colon and rest and front in FAMILIES else (None, name)


def family_of(folder: Path, name: str, config: dict[str, Any]) -> Family | None:
    """Returns the family of a folder that is called `name` and has this config.json; None if it is of none."""
    for family in FAMILIES.values():
        if config.get("model_type") in family.model_types and _modules_fit(folder, family):
            file, mark = family.mark
            if Path(name).name.lower().startswith(family.name) or mark in (text_of(folder, file) or ""):
                return family
    return None


def read_family(folder: Path, family: Family) -> Outline:
    """Reads the settings of a folder. Raises InputError if decoder, modules or tokens are not those of the family."""
    decoder = decoder_config(str(folder), attention=family.attention)
    if decoder.model_type not in family.model_types:
        raise InputError(f"{folder} is a {decoder.model_type!r} model, not one of {family.name}")
    if not _modules_fit(folder, family):
        raise InputError(f"{folder}: modules.json has modules or a pooling that {family.name} does not have")
    tokenizer = load_tokenizer(folder)

    def id_of(token: str) -> int:
        id: int | None = tokenizer.backend_tokenizer.token_to_id(token)
        if id is None:
            raise InputError(f"{folder}: the tokenizer has no {token!r}, which {family.name} needs")
        return id

    with as_input_error(folder, "has no sound text contract"):
        lengths = json.loads(text_of(folder, "sentence_bert_config.json") or "{}")
        contract = Contract(
            query_template=family.query,
            document_template=family.document,
            eos_id=id_of(family.eos) if family.eos else None,
            bos_ids=(id_of(family.bos),) if family.bos else (),
            max_tokens=lengths.get("max_seq_length") or family.max_tokens,
            query_suffix=family.suffix,
            template_specials=family.specials,
            default_task=family.task,
        )
    return Outline(decoder, PoolingConfig(kind=family.pooling), contract, tokenizer)


def _modules_fit(folder: Path, family: Family) -> bool:
    """Returns whether the folder's sentence-transformers modules, if any, are a transformer and this pooling alone."""
    modules = json.loads(text_of(folder, "modules.json") or "[]")
    kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    if "Pooling" not in kinds:
        return not kinds
    pooling = json.loads(text_of(folder, f"{kinds['Pooling']}/config.json") or "{}")
    old_key = {"last": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens"}[family.pooling]
    pools = pooling.get("pooling_mode") == WEIGHTLESS[family.pooling] or pooling.get(old_key) is True
    return kinds.keys() <= {"Transformer", "Pooling", "Normalize"} and pools
