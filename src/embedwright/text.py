"""The text contract: how a text becomes token ids and a pool mask. Stored with the model, used everywhere.

`prefix + text + suffix + EOS`. Attention sees everything; pooling sees the text and EOS, not the prefix or suffix.
Tokenising in another way anywhere else is a bug (design, section 6).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer

from embedwright import threads
from embedwright.errors import InputError, InputTypeError, as_input_error

INSTRUCTION_TEMPLATE = "Instruct: {task}\nQuery: "
# sentence-transformers leaves out a *count* of prompt tokens, so its prompt must end where a token ends.
BOUNDARY_TEMPLATE = "Instruct: {task}\nQuery:\n"

_SURROGATE = re.compile("[\ud800-\udfff]")

_PROBE_TEXTS = (
    "a",
    "Hello world",
    "  two leading spaces",
    "tab\tand\nnewline\n\n",
    "naïve café, Straße",
    "漢字 🙂",
    "x = [1, 2.5e-3]  # code",
    "▁piece",
    "</s> and <s> inside <|im_end|>",
)


class Contract(BaseModel):
    """How texts become tokens. `max_tokens` counts all of them: BOS, prefix, text, suffix and EOS.

    The fields after `max_tokens` serve models of others (`model.formats.families`). New models keep the defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    query_template: str = INSTRUCTION_TEMPLATE
    document_template: str = ""
    eos_id: int | None  # None: this model reads no EOS
    bos_ids: tuple[int, ...] = ()
    mask_rule: Literal["offsets", "boundary", "count", "all"] = "offsets"
    max_tokens: int = Field(default=512, ge=2)
    query_suffix: str = ""  # after every text whose prefix is not the documents'
    template_specials: bool = False  # special tokens written in prefix and suffix are those tokens, not plain text
    default_task: str = ""  # the model's own instruction, of queries for which none is given

    @model_validator(mode="after")
    def _rules_fit(self) -> Contract:
        foreign = self.eos_id is None or self.query_suffix or self.template_specials
        if foreign and self.mask_rule != "offsets":
            raise InputError(f"a model with a suffix or without EOS is read by 'offsets', not by {self.mask_rule!r}")
        return self

    def prefix(self, task: str | None) -> str:
        """Returns the string in front of a query with instruction `task`, or in front of a document (None).

        An empty task means none, not the model's own: such a query is read as a document if the template has a {task}.
        """
        if task or (task is not None and "{task}" not in self.query_template):
            return self.query_template.replace("{task}", task)
        return self.document_template

    def query_task(self, task: str | None) -> str:
        """Returns `task`, or the model's own instruction for None. Raises InputError if it has none."""
        if task is None and "{task}" in self.query_template and not self.default_task:
            raise InputError(
                "the model has no instruction of its own for queries, and would read them as documents: give that of "
                'its training as the task, or an empty task, task="", to have them read so'
            )
        return self.default_task if task is None else task


class TextTokenizer:
    """The model's own copy of a tokenizer. All threads may use it at once.

    Changes to the original, such as added tokens or truncation, do not reach it. `plain` reads special tokens written
    in a text as plain text; `special` reads them as special tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.plain = _frozen(tokenizer, encode_special_tokens=True)

    @cached_property
    def special(self) -> Tokenizer:
        """The copy that reads special tokens written in a text as special tokens. Few models need it."""
        return _frozen(self.plain, encode_special_tokens=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextTokenizer:
        return self

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[Tokenizer]]:
        return TextTokenizer, (self.plain,)  # a pickled Tokenizer forgets its setting


def _frozen(tokenizer: Tokenizer, *, encode_special_tokens: bool) -> Tokenizer:
    made = Tokenizer.from_str(tokenizer.to_str())
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = encode_special_tokens
    return made


def without_backend(tokenizer: Any) -> Any:
    """Copies a transformers tokenizer without its backend, which takes 100 MB for a vocabulary of 262,000 tokens."""
    return copy.deepcopy(tokenizer, {id(tokenizer.backend_tokenizer): Tokenizer})  # a class: copies keep it


def with_backend(shell: Any, backend: Tokenizer) -> Any:
    """Copies a tokenizer of `without_backend`, with a copy of `backend` that never truncates or pads."""
    return copy.deepcopy(shell, {id(Tokenizer): _frozen(backend, encode_special_tokens=False)})


class TokenizedText(NamedTuple):
    """One text of L tokens: `ids` int64 (L,) and `pool` bool (L,), True for the tokens that are pooled."""

    ids: NDArray[np.int64]
    pool: NDArray[np.bool_]


class NoTokenError(InputError):
    """The prefix leaves no token of texts[index] to pool."""

    def __init__(self, prefix: str, limit: int, index: int) -> None:
        self.prefix, self.limit, self.index = prefix, limit, index
        shown = prefix if len(prefix) <= 60 else prefix[:57] + "..."
        super().__init__(f"texts[{index}]: the instruction {shown!r} and max_tokens={limit} leave no token to pool")


def leading_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the special tokens that the tokenizer itself puts in front of a text: its BOS, if it has one."""
    encoding = tokenizer.encode("a")
    count = next((i for i, special in enumerate(encoding.special_tokens_mask) if not special), 0)
    return tuple(encoding.ids[:count])


def load_tokenizer(folder: str | Path, **kwargs: Any) -> Any:
    """Loads the transformers tokenizer of a local folder. It gives the ids that tokenizer.json gives.

    transformers 5 rebuilds some tokenizers from the config. Where that changes the ids of a probe text, the file wins.

    Raises:
        InputError: The folder has no tokenizer, or only one that needs code of its own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options = {"local_files_only": True} | kwargs
    with as_input_error(folder, "has no tokenizer that can be opened"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        names = [name for name in tokenizer.vocab_files_names.values() if name]
        if "gguf_file" not in kwargs and not any((Path(folder) / name).is_file() for name in names):
            raise InputError(f"{folder} has no tokenizer: none of {', '.join(names)} is there")
        file = Path(folder) / "tokenizer.json"
        if file.is_file():
            stored = Tokenizer.from_file(str(file))
            if any(stored.encode(t).ids != tokenizer.backend_tokenizer.encode(t).ids for t in _PROBE_TEXTS):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False, **options)
    return tokenizer


def check_texts(texts: Iterable[str]) -> list[str]:
    """Turns a list, tuple, one-dimensional array, table column or other ordered series of texts into a list.

    Raises:
        InputTypeError: `texts` has no order or is not a series of texts, or an item is not a str; it names the index.
        InputError: A text holds a lone surrogate; it names the index.
    """
    if isinstance(texts, str):
        raise InputTypeError("expected a list of texts, got one string: wrap it in a list")
    if not _is_series(texts):
        raise InputTypeError(f"expected a list of texts, got {type(texts).__name__}: pass a list or a table's column")
    items: list[str] = texts.to_pylist() if hasattr(texts, "to_pylist") else list(texts)  # an Arrow array's are scalars
    for i, text in enumerate(items):
        if not isinstance(text, str) or (not text.isascii() and _SURROGATE.search(text)):
            check_text(text, f"texts[{i}]")
    return items


def check_text(text: object, name: str) -> None:
    """Raises InputTypeError for a value that is not a str, InputError for a lone surrogate, which is not Unicode."""
    if not isinstance(text, str):
        raise InputTypeError(f"{name} is {type(text).__name__}, not str")
    if _SURROGATE.search(text):
        raise InputError(f"{name} holds a lone surrogate and is not valid Unicode")


def _is_series(texts: Any) -> bool:
    """Returns whether the items have an order, and are not the column names of a table."""
    unordered = isinstance(texts, (bytes, bytearray, Mapping, set, frozenset))
    table = getattr(texts, "ndim", 1) != 1 or hasattr(texts, "columns") or hasattr(texts, "column_names")
    return isinstance(texts, Iterable) and not unordered and not table


def check_limit(contract: Contract, max_tokens: int) -> int:
    """Returns `max_tokens` as an int. Raises InputTypeError or InputError if it leaves no room for text."""
    check_whole(max_tokens, "max_tokens")
    fixed = len(contract.bos_ids) + (contract.eos_id is not None and contract.mask_rule != "count")
    if max_tokens <= fixed:
        raise InputError(f"max_tokens={max_tokens} leaves no room for a token of text: give at least {fixed + 1}")
    return int(max_tokens)


def check_whole(value: object, name: str) -> None:
    """Raises InputTypeError for a value that is not a whole number. Bools are refused too."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputTypeError(f"{name}={value!r} is {type(value).__name__}, not a whole number")


def tokenize(
    tokenizer: TextTokenizer,
    contract: Contract,
    texts: Iterable[str],
    prefix: str = "",
    max_tokens: int | None = None,
) -> list[TokenizedText]:
    """Tokenises `prefix + text` for each text, by the contract's rule. Returns ids and pool masks.

    Raises:
        InputError: `max_tokens` leaves no room for text.
        NoTokenError: The prefix leaves no token of a text to pool. The reference returns NaN there.
    """
    return tokenize_checked(tokenizer, contract, check_texts(texts), prefix, max_tokens)


def tokenize_checked(
    tokenizer: TextTokenizer, contract: Contract, texts: list[str], prefix: str, max_tokens: int | None
) -> list[TokenizedText]:
    """Tokenises texts that `check_texts` returned, as `tokenize` does."""
    limit = check_limit(contract, contract.max_tokens if max_tokens is None else max_tokens)
    rule = _by_count if contract.mask_rule == "count" else _by_offsets
    with threads.unbound():  # the first batch starts the tokenizers' own threads
        return rule(tokenizer, contract, texts, prefix, limit)


def _by_offsets(
    tokenizer: TextTokenizer, contract: Contract, texts: list[str], prefix: str, limit: int
) -> list[TokenizedText]:
    """Reads texts as new models do: it truncates the text, appends EOS by id, and reads special tokens as plain text.

    A token is pooled if it ends after the prefix. The prefix's last token may merge with the first word, which a count
    of the prefix's tokens would lose. The rule `boundary`, for models that plain sentence-transformers opens (it
    counts), differs in one thing: white space of the text that merged with the prefix's last token is not pooled.
    The rule `all` pools every token, as servers do that know nothing of prefixes.
    """
    frame = _frame(tokenizer, contract, prefix)
    if limit <= len(contract.bos_ids) + len(frame.back):
        raise InputError(f"max_tokens={limit} leaves no room for a token of text")
    front, back = np.zeros(len(frame.front), dtype=bool), np.zeros(len(frame.back), dtype=bool)
    whole = [frame.prefix + text + frame.suffix for text in texts]
    result = []
    for i, encoding in enumerate(tokenizer.plain.encode_batch(whole, add_special_tokens=False)):
        ids = encoding.ids
        pooled, body = np.ones(len(ids), dtype=bool), len(ids)
        if frame.prefix or frame.suffix:
            pooled, body = _text_tokens(encoding.offsets, frame, texts[i], contract.mask_rule == "boundary")
        kept = min(body, limit - (len(ids) - body) - len(front) - len(back))
        if kept < 0:
            raise NoTokenError(prefix, limit, i)
        pooled = np.concatenate([pooled[:kept], pooled[body:]])
        # a text of nothing may be pooled from its EOS alone, but only after a whole prefix
        if not pooled.any() and (contract.eos_id is None or (prefix and (texts[i].strip() or kept < body))):
            raise NoTokenError(prefix, limit, i)
        # a decoder's BOS, in front, is an attention sink with an outsized state
        pool = np.concatenate([front, pooled, back])
        pool[-1] |= contract.eos_id is not None
        pool |= contract.mask_rule == "all"
        ids = [*frame.front, *ids[:kept], *ids[body:], *frame.back]
        result.append(TokenizedText(np.array(ids, dtype=np.int64), pool))
    return result


def _text_tokens(
    offsets: list[tuple[int, int]], frame: _Frame, text: str, boundary: bool
) -> tuple[NDArray[np.bool_], int]:
    """Finds the tokens of `prefix + text + suffix` that hold some of the text, and counts those before the suffix.

    Only these may be truncated: tokens that reach into the suffix always stay.
    """
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    start, stop = len(frame.prefix), len(frame.prefix) + len(text)
    pooled = end > start if frame.prefix else np.ones(len(offsets), dtype=bool)
    if boundary:
        for n in np.flatnonzero((begin < start) & (end > start)):
            pooled[n] = not text[: end[n] - start].isspace()
    if not frame.suffix:
        return pooled, len(offsets)
    return pooled & (begin < stop), int((end <= stop).sum())


class _Frame(NamedTuple):
    """What surrounds a text: ids where they are fixed, strings where they may merge with the text."""

    front: list[int]
    prefix: str
    suffix: str
    back: list[int]


def _frame(tokenizer: TextTokenizer, contract: Contract, prefix: str) -> _Frame:
    """Builds what surrounds a text: BOS, prefix, suffix and EOS.

    A prefix is fixed up to its last special token, a suffix from its first one on. A tokenizer reads the pieces between
    special tokens one by one, so this split gives the ids of the whole string.
    """
    front, back = list(contract.bos_ids), [] if contract.eos_id is None else [contract.eos_id]
    suffix = contract.query_suffix if prefix != contract.document_template else ""
    if not contract.template_specials:
        return _Frame(front, prefix, suffix, back)
    special = {id for id, token in tokenizer.special.get_added_tokens_decoder().items() if token.special}
    before, behind = (tokenizer.special.encode(string, add_special_tokens=False) for string in (prefix, suffix))
    last = max((n + 1 for n, id in enumerate(before.ids) if id in special), default=0)
    first = next((n for n, id in enumerate(behind.ids) if id in special), len(behind.ids))
    return _Frame(
        front + before.ids[:last],
        prefix[before.offsets[last - 1][1] :] if last else prefix,
        suffix[: behind.offsets[first][0]] if first < len(behind.ids) else suffix,
        behind.ids[first:] + back,
    )


def _by_count(
    tokenizer: TextTokenizer, contract: Contract, texts: list[str], prefix: str, limit: int
) -> list[TokenizedText]:
    """Reads texts as released NV-Embed does: EOS is text and truncated with it; the first n positions are not pooled.

    n is the number of the prefix's tokens without BOS. Position 0 is BOS, so the prefix's last token is pooled.
    """
    special = tokenizer.special
    eos = "" if contract.eos_id is None else special.id_to_token(contract.eos_id) or ""
    masked = len(special.encode(prefix, add_special_tokens=False).ids) if prefix else 0
    result = []
    for i, encoding in enumerate(special.encode_batch([prefix + t + eos for t in texts])):
        ids = np.array(encoding.ids[:limit], dtype=np.int64)
        if len(ids) <= masked:
            raise NoTokenError(prefix, limit, i)
        result.append(TokenizedText(ids, np.arange(len(ids)) >= masked))
    return result
