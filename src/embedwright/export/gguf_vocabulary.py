"""A tokenizer as the fields of a GGUF file, for the two kinds that llama.cpp reads as the `tokenizers` library does.

It reads byte-level BPE by its merges and by the name of its way to split a text, and a vocabulary of SentencePiece by
scores of its pieces. Other tokenizers are refused: llama.cpp would give other ids, without an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from embedwright.errors import InputError
from embedwright.text import Contract

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Steps before BPE, and llama.cpp's name for them. GPT-2's split is inside of ByteLevel.
_SPLITS = {
    ("GPT-2",): "gpt-2",
    ("Digits", "GPT-2"): "smollm",
    (_WORDS + r"\p{N}" + _REST, "bytes"): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
}
_WHOLE_WORDS = {"llama-bpe"}  # read a word that is a token as that token, whatever the merges would make of it

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # gguf.TokenType
_SPACE = "▁"
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


def vocabulary(tokenizer: Tokenizer, contract: Contract, rows: int) -> dict[str, Any]:
    """Returns the fields by the names of `GGUFWriter`'s methods. `rows` is the number of token embeddings.

    BOS and EOS are those of the contract. Raises InputError for a tokenizer that llama.cpp would not read as it is.
    """
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    if model["type"] != "BPE":
        raise InputError(f"the tokenizer is of the type {model['type']}: GGUF files are written of BPE alone")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    pieces = {
        **{id: piece for piece, id in model["vocab"].items()},
        **{id: one["content"] for id, one in added.items()},
    }
    bytewise = any(step["type"] == "ByteLevel" for step in _steps(content["pre_tokenizer"]))
    types = {id: _type(pieces[id], added.get(id), model, bytewise) for id in pieces}
    made = {
        "token_list": [pieces.get(id, f"[PAD{id}]") for id in range(rows)],
        "token_types": [types.get(id, _UNUSED) for id in range(rows)],
        "add_bos_token": bool(contract.bos_ids),
        "add_eos_token": contract.eos_id is not None,
    }
    if contract.bos_ids:
        made["bos_token_id"] = contract.bos_ids[0]
    if contract.eos_id is not None:
        made["eos_token_id"] = contract.eos_id
    if bytewise:
        made |= {"tokenizer_model": "gpt2", "tokenizer_pre": _split(content), "add_space_prefix": False}
        return made | {"token_merges": [" ".join(merge) for merge in merges]}
    made |= {"tokenizer_model": "llama", "tokenizer_pre": "default", "add_space_prefix": _space_in_front(content)}
    ranks = _ranks(merges, {pieces[id] for id, kind in types.items() if kind == _NORMAL})
    made["token_scores"] = [-float(ranks.get(pieces.get(id, ""), len(merges))) for id in range(rows)]
    if model["unk_token"] is not None:
        made["unk_token_id"] = model["vocab"][model["unk_token"]]
    return made


def _type(piece: str, added: Mapping[str, Any] | None, model: Mapping[str, Any], bytewise: bool) -> int:
    if not bytewise and piece == model["unk_token"]:
        return _UNKNOWN
    if added is not None:
        return _CONTROL if added["special"] else _USER_DEFINED
    return _BYTE if not bytewise and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else _NORMAL


def _steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Returns the steps of a normalizer or pre-tokenizer, sequences opened up."""
    if step is None:
        return []
    inner = step.get("pretokenizers") or step.get("normalizers")
    return [step] if inner is None else [found for one in inner for found in _steps(one)]


def _split(content: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name for the steps before byte-level BPE. It composes no characters: NFC stays undone."""
    names = []
    for step in _steps(content["pre_tokenizer"]):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            names.append("GPT-2" if step["use_regex"] else "bytes")
        elif step["type"] == "Digits" and step["individual_digits"]:
            names.append("Digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            names.append(step["pattern"].get("Regex", ""))
        else:
            names.append(str(dict(step)))
    name = _SPLITS.get(tuple(names))
    whole_words = bool(content["model"].get("ignore_merges"))
    normal = all(step["type"] == "NFC" for step in _steps(content["normalizer"]))
    if name is None or not normal or whole_words is not (name in _WHOLE_WORDS):
        raise InputError(
            "the tokenizer splits texts in a way that has no name here, and llama.cpp goes by a name: known are "
            f"{', '.join(_SPLITS.values())}"
        )
    return name


def _space_in_front(content: Mapping[str, Any]) -> bool:
    """Returns whether a text is read with a space in front, by a tokenizer in the manner of SentencePiece."""
    normal = _steps(content["normalizer"])
    splits = [step for step in _steps(content["pre_tokenizer"]) if step.get("pattern") != {"String": " "}]
    front = normal[:1] == [{"type": "Prepend", "prepend": _SPACE}]
    if content["model"].get("byte_fallback") and normal[front:] == [_SPACES] and not splits:
        return front
    raise InputError(
        "the tokenizer is neither byte-level BPE nor one of SentencePiece's kind: llama.cpp cannot read it"
    )


def _ranks(merges: list[tuple[str, ...]], pieces: set[str]) -> dict[str, int]:
    """Returns the rank of the merges that make each piece.

    llama.cpp joins any two neighbours that make a piece, the piece of the highest score first. That is BPE if every
    such pair is a merge, and if the merges of one piece follow each other. Raises InputError otherwise.
    """
    ranks: dict[str, int] = {}
    last = ""
    for rank, merge in enumerate(merges):
        piece = "".join(merge)
        if piece != last and piece in ranks:
            break
        ranks.setdefault(piece, rank)
        last = piece
    else:
        known = set(merges)
        pairs = ((piece[:n], piece[n:]) for piece in pieces for n in range(1, len(piece)))
        if all(pair in known for pair in pairs if pair[0] in pieces and pair[1] in pieces):
            return ranks
    raise InputError(
        "the merges of the tokenizer are not those of a SentencePiece vocabulary: llama.cpp cannot read it"
    )
