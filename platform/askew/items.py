"""Products as they come: cleaned, embedded by the served model, put into its live index, or let go of.

Cleaned as the catalogue was when it was prepared; what cannot be used is told with its reason. There is one of
these in an endpoint, for one process writes an index; while nothing comes, jobs may write.
Shapes: N items, D dimensions, K hits.
"""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from cachetools import LRUCache
from numpy.typing import NDArray

from askew import inputs, segments, sources
from askew.cleaning import Cleaner, CleanSettings, text_of
from askew.errors import ArtifactError
from askew.fetching import Problem
from askew.live import Live
from askew.models import Model
from askew.segments import Plan

SOURCE = "the endpoint"
EXPLAINED = 10_000  # items whose vectors are kept, by what they say and show
PARTS = ("text", "image", "fused")
HELD_S = 2.0  # so long after the last change nobody else may write


class Items:
    """The writing end of a live index, and the model that embeds what is written."""

    def __init__(self, model: str, index: str, release: str) -> None:
        """Load the model. Raises ArtifactError when it or the index does not fit."""
        self._index, self._model = Path(index), Model.load(Path(model))
        plan = Plan.read(self._index, release)
        self._text_fields = tuple(plan.details.get("text_fields", ("title",)))
        self._fields = plan.fields
        clean = CleanSettings(text_fields=self._text_fields, image_size=self._model.image_size)
        none = sources.Table(files=("-",))  # of files: items come by themselves
        self._cleaner = Cleaner(none.model_dump(), clean.model_dump(), self._fields, triplets=False)
        self._parts: LRUCache[bytes, dict[str, NDArray[np.float32]]] = LRUCache(EXPLAINED)
        self._live: Live | None = None
        self._idle: threading.Timer | None = None
        self._one = threading.RLock()

    def upsert(self, items: Sequence[Mapping[str, Any]]) -> tuple[int, int, list[dict[str, str]]]:
        """Add items, or put them in the place of those of the same ids; the last of several with one id counts.

        Returns the number of the change, how many items it has, and what was refused: item_id, reason, message.
        Of an item whose photo or field is refused the rest counts. Raises ArtifactError when another process
        writes.
        """
        rows, _, bad = self._cleaner.rows(self._table(items), SOURCE, _photos)
        refused = [{"item_id": one.id, "reason": one.reason, "message": one.message} for one in bad]
        last = {item_id: row for row, item_id in enumerate(rows["item_id"].to_pylist())}
        rows = rows.take(pa.array(sorted(last.values()), pa.int64())).combine_chunks()
        if not rows.num_rows:
            return self._changed(lambda live: live.last), 0, refused
        [batch] = rows.to_batches()
        vectors, kept = self._model.embedded(batch), batch.select(list(segments.COLUMNS)).to_pylist()
        return self._changed(lambda live: live.upsert(vectors, kept)), len(kept), refused

    def delete(self, item_ids: Sequence[str]) -> int:
        """Delete items; an id that is not there is passed over. Returns the change's number."""
        return self._changed(lambda live: live.delete(item_ids))

    def _changed(self, change: Any) -> int:
        with self._one:
            if self._idle:
                self._idle.cancel()
            self._live = self._live or Live(self._index)
            try:
                number: int = change(self._live)
                return number
            finally:
                self._idle = threading.Timer(HELD_S, self.close)
                self._idle.daemon = True
                self._idle.start()

    def close(self) -> None:
        """Let others write."""
        with self._one:
            if self._live:
                self._live.close()
                self._live = None

    def _table(self, items: Sequence[Mapping[str, Any]]) -> pa.Table:
        """Items as a table as the readers make it: of each known field a column, odd values as text."""
        named = {name for item in items for name in item["fields"]}
        if unknown := sorted(named - {*self._fields.names}):
            known = ", ".join(self._fields.names)
            raise ArtifactError(f"fields among {known}", ", ".join(unknown), "leave them out, or index anew")
        columns = {
            "item_id": pa.array([item["item_id"] for item in items], pa.string()),
            "title": pa.array([item["title"] for item in items], pa.string()),
            "image": pa.array([item["image"] for item in items], pa.binary()),
        }
        for field in self._fields:
            values = [item["fields"].get(field.name) for item in items]
            try:
                columns[field.name] = pa.array(values, field.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                columns[field.name] = pa.array([_as_text(value) for value in values], pa.string())
        return pa.table(columns)

    def explain(self, query: str, items: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
        """Tell of K items what their score is made of.

        "text", "image" and "fused" are cosines of the query and that vector of the item, "without_image" is the
        score that the item would have without its photo. Where there is no photo, "image" is None.
        """
        plain, asked = self._model.plain_queries([query])[0], self._model.queries([query])[0]
        beside = {"without_image": asked}
        return [
            {
                name: float(parts[name] @ beside.get(name, plain)) if name in parts else None
                for name in (*PARTS, *beside)
            }
            for parts in self._vectors(items)
        ]

    def _vectors(self, items: Sequence[Mapping[str, Any]]) -> list[dict[str, NDArray[np.float32]]]:
        """The vectors (D,) of K items: those of text, photo and both that the model has, and without the photo."""
        texts = [text_of(item, self._text_fields) for item in items]
        keys = [_digest(text, item["image"]) for text, item in zip(texts, items, strict=True)]
        with self._one:
            known = {key: self._parts[key] for key in keys if key in self._parts}
        if new := [row for row, key in enumerate(keys) if key not in known]:
            made = self._embedded([texts[row] for row in new], [items[row]["image"] for row in new])
            known |= dict(zip((keys[row] for row in new), made, strict=True))
            with self._one:
                self._parts.update(known)
        return [known[key] for key in keys]

    def _embedded(self, texts: list[str], images: Sequence[bytes | None]) -> list[dict[str, NDArray[np.float32]]]:
        there, size = np.array([image is not None for image in images]), self._model.image_size
        photos = np.zeros((len(texts), size, size, 3), np.uint8)
        for row, image in enumerate(images):
            if image is not None:
                photos[row] = inputs.pixels(image, size)
        found = self._model.items(texts, photos, there)
        alone = self._model.items(texts, photos, np.zeros_like(there))["index"]
        return [
            {name: found[name][row] for name in PARTS if name in found and (name != "image" or there[row])}
            | {"without_image": alone[row]}
            for row in range(len(texts))
        ]


def _digest(text: str, image: bytes | None) -> bytes:
    return hashlib.sha256(b"\0".join((text.encode(), b"" if image is None else b"1" + image))).digest()


def _photos(images: Sequence[object]) -> list[bytes | Problem | None]:
    """Photos that came with their items; one without a byte is refused as a file would be."""
    empty = Problem("empty", "the image has no bytes")
    return [(image or empty) if isinstance(image, bytes) else None for image in images]


def _as_text(value: object) -> str | None:
    return value if isinstance(value, str | None) else json.dumps(value)
