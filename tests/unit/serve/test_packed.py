"""A model cut in two gives the vectors of `encode`."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.serve.packed import PackedModel
from embedwright.text import NoTokenError, TextTokenizer, tokenize


def test_texts_of_different_tasks_in_one_batch_have_the_vectors_of_encode(model: Embedder) -> None:
    packed = PackedModel(model)
    tasks = (None, "Find it", "Find a passage")
    read = [packed.read([f"text {task}", "tides"], task) for task in tasks]
    found = packed.embed([text for texts in read for text in texts])
    expected = np.concatenate([model.encode([f"text {task}", "tides"], task=task) for task in tasks])
    assert np.abs(found - expected).max() < 1e-5


def test_ids_become_their_text_without_special_tokens(model: Embedder) -> None:
    packed = PackedModel(model)
    ids = model.text_tokenizer.plain.encode("naïve café 🙂").ids
    assert packed.text_of([*ids, 1], "input[0]") == "naïve café 🙂"
    with pytest.raises(InputError, match=r"input\[0\] holds the token id 400: the model has 400 tokens"):
        packed.text_of([400], "input[0]")


def long_texts() -> list[str]:
    draw, words = (
        random.Random(3),
        ["tide ", "moon", "  ", "\n", "123,456 ", "漢字", "naïve ", "🙂", "<s>", "</s>", "e\u0301", "."],
    )
    mixed = ["".join(draw.choices(words, k=draw.randrange(200, 3000))) for _ in range(20)]
    alike = [
        unit * (5000 // len(unit) + n) for unit in (" ", "a", "=", "7", "ab", "\n\n", "字", "</s>") for n in (0, 1, 2)
    ]
    edges = [" " * 4000 + "word", "word" + " " * 4000, "x" * 3000 + "1" * 3000 + " end", "1 " * 3000, "", "a" * 340]
    return mixed + alike + edges


@pytest.mark.parametrize("kind", ["latent", "count", "suffix"])
@pytest.mark.parametrize("task", [None, "Find it"])
def test_a_text_that_is_shortened_before_it_is_read_gives_the_tokens_of_the_whole(
    tiny_embedder: Callable[..., Embedder], kind: str, task: str | None
) -> None:
    model = tiny_embedder("latent")
    more = {"latent": {}, "count": {"mask_rule": "count"}, "suffix": {"query_suffix": "moon? Answer:"}}[kind]
    model.contract = model.contract.model_copy(update={"max_tokens": 30, **more})
    packed, texts = PackedModel(model), long_texts()
    found = packed.read(texts, task)
    whole = tokenize(model.text_tokenizer, model.contract, texts, model.contract.prefix(task))
    for text, one, other in zip(texts, found, whole, strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.pool.tolist() == other.pool.tolist(), text[:40]


def test_a_cut_changes_no_token_where_digits_are_grouped_from_the_right_and_words_are_long() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,3}(?=(\d{3})*\b)"), "isolated"),
            pre_tokenizers.Split(Regex(r" ?[a-z]+"), "isolated"),
        ]
    )
    tokenizer.train_from_iterator([" abcdefg 7 77 777" * 9], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    tokenizer.add_special_tokens(["<|a special token with a long name|>"])
    assert tokenizer.encode("x abcdefg abcdefg").tokens[-2:] == [" abcdefg"] * 2
    read = TextTokenizer(tokenizer)
    contract = SimpleNamespace(mask_rule="count")
    model = SimpleNamespace(text_tokenizer=read, contract=contract, max_tokens=20)
    packed = PackedModel(model)  # type: ignore[arg-type]
    texts = [" " * n + " abcdefg" * 400 for n in range(8)] + ["7" * n for n in range(3000, 3003)]
    texts += [f"{' abcdefg' * 15} {'7' * n} end" for n in range(3000, 3003)]
    for rule, whole in (("count", read.special), ("offsets", read.plain)):
        contract.mask_rule = rule
        for text in [*texts, "<|a special token with a long name|>" * 100]:
            assert whole.encode(packed._start(text, rule == "count")).ids[:20] == whole.encode(text).ids[:20], (
                rule,
                text[:20],
            )


def counting(model: Embedder) -> tuple[PackedModel, list[int]]:
    """A model, and the lengths of what it tokenises."""
    seen: list[int] = []

    class Counting:
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tokenizer, name)

        def encode_batch(self, texts: list[str], **how: Any) -> Any:
            seen.extend(map(len, texts))
            return self.tokenizer.encode_batch(texts, **how)

    packed, own = PackedModel(model), model.text_tokenizer
    packed.model = SimpleNamespace(
        text_tokenizer=SimpleNamespace(plain=Counting(own.plain), special=Counting(own.special)),
        contract=model.contract,
        longest=model.longest,
    )  # type: ignore[assignment]
    return packed, seen


def test_of_a_long_text_only_the_start_is_tokenised(model: Embedder) -> None:
    packed, seen = counting(model)
    (found,) = packed.read(["the moon pulls at the sea " * 80_000], None)
    assert len(found.ids) == model.max_tokens and sum(seen) < 100 * model.max_tokens


@pytest.mark.parametrize("rule", ["offsets", "count", "specials"])
def test_an_instruction_that_leaves_no_room_is_refused_before_it_is_tokenised_for_each_text(
    tiny_embedder: Callable[..., Embedder], rule: str
) -> None:
    model = tiny_embedder("latent")
    rules: dict[str, Any] = {"template_specials": True} if rule == "specials" else {"mask_rule": rule}
    model.contract = model.contract.model_copy(update=rules)
    packed, seen = counting(model)
    with pytest.raises(NoTokenError, match="leave no token to pool"):
        packed.read(["a"] * 256, "find the moon " * 5_000)
    assert sum(seen) < 100 * model.max_tokens
    special = "</s>" * 300  # one token each, where special tokens of an instruction are read as such
    task = special * 2 if rule == "offsets" else special + "find"
    assert rule == "offsets" or len(packed.read(["a"], task)) == 1
