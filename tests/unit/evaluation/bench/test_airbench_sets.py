"""Names of AIR-Bench: what they choose, and what is said of those that choose nothing."""

from __future__ import annotations

import pytest

from embedwright.errors import InputError
from embedwright.evaluation.bench.airbench_sets import AirSet, choose


def test_names_choose_sets() -> None:
    everything = choose("AIR-Bench")
    assert len(everything) == 69  # as the package's README counts them
    assert {one.task for one in everything} == {"qa", "long-doc"}
    assert len({one.language for one in everything}) == 13
    assert len({one.domain for one in everything} - {"msmarco"}) == 9
    assert len({one.name for one in everything}) == 69
    assert choose("AIR-Bench/qa/wiki/en") == [AirSet("qa", "wiki", "en", "default", ("dev", "test"), 1012092)]
    assert choose("AIR-Bench/en/wiki/test")[0].splits == ("test",)
    assert [one.name for one in choose("AIR-Bench/long-doc/dev")] == [
        "long-doc_healthcare_en_pubmed_100K-200K_3",
        "long-doc_arxiv_en_llama2",
        "long-doc_law_en_lex_files_300K-400K",
        "long-doc_book_en_a-brief-history-of-time_stephen-hawking",
    ]
    assert [one.name for one in choose("AIR-Bench/gemini")] == ["long-doc_arxiv_en_gemini"]
    for wrong in ("AIR-Benchmark", "AIR-Bench_qa", "air-bench-24.05"):
        with pytest.raises(InputError, match=rf"{wrong}: no benchmark .*Did you mean AIR-Bench, or"):
            choose(wrong)
    assert choose("air-bench/qa/wiki/en") == choose("AIR-Bench/qa/wiki/en")
    with pytest.raises(InputError, match=r"'finanse' \(did you mean 'finance'\?\)"):
        choose("AIR-Bench/qa/finanse")
    with pytest.raises(InputError, match=r"AIR-Bench/qa/law has no 'zh'; it has .*de, default, dev, en, fr"):
        choose("AIR-Bench/qa/law/zh")


def test_names_that_overlap_choose_a_set_once_with_the_splits_of_all() -> None:
    whole = choose("AIR-Bench/qa/arxiv/en")
    assert whole[0].splits == ("dev", "test")
    for names in (["/test", "/dev"], ["", "/dev", "/test"], ["/dev", ""]):
        assert choose(*(f"AIR-Bench/qa/arxiv/en{end}" for end in names)) == whole
    assert choose("AIR-Bench/qa/arxiv/en/dev", "AIR-Bench/en/arxiv/qa/dev") == choose("AIR-Bench/qa/arxiv/en/dev")
    assert len(choose("AIR-Bench/qa/dev", "AIR-Bench/en")) == len({*choose("AIR-Bench/qa/dev", "AIR-Bench/en")})
