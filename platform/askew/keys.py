"""Keys: who may ask the endpoint, and what, by a file that holds the hashes of keys and no key itself.

A key is 32 random bytes, which nobody guesses: so it is kept as one SHA-256. A slow hash makes guesses of
passwords dear; here there is nothing to guess, and it would cost each request milliseconds. The file is read again
when it changes, so that a new key counts beside an old one, and the old one goes, without a restart. Knows nothing
of HTTP.

    askew keys add shop --scope search --file keys.yaml
"""

import asyncio
import hashlib
import hmac
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import typer
import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from askew import artifacts, config
from askew.config import Settings
from askew.errors import AskewError, ConfigError

Scope = Literal["search", "write"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "askew_"  # by which scanners for secrets know a key
KEY_BYTES = 32
EVERY_S = 1.0  # so often the file is looked at, when requests come
LOOKED_UP = 8  # bytes of a hash that find its key; all of them are then compared in constant time
HEAD = "# Keys of an askew endpoint, as SHA-256: no key stands here. Made by `askew keys`.\n"


def _in_utc(when: datetime) -> datetime:
    return when.astimezone(UTC) if when.tzinfo else when.replace(tzinfo=UTC)


class Key(Settings):
    """A key: whose it is, what it may, how often and how long."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # requests a second, at each ingress
    burst: int | None = Field(default=None, ge=1)  # requests at once; by default those of a second
    expires: Annotated[datetime, AfterValidator(_in_utc)] | None = None

    @property
    def expired(self) -> bool:
        """Whether it counts no more."""
        return self.expires is not None and time.time() >= self.expires.timestamp()


class KeyFile(Settings):
    """All keys of an endpoint."""

    keys: tuple[Key, ...]

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for what in ("name", "sha256"):
            told = [getattr(key, what) for key in self.keys]
            if twice := [one for one in told if told.count(one) > 1]:
                raise ValueError(f"the {what} {twice[0]} stands there twice")
        return self


class Bucket:
    """So many requests at once, and then so many a second."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst, self._left, self._at = rate, burst, burst, time.monotonic()

    def take(self) -> float:
        """Take one; where none is left, returns the seconds until one is."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / self._rate
        self._left -= 1
        return 0.0

    def owe(self, count: int) -> None:
        """Take more, which later ones wait for."""
        self._left -= count


@dataclass(frozen=True)
class Held:
    """A key as it is held in memory."""

    key: Key
    digest: bytes
    bucket: Bucket | None


class Keys:
    """The keys of a file, as it is now."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        """Read the file; what is wrong with it later is warned of. Raises ConfigError."""
        self._path, self._warn = path, warn
        self._held: dict[bytes, Held] = {}
        self._seen, self._due = _stamp(path), time.monotonic() + EVERY_S
        self._held = self._taken(read(path))

    async def find(self, shown: bytes) -> Held | None:
        """Find a key that a request shows; None where there is no such key."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY_S
            await asyncio.to_thread(self.refresh)
        digest = hashlib.sha256(shown).digest()
        held = self._held.get(digest[:LOOKED_UP])
        return held if held and hmac.compare_digest(held.digest, digest) else None

    def refresh(self) -> None:
        """Read the file if it has changed; where it cannot be used, the keys stay as they were."""
        if (stamp := _stamp(self._path)) == self._seen:
            return
        self._seen = stamp
        try:
            self._held = self._taken(read(self._path))
        except ConfigError as error:
            self._warn(f"the keys stay as they were: {error}")

    def _taken(self, file: KeyFile) -> dict[bytes, Held]:
        """Hold the keys of a file; who had spent requests before, has spent them."""
        held = {}
        for key in file.keys:
            digest = bytes.fromhex(key.sha256)
            before = self._held.get(digest[:LOOKED_UP])
            if before and (before.key.rate, before.key.burst) == (key.rate, key.burst):
                bucket = before.bucket
            else:
                bucket = Bucket(key.rate, key.burst or max(1.0, key.rate)) if key.rate else None
            held[digest[:LOOKED_UP]] = Held(key, digest, bucket)
        return held


def read(path: Path) -> KeyFile:
    """Read a file of keys. Raises ConfigError."""
    return config.load(KeyFile, path)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What is other once a file was written; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


# --- changing the file ---------------------------------------------------------------------------


def add(
    path: Path, name: str, scopes: Sequence[str], rate: float | None = None, burst: int | None = None,
    expires: datetime | None = None,
) -> str:  # fmt: skip
    """Make a key and write its hash; returns the key, which stands nowhere else. Raises ConfigError."""
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    told = {"name": name, "scopes": list(dict.fromkeys(scopes)), "rate": rate, "burst": burst, "expires": expires}
    given: dict[str, Any] = {what: value for what, value in told.items() if value is not None}
    _write(path, [*_dumped(path), given | {"sha256": hashlib.sha256(key.encode()).hexdigest()}])
    return key


def remove(path: Path, name: str) -> None:
    """Take a key's hash out of the file. Raises ConfigError."""
    keys = _dumped(path)
    left = [key for key in keys if key["name"] != name]
    if len(left) == len(keys):
        known = ", ".join(key["name"] for key in keys) or "none"
        raise ConfigError(f"a key named {name!r} in {path}", known, "name one of those")
    _write(path, left)


def _dumped(path: Path) -> list[dict[str, Any]]:
    return [key.model_dump(exclude_defaults=True) for key in read(path).keys] if path.exists() else []


def _write(path: Path, keys: Sequence[dict[str, Any]]) -> None:
    try:
        checked = KeyFile.model_validate({"keys": keys})
    except ValidationError as error:
        told = [(".".join(map(str, one["loc"][2:])) or "keys", one["msg"]) for one in error.errors()]
        found = "; ".join(f"{where}: {what}" for where, what in told)
        raise ConfigError(f"a key that fits {path}", found, "give it another name or other values") from None
    plain = [key.model_dump(mode="json", exclude_defaults=True) for key in checked.keys]
    artifacts.write_text(path, HEAD + yaml.safe_dump({"keys": plain}, sort_keys=False))


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
File = Annotated[Path, typer.Option("--file", help="of the keys, as the setting `keys` of the endpoint names it")]


@app.callback()
def main() -> None:
    """Keys of an endpoint: its file holds their hashes alone."""


@app.command("add")
def _add(
    name: Annotated[str, typer.Argument(help="whose key it is: letters, digits and . _ -")],
    file: File,
    scope: Annotated[list[str], typer.Option(help="search or write; may be given twice")],
    rate: Annotated[float | None, typer.Option(help="requests a second, at each ingress replica")] = None,
    burst: Annotated[int | None, typer.Option(help="requests at once")] = None,
    expires: Annotated[datetime | None, typer.Option(help="when it counts no more, in UTC")] = None,
) -> None:
    """Make a key, write its hash to the file, and print the key: this once, so keep it."""
    print(_told(lambda: add(file, name, scope, rate, burst, expires)))


@app.command("remove")
def _remove(name: Annotated[str, typer.Argument(help="whose key it is")], file: File) -> None:
    """Take a key out of the file; endpoints refuse it within seconds."""
    _told(lambda: remove(file, name))


def _told(work: Callable[[], str | None]) -> str | None:
    try:
        return work()
    except AskewError as error:
        print(f"askew: error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
