"""Live indexes against a plain dictionary: changes, compaction, restarts, kills, any number of shards."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.flipping import flips

from askew import artifacts, live, segments, wal
from askew.ann import Design, Effort, Index
from askew.errors import ArtifactError
from askew.hits import merge
from askew.live import Follower, Live

DIM = 8
FULL = Effort(lists=64, again=1 << 20, breadth=4096)
IDS = [f"i{n}" for n in range(40)]
SCHEMA = pa.schema({
    "item_id": pa.string(), "title": pa.string(), "has_image": pa.bool_(),
    "fields": pa.struct({"price": pa.float64()}),
})  # fmt: skip


def vector(seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=DIM)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


def item(item_id: str, seed: int) -> dict[str, Any]:
    return {"item_id": item_id, "title": f"title {seed}", "has_image": True, "fields": {"price": float(seed)}}


def batch(ids: Sequence[str], seeds: Sequence[int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    return np.stack([vector(s) for s in seeds]), [item(i, s) for i, s in zip(ids, seeds, strict=True)]


def made(root: Path, kind: str = "flat", size: int = 20, **design: Any) -> Path:
    """An index of items i0, i1, … whose seeds are their numbers, in three segments."""
    vectors = np.stack([vector(n) for n in range(size)])
    table = pa.Table.from_pylist([item(f"i{n}", n) for n in range(size)], SCHEMA)
    names = [f"segment-{n:05d}" for n in range(3)]
    with artifacts.draft(root, "index", {"kind": kind}, {}) as draft:
        empty = Index.trained(Design(kind=kind, dim=DIM, **design), vectors)  # type: ignore[arg-type]
        empty.write(draft.folder / segments.EMPTY)
        for name, rows in zip(names, np.array_split(np.arange(size), 3), strict=True):
            segments.write(draft.folder / name, vectors[rows], table.take(pa.array(rows)), empty, "r1")
        segments.tell(draft, names, FULL)
    return artifacts.place(root, "index", artifacts.key("index", {"kind": kind}, {}))


def answered(shards: Sequence[Follower], query: np.ndarray, k: int) -> list[tuple[str, float, float]]:
    """What shards answer: id, price and score of each hit."""
    [hits] = merge([s.shard.answer(s.shard.search(query[None], k)) for s in shards], k)
    return [(h["item_id"], h["fields"]["price"], h["score"]) for h in hits]


def expected(state: dict[str, int], query: np.ndarray, k: int) -> list[tuple[str, float, float]]:
    found = [(i, float(seed), float(vector(seed) @ query)) for i, seed in state.items()]
    return sorted(found, key=lambda h: (-h[2], h[0]))[:k]


def same(mine: list[tuple[str, float, float]], theirs: list[tuple[str, float, float]], atol: float = 1e-5) -> None:
    assert [m[:2] for m in mine] == [t[:2] for t in theirs]
    np.testing.assert_allclose([m[2] for m in mine], [t[2] for t in theirs], atol=atol)


class Machine(RuleBasedStateMachine):
    """Any order of changes, compactions and restarts, beside a dictionary."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.index = made(self.folder / f"{time.monotonic_ns()}")
        self.live = Live(self.index)
        self.state = {f"i{n}": n for n in range(20)}
        self.shards = [Follower(self.index, n, 2) for n in range(2)]

    def teardown(self) -> None:
        self.live.close()

    @rule(ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=5, unique=True), seed=st.integers(100, 10**6))
    def upsert(self, ids: list[str], seed: int) -> None:
        seeds = [seed + n for n in range(len(ids))]
        self.live.upsert(*batch(ids, seeds))
        self.state |= dict(zip(ids, seeds, strict=True))

    @rule(ids=st.lists(st.sampled_from(IDS), max_size=8))
    def delete(self, ids: list[str]) -> None:
        self.live.delete(ids)
        for item_id in ids:
            self.state.pop(item_id, None)

    @rule()
    def compact(self) -> None:
        for shard in self.shards:
            shard.follow()
        assert self.live.compact() == self.live.last

    @rule()
    def writer_restarts(self) -> None:
        self.live.close()
        self.live = Live(self.index)

    @rule(number=st.integers(0, 1))
    def shard_restarts(self, number: int) -> None:
        self.shards[number] = Follower(self.index, number, 2)

    @rule(num_shards=st.integers(1, 3))
    def other_number_of_shards(self, num_shards: int) -> None:
        shards = [Follower(self.index, n, num_shards) for n in range(num_shards)]
        same(answered(shards, vector(7), 50), expected(self.state, vector(7), 50))

    @invariant()
    def shards_know_all(self) -> None:
        for shard in self.shards:
            shard.follow()
            assert shard.last == self.live.last
        assert sum(s.shard.size for s in self.shards) == len(self.state)
        same(answered(self.shards, vector(3), 12), expected(self.state, vector(3), 12))


def test_any_order_of_changes_is_what_a_dictionary_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_DELTAS", 2)
    Machine.folder = tmp_path
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Machine, settings=settings(max_examples=25, stateful_step_count=20, deadline=None))


KINDS = [
    ("flat", {}), ("hnsw", {}), ("ivf_flat", {"lists": 4}), ("ivf_fp16", {"lists": 4}), ("ivf_sq8", {"lists": 4}),
    ("ivf_pq", {"lists": 4, "refine": "fp16"}), ("ivf_rabitq", {"lists": 4, "refine": "fp16"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "design"), KINDS)
def test_every_kind_takes_changes_and_is_compacted(
    kind: str, design: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_DELTAS", 1)
    index, state = made(tmp_path, kind, 60, **design), {f"i{n}": n for n in range(60)}
    with Live(index) as writer:
        for turn in range(3):
            ids = [f"i{n}" for n in range(10 * turn, 10 * turn + 25)]
            seeds = [1000 * (turn + 1) + n for n in range(len(ids))]
            writer.upsert(*batch(ids, seeds))
            state |= dict(zip(ids, seeds, strict=True))
            writer.delete(gone := [f"i{n}" for n in range(turn, 60, 7)])
            for item_id in gone:
                state.pop(item_id, None)
            writer.compact()
            shards = [Follower(index, n, 2) for n in range(2)]
            assert sum(s.shard.size for s in shards) == len(state)
            found = answered(shards, vector(5), len(state))
            assert {(i, p) for i, p, _ in found} == {(i, float(s)) for i, s in state.items()}
            exact = {i: float(vector(s) @ vector(5)) for i, s in state.items()}
            atol = 0.2 if kind == "ivf_sq8" else 0.002  # whose range is that of the vectors it was trained on
            np.testing.assert_allclose([s for _, _, s in found], [exact[i] for i, _, _ in found], atol=atol)
    plan, upto = live.read(index)
    assert upto == 6
    assert any(name.startswith("changes-") for name in plan.segments)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return made(tmp_path)


def test_a_shard_that_is_too_late_is_told_to_open_anew(index: Path) -> None:
    with Live(index) as writer:
        late = Follower(index)
        for turn in range(3):
            writer.upsert(vector(100 + turn)[None], [item("new", 100 + turn)])
            writer.compact()
        with pytest.raises(ArtifactError, match="read the newer state"):
            late.follow()
        same(answered([Follower(index)], vector(102), 1), [("new", 102.0, 1.0)])


@pytest.mark.parametrize(
    ("vectors", "items", "found"),
    [
        (np.ones((1, DIM + 1)), [item("a", 1)], r"1 finite vectors of 8 dimensions; found \(1, 9\)"),
        (np.ones((2, DIM)), [item("a", 1)], "1 finite vectors"),
        (np.full((1, DIM), np.nan), [item("a", 1)], "1 finite vectors"),
        (np.ones((1, DIM)), [{**item("a", 1), "fields": {"size": 3}}], r"fields among price; found \['size'\] of"),
        (np.ones((1, DIM)), [{**item("a", 1), "fields": {"price": "low"}}], "the index's fields and types"),
        (np.ones((2, DIM)), [item("a", 1), item("a", 2)], r"each item once in a change; found \['a'\]"),
    ],
)  # fmt: skip
def test_a_change_that_does_not_fit_is_refused_and_nothing_of_it_stays(
    index: Path, vectors: np.ndarray, items: list[dict[str, Any]], found: str
) -> None:
    with Live(index) as writer:
        with pytest.raises(ArtifactError, match=found):
            writer.upsert(vectors, items)
        assert writer.last == 0
        assert Follower(index).shard.size == 20


def test_two_writers_are_one_too_many(index: Path) -> None:
    with Live(index), pytest.raises(ArtifactError, match="another that writes it"):
        Live(index)


def test_changes_to_another_index_are_refused(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one"), made(tmp_path / "other", size=21)
    with Live(one) as writer:
        writer.delete(["i1"])
        writer.compact()
    live.place(one).rename(live.place(other))
    state = live.place(other) / live.STATE
    told = json.loads(state.read_text()) | {"index": "0" * 64, "sum": ""}
    state.write_text(json.dumps(told))
    for what in (Live, Follower):
        with pytest.raises(ArtifactError, match="changes to index"):
            what(other)


def test_a_state_names_all_that_a_copy_needs_and_copies_are_told_apart(index: Path, tmp_path: Path) -> None:
    with Live(index) as writer:
        for seed in range(30):
            writer.upsert(*batch([f"i{seed}"], [seed + 100]))
            if seed in (10, 20, 25):
                writer.compact()
        state = live.state(index)
        copy, changes = tmp_path / "copy", live.place(index)
        for name, sum_ in live.contents(index, state).items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(changes / name, copy / name)
            assert artifacts.sha256(copy / name) == sum_
        (copy / live.STATE).write_text(state.written())
        assert wal.copy(changes / live.LOG, state.upto, copy / live.LOG) == 30
        assert live.same(changes, copy)
        assert live.same(copy, changes)
        writer.delete(["i1"])
        assert not live.same(changes, copy)
        there, back = Follower(index), tmp_path / "back" / index.name
        shutil.copytree(index, back)
        copy.rename(live.place(back))
        shard = Follower(back)
        shard.shard.delete(["i1"])
        assert answered([shard], vector(7), 40) == answered([there], vector(7), 40)
        writer.compact()
        assert not live.same(changes, live.place(back))


def test_damage_to_what_a_compaction_wrote_is_refused(index: Path) -> None:
    with Live(index) as writer:
        writer.upsert(vector(100)[None], [item("i3", 100)])
        writer.compact()
    for path in sorted(p for p in live.place(index).rglob("*") if p.is_file() and "log" not in p.parts):
        whole = path.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises((ArtifactError, UnicodeDecodeError)):
                Follower(index)
        path.write_bytes(whole)
    assert Follower(index).shard.size == 20


def changed(index: Path, seed: int, write: int) -> None:
    """Change an index at random for ever, and tell each change that was acknowledged."""
    drawn = random.Random(seed)
    writer = Live(index)
    while True:
        if drawn.random() < 0.1:
            writer.compact()
        ids, number = drawn.sample(IDS, 3), writer.last + 1
        if drawn.random() < 0.3:
            writer.delete(ids)
            seeds = [0, 0, 0]
        else:
            seeds = [10 * number + n for n in range(3)]
            writer.upsert(*batch(ids, seeds))
        told = [f"{number}:{i}:{s}" for i, s in zip(ids, seeds, strict=True)]
        os.write(write, (" ".join(told) + "\n").encode())


def test_killed_at_any_moment_no_acknowledged_change_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_DELTAS", 2)
    index, state, last = made(tmp_path), {f"i{n}": n for n in range(20)}, 0
    for turn in range(25):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                changed(index, turn, write)
            finally:
                os._exit(1)
        os.close(write)
        time.sleep(0.02 + 0.01 * turn)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        told = b"".join(iter(lambda r=read: os.read(r, 1 << 16), b"")).decode()
        os.close(read)
        for line in told[: told.rfind("\n") + 1].splitlines():
            for word in line.split():
                number, item_id, seed = word.split(":")
                last = int(number)
                state.pop(item_id, None)
                if int(seed):
                    state[item_id] = int(seed)
        with Live(index) as writer:
            extra = writer.last - last  # at most the one that was on disk and not yet told
            assert extra in (0, 1)
        follower = Follower(index)
        found = {i: p for i, p, _ in answered([follower], vector(1), 100)}
        if extra:
            [entry] = [e for e in live.Tail(live.place(index) / live.LOG, last).read() if e.number == last + 1]
            kind, table = live._unpacked(entry)
            for row in table.to_pylist():
                state.pop(row["item_id"], None)
                if kind == live.UPSERT:
                    state[row["item_id"]] = int(row["fields"]["price"])
            last += 1
        assert found == {i: float(s) for i, s in state.items()}
    assert last > 50


def test_every_flipped_bit_of_the_state_is_refused(tmp_path: Path) -> None:
    index = made(tmp_path)
    with Live(index) as changes:
        changes.upsert(*batch(["i3", "n1"], [50, 51]))
        changes.compact()
    for _ in flips(live.place(index) / live.STATE, every=3):
        with pytest.raises(ArtifactError, match=r"state\.json"):
            live.read(index)


@pytest.mark.parametrize("name", ["segment-00001/items.arrow", segments.EMPTY])
def test_a_compaction_gives_nothing_damaged_a_new_checksum(tmp_path: Path, name: str) -> None:
    index = made(tmp_path, "ivf_flat", lists=2)
    with Live(index) as changes:
        changes.upsert(*batch(["i3", "n1"], [50, 51]))
        path = index / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=path.name):
            changes.compact()
