"""What clients send and get: the models of the requests and answers, with the bounds that OpenAPI shows."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema, create_model
from pydantic.config import JsonDict
from pydantic.types import Discriminator, Tag

from embedwright.index.documents import Document
from embedwright.index.index import Hit

TOKEN_IDS = (
    "token ids are not taken: ids of another model's vocabulary would give wrong vectors without an error. Send text "
    "(in LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
)


def _whole(value: Any) -> Any:
    """Takes 1.0, which JSON Schema calls an integer, and neither true nor "1", which pydantic takes by itself."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError("this is not a whole number")
    return value


MOST_HITS = 1000
_TASK = "Instruction of queries; empty for none."
_TASK_OF_DOCUMENTS: JsonDict = {
    "properties": {"input_type": {"const": "document"}, "task": {"type": "string"}},
    "required": ["input_type", "task"],
}


# The bounds stand before the validator: after it, the OpenAPI schema would lack them.
def whole_number(least: int, most: int) -> Any:
    """Makes the type of a whole number within bounds."""
    return Annotated[int, Field(ge=least, le=most), BeforeValidator(_whole)]


class EmbeddingRequest(BaseModel):
    """Texts to encode. `input_type` and `task` are not OpenAI's: they say on which side of a search the texts are."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"not": _TASK_OF_DOCUMENTS})

    input: list[str | list[int]]
    model: str | None = Field(None, description="Name of the model, as /v1/models lists it.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="`base64` holds little-endian float32 numbers. Default: float."
    )
    dimensions: int | None = None
    user: str | None = Field(None, description="Ignored.")
    input_type: Literal["query", "document"] | None = Field(
        None,
        description="Side of the texts; a query without `task` gets the model's own. Default: query with a task.",
    )
    task: str | None = Field(None, description=_TASK)


def embedding_request(width: int, max_inputs: int, token_ids: bool) -> type[EmbeddingRequest]:
    """Makes the model of a request for vectors of `width` numbers. Token ids are refused without `token_ids`."""
    cut = Field(None, description="Keep the first numbers of each vector, and normalise again.")
    fields: dict[str, Any] = {
        "input": (_texts_type(max_inputs, token_ids), ...),
        "dimensions": (whole_number(1, width) | None, cut),
    }
    return create_model("EmbeddingRequest", __base__=EmbeddingRequest, **fields)


class Condition(BaseModel):
    """A condition on the metadata in parts. `in` takes a list of values, the others take one."""

    model_config = ConfigDict(extra="forbid")

    column: str
    operator: Literal["=", "!=", "<", "<=", ">", ">=", "in"]
    value: str | bool | int | float | list[str | bool | int | float]


# a branch is chosen first, so that a fault is told of that branch alone
_Where = Annotated[
    Annotated[str, Tag("text")] | Annotated[Condition, Tag("condition")],
    Discriminator(lambda given: "text" if isinstance(given, str) else "condition"),
]


class SearchRequest(BaseModel):
    """Queries to search the index for."""

    model_config = ConfigDict(extra="forbid")

    query: list[str]
    k: whole_number(1, MOST_HITS) = Field(10, description="Hits of a query.")  # type: ignore[valid-type]
    task: str | None = Field(None, description=f"{_TASK} Default: the model's own; 400 where it has none.")
    where: list[_Where] | None = Field(
        None, max_length=32, description="Conditions on the metadata, as `lang=en` or `year>=2020`, or in parts."
    )


def search_request(max_inputs: int) -> type[SearchRequest]:
    """Makes the model of a request for so many queries at most."""
    fields: dict[str, Any] = {"query": (_texts_type(max_inputs, token_ids=False), ...)}
    return create_model("SearchRequest", __base__=SearchRequest, **fields)


def _texts_type(max_inputs: int, token_ids: bool) -> Any:
    """Makes the type of a text or a list of texts, which is read as a list."""
    many = {"type": "array", "minItems": 1, "maxItems": max_inputs}
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
    forms = [{"type": "string"}, many | {"items": {"type": "string"}}]
    forms += [ids, many | {"items": ids}] if token_ids else []

    def texts(value: Any) -> list[str | list[int]]:
        return _inputs(value, max_inputs, token_ids)

    return Annotated[Any, PlainValidator(texts), WithJsonSchema({"anyOf": forms})]


def _inputs(value: Any, max_inputs: int, token_ids: bool) -> list[str | list[int]]:
    """Returns a request's texts, or lists of token ids, as a list. Raises ValueError, whose message the client gets."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("send a text, or a list of texts that is not empty")
    if all(_is_id(item) for item in value):
        value = [value]
    if len(value) > max_inputs:
        raise ValueError(
            f"{len(value)} texts are too many: send at most {max_inputs} in a request "
            "(LangChain: chunk_size; LlamaIndex: embed_batch_size)"
        )
    if all(isinstance(item, list) and item and all(map(_is_id, item)) for item in value):
        if not token_ids:
            raise ValueError(TOKEN_IDS)
        return [[int(id) for id in ids] for ids in value]
    for i, item in enumerate(value):
        if not isinstance(item, str):
            raise ValueError(f"item {i} is no text")
    return list(value)


def _is_id(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and value >= 0
    return isinstance(value, float) and value >= 0 and value.is_integer()


# ---- answers, for OpenAPI; the server writes them itself


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that the model read: instruction, text and special tokens, after texts that are too long are cut."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


def _model_of(row: type, name: str) -> type[BaseModel]:
    """Makes the model of a named tuple of the index."""
    fields: dict[str, Any] = {field: (kind, ...) for field, kind in get_type_hints(row).items()}
    return create_model(name, __doc__=row.__doc__, **fields)


FoundHit = _model_of(Hit, "FoundHit")
FoundDocument = _model_of(Document, "FoundDocument")


class Found(BaseModel):
    query: str
    task: str
    hits: list[FoundHit]  # type: ignore[valid-type]


class SearchAnswer(BaseModel):
    object: Literal["list"]
    data: list[Found]
    model: str
    usage: Usage


class IndexFacts(BaseModel):
    """`metadata` has the type of each column; `task` is the instruction that a query without one gets."""

    documents: int
    chunks: int
    model: str
    dimension: int
    precision: str
    metadata: dict[str, str]
    task: str | None


class DocumentsMap(BaseModel):
    """Documents as points, in columns: `x` and `y` lie between 0 and 1. They are a sample `of` so many."""

    of: int
    seed: int
    method: str
    ids: list[str]
    titles: list[str]
    x: list[float]
    y: list[float]
    metadata: dict[str, list[Any]]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "embedwright"
    dimension: int
    max_tokens: int


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Status(BaseModel):
    status: str
