from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from embedwright.cli.main import main
from embedwright.errors import MissingPackageError
from embedwright.evaluation.results import Result, Results, write_results
from embedwright.studies.report.page import report


class Page(HTMLParser):
    """The texts, and the elements with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def has(self, *texts: str) -> bool:
        return all(any(text in each for each in self.texts) for text in texts)


def test_the_page_shows_the_run_and_escapes_its_texts(tiny_run: Path) -> None:
    html = report([tiny_run], "embedwright report x --out y")
    page = Page(html)
    assert page.has("tiny & small", "CC0 <b>", "first, step 4", "cosine_spearman", "embedwright report x --out y")
    assert page.has(f"embedwright train {tiny_run}/recipe.yaml")
    assert [tag for tag, _ in page.elements if tag == "script"] == ["script"] * 2
    assert page.has("<script>alert(1)</script> & </script> tide", "right", "Find it")
    drawn = json.loads(re.search(r'<script type="application/json" id="drawn">(.*?)</script>', html, re.DOTALL)[1])
    assert list(drawn["charts"]) == ["loss", "lr", "grad_norm", "speed", "scores-0", "pairs-0", "pairs-1"]
    assert any("<script>alert(1)</script>" in text for text in drawn["map"]["texts"])


def test_the_page_names_no_other_place(tiny_run: Path) -> None:
    elements = Page(report([tiny_run], "")).elements
    assert not {tag for tag, _ in elements} & {"img", "iframe", "object", "embed", "base", "form"}
    links = [found[key] for _, found in elements for key in ("href", "src", "srcset") if key in found]
    assert links and all(link == "data:," or link.startswith("#") for link in links)
    assert set(filter(None, links)) - {"data:,"} <= {f"#{found.get('id')}" for _, found in elements}


def test_results_alone_need_no_run(tmp_path: Path) -> None:
    about = {"model": "minilm", "command": "embedwright eval minilm s", "date": "2026", "machine": {"processor": "P"}}
    write_results(tmp_path / "a.json", Results("s", (Result("t", "sts", "cosine_spearman", 0.5),), 1.0, about))
    page = Page(report([tmp_path / "a.json"], ""))
    assert page.has("minilm on s", "embedwright eval minilm s", "0.5000")
    assert page.has("These are results alone") and not page.has("What was trained") and not page.has("Curves")


def test_what_a_run_lacks_is_said(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text((tiny_run / "recipe.yaml").read_text())
    page = Page(report([run], ""))
    assert page.has("A curve needs two steps", "The run has no evaluations", "no data.json", "no environment.json")
    assert page.has("Left out:", "model is not there")


def test_the_command_writes_the_file(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["embedwright", "report", str(tiny_run), "--out", str(tmp_path / "r.html")])
    main()
    assert f"report {tiny_run} --out" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("package", ["jinja2", "sklearn"])
def test_without_a_package_the_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"{package}.*embedwright\[eval\]"):
        report([], "")


def test_a_name_that_is_no_utf_8_and_a_score_that_is_no_number_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "caf\udce9"
    write_results(folder / "a.json", Results("s", (Result("t", "sts", "cosine_spearman", 0.5),), 1.0, {"model": "m"}))
    file, out = folder / "a.json", tmp_path / "r.html"
    file.write_text(file.read_text().replace("0.5", "NaN"))
    monkeypatch.setattr(sys, "argv", ["embedwright", "report", str(file), "--out", str(out)])
    main()
    page = Page(out.read_text())
    assert page.has("caf?/a.json", "nan") and "b" not in [tag for tag, _ in page.elements]
