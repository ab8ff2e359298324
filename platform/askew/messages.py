"""Messages: what requests, answers and errors of the endpoint hold, and the bounds of each field."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from askew.inputs import clean

MAX_QUERY, MAX_K, MAX_ID, MAX_BATCH = 512, 100, 512, 64


def _readable(query: str) -> str:
    if not clean(query):
        raise ValueError("the query holds no readable character")
    return query


class Wanted(BaseModel):
    """How many products, of which, and what of them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    filter: dict[str, Any] | None = Field(default=None, description="conditions on fields: see docs/index.md")
    fields: Annotated[list[str], Field(max_length=64)] | None = Field(default=None, description="all by default")
    min_score: Annotated[float, Field(allow_inf_nan=False)] | None = None
    timeout_ms: Annotated[int, Field(ge=1, le=60_000)] | None = Field(default=None, description="the server's own")
    require_full: bool = Field(default=False, description="503 sooner than an answer without some shard")


class SearchRequest(Wanted):
    """What to search for."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": "red striped mug", "k": 5, "filter": {"price": {"lt": 20}}, "fields": ["price"]}
            ]
        }
    )

    query: Annotated[str, Field(min_length=1, max_length=MAX_QUERY), AfterValidator(_readable)]


class SimilarRequest(Wanted):
    """Which product others shall be like."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"item_id": "item-000017", "k": 5}]})

    item_id: Annotated[str, Field(min_length=1, max_length=MAX_ID)]


class BatchRequest(BaseModel):
    """Several searches at once."""

    model_config = ConfigDict(extra="forbid", strict=True)

    searches: Annotated[list[SearchRequest], Field(min_length=1, max_length=MAX_BATCH)]


class Hit(BaseModel):
    """One product found."""

    item_id: str
    score: float = Field(description="cosine of query and product, −1 to 1")
    title: str
    fields: dict[str, Any]


class Item(BaseModel):
    """One product."""

    item_id: str
    title: str
    fields: dict[str, Any]
    has_image: bool


class Served(BaseModel):
    """The model version that answers."""

    name: str
    version: str


class Coverage(BaseModel):
    """How many shards were asked and how many answered in time."""

    shards: int
    answered: int


class SearchResponse(BaseModel):
    """The products found, best first."""

    hits: list[Hit]
    model: Served
    took_ms: float
    took: dict[str, float] = Field(
        description="milliseconds of the parts: waiting, encoding, searching the shards"
    )
    coverage: Coverage
    degraded: bool = Field(description="true when a shard did not answer, so that products may be missing")
    request_id: str = Field(description="the header x-request-id of the request and of the answer")


class BatchResponse(BaseModel):
    """The answers, in the order of the searches."""

    answers: list[SearchResponse]


class Release(BaseModel):
    """What is served: a model version and the index that it built."""

    model: Served
    model_key: str
    index_key: str
    items: int
    shards: int


class Problem(BaseModel):
    """What was wrong with a request, and what to do."""

    code: str
    message: str
    param: str | None
    hint: str


class Failure(BaseModel):
    """The body of every answer that is no success."""

    error: Problem
