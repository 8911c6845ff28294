"""Proofs of the way from a text to its vector: each step is done by hand and compared with what the model does.

T tokens of one text, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from embedwright.cpu.accelerate import stock
from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
from embedwright.model.backbone import text_hidden
from embedwright.model.embedder import Embedder
from embedwright.model.verify import selftest
from embedwright.model.verify.selftest import TASK, Result
from embedwright.packing import pack
from embedwright.text import TokenizedText, leading_ids

TEXTS = (
    "tides",
    "why is the sky blue?",
    "naïve café, Straße 漢字 🙂",
    "two  spaces, and a\ttab",
    "</s> and <|im_end|> inside",
    "a longer text, which says nothing of note; " * 8,
)
_WHOLE = 1024  # max_tokens under which no text is cut, whatever the model's own
_SHORT = 16  # max_tokens under which the longest text is cut
_NEEDS_BOS = ("gemma",)  # families that were never trained without one

Encoder = Embedder | SentenceTransformerEncoder


def equal(model: Encoder, got: NDArray[Any], expected: NDArray[Any]) -> tuple[bool, str]:
    """Returns whether two sets of vectors are equal up to rounding, with the largest difference."""
    half = isinstance(model, Embedder) and model.network.dtype != torch.float32
    difference = float(np.abs(got - expected).max())
    return difference <= (3e-2 if half else 1e-4), f"largest difference {difference:.1e}"


def encoded(model: Encoder, texts: Sequence[str], task: str | None = None) -> NDArray[Any]:
    """Returns the vectors of texts, under a limit that leaves room for the instruction."""
    if isinstance(model, Embedder):
        return model.encode(texts, task=task, max_tokens=room(model))
    return model.encode(texts, task=task)


def room(model: Embedder) -> int:
    return min(selftest.proof_max_tokens(model.network), model.longest)


def tokens_of(model: Embedder, text: str, task: str | None, max_tokens: int | None = None) -> TokenizedText:
    """Returns the ids and pool mask that the model makes of one text."""
    limit = room(model) if max_tokens is None else min(max_tokens, model.longest)
    packed = model.tokenize([text], task=task, max_tokens=limit)
    return TokenizedText(packed.ids_T.numpy(), packed.pool_mask_T.numpy())


def _readable(model: Embedder) -> list[str]:
    """Returns the TEXTS that can be read by hand: if the templates have special tokens, a text may have none."""
    return [text for text in TEXTS if not (model.contract.template_specials and "</s>" in text)]


def _by_hand(model: Embedder, text: str, task: str | None) -> tuple[list[int], list[bool]]:
    """Computes the ids and pool mask of an uncut text from the contract, with the tokenizer's pipeline alone."""
    contract, prefix = model.contract, model.contract.prefix(task)
    suffix = contract.query_suffix if prefix != contract.document_template else ""
    backend = Tokenizer.from_str(model.own_tokenizer.backend_tokenizer.to_str())
    if contract.mask_rule == "count":
        ids = backend.encode(prefix + text + model.own_tokenizer.convert_ids_to_tokens(contract.eos_id)).ids
        front = len(backend.encode(prefix, add_special_tokens=False).ids) if prefix else 0
        return ids, [i >= front for i in range(len(ids))]
    everything = contract.mask_rule == "all"
    # special tokens in a text are plain text, unless the templates have some
    backend.encode_special_tokens = not contract.template_specials
    encoding = backend.encode(prefix + text + suffix, add_special_tokens=False)
    end = len(prefix) + len(text) if suffix else len(prefix) + len(text) + 1
    inside = [everything or (stop > len(prefix) and start < end) for start, stop in encoding.offsets]
    eos = [] if contract.eos_id is None else [contract.eos_id]
    return [*contract.bos_ids, *encoding.ids, *eos], [everything] * len(contract.bos_ids) + inside + [True] * len(eos)


def as_the_contract(model: Embedder, _: Path | None) -> Result:
    """Ids and pool masks are those of the contract."""
    left_out = total = 0
    for task in (None, TASK):
        for text in _readable(model):
            got, (ids, pooled) = tokens_of(model, text, task, _WHOLE), _by_hand(model, text, task)
            if got.ids.tolist() != ids:
                return False, f"token ids of {text[:20]!r} are not prefix + text + EOS"
            if got.pool.tolist() != pooled:
                return False, f"{int(got.pool.sum())} tokens of {text[:20]!r} are pooled, not {sum(pooled)}"
            left_out, total = left_out + len(ids) - sum(pooled), total + len(ids)
    return True, f"{left_out} of {total} tokens left out of pooling"


@torch.inference_mode()
def as_stock(model: Embedder, _: Path | None) -> Result:
    """Vectors are those of one text at a time through transformers' own code and mask, pooled by hand."""
    expected, texts = [], _readable(model)
    with stock(model.network) as twin:
        for text in texts:
            ids, pooled = _by_hand(model, text, TASK)
            hidden_TD = text_hidden(twin.backbone, torch.tensor(ids, device=model.device))
            one = pack([TokenizedText(np.array(ids), np.array(pooled))]).to(model.device)
            weight = next(twin.head.parameters(), hidden_TD)
            states_TD = twin.head(hidden_TD.to(weight.dtype), one).double().cpu().numpy()
            vector = states_TD[-1] if model.network.pooling.kind == "last" else states_TD[pooled].mean(0)
            expected.append(vector / np.linalg.norm(vector))
    return equal(model, model.encode(texts, task=TASK, max_tokens=min(_WHOLE, model.longest)), np.stack(expected))


def ends_with_eos(model: Embedder, _: Path | None) -> Result:
    """Every text ends in EOS. Under the rule `count` a cut text loses it, as in the reference."""
    eos, backend = model.contract.eos_id, model.own_tokenizer.backend_tokenizer
    if eos is None:
        return None
    if eos not in {id for id, token in backend.get_added_tokens_decoder().items() if token.special}:
        return False, f"id {eos} is not a special token of the tokenizer"
    cut = [] if model.contract.mask_rule == "count" else [(TEXTS[-1], None, _SHORT)]
    for text, task, limit in [*((text, task, None) for text in TEXTS for task in (None, TASK)), *cut]:
        got = tokens_of(model, text, task, limit)
        if got.ids[-1] != eos or not got.pool[-1]:
            return False, f"{text[:20]!r} ends in id {got.ids[-1]}, pooled: {bool(got.pool[-1])}"
    by_hand = "" if backend.encode("a").ids[-1] == eos else "; appended by id, the tokenizer alone adds none"
    return True, f"id {eos}, pooled{', also of a text that is cut' if cut else ''}{by_hand}"


def begins_with_bos(model: Embedder, _: Path | None) -> Result:
    """Every text begins with the tokenizer's own BOS, once."""
    bos, own = model.contract.bos_ids, leading_ids(model.own_tokenizer.backend_tokenizer)
    family = model.network.backbone.config.model_type
    if bos != own:
        return False, f"the contract has {list(bos)}, the tokenizer puts {list(own)} in front"
    if not bos and family.startswith(_NEEDS_BOS):
        return False, f"{family} needs one, but none is added"
    for text in TEXTS:
        ids = tokens_of(model, text, None).ids.tolist()
        if ids[: len(bos)] != list(bos) or (bos and bos[0] in ids[len(bos) :]):
            return False, f"{text[:20]!r} begins with {ids[:3]}"
    return True, f"ids {list(bos)}" if bos else "none, as in its tokenizer"


def round_trip(model: Embedder, folder: Path | None) -> Result:
    """Ids turn back into the text, fit the embedding table, and are those of the folder's own tokenizer.json."""
    backend = stored = model.own_tokenizer.backend_tokenizer
    if folder is not None and (folder / "tokenizer.json").is_file():
        stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = model.network.backbone.get_input_embeddings().weight.shape[0]
    if backend.get_vocab_size() > rows:
        return False, f"{backend.get_vocab_size()} tokens, but the model has rows for {rows}"
    for text in (t for t in TEXTS if "</s>" not in t):  # special tokens come back as they like
        ids = backend.encode(text, add_special_tokens=False).ids
        if stored.encode(text, add_special_tokens=False).ids != ids:
            return False, f"tokenizer.json gives other ids for {text[:20]!r}"
        back = backend.decode(ids, skip_special_tokens=False)
        if back.strip() != text.strip():
            return False, f"{text[:20]!r} comes back as {back[:20]!r}"
    return True, f"{backend.get_vocab_size()} tokens"
