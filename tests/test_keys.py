import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.fakes import run

from askew import keys
from askew.errors import ConfigError
from askew.keys import Bucket, Keys


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def found(held: Keys, shown: str) -> str | None:
    one = run(held.find(shown.encode()))
    return one and one.key.name


def made(file: Path) -> tuple[Keys, list[str]]:
    warned: list[str] = []
    return Keys(file, warned.append), warned


def written(file: Path, text: str) -> None:
    """Write as an editor does: a new file in the place of the old one."""
    (file.parent / "new").write_text(text)
    (file.parent / "new").replace(file)


def test_a_key_is_found_by_itself_alone_and_the_file_does_not_hold_it(file: Path) -> None:
    shop = keys.add(file, "shop", ["search"])
    writer = keys.add(file, "writer", ["search", "write"], rate=2, burst=5)
    held, _ = made(file)
    assert (found(held, shop), found(held, writer)) == ("shop", "writer")
    for other in ("", shop[:-1], shop + "x", shop.upper(), hashlib.sha256(shop.encode()).hexdigest()):
        assert found(held, other) is None
    assert shop not in file.read_text()
    assert len({shop, writer}) == 2
    assert len(shop) >= len(keys.PREFIX) + keys.KEY_BYTES * 4 / 3


def test_all_of_a_hash_is_compared_not_only_what_finds_it(file: Path) -> None:
    shop = keys.add(file, "shop", ["search"])
    told = yaml.safe_load(file.read_text())
    whole = told["keys"][0]["sha256"]
    told["keys"][0]["sha256"] = f"{whole[:-1]}{(int(whole[-1], 16) + 1) % 16:x}"
    file.write_text(yaml.safe_dump(told))
    assert found(made(file)[0], shop) is None


def test_a_new_key_counts_beside_the_old_one_which_then_goes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "EVERY_S", 0.0)
    old = keys.add(file, "shop-1", ["search"])
    held, warned = made(file)
    new = keys.add(file, "shop-2", ["search"])
    assert (found(held, old), found(held, new)) == ("shop-1", "shop-2")
    keys.remove(file, "shop-1")
    assert (found(held, old), found(held, new)) == (None, "shop-2")
    assert warned == []


def test_the_file_is_looked_at_once_a_while(file: Path) -> None:
    old = keys.add(file, "shop-1", ["search"])
    held, _ = made(file)
    new = keys.add(file, "shop-2", ["search"])
    assert found(held, new) is None
    held._due = 0.0
    assert (found(held, new), found(held, old)) == ("shop-2", "shop-1")


@pytest.mark.parametrize(
    "text", ["keys: [", "keys: {}", "key: []", "keys: [{name: a}]", "", None, "[1]", "keys: [{sha256: x}]"]
)
def test_a_file_that_cannot_be_used_changes_nothing_and_is_told_once(
    file: Path, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "EVERY_S", 0.0)
    shop = keys.add(file, "shop", ["search"])
    held, warned = made(file)
    if text is None:
        file.unlink()
    else:
        written(file, text)
    assert [found(held, shop) for _ in range(3)] == ["shop"] * 3
    [message] = warned
    assert message.startswith("the keys stay as they were: wanted")
    file.unlink(missing_ok=True)
    other = keys.add(file, "other", ["search"])
    assert (found(held, other), found(held, shop)) == ("other", None)


def entry(name: str = "a", digest: str = "a" * 64, scopes: str = "[search]", more: str = "") -> str:
    return f"{{name: {name}, sha256: '{digest}', scopes: {scopes}{more}}}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "wanted a settings file; found none at"),
        ("keys: [", "wanted YAML in"),
        ("", "keys: Field required"),
        (f"keys: [{entry(digest='x')}]", "keys.0.sha256"),
        (f"keys: [{entry(digest='A' * 64)}]", "keys.0.sha256"),
        (f"keys: [{entry(name='a b')}]", "keys.0.name"),
        (f"keys: [{entry(scopes='[admin]')}]", "keys.0.scopes.0"),
        (f"keys: [{entry(scopes='[]')}]", "keys.0.scopes"),
        (f"keys: [{entry(more=', rate: 0')}]", "keys.0.rate"),
        (f"keys: [{entry(more=', rate: .inf')}]", "keys.0.rate"),
        (f"keys: [{entry(more=', expire: 2027-01-01')}]", "keys.0.expire"),
        (f"keys: [{entry()}, {entry(digest='b' * 64)}]", "the name a stands there twice"),
        (f"keys: [{entry()}, {entry(name='b')}]", "stands there twice"),
    ],
)
def test_at_the_start_such_a_file_is_refused(file: Path, text: str | None, told: str) -> None:
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        made(file)
    assert told in str(caught.value)


def test_a_folder_in_its_place_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found Is a directory; check the path"):
        made(tmp_path)


@pytest.mark.parametrize("form", ["{:%Y-%m-%dT%H:%M:%SZ}", "'{:%Y-%m-%dT%H:%M:%S+00:00}'", "{:%Y-%m-%d %H:%M:%S}"])
@pytest.mark.parametrize("days", [1, -1])
def test_a_key_counts_until_its_time_in_utc(file: Path, form: str, days: int) -> None:
    when = form.format(datetime.now(UTC) + timedelta(days=days))
    file.write_text(f"keys: [{{name: a, sha256: '{'a' * 64}', scopes: [search], expires: {when}}}]")
    [key] = keys.read(file).keys
    assert key.expired is (days < 0)


def test_what_expires_on_a_day_does_so_when_it_begins_in_utc(file: Path) -> None:
    keys.add(file, "shop", ["search"], expires=datetime(2030, 1, 2))  # as typer reads it
    [key] = keys.read(file).keys
    assert key.expires == datetime(2030, 1, 2, tzinfo=UTC)


# --- how often -----------------------------------------------------------------------------------


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the clock."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 1000.0 + seconds)


def test_so_many_at_once_and_then_so_many_a_second(at: Callable[[float], None]) -> None:
    bucket = Bucket(rate=2.0, burst=3)
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 0.5]
    at(0.25)
    assert bucket.take() == 0.25  # those that were refused cost nothing
    at(0.5)
    assert [bucket.take(), bucket.take()] == [0, 0.5]
    at(100)
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 0.5]  # no more is saved up than the burst


def test_what_is_owed_is_waited_for(at: Callable[[float], None]) -> None:
    bucket = Bucket(rate=2.0, burst=3)
    assert bucket.take() == 0
    bucket.owe(5)
    assert bucket.take() == 2.0


def test_reading_the_file_again_gives_nobody_more(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "EVERY_S", 0.0)
    shop = keys.add(file, "shop", ["search"], rate=0.001, burst=1)
    held, _ = made(file)
    one: Any = run(held.find(shop.encode()))
    assert one.bucket.take() == 0
    keys.add(file, "other", ["search"])
    again: Any = run(held.find(shop.encode()))
    assert again is not one
    assert again.bucket.take() > 0
    other = yaml.safe_load(file.read_text())
    other["keys"][0]["burst"] = 2
    written(file, yaml.safe_dump(other))
    assert run(held.find(shop.encode())).bucket.take() == 0  # another limit begins anew


# --- the command ---------------------------------------------------------------------------------


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-m", "askew.keys", *words], capture_output=True, text=True, env=environment, check=False
    )


def test_the_command_prints_the_key_once_and_says_what_is_wrong(file: Path) -> None:
    how = ("--scope", "search", "--scope", "write", "--rate", "5", "--expires", "2030-01-02")
    told = command("add", "shop", *how, "--file", str(file))
    assert told.returncode == 0, told.stderr
    [key] = told.stdout.split()
    assert found(made(file)[0], key) == "shop"
    [one] = keys.read(file).keys
    assert (one.scopes, one.rate, one.expires) == (("search", "write"), 5, datetime(2030, 1, 2, tzinfo=UTC))

    before = file.read_bytes()
    again = command("add", "shop", "--scope", "search", "--file", str(file))
    assert (again.returncode, again.stdout) == (2, "")
    assert "the name shop stands there twice; give it another name" in again.stderr
    wrong = command("add", "b", "--scope", "admin", "--file", str(file))
    assert (wrong.returncode, "scopes.0: Input should be 'search' or 'write'" in wrong.stderr) == (2, True)
    assert file.read_bytes() == before

    assert command("remove", "shop", "--file", str(file)).returncode == 0
    assert keys.read(file).keys == ()
    gone = command("remove", "shop", "--file", str(file))
    assert (gone.returncode, "a key named 'shop'" in gone.stderr) == (2, True)
