"""A live index: changes to an index that are searchable in seconds and survive any crash, without a rebuild.

Beside the index, which stays as it is, lies a folder with a write-ahead log, segments that took up what the log
held, and `state.json`, which names them, the rows that are deleted, and the last change that all this holds. One
process writes (`Live`). Every shard follows the log by itself (`Follower`): it lets the items of all changes go,
and takes in those whose id falls to it, so that a replica that starts anew, or late, comes to the same state.
Knows nothing of models or clusters.
Shapes: N items, D dimensions.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationError, field_validator

from askew import artifacts, segments
from askew.ann import Rows, Vectors
from askew.config import Settings
from askew.errors import ArtifactError
from askew.segments import AGAIN, Plan
from askew.shards import NO_ROWS, Shard
from askew.wal import Entry, Log, Tail

STATE, LOG = "state.json", "log"
SUFFIX, FORMAT = ".live", 1
CHANGES = re.compile(r"changes-\d{20}-(\d\d)(\.|$)")  # a segment's name: the last change in it, and its bucket
UPSERT, DELETE = b"upsert", b"delete"
MAX_DELTAS = 4  # more segments of changes in one bucket become one
MAX_DEAD = 0.25  # a segment of which more is deleted is written anew


class State(Settings):
    """What `state.json` says."""

    format: int = FORMAT
    index: str  # the key of the index that the changes are to
    upto: int = Field(default=0, ge=0)  # the last change that the segments hold
    # all of them in order, with their keys; None: those of the index
    segments: dict[str, str] | None = Field(default=None, min_length=1)
    dead: dict[str, artifacts.File] = Field(default_factory=dict)  # of a segment: the file of its deleted rows
    sum: str = ""  # of its own text, this being empty

    def written(self) -> str:
        """The text of `state.json`, with its sum."""
        return artifacts.sealed(self.model_copy(update={"sum": ""}).model_dump_json(indent=1))

    @field_validator("segments", "dead")
    @classmethod
    def _inside(cls, named: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        if astray := [name for name in named or () if not artifacts.inside(name)]:
            raise ValueError(f"{astray[0]!r} lies elsewhere")
        return named

    def files(self) -> set[str]:
        """Name what lies beside the state."""
        return {STATE, LOG, *(self.segments or {}), *(_dead(name, self.upto) for name in self.dead)}


def place(index: Path) -> Path:
    """Name the folder of an index's changes."""
    return index.with_name(f"{index.name}{SUFFIX}")


def read(index: Path, release: str | None = None) -> tuple[Plan, int]:
    """Read what an index and its changes are now, and the last change that is in it; the log has the rest.

    Raises ArtifactError when they do not go together.
    """
    plan, folder = Plan.read(index, release), place(index)
    state = _state(folder, plan.key)
    if state.segments is None:
        return plan, state.upto
    places = {name: folder for name in state.segments if name not in plan.segments}
    dead = {name: _rows(folder / _dead(name, state.upto), file) for name, file in state.dead.items()}
    buckets = {name: int(found[1]) for name in state.segments if (found := CHANGES.match(name))}
    now = replace(plan, segments=state.segments, places=places, dead=dead, buckets=buckets)
    return now, state.upto


def state(index: Path) -> State:
    """Read what of an index's changes is in segments. Raises ArtifactError when it is of another index."""
    return _state(place(index), artifacts.read(index, "index", verify=False).key)


def contents(index: Path, state: State) -> dict[str, str]:
    """Name the files that a state needs in the folder of changes, beside itself and the log, with their sha256.

    They never change, but go when a second state has come after this one.
    """
    folder, own = place(index), Plan.read(index).segments
    found = {_dead(name, state.upto): file.sha256 for name, file in state.dead.items()}
    for name in state.segments or {}:
        if name not in own:
            found |= {f"{name}/{one}": sum_ for one, sum_ in artifacts.contents(folder / name).items()}
    return found


def same(folder: Path, other: Path) -> bool:
    """Tell whether two folders of changes hold the same, however their logs are cut into files.

    Their segments are not read. Raises ArtifactError when they are of different indexes.
    """
    state = State.model_validate_json((other / STATE).read_bytes())
    if _state(folder, state.index).written() != state.written():
        return False
    logs = (Tail(one / LOG, state.upto).read() for one in (folder, other))
    return all(one == another for one, another in zip_longest(*logs))


class Live:
    """The writing end."""

    def __init__(self, index: Path) -> None:
        """Open an index for changes. Raises ArtifactError when another process has, or when a file is damaged."""
        self._index, self._folder = index, place(index)
        self._log = Log(self._folder / LOG)
        try:
            self._recover()
        except BaseException:
            self._log.close()
            raise

    def _recover(self) -> None:
        plan, upto = read(self._index)
        self._schema = plan.open(next(iter(plan.segments))).items().schema
        self.dim, self.release = plan.design.dim, plan.release
        if self._log.last < upto:
            raise ArtifactError(f"change {upto} in {self._folder / LOG}", str(self._log.last), "restore the log")
        _sweep(self._folder, _state(self._folder, plan.key).files())  # after a compaction that was killed

    @property
    def last(self) -> int:
        """The number of the last change."""
        return self._log.last

    def upsert(self, vectors: Vectors, items: Sequence[Mapping[str, Any]]) -> int:
        """Add N items with their vectors (N, D), or put them in the place of those of the same ids.

        Returns the change's number when it is on disk. Raises ArtifactError when rows do not match, a vector is
        not finite, or an item does not fit the index's fields.
        """
        vectors = np.asarray(vectors, dtype=np.float32)
        if vectors.shape != (len(items), self.dim) or not np.isfinite(vectors).all():
            wanted = f"{len(items)} finite vectors of {self.dim} dimensions"
            raise ArtifactError(wanted, f"{vectors.shape}", "embed them by the index's model")
        table = self._fitting(items)
        segments.refuse_doubles(table["item_id"], "a change")
        flat = pa.array(vectors.ravel(), pa.float32())
        column = pa.FixedSizeListArray.from_arrays(flat, self.dim)
        return self._log.append(_packed(UPSERT, table.append_column("vector", column)))

    def _fitting(self, items: Sequence[Mapping[str, Any]]) -> pa.Table:
        known = (
            {field.name for field in self._schema.field("fields").type}
            if "fields" in self._schema.names
            else set()
        )
        for item in items:
            if more := set(item.get("fields") or {}) - known:
                found = f"{sorted(more)} of item {item.get('item_id')!r}"
                raise ArtifactError(
                    f"fields among {', '.join(sorted(known))}", found, "leave it out, or index anew"
                )
        try:
            return pa.Table.from_pylist([{"has_image": False, **item} for item in items], self._schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ArtifactError("items of the index's fields and types", str(error), "mend the item") from None

    def delete(self, item_ids: Sequence[str]) -> int:
        """Delete items; an id that is not there is passed over. Returns the change's number when it is on disk."""
        return self._log.append(_packed(DELETE, pa.table({"item_id": pa.array(item_ids, pa.string())})))

    def compact(self) -> int:
        """Put the changes of the log into segments; returns the last one's number.

        Goes on while others search: what they have open stays theirs. Killed at any point, nothing is lost.
        """
        upto = self._log.turn()
        plan, before = read(self._index)
        if upto > before:
            old, new = _state(self._folder, plan.key), _compacted(self._folder, plan, before, upto)
            artifacts.write_text(self._folder / STATE, new.written())
            artifacts.sync(self._folder)
            self._log.forget(before)  # of the last state's changes and files some reader may still be in need
            _sweep(self._folder, old.files() | new.files())
        return upto

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write."""
        self._log.close()


class Follower:
    """A shard that takes in changes as they come."""

    def __init__(
        self, index: Path, number: int = 0, num_shards: int = 1, release: str | None = None, *, gpu: bool = False
    ) -> None:
        """Open shard `number` of `num_shards` as the index and all its changes are now."""
        self._index, self._number, self._num_shards, self._gpu = index, number, num_shards, gpu
        self._folder = place(index)
        plan, upto = read(index, release)
        self.shard = Shard(plan, plan.share(number, num_shards), gpu=gpu)
        self._tail = Tail(self._folder / LOG, upto)
        self.follow()

    def reopened(self) -> "Follower":
        """Open the same shard anew, as the index and all its changes are now."""
        return Follower(self._index, self._number, self._num_shards, self.shard.plan.release, gpu=self._gpu)

    @property
    def last(self) -> int:
        """The number of the last change taken in."""
        return self._tail.last

    def follow(self) -> int:
        """Take in the changes since the last call; returns how many they were.

        Raises ArtifactError when the log no longer holds them, for they are in segments now: open a new one then.
        """
        count = 0
        for entry in self._tail.read():
            count += 1
            kind, table = _unpacked(entry)
            ids = table["item_id"]
            self.shard.delete(ids.to_pylist())
            if kind == UPSERT:
                buckets = segments.bucket(ids.combine_chunks())
                mine = table.filter(pa.array(buckets % self._num_shards == self._number))
                self.shard.upsert(_vectors(mine), mine.drop_columns("vector"))
        return count


# --- compaction ----------------------------------------------------------------------------------


def _compacted(folder: Path, plan: Plan, before: int, upto: int) -> State:
    """Write the changes after `before`, up to `upto`, as a segment, and tell which rows they let go."""
    changed, added = _last_of_each(folder, before, upto)
    dead = {}
    for name in plan.segments:
        items = plan.open(name).items()  # checked: what is damaged shall not get a new checksum
        gone = pc.is_valid(pc.index_in(items["item_id"], value_set=changed)).to_numpy()
        dead[name] = np.union1d(plan.dead.get(name, NO_ROWS), np.flatnonzero(gone))
    kept = _rewritten(folder, plan, dead, upto)
    if added.num_rows:
        of = segments.bucket(added["item_id"].combine_chunks())
        for bucket in np.unique(of).tolist():
            name, mine = f"changes-{upto:020d}-{bucket:02d}", added.filter(pa.array(of == bucket))
            segments.write(folder / name, _vectors(mine), mine.drop_columns("vector"), plan.empty(), plan.release)
            kept[name] = _key(folder / name)
    files = {name: _write_rows(folder / _dead(name, upto), dead[name]) for name in kept if len(dead.get(name, ()))}
    return State(index=plan.key, upto=upto, segments=kept, dead=files)


def _last_of_each(folder: Path, before: int, upto: int) -> tuple[pa.Array, pa.Table]:
    """Which items changes are of, and what they were at last, those that were not deleted then."""
    last: dict[str, tuple[int, int]] = {}
    tables: list[pa.Table] = []
    for entry in Tail(folder / LOG, before).read():
        if entry.number > upto:
            break
        kind, table = _unpacked(entry)
        for row, item_id in enumerate(table["item_id"].to_pylist()):
            last[item_id] = (len(tables), row) if kind == UPSERT else (-1, row)
        if kind == UPSERT:
            tables.append(table)
    rows: list[list[int]] = [[] for _ in tables]
    for number, row in last.values():
        if number >= 0:
            rows[number].append(row)
    added = [table.take(pa.array(sorted(at), pa.int64())) for table, at in zip(tables, rows, strict=True)]
    return pa.array(list(last), pa.string()), pa.concat_tables(added) if added else pa.table({})


def _rewritten(folder: Path, plan: Plan, dead: Mapping[str, Rows], upto: int) -> dict[str, str]:
    """Write segments anew of which too much is deleted, and many of one bucket as one; returns all by name.

    A segment of the index keeps its place, though nothing of it were left: by its place it has its shard.
    """
    kept = {}
    for name, key in plan.segments.items():
        if name not in plan.buckets:
            size = plan.open(name, verify=False).size
            anew = MAX_DEAD * size < len(dead[name]) < size
            new = f"{name.partition('.')[0]}.{upto:020d}" if anew else name
            kept[new] = _write_alive(folder / new, plan, [name], dead) if anew else key
    for bucket in sorted(set(plan.buckets.values())):
        names = [name for name in plan.segments if plan.buckets.get(name) == bucket]
        size = sum(plan.open(name, verify=False).size for name in names)
        gone = sum(len(dead[name]) for name in names)
        if len(names) <= MAX_DELTAS and gone <= MAX_DEAD * size:
            kept |= {name: plan.segments[name] for name in names}
        elif gone < size:
            new = f"{names[0].partition('.')[0]}.{upto:020d}"
            kept[new] = _write_alive(folder / new, plan, names, dead)
    return kept


def _write_alive(path: Path, plan: Plan, names: Sequence[str], dead: Mapping[str, Rows]) -> str:
    vectors, items = [], []
    for name in names:
        segment = plan.open(name, verify=False)
        alive = np.setdiff1d(np.arange(segment.size), dead[name])
        if len(alive):
            vectors.append(segment.index().vectors(alive))
            items.append(segment.items().take(pa.array(alive)))
    segments.write(path, np.concatenate(vectors), pa.concat_tables(items), plan.empty(), plan.release)
    return _key(path)


# --- files ---------------------------------------------------------------------------------------


def _state(folder: Path, index: str) -> State:
    path = folder / STATE
    if not path.exists():
        return State(index=index)
    content = path.read_bytes()
    do = "open it with the version of askew that wrote it, or build the index again"
    artifacts.refuse_format(path, content, FORMAT, do, unsaid=FORMAT)
    try:
        state = State.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(f"a live index's state in {path}", f"{error.error_count()} errors", AGAIN) from None
    artifacts.check_seal(path, content, state.sum, "restore it from a copy")
    if state.index != index:
        raise ArtifactError(f"changes to index {index[:12]} in {folder}", state.index[:12], "move them away")
    return state


def _sweep(folder: Path, files: set[str]) -> None:
    """Remove what no state names."""
    for path in folder.iterdir():
        if path.name not in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _key(folder: Path) -> str:
    return artifacts.read(folder, "segment", verify=False).key


def _dead(name: str, upto: int) -> str:
    return f"{name}.dead-{upto:020d}.npy"


def _write_rows(path: Path, rows: Rows) -> artifacts.File:
    np.save(path, rows)
    artifacts.sync(path)
    return artifacts.File(bytes=path.stat().st_size, sha256=artifacts.sha256(path))


def _rows(path: Path, file: artifacts.File) -> Rows:
    artifacts.check(path, file)
    rows: Rows = np.load(path)
    return rows


def _vectors(table: pa.Table) -> Vectors:
    column = table["vector"].combine_chunks()
    flat: Vectors = column.flatten().to_numpy()
    return flat.reshape(len(column), column.type.list_size)


def _packed(kind: bytes, table: pa.Table) -> bytes:
    """A change as bytes: an Arrow stream whose schema says what is done with its items."""
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({b"change": kind})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _unpacked(entry: Entry) -> tuple[bytes, pa.Table]:
    table = pa.ipc.open_stream(entry.content).read_all()
    return table.schema.metadata[b"change"], table.replace_schema_metadata(None)
