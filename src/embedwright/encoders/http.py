"""A teacher over HTTP: any server of embeddings that speaks OpenAI's `/v1/embeddings` (vLLM, llama.cpp, TEI, ...)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedwright.endpoint import endpoint, refusal, shown
from embedwright.errors import InputError, MissingPackageError
from embedwright.fingerprint import Facts
from embedwright.text import check_texts

log = logging.getLogger(__name__)

_BATCH = 64  # texts of one request
_AT_ONCE = 8  # requests under way
_TIMEOUT_S = 300.0
_RETRIES = 6  # tries after no answer, 429 or 5xx; the pause doubles, or is what the server asks for
_OUTAGE_S, _PAUSE_S = 7200.0, 30.0  # how long, and how often, a server that has answered before is asked after that
_ALL_REFUSED = 16  # texts that are refused before any is taken: no more are tried
_FINE = 16  # a text is cut to what the server takes, or at most 1/16 of that shorter


class RefusedTextsError(InputError):
    """A server refused these `texts`, each of them alone, and took all others: they are too long for its model."""

    def __init__(self, where: str, refused: dict[str, str]) -> None:
        texts, said = list(refused), next(iter(refused.values()))
        first = f"the first has {len(texts[0])} characters: {texts[0][:60]!r}"
        super().__init__(
            f"{where}: {len(texts)} texts were refused, each alone; {first} ({said}). Cut them, or leave them out"
        )
        self.texts = texts


class HttpEncoder:
    """An `Encoder` that asks a server, with eight requests under way.

    The server knows nothing of instructions. The templates say where they go, and what else the model wants to read,
    such as an EOS that the server does not append (`{text}</s>`). Use one object in one thread only.

    A server that has answered before and answers no more is asked again for two hours.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        query_template: str = "Instruct: {task}\nQuery: {text}",
        document_template: str = "{text}",
        api_key_env: str | None = None,
        cut: bool = False,
    ) -> None:
        """`base_url` ends in `/v1`: `/embeddings` follows. `api_key_env` names the environment variable with its key.

        `cut`: a text that the server refuses for its length is cut to what it takes, and named in a warning.

        Raises ValueError for a template without `{text}` or with two, ImportError without the package `openai`.
        """
        for template in (query_template, document_template):
            if template.count("{text}") != 1:
                raise InputError(f"the template {template!r} must have {{text}} once")
        if "{task}" in document_template:
            raise InputError(f"the template {document_template!r}: a document has no {{task}}")
        try:
            import openai  # noqa: F401  # nothing is asked yet
        except ImportError as error:
            raise MissingPackageError("a teacher behind HTTP needs openai: pip install 'embedwright[synth]'") from error
        self.endpoint, self.model = endpoint(base_url, api_key_env), model
        self.query_template, self.document_template = query_template, document_template
        self.cut = cut
        self.dimension: int | None = None  # known from the first answer on

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> HttpEncoder:
        """Opens `http://host:port/v1#model`. Raises ValueError without a model."""
        base_url, _, model = url.rpartition("#")
        if not base_url or not model:
            raise InputError(f"{shown(url)}: say which model of that server, as in {shown(url)}#model-name")
        return cls(base_url, model, **settings)

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        """Encodes to float32 (N, E) of unit length, in the order given: documents where `task` is None, else queries.

        Raises as `Embedder.encode` for bad texts, RefusedTextsError for texts that are too long, ValueError for an
        empty instruction where the template wants one and for an answer that does not fit, RuntimeError if the server
        refuses or gives no answer after all retries.
        """
        texts = check_texts(texts)
        if task == "" and "{task}" in self.query_template:
            raise InputError(
                f"{self.endpoint.url}: the template for queries has a {{task}}, and no instruction is given"
            )
        template = self.document_template if task is None else self.query_template
        before, behind = (part.replace("{task}", task or "") for part in template.split("{text}"))
        if not texts:
            return np.empty((0, self.dimension or 0), np.float32)
        from anyio.from_thread import start_blocking_portal

        with start_blocking_portal() as portal:  # a loop of its own: the caller may be in one, as in a notebook
            vectors = portal.call(self._all, texts, lambda text: before + text + behind)
        return np.stack(vectors)

    def fingerprint(self) -> Facts:
        """Returns the server, its model's name and the templates. It cannot know which weights run there under that
        name.
        """
        templates = {"query_template": self.query_template, "document_template": self.document_template}
        return {"kind": "server", "server": self.endpoint.url, "model": self.model, **templates}

    async def _all(self, texts: Sequence[str], fill: Callable[[str], str]) -> list[NDArray[np.float32]]:
        """Returns the vector of each text. Raises RefusedTextsError, once all others are encoded."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        own = DefaultAsyncHttpxClient(follow_redirects=False)  # texts go to no other server
        limits: dict[str, Any] = {"max_retries": _RETRIES, "timeout": _TIMEOUT_S, "http_client": own}
        async with AsyncOpenAI(**self.endpoint.client, **limits) as client:
            call = _Call(self, client, fill)
            parts = [asyncio.ensure_future(call.encode(texts[i : i + _BATCH])) for i in range(0, len(texts), _BATCH)]
            try:
                vectors = [vector for part in await asyncio.gather(*parts) for vector in part]
            finally:
                for part in parts:  # a call that fails sends no further requests
                    part.cancel()
        if call.refused and self.dimension is None:  # it is not their length
            raise RuntimeError(f"{self.where(list(call.refused))}: {next(iter(call.refused.values()))}")
        if call.refused:
            raise RefusedTextsError(f"{self.endpoint.url}, model {self.model}", call.refused)
        return vectors

    async def request(self, client: Any, texts: list[str]) -> list[NDArray[np.float32]] | str:
        """Returns the vectors, or what the server says against these texts. Waits while it does not answer."""
        from openai import APIConnectionError, APIStatusError, OpenAIError

        began = time.monotonic()
        while True:
            try:
                answer = await client.embeddings.create(input=texts, model=self.model, encoding_format="float")
                return self._checked(answer, texts)
            except OpenAIError as error:  # it says neither where nor what
                status = error.status_code if isinstance(error, APIStatusError) else 0
                said = refusal(error) if isinstance(error, APIStatusError) else f"{error} {error.__cause__ or ''}"
                said = self.endpoint.hide(said)
                if status in (400, 413, 422) or (status == 500 and "too large" in said):  # 500: llama.cpp
                    return said
                passing = status >= 500 or status in (408, 409, 429) or isinstance(error, APIConnectionError)
                if not passing or self.dimension is None or time.monotonic() - began > _OUTAGE_S:
                    raise RuntimeError(f"{self.where(texts)}: {said}") from None
            log.warning("%s: no answer (%s): asked again in %g s", self.endpoint.url, said, _PAUSE_S)
            await asyncio.sleep(_PAUSE_S)

    def where(self, texts: Sequence[str]) -> str:
        return f"{self.endpoint.url}, model {self.model}, text {texts[0][:60]!r} and {len(texts) - 1} more"

    def _checked(self, answer: Any, texts: list[str]) -> list[NDArray[np.float32]]:
        """Returns the vectors of an answer, of unit length. Raises InputError if it does not fit the texts."""
        where = self.where(texts)
        by_index = {item.index: np.array(item.embedding, dtype=np.float32) for item in answer.data}
        if len(answer.data) != len(texts) or sorted(by_index) != list(range(len(texts))):
            raise InputError(f"{where}: {len(answer.data)} vectors with {len(by_index)} different numbers came back")
        if len(widths := {len(vector) for vector in by_index.values()} | {self.dimension or len(by_index[0])}) > 1:
            raise InputError(f"{where}: vectors of different lengths came back: {sorted(widths)}")
        vectors_NE = np.stack([by_index[index] for index in range(len(texts))])
        length_N1 = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
        if not (np.isfinite(length_N1) & (length_N1 > 0)).all():
            raise InputError(f"{where}: a vector came back that is not finite, or zero")
        self.dimension = vectors_NE.shape[1]
        return list(vectors_NE / length_N1)


class _Call:
    """One call of `encode`. Eight of its requests are under way, and `refused` are texts that were refused alone."""

    def __init__(self, encoder: HttpEncoder, client: Any, fill: Callable[[str], str]) -> None:
        self.encoder, self.client, self.fill = encoder, client, fill
        self.slots = asyncio.Semaphore(_AT_ONCE)
        self.refused: dict[str, str] = {}  # text -> what the server said

    async def encode(self, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        """Returns the vectors of these texts, in halves where the server refuses them together."""
        if not isinstance(found := await self.ask(texts), str):
            return found
        if len(texts) > 1:  # one of them is too long, and the others are not to pay for it
            half = len(texts) // 2
            return [*await self.encode(texts[:half]), *await self.encode(texts[half:])]
        if self.encoder.dimension is None and len(self.refused) >= _ALL_REFUSED:
            raise RuntimeError(f"{self.encoder.where(texts)}: {found}")
        if self.encoder.cut and (fitting := await self.shorter(texts[0])) is not None:
            return [fitting]
        self.refused[texts[0]] = found
        return [np.empty(0, np.float32)]

    async def shorter(self, text: str) -> NDArray[np.float32] | None:
        """Returns the vector of the longest beginning that the server takes, or nearly so."""
        taken, fits, fails = None, 0, len(text)
        while fails - fits > max(fails // _FINE, 1):
            middle = (fits + fails) // 2
            if isinstance(found := await self.ask([text[:middle]]), str):
                fails = middle
            else:
                taken, fits = found[0], middle
        if taken is not None:
            url = self.encoder.endpoint.url
            log.warning("%s: a text is cut from %d to %d characters: %r", url, len(text), fits, text[:60])
        return taken

    async def ask(self, texts: Sequence[str]) -> list[NDArray[np.float32]] | str:
        """Returns the vectors, or what the server says against these texts."""
        async with self.slots:
            return await self.encoder.request(self.client, [self.fill(text) for text in texts])
