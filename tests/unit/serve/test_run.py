"""The real process: what it listens at, the keys it reads, and what a signal does to it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.serve.run import listen, read_keys

TEXTS = [f"Number {i}: the moon pulls at the sea, and the sea follows. " * 12 for i in range(256)]


def test_others_are_let_in_with_a_key_alone() -> None:
    with pytest.raises(InputError, match=r"--host 0\.0\.0\.0 .* needs a key"):
        listen("0.0.0.0", 0, [])
    for host in ("127.0.0.1", "localhost"):
        listen(host, 0, []).close()
    with listen("0.0.0.0", 0, ["key"]) as taken, pytest.raises(InputError, match="port"):
        listen("0.0.0.0", taken.getsockname()[1], ["key"])


def test_keys_come_from_a_variable_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    monkeypatch.setenv("SOME_KEY", "three")
    assert read_keys("SOME_KEY", file) == ["three", "one", "two"] and read_keys(None, None) == []
    file.write_text("\n")
    for env, path, words in (
        ("OTHER_KEY", None, "OTHER_KEY"),
        ("sk-secret", None, "NAME of the environment variable"),
        (None, file, "no key"),
        (None, tmp_path / "none", "none"),
    ):
        with pytest.raises(InputError, match=words) as found:
            read_keys(env, path)
        assert "sk-secret" not in str(found.value)


def test_a_signal_ends_the_process_when_all_it_has_accepted_is_answered(
    start: Callable[..., Any], model: Embedder, tmp_path: Path
) -> None:
    model.save(tmp_path / "model")
    # a batch for each text, so that the requests are still under way when the signal comes
    server = start(tmp_path / "model", "--batch-tokens", "1", "--queue-tokens", "99999", "--drain", "60")
    parts = [TEXTS[i * 24 :][:24] for i in range(4)]
    answers: list[tuple[int, bytes]] = []

    def ask(texts: list[str]) -> None:
        with suppress(OSError):  # only for one that was not accepted: all of those that were are counted below
            answers.append(server.ask("/v1/embeddings", {"input": texts}))

    asking = [threading.Thread(target=ask, args=(part,)) for part in parts]
    try:
        for thread in asking:
            thread.start()
        while (accepted := server.under_way()) < 4 and not answers:
            assert server.process.poll() is None
            time.sleep(0.02)
        os.kill(server.process.pid, signal.SIGTERM)
        for thread in asking:
            thread.join(60)
        _, errors = server.process.communicate(timeout=60)
    finally:
        server.process.kill()
    assert server.process.returncode == 0 and "Traceback" not in errors, errors
    right = 0
    for status, raw in answers:
        if status == 503:
            assert json.loads(raw)["error"]["code"] == "stopping"
            continue
        found = np.array([row["embedding"] for row in json.loads(raw)["data"]], np.float32)
        assert min(np.abs(found - model.encode(part)).max() for part in parts) < 1e-5
        right += 1
    assert right >= accepted >= 1 or right == 4
