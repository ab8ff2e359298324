"""Segments: the vectors and display fields of an index in immutable folders.

A segment folder holds `vectors.faiss` (inner product) and `items.arrow` (Arrow IPC, memory-mapped) in the same row
order, and a manifest with checksums and the release that the vectors are of. Both files open without askew. There
are more segments than shards, so that the number of serving shards changes without a rebuild. Knows nothing of
models, clusters or searching.
Shapes: N items, D dimensions.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from askew import artifacts
from askew.ann import Design, Effort, Index, Vectors
from askew.config import Settings
from askew.errors import ArtifactError
from askew.register import hashes

VECTORS, ITEMS, EMPTY = "vectors.faiss", "items.arrow", "empty.faiss"
COLUMNS = ("item_id", "split", "title", "fields", "image", "has_image")
IDENTIFYING = ("towers.json", "tokenizer.json", "weights.safetensors")  # files of a model
BUCKETS = 16
AGAIN = "build the index again"


@dataclass(frozen=True)
class Segment:
    """A segment whose files are as its manifest states them."""

    folder: Path
    design: Design
    release: str
    size: int
    key: str

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> "Segment":
        """Read a segment's manifest, and check its files against it.

        Raises ArtifactError naming the file when one is missing or altered.
        """
        manifest = artifacts.read(folder, "segment", verify=verify)
        design = read_design(manifest.details, folder)
        try:
            return cls(folder, design, manifest.inputs["release"], manifest.counts["items"], manifest.key)
        except KeyError as error:
            raise ArtifactError(f"what a segment tells in {folder}", f"no {error}", AGAIN) from None

    def index(self) -> Index:
        """Read the vectors. Raises ArtifactError when they are not those of this segment's items."""
        index = Index.read(self.folder / VECTORS, self.design)
        if index.size != self.size:
            raise ArtifactError(f"{self.size} vectors in {self.folder / VECTORS}", str(index.size), AGAIN)
        return index

    def items(self) -> pa.Table:
        """Map the items. Raises ArtifactError when they are not those of this segment's vectors."""
        table = mapped(self.folder / ITEMS)
        if table.num_rows != self.size:
            raise ArtifactError(f"{self.size} items in {self.folder / ITEMS}", str(table.num_rows), AGAIN)
        return table


def write(folder: Path, vectors: Vectors, items: pa.Table, empty: Index | None = None, release: str = "") -> int:
    """Write (N, D) vectors and their N items as a segment; returns the vectors' bytes on disk.

    `empty` is the trained index that all segments of an index start from; without one they are searched exactly.
    Raises ArtifactError when a vector is not finite, when rows do not match, or when an item stands there twice.
    """
    if len(vectors) != items.num_rows or not len(vectors):
        raise ArtifactError(
            "a vector for each of one or more items", f"{len(vectors)} for {items.num_rows}", "report it"
        )
    if not (finite := np.isfinite(vectors).all(axis=1)).all():
        bad = items["item_id"].filter(pa.array(~finite)).to_pylist()
        raise ArtifactError(
            "finite vectors", f"{len(bad)} that are not, of items {bad[:5]}", "train the model again"
        )
    refuse_doubles(items["item_id"], str(folder))
    index = Index.flat(vectors.shape[1]) if empty is None else empty.copy()
    index.add(vectors)
    with artifacts.part(folder, "segment", {"release": release}) as draft:
        index.write(draft.folder / VECTORS)
        write_items(draft.folder / ITEMS, items)
        draft.counts["items"] = len(vectors)
        draft.details["design"] = index.design.model_dump()
    return (folder / VECTORS).stat().st_size


def write_items(path: Path, items: pa.Table) -> None:
    """Write items as an Arrow file that can be mapped."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, items.schema) as writer:
        writer.write_table(items.combine_chunks())


def refuse_doubles(ids: pa.ChunkedArray, where: str) -> None:
    """Raise ArtifactError when an item stands more than once."""
    counted = ids.value_counts()
    if len(counted) < len(ids):
        twice = [row["values"] for row in counted.filter(pc.greater(counted.field("counts"), 1)).to_pylist()]
        raise ArtifactError(f"each item once in {where}", f"{twice[:5]} more than once", AGAIN)


# --- an index, of many segments ------------------------------------------------------------------


class _Told(Settings):
    """What an index's manifest says of a segment."""

    name: str
    items: int = Field(ge=0)
    key: str


@dataclass(frozen=True)
class Plan:
    """What an index's manifest says of it: its design, how hard it is searched, its release and its segments."""

    folder: Path
    key: str
    design: Design
    effort: Effort
    release: str
    segments: Mapping[str, str]  # name: key, in order
    details: Mapping[str, Any]
    places: Mapping[str, Path] = field(default_factory=dict)  # of segments that lie elsewhere than in `folder`
    dead: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)  # rows of segments that are deleted
    buckets: Mapping[str, int] = field(default_factory=dict)  # of segments of changes

    @property
    def size(self) -> int:
        """Number of items in the index, without what changed since."""
        return sum(int(one["items"]) for one in self.details["segments"])

    @classmethod
    def read(cls, folder: Path, release: str | None = None) -> "Plan":
        """Read an index's manifest. Raises ArtifactError when it is of another release than the one given."""
        manifest = artifacts.read(folder, "index", verify=False)
        details = manifest.details
        try:
            effort, found = Effort.model_validate(details["effort"]), str(details["release"])
            told = [_Told.model_validate(one) for one in details["segments"]]
        except (KeyError, TypeError, ValidationError) as error:
            raise ArtifactError(f"what an index tells in {folder}", f"no {error}", AGAIN) from None
        if release is not None and found != release:
            raise ArtifactError(f"an index of release {release[:12]} in {folder}", f"one of {found[:12]}", AGAIN)
        names = {one.name: one.key for one in told}
        if not told or not all(map(artifacts.inside, names)):
            raise ArtifactError(f"segments inside of {folder}", str(list(names)[:5]), AGAIN)
        if len(names) < len(told):
            raise ArtifactError(f"each segment once in {folder}", "a name that stands there twice", AGAIN)
        return cls(folder, manifest.key, read_design(details, folder), effort, found, names, details)

    def open(self, name: str, *, verify: bool = True) -> Segment:
        """Open one segment, which must be the one that the index was built with."""
        if name not in self.segments:
            raise ArtifactError(f"a segment {name} of {self.folder}", "none of this name", "see its manifest")
        segment = Segment.open(self.places.get(name, self.folder) / name, verify=verify)
        if segment.key != (key := self.segments[name]):
            raise ArtifactError(f"segment {key[:12]} in {segment.folder}", segment.key[:12], AGAIN)
        if segment.design != self.design or segment.release != self.release:
            raise ArtifactError(
                f"a segment of release {self.release[:12]}, {self.design.factory} in {segment.folder}",
                f"{segment.release[:12]}, {segment.design.factory}", AGAIN,
            )  # fmt: skip
        return segment

    @property
    def schema(self) -> pa.Schema:
        """The columns of items, without their photos, as the first segment has them."""
        items = self.open(next(iter(self.segments)), verify=False).items()
        return pa.schema([field for field in items.schema if field.name != "image"])

    @property
    def fields(self) -> pa.Schema:
        """The fields of items beside id and title, of those that have a type."""
        fields = self.schema.field("fields").type if "fields" in self.schema.names else ()
        return pa.schema([field for field in fields if not pa.types.is_null(field.type)])

    def share(self, number: int, num_shards: int) -> list[str]:
        """Name the segments that shard number `number` of `num_shards` serves, more or less as many as the others.

        Those of changes go by the hash of their items' ids (`bucket`), so that an item that was changed is always
        of one shard, whether the change is in a segment yet or not.
        """
        first = assigned([name for name in self.segments if name not in self.buckets], number, num_shards)
        return first + [name for name, bucket in self.buckets.items() if bucket % num_shards == number]

    def empty(self) -> Index:
        """Read the trained index that this one's segments start from."""
        if self.design.exact:
            return Index.flat(self.design.dim)
        files = artifacts.read(self.folder, "index", verify=False).files
        if EMPTY not in files:
            raise ArtifactError(f"the file {self.folder / EMPTY} of an index", "none", AGAIN)
        artifacts.check(self.folder / EMPTY, files[EMPTY])
        return Index.read(self.folder / EMPTY, self.design)


def tell(draft: artifacts.Draft, names: Sequence[str], effort: Effort | None = None) -> None:
    """Note in an index's draft the segments that were written into it, in order, and how they are searched."""
    kept = [artifacts.read(draft.folder / name, "segment", verify=False) for name in names]
    draft.counts["items"] = sum(manifest.counts["items"] for manifest in kept)
    draft.details |= {
        "design": kept[0].details["design"],
        "effort": (effort or Effort()).model_dump(),
        "release": kept[0].inputs["release"],
        "segments": [
            {"name": name, "items": manifest.counts["items"], "key": manifest.key}
            for name, manifest in zip(names, kept, strict=True)
        ],
    }


def identity(model: artifacts.Manifest, catalogue: str, dim: int, transform: int) -> str:
    """Hash what makes vectors what they are: the release identity, in hex.

    The content of weights, tokenizer and towers (with fusion and sizes), how photos are decoded
    (`inputs.TRANSFORM`), the vectors' type and width, and the catalogue's key.
    """
    made_of = {
        "model": {name: model.files[name].sha256 for name in IDENTIFYING},
        "photos": transform, "dtype": "float32", "dim": dim, "catalogue": catalogue,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def assigned(names: Sequence[str], shard: int, num_shards: int) -> list[str]:
    """Name the segments that shard number `shard` of `num_shards` serves."""
    return list(names[shard::num_shards])


def bucket(item_ids: pa.Array | Sequence[str]) -> NDArray[np.int64]:
    """Tell by their ids in which of BUCKETS the items of changes go."""
    return (hashes(item_ids) % BUCKETS).astype(np.int64)


def read_design(details: Mapping[str, Any], folder: Path) -> Design:
    """Read a design from a manifest's details."""
    try:
        return Design.model_validate(details.get("design"))
    except ValidationError as error:
        raise ArtifactError(f"an index's design in {folder}", f"{error.error_count()} errors", AGAIN) from None


def mapped(path: Path) -> pa.Table:
    """Map an Arrow file. Raises ArtifactError when it is none."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(f"an Arrow file in {path}", str(error), AGAIN) from error
