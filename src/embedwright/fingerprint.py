"""Facts that identify a model: the same for two models exactly when they give the same vectors, up to rounding.

Rounding depends on the machine: on the order of its sums, and on whether it rounds the inputs of int8 weights to int8
too. A name or a folder does not identify a model, since the model there may be trained further or edited.

Facts are strings by name. They
are kept as JSON beside vectors, and an error can say which of them differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Facts = dict[str, str]

_DIGESTS = {"weights", "pooling.weights", "tokenizer"}  # facts whose value says nothing in a message
# Keys of a transformers config that change no vector, or are facts of their own.
_INERT = {
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "initializer_range",
    "pad_token_id",
    "pretraining_tp",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "vocab_size",
}


def fingerprint_of(encoder: Any) -> Facts | None:
    """Returns the facts of an encoder; None if it has no `fingerprint`, which a user's own object may lack."""
    known = getattr(encoder, "fingerprint", None)
    return known() if callable(known) else None


def brief_of(encoder: Any) -> str | None:
    """Digests the facts of an encoder to a word, for a message or a file; None if it has no `fingerprint`."""
    known = fingerprint_of(encoder)
    return None if known is None else hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def space_of(known: Facts) -> str:
    """Digests the facts that decide what the numbers of a model's vectors mean.

    It is the same for one model, however many tokens of a text it reads and however many dimensions of a vector are
    kept.
    """
    decisive = {key: value for key, value in known.items() if key not in ("contract.max_tokens", "option.dim")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]


def aligned_with(encoder: Any) -> str | None:
    """Returns the `space_of` the teacher whose vectors a student was trained to give; None for any other encoder.

    It is read from the last step of the model's history, so any later step ends the alignment, and so do changed
    weights. Quantising the weights copies it to its own step.
    """
    network = getattr(encoder, "network", None)
    steps = getattr(getattr(network, "config", None), "history", None)
    teacher: str | None = steps[-1].get("aligned_with") if steps else None
    return None if teacher is None or network is None or network.changed() else teacher


def facts(prefix: str, values: Mapping[str, Any]) -> Facts:
    """Names each value `prefix.key` and writes it as JSON."""
    return {f"{prefix}.{key}": json.dumps(value, sort_keys=True, ensure_ascii=False) for key, value in values.items()}


def config_facts(config: Any) -> Facts:
    """Returns the facts of a backbone's config that change vectors and differ from its class's defaults."""
    said = {key: value for key, value in config.to_diff_dict().items() if key not in _INERT and "dropout" not in key}
    return facts("backbone", {key: value for key, value in said.items() if not key.startswith("_")})


def tokenizer_fact(tokenizer: Any, with_specials: bool) -> str:
    """Digests a tokenizer of the package `tokenizers`. Padding and truncation do not count, as they come and go.

    With `with_specials`, the tokens that it puts around a text count too.
    """
    parts = [tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model]
    parts += [tokenizer.post_processor] if with_specials else []
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"none" if part is None else part.__getstate__())
    digest.update(repr(sorted((id, str(token)) for id, token in tokenizer.get_added_tokens_decoder().items())).encode())
    return digest.hexdigest()[:32]


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Says which facts differ, for a message: `contract.max_tokens (512, now 128), weights`."""
    changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    if "dtype" in changed:  # other weights follow from it
        changed = [key for key in changed if not key.endswith("weights")]
    named = [
        key if key in _DIGESTS else f"{key} ({_short(then.get(key))}, now {_short(now.get(key))})" for key in changed
    ]
    return ", ".join(named[:6]) + (f" and {len(named) - 6} more" if len(named) > 6 else "")


def _short(value: str | None) -> str:
    return "not set" if value is None else value if len(value) <= 60 else f"{value[:57]}..."


class Digest:
    """The digest of some tensors, computed again only when one of them has changed.

    Torch's own counter of writes shows a change, and so does a sum over all bytes, since some writes are not counted:
    those through `.data`, and those of fused optimizers. The sum runs at the speed of memory, tens of times faster than
    the digest.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Any, ...]] = []
        self._digest = ""

    def of(self, tensors: Mapping[str, Tensor]) -> str:
        """Digests the names, shapes and bytes."""
        seen = [_state(name, tensor) for name, tensor in tensors.items()]
        if seen != self._seen or not self._digest:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                parts = list(pool.map(tensor_digest, tensors.values()))
            named = [(name, list(t.shape), part) for (name, t), part in zip(tensors.items(), parts, strict=True)]
            self._digest = hashlib.sha256(json.dumps(sorted(named)).encode()).hexdigest()[:32]
            self._seen = seen
        return self._digest


def dtypes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))


def _state(name: str, tensor: Tensor) -> tuple[Any, ...]:
    writes = 0 if tensor.is_inference() else tensor._version
    raw = _bytes(tensor)
    whole = len(raw) // 8 * 8
    words = int(raw[:whole].view(torch.int64).sum()) if whole else 0
    return name, tensor.dtype, tuple(tensor.shape), writes, words, raw[whole:].tolist()


def tensor_digest(tensor: Tensor) -> str:
    """Digests the bytes."""
    return hashlib.sha256(_bytes(tensor).cpu().numpy().data).hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.clone() if flat.storage_offset() % 8 else flat  # int64 can look at whole words only
