"""Static students in the manner of model2vec: a vector for each token of the vocabulary, and a text is their mean.

V tokens of the vocabulary, E embedding of the teacher, D dimensions of the student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from embedwright.compress.chain import Step
from embedwright.errors import InputError, MissingPackageError
from embedwright.files import check_new_folder, whole_folder, write_text
from embedwright.model.embedder import Embedder
from embedwright.model.formats.open import outline
from embedwright.model.interop.card import history_lines
from embedwright.model.verify.modes import evaluating
from embedwright.packing import pack
from embedwright.text import TokenizedText

_SIF = 1e-4  # weight of a token: _SIF / (_SIF + its share of all text). Arora et al. 2017; model2vec's number

Progress = Callable[[int, int], None]


def static_step(teacher: str, dim: int, progress: Progress | None = None) -> Step:
    """Returns the step that makes a static student of `dim` dimensions by `save_static`. `teacher` is for its history.

    Raises MissingPackageError without model2vec, and InputError for more dimensions than the teacher's.
    """
    _static_model()
    if dim > (width := outline(teacher).decoder.hidden_size):
        raise InputError(f"--dim {dim}: the vectors of {teacher} have {width} dimensions")

    def make(source: str, out: Path) -> None:
        model = Embedder.load(source, dtype="float32")
        step = {"step": "static", "teacher": Path(teacher).name, "dim": dim}
        save_static(model, out, dim=dim, history=[*(model.network.config.history or ()), step], progress=progress)

    return Step("static", {"dim": dim}, make)


def save_static(
    model: Embedder,
    out: Path,
    *,
    dim: int = 256,
    history: Sequence[Mapping[str, Any]] = (),
    progress: Progress | None = None,
) -> None:
    """Makes a static student of a model and saves it as a folder that model2vec and sentence-transformers open.

    It needs no data and a forward pass over the vocabulary. The student reads no instructions. `dim` is D, `history`
    what was done to the model before, and `progress(done, total)` counts tokens.

    Raises:
        MissingPackageError: model2vec is not installed.
        ValueError: The model has fewer than `dim` dimensions or tokens, or its token ids have gaps.
        FileExistsError: `out` is not empty.
    """
    static_model = _static_model()
    check_new_folder(out)
    tokenizer = Tokenizer.from_str(model.text_tokenizer.plain.to_str())
    read_V = _read_tokens(tokenizer)
    if not 1 <= dim <= min(model.embedding_dim, int(read_V.sum()) - 1):
        raise InputError(f"--dim {dim}: the model has {model.embedding_dim} dimensions and {int(read_V.sum())} tokens")
    vectors_VD = np.zeros((len(read_V), dim), np.float32)  # special tokens add nothing to a sum
    vectors_VD[read_V] = weighted(principal(token_vectors(model, np.flatnonzero(read_V), progress), dim))
    config = {
        "model_type": "model2vec",
        "architectures": ["StaticModel"],
        "hidden_dim": dim,
        "apply_pca": dim,
        "sif_coefficient": _SIF,
        "seq_length": 1_000_000,  # as model2vec writes it: there is no longest text
        "history": [dict(step) for step in history],
    }
    with whole_folder(out) as temp:
        static_model(vectors_VD, tokenizer, config=config, normalize=True).save_pretrained(temp)
        write_text(temp / "README.md", _card(dim, history))


def token_vectors(model: Embedder, id_V: NDArray[np.int64], progress: Progress | None = None) -> NDArray[np.float32]:
    """Encodes each token as a document of that one token: float32 (V, E) of unit length."""
    contract = model.contract
    front = [
        *contract.bos_ids,
        *model.text_tokenizer.plain.encode(contract.document_template, add_special_tokens=False).ids,
    ]
    back = [] if contract.eos_id is None else [contract.eos_id]
    pool = np.array([contract.mask_rule == "all"] * len(front) + [True] * (1 + len(back)))
    pool[0] |= contract.mask_rule == "count"  # which pools BOS
    size = max(1, model.batch_tokens // len(pool))
    blocks = []
    for start in range(0, len(id_V), size):
        texts = [TokenizedText(np.array([*front, id, *back], np.int64), pool) for id in id_V[start : start + size]]
        with evaluating(model.network), torch.inference_mode():
            blocks.append(model.embed(pack(texts)).cpu().numpy())
        if progress is not None:
            progress(min(start + size, len(id_V)), len(id_V))
    vectors_VE: NDArray[np.float32] = np.concatenate(blocks)
    if not np.isfinite(vectors_VE).all():
        raise InputError("the model gives tokens vectors that are not finite: open it with --dtype float32")
    return vectors_VE


def principal(vectors_VE: NDArray[np.float32], dim: int) -> NDArray[np.float64]:
    """Returns the first `dim` principal components of vectors (V, D). Each axis points to its largest part."""
    centred_VE = vectors_VE - vectors_VE.mean(0, dtype=np.float64)
    axes_ED = np.linalg.eigh(centred_VE.T @ centred_VE)[1][:, ::-1][:, :dim]
    signs_D = np.sign(axes_ED[np.abs(axes_ED).argmax(0), np.arange(dim)])
    components_VD: NDArray[np.float64] = centred_VE @ (axes_ED * signs_D)
    return components_VD


def weighted(vectors_VD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Makes frequent tokens shorter. Tokens stand in the order of how frequent they are, whose shares Zipf's law
    gives: vocabularies of BPE are in about that order.
    """
    share_V = 1 / np.arange(2, len(vectors_VD) + 2)
    share_V /= share_V.sum()
    scaled_VD: NDArray[np.float64] = vectors_VD * (_SIF / (_SIF + share_V))[:, None]
    return scaled_VD


def _static_model() -> Any:
    """Returns model2vec's class, which writes the folder."""
    try:
        from model2vec import StaticModel
    except ImportError as error:
        raise MissingPackageError(
            f"static students need model2vec ({error}): pip install 'embedwright[static]'"
        ) from None
    return StaticModel


def _read_tokens(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Says of each token id whether texts hold it, as special tokens are not text. InputError for gaps in the ids."""
    ids = set(tokenizer.get_vocab().values())
    if ids != set(range(len(ids))):
        raise InputError(f"the tokenizer's ids go up to {max(ids)} for {len(ids)} tokens: model2vec needs them all")
    read_V = np.ones(len(ids), np.bool_)
    read_V[[id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special]] = False
    return read_V


def _card(dim: int, history: Sequence[Mapping[str, Any]]) -> str:
    steps = "\n".join(f"1. {line}" for line in history_lines(history))
    return f"""---
library_name: model2vec
tags: [embedwright, model2vec, static-embeddings, sentence-transformers]
---

# Static text embeddings

A static text-embedding model of {dim} dimensions: a text's vector is the mean of its tokens' vectors, at unit length.
It reads no instructions. Made with Embedwright:

{steps}

```python
from model2vec import StaticModel

model = StaticModel.from_pretrained("FOLDER")
vectors = model.encode(["how do tides work?"])
```

The same vectors in sentence-transformers:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
vectors = model.encode(["how do tides work?"])
```
"""
