"""Reads the JSON in a language model's answers, and keeps every answer that was paid for in a file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from embedwright.cache import check_private
from embedwright.errors import InputError

_JSON = json.JSONDecoder(strict=False)  # models write line breaks into JSON strings

# Some servers leave the reasoning in the text. These marks surround it: DeepSeek, Qwen and most others; Seed-OSS; Kimi;
# Magistral; Sky-T1; Command A; gpt-oss, whose answer comes in the channel `final`.
_WORDS = "think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad"
_OPENED = re.compile(
    rf"<(?:\w+:)?(?:{_WORDS})(?:\s[^<>]*)?>|◁think▷|\[THINK\]|<\|(?:begin_of_thought|START_THINKING)\|>"
    r"|<\|channel\|>\s*(?!final\b)\w+",
    re.IGNORECASE,
)
_CLOSED = re.compile(
    rf"</(?:\w+:)?(?:{_WORDS})\s*>|◁/think▷|\[/THINK\]|<\|(?:end_of_thought|END_THINKING)\|>"
    r"|<\|channel\|>\s*final\b[^<{]*<\|message\|>",
    re.IGNORECASE,
)


class BadAnswerError(InputError):
    """The answer has another form than was asked for: `bad_json`, `wrong_schema` or `only_reasoning`."""


class Completion(NamedTuple):
    """A model's text and its cost. `cut_at` is the token limit that cut it off, or 0 if it ended by itself."""

    text: str
    cut_at: int
    tokens: int


def read_completion(answer: Any, request: dict[str, Any]) -> Completion | None:
    """Reads a chat completion, without reasoning in separate fields or parts. None if `answer` is something else."""
    try:
        choice = answer.choices[0]
        content = choice.message.content
        cut_at = request["max_tokens"] if choice.finish_reason == "length" else 0
    except (AttributeError, IndexError, TypeError):
        return None
    if isinstance(content, list):  # Mistral's servers send parts, and `thinking` is one of them
        texts = [part for part in content if isinstance(part, dict) and part.get("type") in ("text", "output_text")]
        content = "".join(str(part.get("text") or "") for part in texts)
    # JSON can spell half a surrogate pair, but no file can hold it
    text = str(content or "").encode(errors="replace").decode()
    used = getattr(answer.usage, "total_tokens", None)
    tokens = used if isinstance(used, int) else tokens_of(request["messages"][0]["content"] + text)
    return Completion(text, cut_at, tokens)


def tokens_of(text: str) -> int:
    """Estimates the tokens of a text by four characters each, which is usual for English."""
    return len(text) // 4 + 1


def read_answer(text: str, schema: type[BaseModel]) -> dict[str, Any]:
    """Returns the fields of the answer in `text`: the last JSON object that fits `schema` and follows any reasoning.

    Drafts, fences and prose are skipped. Marks of reasoning inside a JSON string belong to that string. Raises
    BadAnswerError: `only_reasoning` if the reasoning does not end, `wrong_schema` if there are objects but none fits,
    else `bad_json`.
    """
    objects = list(_objects(text))
    begin = max((mark.end() for mark in _outside(_CLOSED, text, objects)), default=0)
    if any(mark.start() >= begin for mark in _outside(_OPENED, text, objects)):
        raise BadAnswerError("only_reasoning")
    answers = [value for start, _, value in objects if start >= begin]
    for value in reversed(answers):
        try:
            return schema.model_validate(value).model_dump()
        except ValidationError:
            continue
    raise BadAnswerError("wrong_schema" if answers else "bad_json")


def _objects(text: str) -> Iterator[tuple[int, int, Any]]:
    """Yields (start, end, value) of each JSON object, without those inside other objects."""
    at = text.find("{")
    while at >= 0:
        try:
            value, end = _JSON.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            end = at + 1
        else:
            yield at, end, value
        at = text.find("{", end)


def _outside(mark: re.Pattern[str], text: str, objects: list[tuple[int, int, Any]]) -> Iterator[re.Match[str]]:
    """Yields the marks that are not inside a JSON object."""
    for found in mark.finditer(text):
        if not any(start < found.start() < end for start, end, _ in objects):
            yield found


def answer_key(model: str, prompt: str, temperature: float, seed: str, attempt: int) -> str:
    """Returns the key under which an answer is kept. With another key, every user pays for all answers again.

    The server's address, its limits and the schema are not in it: an answer to the same prompt and seed stays useful
    when they change.
    """
    named = [model, prompt, float(temperature), seed, attempt]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


class AnswerFile:
    """Keeps answers by `answer_key` in an SQLite file that only this user can write. A kill never leaves half a row."""

    def __init__(self, path: Path, earlier: Sequence[Path] = ()) -> None:
        """Opens the file, and those `earlier` ones whose answers it gives, too.

        Raises InputError if another user owns it or may write to it, or if it holds no answers.
        """
        self._earlier = [AnswerFile(file) for file in earlier]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        for part in ("", "-wal", "-shm", "-journal"):  # SQLite also reads rows from these files
            if os.path.lexists(file := path.with_name(path.name + part)):
                check_private(file)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))  # the other files take its mode
        try:
            self._base = sqlite3.connect(path, isolation_level=None)  # each statement is a transaction
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = NORMAL")
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT, cut INTEGER, tokens INTEGER)"
            )
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path}: not a file of answers ({error})") from error

    def get(self, key: str) -> Completion | None:
        row = self._base.execute("SELECT text, cut, tokens FROM answers WHERE key = ?", (key,)).fetchone()
        if row is not None:
            return Completion(*row)
        return next((found for file in self._earlier if (found := file.get(key))), None)

    def put(self, key: str, completion: Completion) -> None:
        """Replaces an earlier answer of this key. The tokens add up, since both answers were paid for."""
        self._base.execute(
            "INSERT INTO answers VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
            "text = excluded.text, cut = excluded.cut, tokens = tokens + excluded.tokens",
            (key, *completion),
        )

    def tokens(self) -> int:
        """Returns the tokens paid for in all runs, without those of earlier files."""
        return int(self._base.execute("SELECT COALESCE(SUM(tokens), 0) FROM answers").fetchone()[0])

    def close(self) -> None:
        for file in (*self._earlier, self):
            file._base.close()


def tokens_paid(path: Path) -> int:
    """Returns the tokens that a file of answers was paid for with."""
    file = AnswerFile(path)
    try:
        return file.tokens()
    finally:
        file.close()
