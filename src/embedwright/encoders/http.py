"""A teacher over HTTP: any server of embeddings that speaks OpenAI's `/v1/embeddings` (vLLM, llama.cpp, TEI, ...)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedwright.endpoint import endpoint, refusal, shown
from embedwright.errors import InputError, MissingPackageError
from embedwright.fingerprint import Facts
from embedwright.text import check_texts

_BATCH = 64  # texts of one request
_TIMEOUT_S = 300.0
_RETRIES = 6  # of one request that gets no answer, 429 or 5xx; the pause doubles, or is what the server asks for


class HttpEncoder:
    """An `Encoder` that asks a server.

    The server knows nothing of instructions. The templates say where they go, and what else the model wants to read,
    such as an EOS that the server does not append (`{text}</s>`). Use one object in one thread only.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        query_template: str = "Instruct: {task}\nQuery: {text}",
        document_template: str = "{text}",
        api_key_env: str | None = None,
    ) -> None:
        """`base_url` ends in `/v1`: `/embeddings` follows. `api_key_env` names the environment variable with its key.

        Raises ValueError for a template without `{text}` or with two, ImportError without the package `openai`.
        """
        for template in (query_template, document_template):
            if template.count("{text}") != 1:
                raise InputError(f"the template {template!r} must have {{text}} once")
        if "{task}" in document_template:
            raise InputError(f"the template {document_template!r}: a document has no {{task}}")
        try:
            from openai import DefaultHttpxClient, OpenAI
        except ImportError as error:
            raise MissingPackageError("a teacher behind HTTP needs openai: pip install 'embedwright[synth]'") from error
        self.endpoint, self.model = endpoint(base_url, api_key_env), model
        self.query_template, self.document_template = query_template, document_template
        self.dimension: int | None = None  # known from the first answer on
        self._client = OpenAI(
            **self.endpoint.client,
            max_retries=_RETRIES,
            timeout=_TIMEOUT_S,
            http_client=DefaultHttpxClient(follow_redirects=False),  # texts go to no other server
        )

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> HttpEncoder:
        """Opens `http://host:port/v1#model`. Raises ValueError without a model."""
        base_url, _, model = url.rpartition("#")
        if not base_url or not model:
            raise InputError(f"{shown(url)}: say which model of that server, as in {shown(url)}#model-name")
        return cls(base_url, model, **settings)

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        """Encodes to float32 (N, E) of unit length, in the order given: documents where `task` is None, else queries.

        Raises as `Embedder.encode` for bad texts, ValueError for an empty instruction where the template wants one and
        for an answer that does not fit, RuntimeError if the server refuses or gives no answer after all retries.
        """
        texts = check_texts(texts)
        if task == "" and "{task}" in self.query_template:
            raise InputError(
                f"{self.endpoint.url}: the template for queries has a {{task}}, and no instruction is given"
            )
        template = self.document_template if task is None else self.query_template
        before, behind = (part.replace("{task}", task or "") for part in template.split("{text}"))
        filled = [before + text + behind for text in texts]
        parts = [self._request(filled[start : start + _BATCH]) for start in range(0, len(filled), _BATCH)]
        return np.concatenate(parts) if parts else np.empty((0, self.dimension or 0), np.float32)

    def fingerprint(self) -> Facts:
        """Returns the server, its model's name and the templates. It cannot know which weights run there under that
        name.
        """
        templates = {"query_template": self.query_template, "document_template": self.document_template}
        return {"kind": "server", "server": self.endpoint.url, "model": self.model, **templates}

    def _request(self, texts: list[str]) -> NDArray[np.float32]:
        from openai import APIStatusError, OpenAIError

        where = f"{self.endpoint.url}, model {self.model}, text {texts[0][:60]!r} and {len(texts) - 1} more"
        try:
            answer = self._client.embeddings.create(input=texts, model=self.model, encoding_format="float")
        except OpenAIError as error:  # it says neither where nor what
            said = refusal(error) if isinstance(error, APIStatusError) else f"{error} {error.__cause__ or ''}"
            raise RuntimeError(f"{where}: {self.endpoint.hide(said)}") from None
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
        unit_NE: NDArray[np.float32] = vectors_NE / length_N1
        return unit_NE
