"""Questions to any OpenAI-compatible server (vLLM, llama.cpp, Ollama, ...), answered with JSON of a given schema.

Every answer that was paid for, a useless one too, goes to a file on disk, so that the same questions asked again cost
nothing. Waiting, retrying and counting are ours and not `openai`'s (`max_retries=0`): its retries pass by the rate
limits and are not told apart by cause, and its timeout starts again with each byte that a stalled server drips.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from embedwright.endpoint import endpoint, refusal
from embedwright.errors import MissingPackageError
from embedwright.llm.answers import AnswerFile, BadAnswerError, Completion, answer_key, read_answer
from embedwright.llm.pace import Pace, retry_after_s

log = logging.getLogger(__name__)

Positive = Annotated[int, Field(ge=1)]

# What is asked for, from the strictest to the one that all servers have. The second is llama.cpp's own spelling.
FORMATS = ("json_schema", "json_object with schema", "json_object", "text")
MAX_WAIT_S = 600.0  # a server that asks for a longer pause has said no for today
_MAX_BACKOFF_S = 60.0
_AHEAD = 4  # questions begun for each slot, so that one slow answer at the head does not leave the others idle


class Server(BaseModel):
    """Where to ask, and how hard. Times in seconds; `tokens` are prompt and answer together.

    `token_budget` counts all answers in the cache file, those of earlier runs too: run again, it is not spent again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    base_url: str = Field(repr=False)  # it may hold a password
    api_key_env: str | None = None  # the environment variable that holds this server's key
    timeout_s: Annotated[float, Field(gt=0)] = 300.0  # of one request, from sending it to the answer's last byte
    retries: Annotated[int, Field(ge=0)] = 6  # of a request that got no answer
    attempts: Positive = 3  # at a valid answer, each with a seed of its own
    backoff_s: Annotated[float, Field(ge=0)] = 1.0  # doubled with each retry
    concurrency: Positive = 8
    max_tokens: Positive = 2048  # of one answer
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    token_budget: Positive | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt in a session of its own. `seed` names the draw: equal questions with equal seeds are the same one."""

    model: str
    prompt: str
    schema: type[BaseModel]
    seed: str
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a question has no answer: `no_valid_answer`, `server_error`, `refused` or `budget`."""

    reason: str


class ServerError(RuntimeError):
    """A server that does not answer, or not us. The message names it and its last word."""


class _NoAnswerError(Exception):
    """One question's request was given up."""


class _BudgetError(Exception):
    """One more request could pass the token budget."""


class Client:
    """Asks one server, and keeps what it says. A context; not for use inside a running event loop.

    `counts`: `requests` sent, `answers` received, `cached` ones, `tokens` of both, the faults of the server by kind
    (`timeout`, `connection`, `bad_body`, `http_429`, ...) and the useless answers by kind (`bad_json`, `wrong_schema`,
    `only_reasoning`, `truncated`). The API key is that of `endpoint`.
    """

    def __init__(self, server: Server, cache: Path) -> None:
        try:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError as error:
            raise MissingPackageError("asking a language model needs: pip install 'embedwright[synth]'") from error
        self.server = server
        self.endpoint = endpoint(server.base_url, server.api_key_env)
        self.counts: Counter[str] = Counter()
        self._cache = AnswerFile(cache)
        self._openai = AsyncOpenAI(
            **self.endpoint.client,
            max_retries=0,
            timeout=server.timeout_s,
            http_client=DefaultAsyncHttpxClient(follow_redirects=False),  # prompts go to no other server
        )
        self._runner = asyncio.Runner()
        self._slots = asyncio.Semaphore(server.concurrency)
        self._pace = Pace(server.requests_per_minute, server.tokens_per_minute)
        self._settled = asyncio.Condition()
        self._spent, self._reserved = self._cache.tokens(), 0
        self._format: dict[str, int] = {}  # model -> index into FORMATS
        self._unanswered = 0  # questions given up since the last answer
        self._fatal: ServerError | None = None
        self._open = True

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open = False
        self._runner.run(self._openai.close())
        self._runner.close()  # cancels what is under way
        self._cache.close()

    def ask(self, questions: Iterable[Question]) -> Iterator[dict[str, Any] | Failure]:
        """The answer to each question, in order, as the fields of its schema; or why there is none.

        Holds `4 * concurrency` questions in memory. Raises ServerError where the server refuses every question
        (401, 403, 404), or has let down `concurrency + 3` in a row, with all their retries.
        """
        waiting = iter(questions)
        begun: deque[asyncio.Task[dict[str, Any] | Failure]] = deque()
        ahead = _AHEAD * self.server.concurrency
        loop = self._runner.get_loop()
        try:
            while True:
                begun.extend(loop.create_task(self._answer(q)) for q in itertools.islice(waiting, ahead - len(begun)))
                if not begun:
                    return
                answer = self._runner.run(_result(begun[0]))
                begun.popleft()
                yield answer
        finally:
            if self._open:  # or the answers were left unread until the client was closed
                for task in begun:
                    task.cancel()
                self._runner.run(_all_ended(begun))

    async def _answer(self, question: Question) -> dict[str, Any] | Failure:
        async with self._slots:
            kept = [self._cache.get(_key(question, attempt)) for attempt in range(self.server.attempts)]
            answered = any(_fits(known, question.schema) for known in kept)
            for attempt, known in enumerate(kept):
                # an answer that was cut off may be whole under today's limit
                if known is None or (not answered and 0 < known.cut_at < self.server.max_tokens):
                    try:
                        known = await self._completion(question, attempt)
                    except _NoAnswerError as error:
                        return Failure(str(error))
                    except _BudgetError:
                        return Failure("budget")
                else:
                    self.counts["cached"] += 1
                try:
                    return read_answer(known.text, question.schema)
                except BadAnswerError as error:
                    self.counts["truncated" if known.cut_at else str(error)] += 1
            return Failure("no_valid_answer")

    async def _completion(self, question: Question, attempt: int) -> Completion:
        schema = question.schema.model_json_schema()
        request = {
            "model": question.model,
            "messages": [{"role": "user", "content": question.prompt}],
            # at temperature 0 another seed would bring the same answer again
            "temperature": max(question.temperature, 0.5) if attempt else question.temperature,
            "top_p": 1.0,  # some servers take another one from the model's own files
            "max_tokens": self.server.max_tokens,
            "seed": int(_digest([question.seed, attempt])[:7], 16),
        }
        estimate = _tokens_of(question.prompt) + self.server.max_tokens
        async with self._settled:
            await self._settled.wait_for(lambda: self._reserved == 0 or self._affords(estimate))
            if not self._affords(estimate):
                raise _BudgetError
            self._reserved += estimate
        try:
            completion = await self._in_known_format(request, schema, estimate)
            self._cache.put(_key(question, attempt), completion)
            self._spent += completion.tokens
            self._unanswered = 0
            self.counts.update(answers=1, tokens=completion.tokens)
            return completion
        finally:
            async with self._settled:
                self._reserved -= estimate
                self._settled.notify_all()

    def _affords(self, tokens: int) -> bool:
        budget = self.server.token_budget
        return budget is None or self._spent + self._reserved + tokens <= budget

    async def _in_known_format(self, request: dict[str, Any], schema: dict[str, Any], estimate: int) -> Completion:
        """The strictest format that the server takes; proved by an answer, as a 400 may have other causes."""
        from openai import APIStatusError

        model = request["model"]
        for n in range(self._format.get(model, 0), len(FORMATS)):
            try:
                completion = await self._retried(request | _response_format(FORMATS[n], schema), estimate)
            except APIStatusError as error:
                if n < len(FORMATS) - 1 and _may_mean_the_format(error.status_code, str(error)):
                    self.counts["refused_format"] += 1
                    continue
                status = error.status_code
                raise self._given_up("refused", refusal(error), status < 400 or status in (401, 403, 404)) from None
            if n > self._format.get(model, 0):
                self._format[model] = n
                log.warning("%s: %s takes no %s here, asked for %s", self.endpoint.url, model, FORMATS[0], FORMATS[n])
            return completion
        raise AssertionError("the last format returns or raises")

    async def _retried(self, request: dict[str, Any], estimate: int) -> Completion:
        """One answer of the server, after as many retries as it takes. Raises openai's error on a refusal."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        for retry in itertools.count():
            if self._fatal is not None:
                raise self._fatal
            turn = await self._pace.turn(estimate)
            self.counts["requests"] += 1
            asked_wait = 0.0
            try:
                async with asyncio.timeout(self.server.timeout_s):
                    answer = await self._openai.chat.completions.create(**request)
                completion = _read_completion(answer, request)
                if completion is not None:
                    turn.tokens = completion.tokens
                    return completion
                fault, said = "bad_body", f"no chat completion: {answer!r:.200}"
            except (TimeoutError, APITimeoutError) as error:
                fault, said = "timeout", f"no answer within {self.server.timeout_s:g} s {error}"
            except APIConnectionError as error:
                fault, said = "connection", f"{error} {error.__cause__ or ''}"
            except json.JSONDecodeError as error:
                fault, said = "bad_body", f"the body is not JSON: {error}"
            except APIStatusError as error:
                passing = error.status_code >= 500 or error.status_code in (408, 409, 429)
                if not passing or _may_mean_the_format(error.status_code, str(error)):
                    raise
                fault, said = f"http_{error.status_code}", str(error)
                asked_wait = retry_after_s(error.response.headers.get("retry-after"), time.time())
            self.counts[fault] += 1
            if retry == self.server.retries or asked_wait > MAX_WAIT_S:
                raise self._given_up("server_error", said)
            backoff = min(self.server.backoff_s * 2**retry, _MAX_BACKOFF_S) * random.uniform(0.5, 1)
            await asyncio.sleep(asked_wait + backoff)
        raise AssertionError("the last retry returns or raises")

    def _given_up(self, reason: str, said: object, fatal: bool = False) -> Exception:
        """What to raise for a question without an answer: the end of everything, where it is one of many or all."""
        self._unanswered += 1
        said = self.endpoint.hide(said)
        if self._fatal is None and (fatal or self._unanswered >= self.server.concurrency + 3):
            self._fatal = ServerError(f"{self.endpoint.url}: {said} (answers so far are kept: {self._cache.path})")
        if self._fatal is not None:
            return self._fatal
        log.warning("%s: a question is given up: %s", self.endpoint.url, said)
        return _NoAnswerError(reason)


def _key(question: Question, attempt: int) -> str:
    return answer_key(question.model, question.prompt, question.temperature, question.seed, attempt)


def _fits(known: Completion | None, schema: type[BaseModel]) -> bool:
    try:
        return known is not None and read_answer(known.text, schema) is not None
    except BadAnswerError:
        return False


def _may_mean_the_format(status: int, said: str) -> bool:
    """400; 422, which FastAPI says for it; and what names the field: llama-cpp-python says 500."""
    return status in (400, 422) or "response_format" in said


def _response_format(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    if name == "text":
        return {}
    if name == "json_object":
        return {"response_format": {"type": "json_object"}}
    if name == "json_object with schema":
        return {"response_format": {"type": "json_object", "schema": schema}}
    named = {"name": "answer", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _read_completion(answer: Any, request: dict[str, Any]) -> Completion | None:
    """None where it is no chat completion. Reasoning that comes in a field or part of its own is left out."""
    try:
        choice = answer.choices[0]
        content = choice.message.content
        cut_at = request["max_tokens"] if choice.finish_reason == "length" else 0
    except (AttributeError, IndexError, TypeError):
        return None
    if isinstance(content, list):  # parts, as Mistral's servers send them, those of `thinking` among them
        said = [part for part in content if isinstance(part, dict) and part.get("type") in ("text", "output_text")]
        content = "".join(str(part.get("text") or "") for part in said)
    # half a surrogate pair, which JSON can spell, goes into no file
    text = str(content or "").encode(errors="replace").decode()
    told = getattr(answer.usage, "total_tokens", None)
    tokens = told if isinstance(told, int) else _tokens_of(request["messages"][0]["content"] + text)
    return Completion(text, cut_at, tokens)


def _tokens_of(text: str) -> int:
    """About: four characters a token, the usual estimate for English."""
    return len(text) // 4 + 1


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


async def _result(task: asyncio.Task[dict[str, Any] | Failure]) -> dict[str, Any] | Failure:
    return await task


async def _all_ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
