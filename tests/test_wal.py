"""The write-ahead log: what is acknowledged stays, whatever is cut off or flipped."""

import itertools
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flipping import flips

from askew import wal
from askew.errors import ArtifactError
from askew.wal import Log, Tail


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with Log(tmp_path) as log:
        yield log


def contents(folder: Path, after: int = 0) -> list[bytes]:
    return [entry.content for entry in Tail(folder, after).read()]


def filled(folder: Path, *changes: bytes) -> Path:
    with Log(folder) as log:
        for change in changes:
            log.append(change)
    return next(folder.glob("*.wal"))


def test_changes_are_numbered_from_one_and_read_in_order(tmp_path: Path, log: Log) -> None:
    assert [log.append(c) for c in (b"a", b"", b"c" * 100_000)] == [1, 2, 3]
    assert [(e.number, len(e.content)) for e in Tail(tmp_path, 0).read()] == [(1, 1), (2, 0), (3, 100_000)]
    assert [e.number for e in Tail(tmp_path, 2).read()] == [3]


def test_a_reader_follows_over_files_and_restarts(tmp_path: Path) -> None:
    log, tail = Log(tmp_path), Tail(tmp_path, 0)
    seen = []
    for number in range(1, 9):
        if number in (4, 5):
            assert log.turn() == number - 1
        if number == 6:
            log.close()
            log = Log(tmp_path)
        log.append(str(number).encode())
        seen += [e.number for e in tail.read()]
    log.close()
    assert seen == list(range(1, 9))
    assert list(tail.read()) == []


def test_an_empty_file_is_not_turned(tmp_path: Path, log: Log) -> None:
    assert (log.turn(), log.turn()) == (0, 0)
    log.append(b"a")
    assert (log.turn(), log.turn()) == (1, 1)
    assert len(list(tmp_path.glob("*.wal"))) == 2


def test_what_is_forgotten_is_gone_and_a_late_reader_is_told(tmp_path: Path, log: Log) -> None:
    late = Tail(tmp_path, 0)
    for change in (b"a", b"b"):
        log.append(change)
    log.forget(log.turn())
    log.append(b"c")
    assert contents(tmp_path, 2) == [b"c"]
    with pytest.raises(ArtifactError, match=r"change 1 in .*none before 3"):
        list(late.read())


def test_one_process_writes(tmp_path: Path) -> None:
    log = Log(tmp_path)
    with pytest.raises(ArtifactError, match="another that writes it"):
        Log(tmp_path)
    log.close()
    Log(tmp_path).close()


def test_a_change_that_is_too_large_is_refused_and_the_log_goes_on(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal, "MAX_CONTENT", 10)
    with pytest.raises(ArtifactError, match="at most 10 bytes; found 11"):
        log.append(b"x" * 11)
    assert log.append(b"x" * 10) == 1


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.data())
def test_cut_anywhere_the_whole_changes_before_it_stay_and_the_log_goes_on(
    tmp_path_factory: pytest.TempPathFactory, changes: list[bytes], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path = filled(folder, *changes)
    at = data.draw(st.integers(0, path.stat().st_size))
    os.truncate(path, at)
    ends = [sum(wal.HEAD.size + len(c) for c in changes[: n + 1]) for n in range(len(changes))]
    whole = [c for c, end in zip(changes, ends, strict=True) if end <= at]
    assert contents(folder) == whole
    with Log(folder) as log:
        assert log.last == len(whole)
        log.append(b"more")
    assert contents(folder) == [*whole, b"more"]


@pytest.mark.parametrize("end", [False, True])
def test_every_flipped_bit_is_refused_by_reader_and_writer_the_last_changes_too(tmp_path: Path, end: bool) -> None:
    path = filled(tmp_path, b"first", b"second")
    if end:  # a change that was being written when all stopped
        path.write_bytes(path.read_bytes() + filled(tmp_path / "other", b"third").read_bytes()[:-1])
    first, second = wal.HEAD.size + 5, 2 * wal.HEAD.size + 11
    for bit in itertools.islice(flips(path), 8 * second):
        found = f"damage at byte {0 if bit // 8 < first else first};|found format"  # by the mark's last letter
        if end and bit // 8 - first in range(8):
            continue  # its mark or length, and it is not the last: what is lost is not known
        flipped = path.read_bytes()
        with pytest.raises(ArtifactError, match=found):
            contents(tmp_path)
        with pytest.raises(ArtifactError, match=found):
            Log(tmp_path)
        assert path.read_bytes() == flipped


def test_what_the_system_had_not_written_when_it_stopped_is_cut_off(tmp_path: Path) -> None:
    path = filled(tmp_path, b"first", b"x" * 100)
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    assert contents(tmp_path) == [b"first"]
    with Log(tmp_path) as log:
        assert log.last == 1


def test_a_reader_beside_a_writer_takes_nothing_for_damage(tmp_path: Path) -> None:
    with Log(tmp_path) as log:
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                log.append(os.urandom(random.randrange(200_000)))

        writer = threading.Thread(target=write)
        writer.start()
        tail, seen = Tail(tmp_path, 0), 0
        until = time.monotonic() + 2
        while time.monotonic() < until:
            seen += sum(1 for _ in tail.read())
        stop.set()
        writer.join()
        assert seen + sum(1 for _ in tail.read()) == log.last > 10


def test_damage_in_a_file_that_others_follow_is_refused(tmp_path: Path) -> None:
    with Log(tmp_path) as log:
        log.append(b"a")
        log.turn()
        log.append(b"b")
    first, second = sorted(tmp_path.glob("*.wal"))
    os.truncate(first, 10)
    with pytest.raises(ArtifactError, match=r"damage at byte 0|change 1"):
        Log(tmp_path)
    first.unlink()
    second.rename(second.with_name(f"{3:020d}.wal"))
    with pytest.raises(ArtifactError, match=r"change 3 in .*found 2"):
        Log(tmp_path)


def test_a_copy_is_a_log_of_its_own_with_what_came_after_a_change(tmp_path: Path) -> None:
    with Log(tmp_path / "log") as log:
        for number in range(1, 8):
            log.append(b"%d" % number)
            if number in (2, 5):
                log.turn()
        assert wal.copy(tmp_path / "log", 4, tmp_path / "copy") == 7
        assert wal.copy(tmp_path / "log", 7, tmp_path / "none") == 7
    assert contents(tmp_path / "copy", 4) == [b"5", b"6", b"7"]
    for name, contains in (("copy", [b"5", b"6", b"7", b"8"]), ("none", [b"8"])):
        with Log(tmp_path / name) as log:
            assert log.append(b"8") == 8
        assert contents(tmp_path / name, 8 - len(contains)) == contains


def test_a_copy_of_a_damaged_log_is_refused_and_of_one_that_is_being_written_is_not(tmp_path: Path) -> None:
    path = filled(tmp_path / "log", b"first", b"second", b"third")
    whole, size = path.read_bytes(), wal.HEAD.size
    for at in (size, size + 5 + size):  # in the content of the first, of the second
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match="damage at byte"):
            wal.copy(tmp_path / "log", 0, tmp_path / f"copy-{at}")
    path.write_bytes(whole[:-2])  # the third is not on the disk yet
    assert wal.copy(tmp_path / "log", 0, tmp_path / "copy") == 2
    os.truncate(path, size + 2)
    path.with_name(f"{4:020d}.wal").touch()
    with pytest.raises(ArtifactError, match="damage at byte 0"):
        wal.copy(tmp_path / "log", 0, tmp_path / "gap")
    path.unlink()
    with pytest.raises(ArtifactError, match=r"change 1 in .*found none before 4; read the newer state"):
        wal.copy(tmp_path / "log", 0, tmp_path / "late")


def test_a_full_disk_fails_the_change_alone(tmp_path: Path, log: Log) -> None:
    log.append(b"a" * 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        for _ in range(3):
            with pytest.raises(OSError, match=r"File too large|took a part"):
                log.append(b"b" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert log.append(b"c") == 2
    assert contents(tmp_path) == [b"a" * 1000, b"c"]


def test_killed_at_any_moment_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    acknowledged = 0
    for delay in range(12):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            log = Log(tmp_path)
            for _ in range(100_000):
                os.write(write, log.append(os.urandom(2000)).to_bytes(8, "big"))
        os.close(write)
        time.sleep(0.01 + 0.007 * delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        told = b"".join(iter(lambda r=read: os.read(r, 1 << 16), b""))
        os.close(read)
        numbers = [int.from_bytes(told[i : i + 8], "big") for i in range(0, len(told) - 7, 8)]
        log = Log(tmp_path)
        assert not numbers or log.last >= numbers[-1]
        assert log.last >= acknowledged
        acknowledged = log.last
        log.close()
        assert len(contents(tmp_path)) == acknowledged
    assert acknowledged > 12
