"""Asks any OpenAI-compatible server (vLLM, llama.cpp, Ollama, ...) questions that are answered with JSON of a schema.

Every answer that was paid for, a useless one too, goes to a file on disk, so that the same questions asked again cost
nothing. The `openai` client retries what fails for a moment, and waits as long as the server's Retry-After says.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from embedwright.endpoint import endpoint, refusal
from embedwright.errors import MissingPackageError
from embedwright.llm.answers import (
    AnswerFile,
    BadAnswerError,
    Completion,
    answer_key,
    read_answer,
    read_completion,
    tokens_of,
)

log = logging.getLogger(__name__)

Positive = Annotated[int, Field(ge=1)]

_AHEAD = 4  # questions begun for each slot, so that one slow answer at the head does not leave the others idle
_LONGEST_PAUSE_S = 120.0  # openai waits no longer between two tries, whatever Retry-After says
_NO_SCHEMA = (
    "this server does not answer with JSON of a schema (response_format json_schema); use one that does, such as vLLM, "
    "SGLang, Ollama or llama.cpp's llama-server"
)


class Answer(BaseModel):
    """The base of answer schemas. They forbid other keys, as strict servers want; an answer with others is taken."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": False})


class Server(BaseModel):
    """Says where to ask, and how hard.

    `token_budget` counts all answers in the cache file, with those of earlier runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    base_url: str = Field(repr=False)  # it may hold a password
    api_key_env: str | None = None  # the environment variable that holds this server's key
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0  # for one try, without a byte
    retries: Annotated[int, Field(ge=0)] = 6  # of one request that got no answer
    attempts: Positive = 3  # to get a valid answer, each with another seed
    concurrency: Positive = 8
    max_tokens: Positive = 2048  # in one answer
    token_budget: Positive | None = None  # prompts and answers together


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt, asked in a new session. Equal questions with equal seeds are one question, and are paid for once."""

    model: str
    prompt: str
    schema: type[BaseModel]
    seed: str
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Says why a question has no answer: `no_valid_answer`, `truncated`, `server_error`, `refused` or `budget`.

    `truncated`: no answer is valid, and one was cut off, so that a larger `max_tokens` may give a valid one.
    """

    reason: str


class ServerError(RuntimeError):
    """The server does not answer, or refuses every question. The message names it and quotes its last error."""


class _NoAnswerError(Exception):
    """One question is given up; the message is the reason of its `Failure`."""


class Client:
    """Asks one server and keeps its answers. Use it in a `with` statement, outside a running event loop.

    `counts` has the `requests` sent, the `answers` received, the `cached` ones, and the `tokens` paid for; failed
    requests by kind (`http_429`, ..., `timeout`, `connection`, `bad_body`); and useless answers by kind (`bad_json`,
    `wrong_schema`, `only_reasoning`, `truncated`). `unanswered` questions may have an answer when they are asked again:
    the budget was spent, or the server failed.
    """

    def __init__(self, server: Server, cache: Path, earlier: Sequence[Path] = ()) -> None:
        """`cache` is the file of answers. Those of the files `earlier` are known, too, and cost nothing."""
        try:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError as error:
            raise MissingPackageError("asking a language model needs: pip install 'embedwright[synth]'") from error
        self.server = server
        self.endpoint = endpoint(server.base_url, server.api_key_env)
        self.counts: Counter[str] = Counter()
        self._cache = AnswerFile(cache, earlier)
        self._openai = AsyncOpenAI(
            **self.endpoint.client,
            max_retries=server.retries,
            timeout=server.timeout_s,
            http_client=DefaultAsyncHttpxClient(
                follow_redirects=False,  # prompts go to no other server
                event_hooks={"request": [self._count_request], "response": [self._count_response]},
            ),
        )
        self._runner = asyncio.Runner()
        self._slots = asyncio.Semaphore(server.concurrency)
        self._settled = asyncio.Condition()
        self._spent, self._reserved = self._cache.tokens(), 0
        self.unanswered = 0
        self._in_vain = 0.0  # questions given up since the last answer
        self._fatal: ServerError | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._runner.run(self._openai.close())
        self._runner.close()  # cancels what is under way
        self._cache.close()

    def ask(self, questions: Iterable[Question]) -> Iterator[dict[str, Any] | Failure]:
        """Yields the answer to each question, in order, as the fields of its schema; or a Failure.

        Holds `4 * concurrency` questions in memory. Raises ServerError if the server refuses every question (401, 403,
        404, no JSON schemas), or if `concurrency + 3` questions in a row have failed after all their retries. Of those
        that it refuses alone once it has answered others, such as prompts that are too long, ten count as one.
        """
        waiting = iter(questions)
        begun: deque[asyncio.Task[dict[str, Any] | Failure]] = deque()
        ahead = _AHEAD * self.server.concurrency
        loop = self._runner.get_loop()
        try:
            while True:
                begun.extend(loop.create_task(self._answer(q)) for q in islice(waiting, ahead - len(begun)))
                if not begun:
                    return
                answer = self._runner.run(asyncio.wait_for(begun[0], None))
                begun.popleft()
                yield answer
        finally:
            if not loop.is_closed():  # it is if the caller reads no further, and the client was closed meanwhile
                for task in begun:
                    task.cancel()
                self._runner.run(_all_ended(begun))

    async def _answer(self, question: Question) -> dict[str, Any] | Failure:
        async with self._slots:
            kept = [self._cache.get(_key(question, attempt)) for attempt in range(self.server.attempts)]
            answered = any(_fits(known, question.schema) for known in kept)
            truncated = False
            for attempt, known in enumerate(kept):
                # an answer that was cut off may be whole under a larger limit
                if known is None or (not answered and 0 < known.cut_at < self.server.max_tokens):
                    try:
                        known = await self._completion(question, attempt)
                    except _NoAnswerError as error:
                        self.unanswered += str(error) in ("budget", "server_error")
                        return Failure(str(error))
                else:
                    self.counts["cached"] += 1
                try:
                    return read_answer(known.text, question.schema)
                except BadAnswerError as error:
                    self.counts["truncated" if known.cut_at else str(error)] += 1
                    truncated |= known.cut_at > 0
            return Failure("truncated" if truncated else "no_valid_answer")

    async def _completion(self, question: Question, attempt: int) -> Completion:
        """Asks once, within the token budget, and keeps the answer."""
        schema = {"name": "answer", "strict": True, "schema": question.schema.model_json_schema()}
        request = {
            "model": question.model,
            "messages": [{"role": "user", "content": question.prompt}],
            # at temperature 0, another seed would give the same answer again
            "temperature": max(question.temperature, 0.5) if attempt else question.temperature,
            "top_p": 1.0,  # else some servers take the value in the model's own files
            "max_tokens": self.server.max_tokens,
            "seed": int(_digest([question.seed, attempt])[:7], 16),
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
        estimate = tokens_of(question.prompt) + self.server.max_tokens
        async with self._settled:
            await self._settled.wait_for(lambda: self._reserved == 0 or self._affords(estimate))
            if not self._affords(estimate):
                raise _NoAnswerError("budget")
            self._reserved += estimate
        try:
            completion = await self._request(request)
            self._cache.put(_key(question, attempt), completion)
            self._spent += completion.tokens
            self._in_vain = 0.0
            self.counts.update(answers=1, tokens=completion.tokens)
            return completion
        finally:
            async with self._settled:
                self._reserved -= estimate
                self._settled.notify_all()

    def _affords(self, tokens: int) -> bool:
        budget = self.server.token_budget
        return budget is None or self._spent + self._reserved + tokens <= budget

    async def _request(self, request: dict[str, Any]) -> Completion:
        """Sends one request; openai retries it. Raises _NoAnswerError, or ServerError if all questions would fail.

        openai's timeout starts again with each byte, and some servers send a byte now and then while they stall. So the
        tries together have a time limit as well.
        """
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        if self._fatal is not None:
            raise self._fatal
        retries, timeout_s = self.server.retries, self.server.timeout_s
        try:
            async with asyncio.timeout(timeout_s + retries * (timeout_s + _LONGEST_PAUSE_S)):
                answer = await self._openai.chat.completions.create(**request)
            completion = read_completion(answer, request)
            if completion is not None:
                return completion
            fault, message = "bad_body", f"no chat completion: {answer!r:.200}"
        except (TimeoutError, APITimeoutError):
            fault, message = "timeout", f"no answer within {timeout_s:g} s"
        except APIConnectionError as error:
            fault, message = "connection", f"{error} {error.__cause__ or ''}"
        except ValueError as error:
            fault, message = "bad_body", f"the body is not JSON: {error}"
        except APIStatusError as error:
            status, message = error.status_code, refusal(error)
            no_schema = not self.counts["answers"] and ("response_format" in message or "json_schema" in message)
            message += f": {_NO_SCHEMA}" if no_schema else ""
            passing = status >= 500 or status in (408, 409, 429)
            fatal = no_schema or status < 400 or status in (401, 403, 404)
            raise self._given_up("server_error" if passing else "refused", message, fatal) from None
        self.counts[fault] += 1
        raise self._given_up("server_error", message)

    def _given_up(self, reason: str, message: str, fatal: bool = False) -> Exception:
        """Returns the exception for a question without an answer, a ServerError if it ends the whole run."""
        alone = reason == "refused" and (self.counts["answers"] or self.counts["cached"])
        self._in_vain += 0.1 if alone else 1
        message = self.endpoint.hide(message)
        if self._fatal is None and (fatal or self._in_vain >= self.server.concurrency + 3):
            self._fatal = ServerError(f"{self.endpoint.url}: {message} (answers so far are kept: {self._cache.path})")
        if self._fatal is not None:
            return self._fatal
        log.warning("%s: a question is given up: %s", self.endpoint.url, message)
        return _NoAnswerError(reason)

    async def _count_request(self, request: Any) -> None:
        self.counts["requests"] += 1

    async def _count_response(self, response: Any) -> None:
        if response.status_code >= 300:
            self.counts[f"http_{response.status_code}"] += 1


def _key(question: Question, attempt: int) -> str:
    return answer_key(question.model, question.prompt, question.temperature, question.seed, attempt)


def _fits(known: Completion | None, schema: type[BaseModel]) -> bool:
    try:
        return known is not None and read_answer(known.text, schema) is not None
    except BadAnswerError:
        return False


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


async def _all_ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
