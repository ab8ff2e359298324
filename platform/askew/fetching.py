"""Fetching: from what a catalogue names as an item's image to its bytes.

A reference is bytes, a path inside the data folder, an object of a store (`s3://…`) or, if switched on, an
http(s) URL. A catalogue is not trusted: it must not make this machine read a file outside the data folder,
nor reach an address that is not public. So a path is resolved before it is opened, and a name is resolved,
checked and connected to as one step, for every connection: neither a redirect nor a name that changes its
address gets round it. Knows nothing of pixels, catalogues' formats or Ray.
"""

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import fsspec
import httpcore
import httpx
from pydantic import Field

from askew.config import Settings
from askew.errors import DataError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Allow = Callable[[Address], bool]
Resolve = Callable[[str, int], Sequence[str]]  # host and port to addresses, or an OSError

STORES = frozenset({"s3", "s3a", "gs", "gcs", "memory"})  # what any catalogue may name
SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
QUERY_OR_FRAGMENT = re.compile(r"[?#]")
SHOWN = 160  # characters of a reference in a message
REDIRECTS = frozenset({301, 302, 303, 307, 308})
PASSING = frozenset({408, 425, 429})  # client errors that may pass, as all 5xx may
HEADERS = (("Accept", "image/*,*/*;q=0.5"), ("Accept-Encoding", "identity"), ("User-Agent", "askew"))
GZIP_OR_ZLIB = zlib.MAX_WBITS | 32
BACKOFF_S = 0.25
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # RFC 4291, section 2.4


class FetchSettings(Settings):
    """Settings of fetching. `hosts`, if given, limits URLs to these host names and their subdomains."""

    urls: bool = False  # whether http(s) URLs are fetched, of public addresses alone
    hosts: tuple[str, ...] = ()  # if given, URLs of these hosts and of those below them alone
    timeout_s: float = Field(default=10, gt=0)  # without a byte
    total_s: float = Field(default=30, gt=0)  # for a photo, retries not counted
    max_bytes: int = Field(default=20 << 20, ge=1)  # of a photo
    max_redirects: int = Field(default=3, ge=0)  # of a URL
    num_connections: int = Field(default=16, ge=1)  # photos fetched at a time by a worker
    retries: int = Field(default=2, ge=0)  # of what may pass: time-outs, 5xx, 408, 425, 429


class Problem(NamedTuple):
    """Why a reference gave no bytes.

    `reason` is one of empty, too_large, outside, not_a_file, not_found, refused, unavailable, timed_out,
    urls_off, bad_url and unsupported; `message` is a sentence without credentials or query string.
    """

    reason: str
    message: str


class UnfetchedError(Exception):
    """A reference gives no bytes; `Fetcher` turns it into a Problem."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.problem = Problem(reason, message)


class PassingError(UnfetchedError):
    """A reference gave no bytes this time, and may the next."""


def is_public(address: Address) -> bool:
    """Tell whether an address is globally routable unicast, with no other address inside (mapped, 6to4, NAT64)."""
    if isinstance(address, ipaddress.IPv6Address) and (address not in GLOBAL_UNICAST or address.sixtofour):
        return False
    return address.is_global and not address.is_multicast


def resolve(host: str, port: int) -> list[str]:
    """Look up the addresses of a host. Raises OSError when it has none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Fetcher:
    """Fetches what references name, many at a time; to be closed after use."""

    def __init__(
        self,
        root: str,
        settings: FetchSettings,
        allow: Allow = is_public,
        resolve: Resolve = resolve,
    ) -> None:
        """Open the data folder `root`, a local path or an fsspec URL.

        `allow` says which addresses may be connected to, `resolve` which a host has. Raises DataError when
        the root cannot be opened.
        """
        self._settings = settings
        self._root = _opened(root, settings.max_bytes)
        self._web = _Web(settings, allow, resolve) if settings.urls else None
        self._threads = ThreadPoolExecutor(settings.num_connections, thread_name_prefix="fetch")

    def fetch(self, references: Sequence[object]) -> list[bytes | Problem | None]:
        """Fetch n references, in order: bytes each, None where nothing is named, a Problem where it fails.

        All n results are in memory at once: up to n · max_bytes.
        """
        return list(self._threads.map(self._one, references))

    def close(self) -> None:
        """End the threads and the connections."""
        self._threads.shutdown(cancel_futures=True)
        if self._web:
            self._web.close()

    def _one(self, reference: object) -> bytes | Problem | None:
        try:
            if isinstance(reference, bytes):
                return _fitting(reference, "the image", self._settings.max_bytes)
            if not isinstance(reference, str | None):
                raise UnfetchedError("unsupported", f"{reference!r:.{SHOWN}} is no bytes, path or URL.")
            name = (reference or "").strip()
            return _fitting(self._read(name), _shown(name), self._settings.max_bytes) if name else None
        except UnfetchedError as error:
            return error.problem

    def _read(self, name: str) -> bytes:
        matched, shown = SCHEME.match(name), _shown(name)
        scheme = matched[1].lower() if matched else "file"
        if scheme == "file":
            return self._root.read(name)
        if scheme not in ("http", "https"):
            # of the root's own store: its connection and account, whatever host the reference names
            filesystem = self._root.filesystems.get(scheme) or _filesystem(scheme, shown)
            return _object(filesystem, name, shown, self._settings.max_bytes)
        if self._web is None:
            raise UnfetchedError("urls_off", f"{shown} is a URL, and fetching URLs is off (`urls: true` is on).")
        return self._web.read(name)


def _fitting(data: bytes, shown: str, max_bytes: int) -> bytes:
    if not data:
        raise UnfetchedError("empty", f"{shown} has no bytes.")
    if len(data) > max_bytes:
        raise UnfetchedError("too_large", f"{shown} has more than {max_bytes:,} bytes.")
    return data


def _shown(reference: str) -> str:
    """Show a reference in a message: quoted and cut, without user information, query and fragment.

    A password with a slash in it ends no URL's authority, but stays unseen all the same.
    """
    scheme, slashes, rest = reference.partition("//")
    at = rest.rfind("@")
    if ":" not in rest[:at]:
        at = rest.partition("/")[0].rfind("@")
    shown = QUERY_OR_FRAGMENT.split(f"{scheme}{slashes}{rest[at + 1 :]}", maxsplit=1)[0]
    return repr(shown[:SHOWN])[: SHOWN + 2]


# --- files and objects ---------------------------------------------------------------------------


def _opened(root: str, max_bytes: int) -> "_Folder | _Store":
    matched = SCHEME.match(root)
    scheme = matched[1].lower() if matched else "file"
    try:
        if scheme == "file":
            return _Folder(_file_path(root) if matched else root, max_bytes)
        if scheme in ("http", "https") or "::" in root:
            raise ValueError("neither a folder nor an object store")
        filesystem, folder = fsspec.url_to_fs(root)
        return _Store(scheme, filesystem, folder, max_bytes)
    except (ImportError, ValueError, OSError, UnfetchedError) as error:
        wanted = "a data folder, local or in an object store"
        raise DataError(wanted, f"{_shown(root)}: {error}", "check its path") from error


def _file_path(url: str) -> str:
    """The path that a file URL names (RFC 8089)."""
    rest = url[len("file://") :].removeprefix("localhost")
    if not rest.startswith("/"):
        raise UnfetchedError("outside", f"{_shown(url)} is on another machine.")
    return unquote(rest)


def _inside(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise UnfetchedError("outside", f"{_shown(name)} is not a plain path below the data folder.")
    return name


class _Folder:
    """A local data folder."""

    def __init__(self, folder: str, max_bytes: int) -> None:
        self._folder, self._max_bytes = os.path.realpath(folder), max_bytes
        self.filesystems: dict[str, Any] = {}
        if not Path(self._folder).is_dir():
            raise NotADirectoryError("no such folder")

    def read(self, name: str) -> bytes:
        shown = _shown(name)
        path = _file_path(name) if SCHEME.match(name) else f"{self._folder}/{_inside(name)}"
        with _file_errors(shown):
            path = os.path.realpath(path)
            if not Path(path).is_relative_to(self._folder):
                raise UnfetchedError("outside", f"{shown} leads out of the data folder.")
            return _file(path, shown, self._max_bytes)


def _file(path: str, shown: str, max_bytes: int) -> bytes:
    """Read a regular file's first max_bytes + 1 bytes."""
    _regular(os.lstat(path), shown)  # before it is opened: opening a device may do something
    # and afterwards again: a link put in its place meanwhile is not followed, a pipe does not block
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        size = _regular(os.fstat(file.fileno()), shown).st_size
        return file.read(min(size, max_bytes) + 1)


def _regular(found: os.stat_result, shown: str) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        raise UnfetchedError("not_a_file", f"{shown} is not a regular file.")
    return found


@contextlib.contextmanager
def _file_errors(shown: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: no file's name at all
        raise UnfetchedError("not_found", f"There is no file {shown}.") from error
    except PermissionError as error:
        raise UnfetchedError("refused", f"{shown} may not be read.") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UnfetchedError("not_found", f"There is no file {shown}.") from error
        raise UnfetchedError("unavailable", f"{shown} cannot be read ({error.strerror}).") from error


class _Store:
    """A data folder in an object store."""

    def __init__(self, scheme: str, filesystem: Any, folder: str, max_bytes: int) -> None:
        self._filesystem, self._folder, self._max_bytes = filesystem, folder.rstrip("/"), max_bytes
        self.filesystems = {scheme: filesystem}

    def read(self, name: str) -> bytes:
        if SCHEME.match(name):
            raise UnfetchedError("outside", f"{_shown(name)} is not in the data folder.")
        return _object(self._filesystem, f"{self._folder}/{_inside(name)}", _shown(name), self._max_bytes)


def _filesystem(scheme: str, shown: str) -> Any:
    """Connect to a store with the environment's account; nothing of it is taken from a reference."""
    if scheme not in STORES:
        raise UnfetchedError("unsupported", f"{shown} is of a scheme that is not read.")
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise UnfetchedError("unsupported", f"{shown} needs a package: {error}.") from error


def _object(filesystem: Any, path: str, shown: str, max_bytes: int) -> bytes:
    """Read an object's first max_bytes + 1 bytes; the store's library sees to retries and timeouts."""
    try:
        return bytes(filesystem.cat_file(path, start=0, end=max_bytes + 1))
    except FileNotFoundError as error:
        raise UnfetchedError("not_found", f"There is no object {shown}.") from error
    except IsADirectoryError as error:
        raise UnfetchedError("not_a_file", f"{shown} is not an object.") from error
    except PermissionError as error:
        raise UnfetchedError("refused", f"{shown} may not be read.") from error
    except Exception as error:  # each store's library has errors of its own
        raise UnfetchedError("unavailable", f"{shown} cannot be read ({type(error).__name__}).") from error


# --- URLs ----------------------------------------------------------------------------------------


class _Web:
    """GETs over HTTP/1.1: no cookies, no proxies, no credentials, every connection through the guard."""

    def __init__(self, settings: FetchSettings, allow: Allow, resolve: Resolve) -> None:
        self._settings = settings
        self._lookups = ThreadPoolExecutor(settings.num_connections, thread_name_prefix="lookup")
        self._hosts = tuple(host.lower().strip(".") for host in settings.hosts)
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), settings.timeout_s)
        self._extensions = {"timeout": timeouts}
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpcore.default_ssl_context(),
            max_connections=settings.num_connections,
            keepalive_expiry=settings.timeout_s,
            network_backend=_Guard(allow, resolve, self._lookups),
        )

    def close(self) -> None:
        self._pool.close()
        self._lookups.shutdown(wait=False, cancel_futures=True)

    def read(self, reference: str) -> bytes:
        """GET a URL, once more after a problem that may pass; all within total_s."""
        DEADLINE.set(time.monotonic() + self._settings.total_s)
        url, num_tries = _parsed(reference), 0
        while True:
            try:
                return self._follow(url)
            except PassingError:
                wait_s = BACKOFF_S * 2**num_tries
                if num_tries == self._settings.retries or wait_s > _left_s():
                    raise
            time.sleep(wait_s)
            num_tries += 1

    def _follow(self, url: httpx.URL) -> bytes:
        for _ in range(self._settings.max_redirects + 1):
            self._check(url)
            answer = self._get(url)
            if isinstance(answer, bytes):
                return answer
            if url.scheme == "https" and answer.scheme != "https":
                raise UnfetchedError("refused", f"{_shown(str(url))} redirects from https to {answer.scheme}.")
            url = answer
        raise UnfetchedError("refused", f"{_shown(str(url))} is one redirect too many.")

    def _check(self, url: httpx.URL) -> None:
        shown = _shown(str(url))
        host = url.host.lower().strip(".")
        listed = any(host == known or host.endswith(f".{known}") for known in self._hosts)
        if url.scheme not in ("http", "https"):
            raise UnfetchedError("refused", f"{shown} is neither http nor https.")
        if url.userinfo:
            raise UnfetchedError("refused", f"{shown} carries credentials.")
        if self._hosts and not listed:
            raise UnfetchedError("refused", f"{shown} is not on one of the hosts that are allowed.")
        if url.port not in (None, 80, 443) and not listed:
            raise UnfetchedError("refused", f"{shown} is on a port other than 80 and 443.")

    def _get(self, url: httpx.URL) -> bytes | httpx.URL:
        shown = _shown(str(url))
        headers = (("Host", url.netloc.decode("ascii")), *HEADERS)
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        try:
            with self._pool.stream("GET", target, headers=headers, extensions=self._extensions) as response:
                if response.status in REDIRECTS:
                    return _location(response, url)
                _check_status(response.status, shown)
                return _body(response, shown, self._settings.max_bytes)
        except httpcore.TimeoutException as error:
            raise PassingError("timed_out", f"{shown} did not answer in time.") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise PassingError("unavailable", f"{shown} cannot be reached ({type(error).__name__}).") from error


def _parsed(reference: str, base: httpx.URL | None = None) -> httpx.URL:
    try:
        url = base.join(reference) if base else httpx.URL(reference)
        if not url.host:
            raise ValueError("no host")
    except (httpx.InvalidURL, ValueError) as error:
        raise UnfetchedError("bad_url", f"{_shown(reference)} is no valid URL.") from error
    return url


def _header(response: httpcore.Response, name: bytes) -> str:
    return next((value for key, value in response.headers if key.lower() == name), b"").decode("utf-8", "replace")


def _location(response: httpcore.Response, url: httpx.URL) -> httpx.URL:
    if location := _header(response, b"location").strip():
        return _parsed(location, url)
    raise UnfetchedError("refused", f"{_shown(str(url))} redirects to nowhere.")


def _check_status(status: int, shown: str) -> None:
    said = f"{shown} answers with status {status}."
    if status in (404, 410):
        raise UnfetchedError("not_found", said)
    if status >= 500:
        raise PassingError("unavailable", said)
    if status in PASSING:
        raise PassingError("refused", said)
    if not 200 <= status < 300:
        raise UnfetchedError("refused", said)


def _body(response: httpcore.Response, shown: str, max_bytes: int) -> bytes:
    """Read a body of at most max_bytes, both as sent and unpacked; nothing larger is ever held."""
    too_large = UnfetchedError("too_large", f"{shown} has more than {max_bytes:,} bytes.")
    length = _header(response, b"content-length")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    unpack = _unpacker(_header(response, b"content-encoding").lower().strip(), shown)
    data, num_sent = bytearray(), 0
    for chunk in response.iter_stream():
        num_sent += len(chunk)
        data += unpack(chunk, max_bytes + 1 - len(data))
        if max(num_sent, len(data)) > max_bytes:
            raise too_large
    return bytes(data)


def _unpacker(encoding: str, shown: str) -> Callable[[bytes, int], bytes]:
    """A function from a chunk and the most bytes wanted of it to the chunk unpacked.

    The server is asked to pack nothing; some pack all the same. httpx's own decoders have no bound.
    """
    if encoding in ("", "identity"):
        return lambda chunk, _: chunk
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnfetchedError("unsupported", f"{shown} is packed in a way that is not read.")
    unzip = zlib.decompressobj(GZIP_OR_ZLIB)

    def unpack(chunk: bytes, wanted: int) -> bytes:
        try:
            return unzip.decompress(chunk, wanted)
        except zlib.error as error:
            raise PassingError("unavailable", f"{shown} is packed wrongly.") from error

    return unpack


# --- connections ---------------------------------------------------------------------------------

DEADLINE: ContextVar[float] = ContextVar("deadline")  # of this thread's fetch, on the monotonic clock, in seconds


def _left_s(timeout_s: float | None = None) -> float:
    """Seconds left to this thread's fetch, at most `timeout_s`; at most 0 when it is over."""
    left_s = DEADLINE.get() - time.monotonic()
    return left_s if timeout_s is None else min(left_s, timeout_s)


class _Guard(httpcore.SyncBackend):
    """Opens connections to allowed addresses only: the address that was checked is the one connected to."""

    def __init__(self, allow: Allow, resolve: Resolve, lookups: ThreadPoolExecutor) -> None:
        self._allow, self._resolve, self._lookups = allow, resolve, lookups

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        problem: Exception = httpcore.ConnectError("no address")
        for address in self._addresses(host, port, timeout):
            if (left_s := _left_s(timeout)) <= 0:
                raise httpcore.ConnectTimeout("over the total")
            try:
                return _Bounded(super().connect_tcp(address, port, left_s, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                problem = error
        raise problem

    def _addresses(self, host: str, port: int, timeout: float | None) -> list[str]:
        try:  # in a thread of its own, as the system's look-up knows no timeout
            looked_up = self._lookups.submit(self._resolve, host, port).result(_left_s(timeout))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("no address in time") from error
        except (OSError, UnicodeError) as error:  # UnicodeError: a label of more than 63 characters
            raise httpcore.ConnectError(str(error)) from error
        found = [ipaddress.ip_address(address) for address in looked_up]
        allowed = [str(address) for address in found if self._allow(address)]
        if found and not allowed:
            raise UnfetchedError("refused", f"{_shown(host)} is at no public address.")
        return allowed


class _Bounded(httpcore.NetworkStream):
    """A connection on which every wait ends by the deadline of the fetch that it serves at the time."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if (left_s := _left_s(timeout)) <= 0:
            raise httpcore.ReadTimeout("over the total")
        return self._stream.read(max_bytes, left_s)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if (left_s := _left_s(timeout)) <= 0:
            raise httpcore.WriteTimeout("over the total")
        self._stream.write(buffer, left_s)

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        if (left_s := _left_s(timeout)) <= 0:
            raise httpcore.ConnectTimeout("over the total")
        return _Bounded(self._stream.start_tls(ssl_context, server_hostname, left_s))

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
