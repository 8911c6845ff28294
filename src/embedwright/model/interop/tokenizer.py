"""A transformers tokenizer that follows the text contract, and the files that sentence-transformers reads.

Other libraries make token ids themselves, and all they know of a contract is a count of prompt tokens. So the tokenizer
carries the contract, and its calls return the ids and the pool mask of the contract (design, section 7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from embedwright.errors import InputError
from embedwright.model.network import EmbedwrightConfig
from embedwright.text import Contract, NoTokenError, TextTokenizer, TokenizedText, check_limit, check_texts, tokenize

Message = Mapping[str, Any]
NO_LIMIT = 10**9  # tokens


class EmbedwrightTokenizer(PreTrainedTokenizerFast):
    """Turns texts into `input_ids`, `attention_mask` and `pool_mask`, exactly as `Embedder.encode` reads them.

    `model(**tokenizer(texts)).pooler_output` are the vectors of documents; `prefix`, or a system message in
    `apply_chat_template`, is the string in front of a query. Made by `tokenizer_for`; AutoTokenizer loads it.
    """

    # No __init__: transformers rebuilds the pipeline of a class that has one, with other ids.
    model_input_names = ["input_ids", "attention_mask", "pool_mask"]  # noqa: RUF012  (the base class's way)
    _reads_with: tuple[int, TextTokenizer] | None = None  # and the number of tokens that there were

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer that reads the texts: a copy with the tokens of now, without truncation or padding."""
        if self._reads_with is None or self._reads_with[0] != len(self):
            self._reads_with = len(self), TextTokenizer(self.backend_tokenizer)
        return self._reads_with[1]

    @property
    def text_contract(self) -> Contract:
        """The contract that was saved with this tokenizer, with the length that is set now.

        Raises InputError if there is none, or if the length leaves no room for text.
        """
        if "contract" not in self.init_kwargs:
            raise InputError("this tokenizer holds no text contract: make it with tokenizer_for")
        saved = Contract.model_validate(self.init_kwargs["contract"])
        limit = self.model_max_length or saved.max_tokens  # None: sentence-transformers' user unset it
        return saved.model_copy(update={"max_tokens": check_limit(saved, limit)})

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the tokenizer as transformers does, with the length that is set now in its contract too."""
        if "contract" in self.init_kwargs:
            contract = self.text_contract
            self.init_kwargs["contract"], self.model_max_length = contract.model_dump(mode="json"), contract.max_tokens
        return super().save_pretrained(*args, **kwargs)

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: Any = None,
        *,
        prefix: str | None = None,
        return_tensors: str | None = "pt",
        **options: Any,
    ) -> Any:
        """Returns a BatchEncoding of the texts, with `prefix` (None: the document template) in front of each.

        Texts are cut to `max_length`, or else to `model_max_length`, all tokens counted; `truncation=False` cuts
        nothing. A single text without tensors has no batch dimension. Raises InputError for text pairs, for any option
        that would change the ids, and for a prefix that leaves no token to pool; InputTypeError for an item that is no
        text.
        """
        if text_pair is not None:
            raise InputError("an embedding model reads one text at a time: text pairs are not supported")
        in_front = self.text_contract.prefix(None) if prefix is None else prefix
        pairs = [(in_front, one) for one in check_texts([text] if isinstance(text, str) else text)]
        return self._encoded(pairs, isinstance(text, str), return_tensors=return_tensors, **options)

    def encode(self, text: str, text_pair: Any = None, *, return_tensors: str | None = None, **options: Any) -> Any:
        """Returns the `input_ids` of one text."""
        return self(text, text_pair, return_tensors=return_tensors, **options)["input_ids"]

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        tokenize: bool = True,
        return_dict: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        common_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Reads conversations, as sentence-transformers makes them: the system message is the prefix of the text.

        A conversation is one user message, the text, after at most one system message. The rest is as in a call.
        `tokenize=False` returns the strings. Raises InputError for other conversations and options.
        """
        batched = not conversation or not isinstance(conversation[0], Mapping)
        conversations: Any = conversation if batched else [conversation]
        pairs = [_prefix_and_text(one, i) for i, one in enumerate(conversations)]
        if not tokenize:
            strings = [prefix + text for prefix, text in pairs]
            return strings if batched else strings[0]
        encoded = self._encoded(pairs, not batched, **{**options, **(tokenizer_kwargs or {}), **(common_kwargs or {})})
        return encoded if return_dict else encoded["input_ids"]

    def _encoded(
        self,
        pairs: Sequence[tuple[str, str]],
        single: bool,
        *,
        padding: bool | str = True,
        truncation: bool | str | None = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        **unknown: Any,
    ) -> Any:
        """Reads (prefix, text) pairs, all of one prefix at a time, and pads them."""
        _refuse(unknown)
        contract, tokenizer = self.text_contract, self.text_tokenizer
        limit = _limit(contract, truncation, max_length)
        rows: dict[int, TokenizedText] = {}
        for prefix in dict.fromkeys(prefix for prefix, _ in pairs):
            places = [i for i, pair in enumerate(pairs) if pair[0] == prefix]
            try:
                made = tokenize(tokenizer, contract, [pairs[i][1] for i in places], prefix, limit)
            except NoTokenError as error:
                raise NoTokenError(prefix, limit, places[error.index]) from None
            rows |= zip(places, made, strict=True)
        encoded: dict[str, Any] = {
            "input_ids": [rows[i].ids.tolist() for i in range(len(pairs))],
            "attention_mask": [[1] * len(rows[i].ids) for i in range(len(pairs))],
            "pool_mask": [rows[i].pool.astype(int).tolist() for i in range(len(pairs))],
        }
        if single and return_tensors is None:
            encoded = {name: values[0] for name, values in encoded.items()}
        return self.pad(
            encoded,
            padding=padding,
            max_length=max_length if padding == "max_length" else None,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors=return_tensors,
        )

    def _pad(self, encoded_inputs: Any, *args: Any, padding_side: str | None = None, **kwargs: Any) -> Any:
        """Pads the pool mask too. Data collators call this."""
        padded = super()._pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)
        if "pool_mask" in padded:
            missing = [0] * (len(padded["input_ids"]) - len(padded["pool_mask"]))
            left = (padding_side or self.padding_side) == "left"
            padded["pool_mask"] = missing + padded["pool_mask"] if left else padded["pool_mask"] + missing
        return padded


AutoTokenizer.register(EmbedwrightConfig, fast_tokenizer_class=EmbedwrightTokenizer)


def tokenizer_for(tokenizer: Any, contract: Contract) -> EmbedwrightTokenizer:
    """Makes a tokenizer with the same ids that carries the contract and has no chat template."""
    tokens = dict(tokenizer.special_tokens_map)
    tokens.setdefault("pad_token", tokenizer.convert_ids_to_tokens(contract.eos_id or 0))  # any will do: none is read
    made = EmbedwrightTokenizer(
        tokenizer_object=tokenizer.backend_tokenizer,
        contract=contract.model_dump(mode="json"),
        model_max_length=contract.max_tokens,
        padding_side="right",
        **tokens,
    )
    made.backend_tokenizer.no_truncation()
    made.backend_tokenizer.no_padding()
    return made


def sentence_transformers_files(
    contract: Contract, pooling_mode: str, hidden: int, transformer: dict[str, Any]
) -> dict[str, Any]:
    """Maps paths in the folder to JSON content, for the modules Transformer, Pooling and Normalize.

    `transformer` is added to the config of the first. The default prompt is the document template. The query prompt is
    that of the default task; for another task, users pass `prompt`. Names and keys are those of sentence-transformers
    before 5.4, too: text-embeddings-inference and older versions of vLLM read no others (vllm-project/vllm#45995).
    """
    modules = (
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
        ("2_Normalize", "sentence_transformers.models.Normalize"),
    )
    query, document = contract.prefix(contract.default_task), contract.document_template
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "module_output_name": "token_embeddings",
            "max_seq_length": contract.max_tokens,
            "unpad_inputs": False,  # unpadded rows of a bidirectional stock model would leak into each other
            **transformer,
        },
        "config_sentence_transformers.json": {
            "prompts": {"query": query, "document": document},
            "default_prompt_name": "document" if document else None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": hidden,
            "pooling_mode": pooling_mode,
            **{f"pooling_mode_{key}": mode == pooling_mode for key, mode in _OLDER_KEYS.items()},
            "include_prompt": contract.mask_rule == "all",
        },
        "2_Normalize/config.json": {},
    }


_OLDER_KEYS = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "lasttoken"}
_OLDER_KEYS |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean_tokens": "weightedmean"}
_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
# A tokenizer without contract: pinned, since one with a chat template would be opened in message form. vLLM reads the
# longest text only if both of its keys are there.
STOCK_TRANSFORMER = {"modality_config": {"text": _FORWARD}, "do_lower_case": False}
# EmbedwrightTokenizer: texts become messages, since in text form the prompt and the text arrive as one string.
OUR_TRANSFORMER = {
    "modality_config": {"text": _FORWARD, "message": {**_FORWARD, "format": "flat"}},
    "processing_kwargs": {"chat_template": {"restore_suffix": False}},  # the contract says what follows a cut text
}


def _limit(contract: Contract, truncation: bool | str | None, max_length: int | None) -> int:
    """Returns the number of tokens to which texts are cut; checked when they are read."""
    if truncation is False or truncation == "do_not_truncate":
        return NO_LIMIT
    if truncation not in (True, None, "longest_first", "only_first"):
        raise InputError(f"truncation={truncation!r}: texts are cut on the right, by the text contract")
    return contract.max_tokens if max_length is None else max_length


def _refuse(options: Mapping[str, Any]) -> None:
    """Raises InputError if a caller asks for an option that this tokenizer lacks, or that would change the ids."""
    asked = {name: value for name, value in options.items() if value is not None and value is not False}
    if options.get("add_special_tokens") is False:
        raise InputError("add_special_tokens=False: special tokens are part of the text contract")
    for harmless in ("add_special_tokens", "return_attention_mask", "verbose"):
        asked.pop(harmless, None)
    if asked:
        raise InputError(f"not supported, as ids come from the text contract alone: {', '.join(sorted(asked))}")


def _prefix_and_text(conversation: Sequence[Any], index: int) -> tuple[str, str]:
    roles = [message.get("role") for message in conversation]
    if roles not in (["user"], ["system", "user"]):
        raise InputError(f"conversation {index} has the roles {roles}, not user alone or system and user")
    contents = ["", *(message.get("content") for message in conversation)]
    if not all(isinstance(content, str) for content in contents):
        raise InputError(f"conversation {index}: the content of a message must be a string")
    return contents[-2], contents[-1]
