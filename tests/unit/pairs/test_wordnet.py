"""WordNet's files: senses, relations and counts as other readers see them, and files that are none."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest
from small_wordnet import ENTRIES, write_wordnet

from embedwright.data.schema import DataError
from embedwright.errors import NotFoundError
from embedwright.pairs.wordnet import _FILES, Sense, WordNet

REAL = Path(os.environ.get("EMBEDWRIGHT_WORDNET", "/usr/share/wordnet"))
needs_wordnet = pytest.mark.skipif(not (REAL / "data.noun").is_file(), reason="no WordNet in EMBEDWRIGHT_WORDNET")


def test_words_pointers_and_depth(tmp_path: Path) -> None:
    wordnet = WordNet(write_wordnet(tmp_path))
    ferry = wordnet.usual("ferry")
    assert ferry is not None
    words, pointers = wordnet.synset(ferry)
    assert words == ["ferry", "ferryboat"]
    [(symbol, boat, *of)] = pointers
    assert (symbol, of, wordnet.synset(boat)[0]) == ("@", [0, 0], ["boat"])
    assert [wordnet.synset(down)[0] for link, down, *_ in wordnet.synset(boat)[1] if link == "~"] == [
        ["ferry", "ferryboat"],
        ["barge"],
        ["canoe"],
    ]
    assert (wordnet.depth(boat), wordnet.depth(ferry)) == (7, 8)
    usual = wordnet.usual("usual")
    assert usual is not None
    [(symbol, opposite, own, other)] = wordnet.synset(usual)[1]
    assert (symbol, own, other, opposite.pos) == ("!", 1, 1, "a") and wordnet.usual("unusual") == opposite
    assert wordnet.has("river boat") and not wordnet.has("river")


def test_the_usual_sense_of_several(tmp_path: Path) -> None:
    def usual(**uses: list[int]) -> Sense | None:
        return WordNet(write_wordnet(tmp_path, uses=uses)).usual("bank")

    first, second = (WordNet(write_wordnet(tmp_path))._senses["bank"][i] for i in range(2))
    assert usual() is None  # nothing says which
    assert usual(bank=[9, 1]) == first and usual(bank=[8, 1]) is None
    assert usual(bank=[1, 9]) == second
    assert usual(bank=[4, 0]) is None  # too few
    more = [*ENTRIES, ("n", ["bank"], [])]
    assert WordNet(write_wordnet(tmp_path, more, {"bank": [99, 1]})).usual("bank") is None  # too many senses
    wordnet = WordNet(write_wordnet(tmp_path, uses={"bank": [1, 9]}))
    assert wordnet.is_first("bank", second) and not wordnet.is_first("bank", first)


def test_forms_of_other_words(tmp_path: Path) -> None:
    wordnet = WordNet(write_wordnet(tmp_path))
    assert all(map(wordnet.is_form, ["ferries", "boats", "enabled", "enabling", "took"]))
    assert not any(map(wordnet.is_form, ["ferry", "boat", "usual", "canoes"[:5]]))


def test_what_is_no_wordnet(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"--wordnet .*data\.noun is missing.*wordnet-base"):
        WordNet(tmp_path)
    write_wordnet(tmp_path)
    for name in _FILES[4:9]:  # the index files and the counts
        write_wordnet(tmp_path)
        (tmp_path / name).write_text("something else\n")
        with pytest.raises(DataError, match="not the files of WordNet"):
            WordNet(tmp_path)


@needs_wordnet
def test_facts_of_wordnet() -> None:
    """As nltk shows them for the same files."""
    wordnet = WordNet(REAL)

    def related(word: str, symbol: str) -> list[list[str]]:
        sense = wordnet.usual(word)
        assert sense is not None
        return [wordnet.synset(target)[0] for link, target, *_ in wordnet.synset(sense)[1] if link == symbol]

    assert related("programmer", "@") == [["engineer", "applied scientist", "technologist"], ["computer user"]]
    assert related("software", "!") == [["hardware", "computer hardware"]]
    assert related("huge", "&") == [["large", "big"]]
    assert wordnet.usual("program") is None and wordnet.usual("direct") is None


@pytest.mark.long
@needs_wordnet
def test_all_senses_and_relations_are_those_that_nltk_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("nltk.corpus.reader.wordnet")
    nltk = pytest.importorskip("nltk")
    for name in _FILES:
        shutil.copy(REAL / name, tmp_path)
    names = ["adj.all", "adj.pert", "adv.all", *(f"noun.{i}" for i in range(26)), *(f"verb.{i}" for i in range(15))]
    (tmp_path / "lexnames").write_text("".join(f"{i:02d}\t{name}\t1\n" for i, name in enumerate([*names, "adj.ppl"])))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(reader.WordNetCorpusReader, "map_wn", lambda *_: None)  # between versions of WordNet
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = reader.WordNetCorpusReader(str(tmp_path), None)
    ours = WordNet(REAL)

    def sense(synset: object) -> Sense:
        return Sense(synset.pos().replace("s", "a"), synset.offset())  # type: ignore[attr-defined]

    for lemma, senses in ours._senses.items():
        found = [s for pos in "nvar" for s in theirs.synsets(lemma, pos) if lemma in map(str.lower, s.lemma_names())]
        assert senses == list(dict.fromkeys(map(sense, found))), lemma
    for one in {one for senses in ours._senses.values() for one in senses}:
        synset = theirs.synset_from_pos_and_offset(one.pos, one.offset)
        words, pointers = ours.synset(one)
        assert words == [name.replace("_", " ") for name in synset.lemma_names()]
        for symbol, related in (("@", synset.hypernyms()), ("~", synset.hyponyms())):
            assert {target for link, target, *_ in pointers if link == symbol} == set(map(sense, related))
        assert {(a, t, b) for link, t, a, b in pointers if link == "!"} == {
            (number, sense(other.synset()), other.synset().lemmas().index(other) + 1)
            for number, lemma in enumerate(synset.lemmas(), 1)
            for other in lemma.antonyms()
        }
