"""The routes of the page. What it does in a browser: test_in_browser.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import embedwright.serve.page as serve_page
from embedwright.cli.main import main
from embedwright.errors import InputError
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.serve.app import create_app
from embedwright.serve.map import map_of

PAGE = Path(serve_page.__file__).parent / "page"
Serving = Callable[..., AbstractContextManager[Any]]


def test_every_file_is_served_with_headers_that_allow_nothing_from_elsewhere(
    serving: Serving, told: Embedder, index: Index
) -> None:
    with serving(told, index=index, page=True) as server:
        for path in ["/", *(f"/page/{file.name}" for file in PAGE.iterdir())]:
            answer = server.ask("GET", path)
            assert answer.status == 200 and answer.headers["x-content-type-options"] == "nosniff", path
            rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
            assert rules.pop("img-src") == "data:" and rules.pop("default-src") == "'none'"
            assert set(rules.values()) == {"'self'", "'none'"}
            kind = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}[Path(path).suffix or ".html"]
            assert answer.headers["content-type"].startswith(kind)
        assert server.ask("GET", "/").raw == (PAGE / "index.html").read_bytes()
        assert server.ask("GET", "/page/other.js").status == server.ask("GET", "/page/../app.py").status == 404
        assert server.ask("GET", "/page/sides.json").body == {"bases": [""]}


def test_without_ui_there_is_no_page(serving: Serving, told: Embedder, index: Index) -> None:
    with serving(told, index=index) as server:
        assert [server.ask("GET", path).status for path in ("/", "/page/app.js")] == [404] * 2


def test_the_files_of_the_page_name_only_each_other_and_never_write_html() -> None:
    texts = {file.name: file.read_text(encoding="utf-8") for file in PAGE.iterdir()}
    named = re.findall(r"""(?:href|src)="page/([^"]+)"|from "\./([^"]+)\"""", "".join(texts.values()))
    assert {a or b for a, b in named} == texts.keys() - {"index.html"}
    whole = "".join(texts.values()).replace("http://www.w3.org/2000/svg", "")
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?:|//www|Storage", whole) == []
    )


def test_the_page_opens_without_the_key_and_tells_nothing_of_the_index(
    serving: Serving, told: Embedder, index: Index
) -> None:
    with serving(told, index=index, page=True, keys=["k"]) as server:
        for path in ["/", *(f"/page/{file.name}" for file in PAGE.iterdir())]:
            assert server.ask("GET", path).status == 200, path
        for path in ("/index", "/map", "/page/sides.json"):
            assert server.ask("GET", path).status == 401, path
        assert server.ask("GET", "/map", headers={"Authorization": "Bearer k"}).status == 200


def test_the_map_is_made_once(serving: Serving, told: Embedder, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(serve_page, "map_of", lambda index: made.append(index) or {"x": [0.5, float("nan")]})
    with serving(told, index=index, page=True) as server:
        assert [server.ask("GET", "/map").body for _ in range(3)] == [{"x": [0.5, None]}] * 3
    assert made == [index]


def test_a_map_that_failed_once_is_made_anew(
    serving: Serving, told: Embedder, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Index] = []

    def fails_once(index: Index) -> dict[str, int]:
        made.append(index)
        if len(made) == 1:
            raise MemoryError
        return {"of": 14}

    monkeypatch.setattr(serve_page, "map_of", fails_once)
    with serving(told, index=index, page=True) as server:
        assert [server.ask("GET", "/map").status for _ in range(3)] == [500, 200, 200]
    assert len(made) == 2


def test_a_map_that_failed_is_tried_again_and_one_that_there_is_not_is_kept(
    serving: Serving, told: Embedder, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Exception] = [MemoryError(), InputError("no two")]

    def fail(_: Index) -> Any:
        raise faults.pop(0)

    monkeypatch.setattr(serve_page, "map_of", fail)
    with serving(told, index=index) as server:
        assert [server.ask("GET", "/map").status for _ in range(3)] == [500, 400, 400]
        schema = server.ask("GET", "/openapi.json").body
    shown = schema["paths"]["/map"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    assert schema["components"]["schemas"][shown.rpartition("/")[2]]["required"] == list(map_of(index))


def test_a_map_that_cannot_be_made_says_why(
    serving: Serving, told: Embedder, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "live_N", index.live_N & False)
    with serving(told, index=index, page=True) as server:
        for _ in range(2):
            answer = server.ask("GET", "/map")
            assert answer.status == 400 and "at least two" in answer.body["error"]["message"]


def test_readiness_is_that_of_both_models(
    serving: Serving, told: Embedder, index: Index, model: Embedder, other: Index
) -> None:
    second = create_app(model, name="second", index=other)
    with serving(told, index=index, page=True, against=second) as server:
        assert server.ask("GET", "/ready").status == 200
        second.state.server.batcher.close()
        assert server.ask("GET", "/ready").status == 503 and server.ask("GET", "/health").status == 200


def test_a_second_model_lies_behind_the_same_key(
    serving: Serving, told: Embedder, index: Index, model: Embedder, other: Index
) -> None:
    second = create_app(model, name="second", index=other, keys=["k"])
    with serving(told, index=index, page=True, against=second, keys=["k"]) as server:
        assert server.ask("GET", "/against/index").status == server.ask("POST", "/against/search", {}).status == 401
        key = {"Authorization": "Bearer k"}
        assert server.ask("GET", "/page/sides.json", headers=key).body == {"bases": ["", "against/"]}
        assert server.ask("GET", "/against/index", headers=key).body["model"] == "second"
        answer = server.ask("POST", "/against/search", {"query": "moon", "k": 3, "task": ""}, key)
        assert [hit["id"] for hit in answer.body["data"][0]["hits"]] == [
            hit.id for hit in other.search(model, ["moon"], k=3)[0]
        ]
        assert server.ask("GET", "/against/map", headers=key).body["of"] == 14
        counted = server.ask("GET", "/metrics", headers=key).raw.decode()
        assert 'path="/against/search",status="200"} 1.0' in counted and 'path="/search"' not in counted


@pytest.mark.parametrize(
    "words",
    [
        "--ui",
        "--index i --against m --against-index i",
        "--index i --ui --against m",
        "--index i --ui --against-index i",
    ],
)
def test_options_that_want_another_are_refused(words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["embedwright", "serve", "m", *words.split()])
    with pytest.raises(SystemExit):
        main()
    assert re.search(r"--ui is a page that searches an index|go together, with --ui", capsys.readouterr().err)
