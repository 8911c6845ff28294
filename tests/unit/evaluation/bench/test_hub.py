"""Splits of a data set: fetched from a hub, a real server on this machine, and opened again from its cache alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from datasets import config as datasets_config
from hub_cache import SHA, contents, offline, put
from huggingface_hub import constants

from embedwright.errors import InputError, OutOfReachError
from embedwright.evaluation.bench.hub import open_splits

ROWS = [{"id": "a", "text": "naïve 漢字"}, {"id": "b", "text": "two\u2028lines"}]
FILES = {
    "corpus": ("set/corpus.jsonl", ROWS),
    "queries_dev": ("set/dev.jsonl", ROWS[:1]),
    "queries_test": ("set/test.jsonl", ROWS[1:]),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A hub with `me/set`, whose cache is empty. Gives the list of files that were fetched."""
    files, fetched = {path: text.encode() for path, text in contents("v2", FILES).items()}, list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, content = self.path.split("?")[0], b""
            if path.startswith("/api/datasets/me/set/tree/"):
                content = json.dumps(
                    [{"type": "file", "path": p, "size": len(c), "oid": SHA} for p, c in files.items()]
                ).encode()
            elif path.startswith("/api/datasets/me/set"):
                siblings = [{"rfilename": name} for name in files]
                content = json.dumps({"id": "me/set", "sha": SHA, "siblings": siblings}).encode()
            elif path.startswith("/datasets/me/set/resolve/"):
                name = path.split("/", 6)[-1]
                content = files[name]
                fetched.extend([name] if self.command == "GET" else [])
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for name, value in {
                "Content-Length": len(content),
                "ETag": f'"{hash(content)}"',
                "X-Repo-Commit": SHA,
            }.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *given: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{http.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    values = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    for name, value in {**values, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "hub")}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    yield fetched
    http.shutdown()
    thread.join()
    http.server_close()


def test_only_the_files_of_the_splits_are_fetched_and_the_cache_is_enough_later(
    server: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, commits = open_splits("me/set", "v2", ["corpus", "queries_dev"], offline=False)
    assert sorted(server) == ["README.md", "v2/set/corpus.jsonl", "v2/set/dev.jsonl"]
    assert list(tables["corpus"]) == ROWS and commits == {"me/set": SHA}
    offline(monkeypatch, tmp_path)
    again, _ = open_splits("me/set", "v2", ["corpus"], offline=False)
    assert list(again["corpus"]) == ROWS
    place = tmp_path / "hub" / "datasets--me--set"
    for asked in (False, True):
        with pytest.raises(OutOfReachError, match=rf"me/set: .* cache {place} lacks queries_test.*hf download me/set "):
            open_splits("me/set", "v2", ["queries_test"], offline=asked)


def test_what_is_not_there_is_named(tmp_path: Path, server: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"me/none: the hub does not give it: .*404"):
        open_splits("me/none", "v2", ["corpus"], offline=False)
    offline(monkeypatch, tmp_path)
    with pytest.raises(OutOfReachError, match=r"me/set: the hub cannot.* lacks corpus.*--include README.md 'v2/\*'"):
        open_splits("me/set", "v2", ["corpus"], offline=False)
    snapshot = put(tmp_path / "hub", "me/set", "v2", FILES)
    with pytest.raises(InputError, match=r"me/set has no split corpus_x in v2; it has corpus, queries_dev"):
        open_splits("me/set", "v2", ["corpus_x"], offline=False)
    with pytest.raises(InputError, match="no split corpus in v3; it has none"):
        open_splits("me/set", "v3", ["corpus"], offline=False)
    (snapshot / "v2" / "set" / "corpus.jsonl").write_text('{"id": "a", "text"')
    with pytest.raises(InputError, match=r"me/set: v2/set/corpus.jsonl cannot be opened"):
        open_splits("me/set", "v2", ["corpus"], offline=False)


def test_offline_asks_no_hub(tmp_path: Path, server: list[str]) -> None:
    with pytest.raises(OutOfReachError):
        open_splits("me/set", "v2", ["corpus"], offline=True)
    assert server == []
