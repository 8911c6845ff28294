"""A language model's answers: reading the JSON in them, and the file on disk that keeps what was paid for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from embedwright.cache import check_private
from embedwright.errors import InputError

_JSON = json.JSONDecoder(strict=False)  # models write line breaks into JSON strings

# Marks around the reasoning that some servers leave in the text: DeepSeek, Qwen and most others; Seed-OSS; Kimi;
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
    """An answer that is not what was asked for: `bad_json`, `wrong_schema` or `only_reasoning`."""


class Completion(NamedTuple):
    """A model's text, and what it cost. `cut_at`: the token limit that cut it off; 0 where it ended by itself."""

    text: str
    cut_at: int
    tokens: int


def read_answer(text: str, schema: type[BaseModel]) -> dict[str, Any]:
    """Returns the fields of the answer in `text`: of the last JSON object after any reasoning that fits `schema`.

    Drafts, fences and prose around it are skipped. Marks of reasoning inside a JSON string are part of that string.
    Raises BadAnswerError: `only_reasoning` where the reasoning does not end, `wrong_schema` where there are objects but
    none fits, else `bad_json`.
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
    """(start, end, value) of each JSON object that is not inside of another one."""
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
    """The marks that are not inside of a JSON object."""
    for found in mark.finditer(text):
        if not any(start < found.start() < end for start, end, _ in objects):
            yield found


def answer_key(model: str, prompt: str, temperature: float, seed: str, attempt: int) -> str:
    """What an answer is kept under. Any change here has every user pay for all answers again.

    The server's address, its limits and the form in which JSON was asked for are no part of it: the answer to the same
    prompt, drawn by the same seed, stays of use when they change.
    """
    named = [model, prompt, float(temperature), seed, attempt]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


class AnswerFile:
    """Answers by `answer_key`, in an SQLite file of this user alone: whole rows, whenever the process is killed."""

    def __init__(self, path: Path) -> None:
        """InputError where somebody else owns the file or may write to it, or where it holds no answers."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        for part in ("", "-wal", "-shm", "-journal"):  # SQLite takes rows from the files beside it, too
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
        return None if row is None else Completion(*row)

    def put(self, key: str, completion: Completion) -> None:
        """Keeps an answer in place of an earlier one; the tokens of both have been paid for."""
        self._base.execute(
            "INSERT INTO answers VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
            "text = excluded.text, cut = excluded.cut, tokens = tokens + excluded.tokens",
            (key, *completion),
        )

    def tokens(self) -> int:
        """The tokens paid for, over all runs."""
        return int(self._base.execute("SELECT COALESCE(SUM(tokens), 0) FROM answers").fetchone()[0])

    def close(self) -> None:
        self._base.close()
