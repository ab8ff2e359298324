"""Messages: what requests, answers and errors of the endpoint hold, and the bounds of each field."""

import base64
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from askew.words import clean

MAX_QUERY, MAX_K, MAX_ID, MAX_BATCH = 512, 100, 512, 64
MAX_ITEMS, MAX_DELETED = 64, 1000


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
    version: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="another one than is live, of those that /release says are held"
    )
    require_full: bool = Field(default=False, description="503 sooner than an answer without some shard")


Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]


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
    explain: bool = Field(default=False, description="tell what the first 24 scores are made of; slow")
    image_weight: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="put the best 100 into the order of their photos (1), their texts (0) or between; slow",
    )


class SimilarRequest(Wanted):
    """Which product others shall be like."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"item_id": "item-000017", "k": 5}]})

    item_id: Id


class BatchRequest(BaseModel):
    """Several searches at once."""

    model_config = ConfigDict(extra="forbid", strict=True)

    searches: Annotated[list[SearchRequest], Field(min_length=1, max_length=MAX_BATCH)]


def _decoded(encoded: object) -> bytes:
    if not isinstance(encoded, str):
        raise ValueError("a photo is sent as text in base64")
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise ValueError(f"a photo is sent in base64: {error}") from None


Photo = Annotated[
    bytes, BeforeValidator(_decoded), WithJsonSchema({"type": "string", "contentEncoding": "base64"})
]


class NewItem(BaseModel):
    """One product as it shall be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    item_id: Id
    title: str
    fields: dict[str, Any] = Field(default_factory=dict, description="of those that the index has")
    image: Photo | None = Field(default=None, description="JPEG, PNG, WebP, GIF or AVIF in base64")


class UpsertRequest(BaseModel):
    """Products that are new, or that take the place of those of the same ids."""

    model_config = ConfigDict(
        extra="forbid", strict=True,
        json_schema_extra={"examples": [{"items": [{"item_id": "new-1", "title": "Red striped mug"}]}]},
    )  # fmt: skip

    items: Annotated[list[NewItem], Field(min_length=1, max_length=MAX_ITEMS)]


class DeleteRequest(BaseModel):
    """Products that shall not be found any more."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"item_ids": ["new-1"]}]}
    )

    item_ids: Annotated[list[Id], Field(min_length=1, max_length=MAX_DELETED)]


class Refused(BaseModel):
    """What of a product could not be used, and why: the product, its photo or a field."""

    item_id: str
    reason: str
    message: str


class WriteResponse(BaseModel):
    """A change that is on disk; searches see it within seconds."""

    change: int = Field(description="its number: changes of an index are numbered from 1")
    items: int = Field(description="products that it has")
    refused: list[Refused]


class Explanation(BaseModel):
    """What a score is made of: cosines of the query and an item's vectors, and the score without its photo."""

    text: float | None = None
    image: float | None = None
    fused: float | None = None
    without_image: float


class Hit(BaseModel):
    """One product found."""

    item_id: str
    score: float = Field(description="cosine of query and product, −1 to 1")
    title: str
    fields: dict[str, Any]
    explanation: Explanation | None = None


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
    missing: float = Field(description="share of the catalogue that the others hold, 0 to 1")


class SearchResponse(BaseModel):
    """The products found, best first."""

    hits: list[Hit]
    model: Served
    took_ms: float
    took: dict[str, float] = Field(
        description="milliseconds of the parts: waiting, encoding, searching the shards; or cached"
    )
    coverage: Coverage
    degraded: bool = Field(description="true when a shard did not answer, so that products may be missing")
    request_id: str = Field(description="the header x-request-id of the request and of the answer")


class BatchResponse(BaseModel):
    """The answers, in the order of the searches."""

    answers: list[SearchResponse]


class FacetsRequest(BaseModel):
    """Of which products to tell the fields."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"filter": {"price": {"lt": 20}}}]}
    )

    filter: dict[str, Any] | None = Field(default=None, description="conditions on fields: see docs/index.md")
    limit: Annotated[int, Field(ge=1, le=100)] = Field(default=20, description="of values told of each field")


class FacetValue(BaseModel):
    """A value of a field."""

    value: str | bool
    items: int = Field(description="products that have it")


class Facet(BaseModel):
    """A field of the products, and what they have in it."""

    name: str
    kind: str = Field(description="text, boolean, number, or other: no filter compares those")
    items: int = Field(description="products that have the field")
    distinct: int = Field(description="how many values it has, at least; of numbers 0")
    values: list[FacetValue] = Field(description="those that most products have; of numbers none")
    least: float | None
    greatest: float | None


class FacetsResponse(BaseModel):
    """The fields of the products that pass the filter."""

    model: Served
    fields: list[Facet]


class Release(BaseModel):
    """What is served: a model version and the index that it built."""

    model: Served
    model_key: str
    index_key: str
    items: int
    shards: int


class Candidate(BaseModel):
    """A version that the alias is on and that is not served: it is being prepared, or was refused."""

    version: str
    state: str = Field(description="preparing, loading or refused")
    reasons: list[str]


class ReleaseResponse(Release):
    """What is served, since when and after what, and what becomes of the version that shall be."""

    since: str = Field(description="when it went live, in UTC")
    previous: str | None = Field(default=None, description="the version before, if it can be returned to at once")
    held: list[str] = Field(default=[], description="versions in memory: a search may name one of them")
    candidate: Candidate | None = None
    note: str = Field(default="", description="what whoever looks after it should know")


class Problem(BaseModel):
    """What was wrong with a request, and what to do."""

    code: str
    message: str
    param: str | None
    hint: str


class Failure(BaseModel):
    """The body of every answer that is no success."""

    error: Problem
