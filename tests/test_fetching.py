import datetime
import gzip
import http.server
import ipaddress
import itertools
import os
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import httpcore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew.errors import DataError
from askew.fetching import Fetcher, FetchSettings, Problem, is_public, resolve

PHOTO = b"\xff\xd8\xff\xe0 a photo"
LIMIT = 1000
BOMB = gzip.compress(bytes(30 << 20))  # some 30 kB
LOOPBACK = ipaddress.ip_address("127.0.0.1")


# --- a server that misbehaves in every way -------------------------------------------------------


class Shop(http.server.BaseHTTPRequestHandler):
    """Answers /name with the method called name; counts what it is asked."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, dict[str, str]]]
    stop: threading.Event

    def do_GET(self) -> None:
        self.asked.append((self.path, dict(self.headers)))
        try:
            getattr(self, self.path.split("?")[0].strip("/").split("/")[0])()
        except OSError:
            self.close_connection = True

    def answer(self, body: bytes = PHOTO, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content_length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass

    def good(self) -> None:
        self.answer()

    def page(self) -> None:
        self.answer(b"<html>sorry</html>", content_type="text/html")

    def status(self) -> None:
        self.answer(b"sorry", int(self.path.split("/")[2]))

    def empty(self) -> None:
        self.answer(b"")

    def seldom(self) -> None:
        times = sum(path == self.path for path, _ in self.asked)
        self.answer(PHOTO, 500 if times == 1 else 200)

    def cookie(self) -> None:
        self.answer(PHOTO, set_cookie="a=b")

    def to(self) -> None:
        self.answer(b"", 302, location=self.path.split("?", 1)[1])

    def nowhere(self) -> None:
        self.answer(b"", 302)

    def hops(self) -> None:
        left = int(self.path.split("/")[2])
        self.answer(PHOTO, 307, location=f"/hops/{left - 1}") if left else self.answer()

    def large(self) -> None:
        self.answer(bytes(LIMIT + 1))

    def endless(self) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        while not self.stop.is_set():
            self.wfile.write(b"400\r\n" + bytes(1024) + b"\r\n")

    def cut(self) -> None:
        self.answer(PHOTO, content_length=str(len(PHOTO) + 5))
        self.close_connection = True

    def zipped(self) -> None:
        self.answer(gzip.compress(PHOTO), content_encoding="gzip")

    def deflated(self) -> None:
        self.answer(zlib.compress(PHOTO), content_encoding="deflate")

    def bomb(self) -> None:
        self.answer(gzip.compress(bytes(900_000)), content_encoding="gzip")

    def large_bomb(self) -> None:
        self.answer(BOMB, content_encoding="gzip")

    def mispacked(self) -> None:
        self.answer(b"no gzip", content_encoding="gzip")

    def twice(self) -> None:
        self.answer(gzip.compress(gzip.compress(PHOTO)), content_encoding="gzip, gzip")

    def hang(self) -> None:
        self.stop.wait(5)
        self.close_connection = True

    def drip(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "900")
        self.end_headers()
        while not self.stop.wait(0.05):
            self.wfile.write(b"x")

    def drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
        while not self.stop.wait(0.05):
            self.wfile.write(b"x")

    def rubbish(self) -> None:
        self.wfile.write(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        self.close_connection = True


class Server:
    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self._stop = threading.Event()
        handler = type("Handler", (Shop,), {"asked": self.asked, "stop": self._stop})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if context:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}/{path}"

    def close(self) -> None:
        self._stop.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with closing(Server()) as server:
        yield server


def fetched(
    references: Sequence[bytes | str | None], root: Path | str, **settings: Any
) -> list[bytes | Problem | None]:
    seams = {name: settings.pop(name) for name in ("allow", "resolve") if name in settings}
    with closing(Fetcher(str(root), FetchSettings(**{"max_bytes": LIMIT, **settings}), **seams)) as fetcher:
        return fetcher.fetch(references)


def over_web(reference: str, root: Path, **settings: Any) -> bytes | Problem | None:
    defaults = {"urls": True, "hosts": ("127.0.0.1", "shop.example"), "allow": LOOPBACK.__eq__, "retries": 0}
    return fetched([reference], root, **{**defaults, **settings})[0]


def reason(result: bytes | Problem | None) -> str:
    assert isinstance(result, Problem), result
    assert 0 < len(result.message) <= 300
    return result.reason


# --- bytes, files and objects --------------------------------------------------------------------


def test_bytes_pass_and_nothing_stays_nothing(tmp_path: Path) -> None:
    assert fetched([PHOTO, None, "", "  "], tmp_path) == [PHOTO, None, None, None]


@pytest.mark.parametrize(("data", "why"), [(b"", "empty"), (bytes(LIMIT + 1), "too_large")])
def test_bytes_of_no_use_are_named(data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    assert [reason(r) for r in fetched([data, "a.jpg"], tmp_path)] == [why, why]


@pytest.mark.parametrize("name", ["a/b.jpg", "./a/b.jpg", "a//b.jpg", " a/b.jpg\n", "link.jpg", "a/é ?#%41.jpg"])
def test_a_file_inside_the_folder_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for path in ("a/b.jpg", "a/é ?#%41.jpg"):
        (tmp_path / path).write_bytes(PHOTO)
    (tmp_path / "link.jpg").symlink_to("a/b.jpg")
    assert fetched([name, (tmp_path / name.strip()).as_uri()], tmp_path) == [PHOTO, PHOTO]
    assert fetched([name], tmp_path.as_uri()) == [PHOTO]


@pytest.fixture
def crooked(tmp_path: Path) -> Path:
    """A data folder in which everything is wrong, and a secret beside it."""
    (tmp_path / "secret.jpg").write_bytes(PHOTO)
    root = tmp_path / "data"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2" / "a.jpg").write_bytes(PHOTO)
    (root / "out.jpg").symlink_to("../secret.jpg")
    (root / "out").symlink_to(tmp_path)
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "device.jpg").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo.jpg")
    (root / "a.jpg").write_bytes(PHOTO)
    return root


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../secret.jpg", "outside"),
        ("folder/../../secret.jpg", "outside"),
        ("../data2/a.jpg", "outside"),
        ("/etc/passwd", "outside"),
        ("//host/share/a.jpg", "outside"),
        ("out.jpg", "outside"),
        ("out/secret.jpg", "outside"),
        ("device.jpg", "outside"),
        ("file:///etc/passwd", "outside"),
        ("FILE:///etc/passwd", "outside"),
        ("file://localhost/etc/passwd", "outside"),
        ("file://elsewhere/etc/passwd", "outside"),
        ("file://../secret.jpg", "outside"),
        ("file:///%2e%2e/etc/passwd", "outside"),
        ("fifo.jpg", "not_a_file"),
        ("folder", "not_a_file"),
        (".", "not_a_file"),
        ("none.jpg", "not_found"),
        ("a.jpg/b.jpg", "not_found"),
        ("loop.jpg", "not_a_file"),
        ("nul\0.jpg", "not_found"),
        ("\ud800.jpg", "not_found"),
        ("n" * 5000, "not_found"),
        ("data:image/png;base64,AAAA", "not_found"),
        ("ftp://host/a.jpg", "unsupported"),
        ("sftp://host/a.jpg", "unsupported"),
        ("local:///etc/passwd", "unsupported"),
        ("simplecache::file:///etc/passwd", "not_found"),
        ("memory://a::file:///etc/passwd", "not_found"),
        ("hdfs://host/a.jpg", "unsupported"),
        ("tar://" + "\ud800" * 300, "unsupported"),
    ],
)
def test_what_is_no_file_inside_the_folder_is_refused(name: str, why: str, crooked: Path) -> None:
    before = time.monotonic()
    assert reason(fetched([name], crooked)[0]) == why
    assert time.monotonic() - before < 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch(mode=0)
    assert reason(fetched(["a.jpg"], tmp_path)[0]) == "refused"


def test_objects_are_read_from_a_store() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/shop/a.jpg": PHOTO, "/shop/large.jpg": bytes(LIMIT + 1), "/other/b.jpg": PHOTO})
    names = ["a.jpg", "memory://other/b.jpg", "large.jpg", "none.jpg", "../other/b.jpg", "/other/b.jpg"]
    results = fetched([*names, "file:///etc/passwd", "", "memory://shop", "ftp://a/b"], "memory://shop/")
    assert results[:2] == [PHOTO, PHOTO]
    assert results[7] is None
    whys = [reason(result) for result in [*results[2:7], *results[8:]]]
    assert whys == ["too_large", "not_found", *["outside"] * 3, "not_found", "unsupported"]


def test_a_store_can_be_read_beside_a_local_folder(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/shop/c.jpg", PHOTO)
    assert fetched(["memory://shop/c.jpg"], tmp_path) == [PHOTO]


@pytest.mark.parametrize(
    "root", ["/no/such/folder", "file://elsewhere/data", "http://host/", "nonsense://a", "dir::memory://a", "a\0"]
)
def test_a_root_that_cannot_be_opened_is_refused(root: str) -> None:
    with pytest.raises(DataError, match="data folder"):
        Fetcher(root, FetchSettings())


# --- URLs ----------------------------------------------------------------------------------------


def test_urls_are_off_unless_switched_on(server: Server, tmp_path: Path) -> None:
    assert reason(over_web(server.url("good"), tmp_path, urls=False)) == "urls_off"
    assert not server.asked


@pytest.mark.parametrize(
    "path", ["good", "good?width=200#top", "hops/3", "zipped", "deflated", "to/?good", "cookie"]
)
def test_a_photo_is_fetched(path: str, server: Server, tmp_path: Path) -> None:
    assert over_web(server.url(path).replace("?good", "?/good"), tmp_path) == PHOTO


def test_a_page_is_bytes_like_any_other(server: Server, tmp_path: Path) -> None:
    assert over_web(server.url("page"), tmp_path) == b"<html>sorry</html>"


def test_nothing_is_sent_along(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    results = fetched([server.url("cookie")] * 3, tmp_path, urls=True, hosts=["127.0.0.1"], allow=LOOPBACK.__eq__)
    assert results == [PHOTO] * 3
    assert {name.lower() for _, headers in server.asked for name in headers} == {
        "host", "accept", "accept-encoding", "user-agent"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "why", "times"),
    [
        ("status/404", "not_found", 1),
        ("status/410", "not_found", 1),
        ("status/403", "refused", 1),
        ("status/304", "refused", 1),
        ("status/429", "refused", 2),
        ("status/500", "unavailable", 2),
        ("status/503", "unavailable", 2),
        ("empty", "empty", 1),
        ("nowhere", "refused", 1),
        ("hops/4", "refused", 4),
        ("large", "too_large", 1),
        ("endless", "too_large", 1),
        ("bomb", "too_large", 1),
        ("twice", "unsupported", 1),
        ("mispacked", "unavailable", 2),
        ("cut", "unavailable", 2),
        ("rubbish", "unavailable", 2),
    ],
)
def test_an_answer_of_no_use_is_named(path: str, why: str, times: int, server: Server, tmp_path: Path) -> None:
    assert reason(over_web(server.url(path), tmp_path, retries=1)) == why
    assert len(server.asked) == times


def test_a_bomb_is_never_held(server: Server, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        assert reason(over_web(server.url("large_bomb"), tmp_path, max_bytes=100_000)) == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_a_server_that_fails_once_is_asked_again(server: Server, tmp_path: Path) -> None:
    assert over_web(server.url("seldom"), tmp_path, retries=2) == PHOTO
    assert len(server.asked) == 2


@pytest.mark.parametrize("path", ["hang", "drip", "drip_headers"])
@pytest.mark.parametrize(("timeout_s", "total_s"), [(0.4, 1), (10, 0.5)])
def test_a_slow_server_is_cut(path: str, timeout_s: float, total_s: float, server: Server, tmp_path: Path) -> None:
    before = time.monotonic()
    result = over_web(server.url(path), tmp_path, timeout_s=timeout_s, total_s=total_s, retries=5)
    assert reason(result) == "timed_out"
    assert time.monotonic() - before < total_s + 0.6


def test_a_name_that_is_long_looked_up_is_cut(tmp_path: Path) -> None:
    def slow(host: str, port: int) -> list[str]:
        time.sleep(1.5)
        return ["127.0.0.1"]

    before = time.monotonic()
    assert reason(over_web("http://shop.example/", tmp_path, resolve=slow, timeout_s=0.3)) == "timed_out"
    assert time.monotonic() - before < 1


def test_nobody_at_the_port_is_unavailable(tmp_path: Path) -> None:
    with closing(Server()) as gone:
        url = gone.url("good")
    assert reason(over_web(url, tmp_path)) == "unavailable"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://", "bad_url"),
        ("http:///a.jpg", "bad_url"),
        ("http://[::1", "bad_url"),
        ("http://shop.example:port/", "bad_url"),
        ("http://a\n/", "bad_url"),
        ("http://user:secret@shop.example/a.jpg?token=secret", "refused"),
        ("http://secret@shop.example/a.jpg", "refused"),
        ("http://other.example/a.jpg", "refused"),
        ("http://badshop.example/a.jpg", "refused"),
        ("http://none.shop.example/", "unavailable"),
    ],
)
def test_a_url_of_no_use_is_named(url: str, why: str, tmp_path: Path) -> None:
    def nobody(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    result = over_web(url, tmp_path, hosts=["shop.example"], resolve=nobody)
    assert reason(result) == why
    assert "secret" not in str(result)


def test_a_name_that_no_resolver_takes_is_unavailable(tmp_path: Path) -> None:
    assert reason(over_web(f"http://{'l' * 64}.example/", tmp_path, hosts=())) == "unavailable"


@pytest.mark.parametrize("port", [22, 6379, 8080])
def test_a_port_is_open_to_listed_hosts_only(port: int, tmp_path: Path) -> None:
    assert reason(over_web(f"http://127.0.0.1:{port}/", tmp_path, hosts=())) == "refused"


def test_a_subdomain_of_a_listed_host_is_listed(server: Server, tmp_path: Path) -> None:
    url = server.url("good", "CDN.Shop.Example")
    assert over_web(url, tmp_path, resolve=lambda host, port: ["127.0.0.1"]) == PHOTO
    assert server.asked[0][1]["Host"] == f"cdn.shop.example:{server.port}"


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",  # noqa: S104
        "10.1.2.3", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.168.1.1",
        "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1",
        "64:ff9b::7f00:1", "64:ff9b:1::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::",
        "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%1", "fec0::1", "ff02::1", "ff0e::1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public_is_known(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::1"])
def test_a_public_address_is_known(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "localhost", "[::1]", "[::ffff:127.0.0.1]",
     "0", "169.254.169.254", "[fd00:ec2::254]"],
)  # fmt: skip
def test_this_machine_is_refused_however_it_is_written(host: str, server: Server, tmp_path: Path) -> None:
    result = over_web(server.url("good", host), tmp_path, allow=is_public, hosts=[host.strip("[]")])
    assert reason(result) == "refused"
    assert not server.asked


def test_a_redirect_to_this_machine_is_refused(server: Server, tmp_path: Path) -> None:
    def resolved(host: str, port: int) -> list[str]:
        return {"shop.example": ["127.0.0.1"], "127.0.0.2": ["127.0.0.2"]}[host]

    inner = server.url("good", "127.0.0.2")
    result = over_web(server.url(f"to/?{inner}", "shop.example"), tmp_path, hosts=(), resolve=resolved)
    assert reason(result) == "refused"  # by its port
    settings = {"hosts": ("shop.example", "127.0.0.2"), "resolve": resolved}
    result = over_web(server.url(f"to/?{inner}", "shop.example"), tmp_path, **settings)
    assert reason(result) == "refused"  # by its address: `allow` has 127.0.0.1 alone
    assert [path for path, _ in server.asked] == [f"/to/?{inner}"]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.2", "127.2", "2130706434", "0x7f000002", "0177.0.0.2", "[::1]", "[::ffff:127.0.0.1]",
     "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "0", "10.0.0.1", "169.254.169.254", "[fe80::1]", "[fd00:ec2::254]"],
)  # fmt: skip
def test_a_redirect_to_an_address_that_is_not_public_is_refused_however_it_is_written(
    host: str, server: Server, tmp_path: Path
) -> None:
    """Only the first server's own address is let through besides public ones, and none in another form."""

    def resolved(name: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"] if name == "shop.example" else resolve(name, port)

    url = server.url(f"to/?http://{host}:{server.port}/good", "shop.example")
    result = over_web(
        url, tmp_path, hosts=("shop.example", host.strip("[]")), resolve=resolved,
        allow=lambda address: address == LOOPBACK or is_public(address),
    )  # fmt: skip
    assert reason(result) in ("refused", "bad_url")
    assert len(server.asked) == 1


def test_what_is_connected_to_is_the_address_that_was_checked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = list[Any]()
    connect = socket.create_connection

    def noted(address: Any, *how: Any, **more: Any) -> socket.socket:
        connected.append(address)
        return connect(address, *how, **more)

    monkeypatch.setattr(socket, "create_connection", noted)
    assert over_web(server.url("good", "shop.example"), tmp_path, resolve=lambda *_: ["127.0.0.1"]) == PHOTO
    assert connected == [("127.0.0.1", server.port)]


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://shop.example/a", "http://a:b@shop.example/", "http://else.example/"]
)
def test_a_redirect_is_checked_as_any_url(location: str, server: Server, tmp_path: Path) -> None:
    assert reason(over_web(server.url(f"to/?{location}"), tmp_path)) in ("refused", "bad_url")


def test_a_name_that_changes_its_address_gains_nothing(server: Server, tmp_path: Path) -> None:
    """The first answer is allowed, all later ones are not: a second connection is refused."""
    answers = itertools.chain(["127.0.0.1"], itertools.repeat("127.0.0.2"))
    asked = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return [next(answers)]

    url = server.url("rubbish", "shop.example")  # closes the connection, so that another is needed
    assert reason(over_web(url, tmp_path, resolve=rebinding, retries=3)) == "refused"
    assert len(server.asked) == 1
    assert asked == ["shop.example"] * 2  # once a connection: what was checked is what was connected to


def test_of_many_addresses_the_allowed_are_tried_in_turn(server: Server, tmp_path: Path) -> None:
    allowed = {ipaddress.ip_address(a) for a in ("127.0.0.9", "127.0.0.1")}  # nobody is at the first
    addresses = ["10.0.0.1", "127.0.0.9", "127.0.0.1"]
    url = server.url("good", "shop.example")
    assert over_web(url, tmp_path, resolve=lambda *_: addresses, allow=allowed.__contains__) == PHOTO


# --- https ---------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of shop.example, signed by itself, with its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    names = x509.SubjectAlternativeName([x509.DNSName("shop.example")])
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(hours=1))
    signed = builder.add_extension(names, critical=True).sign(key, hashes.SHA256())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path / "certificate.pem"
    path.write_bytes(secret + signed.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def secure(certificate: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with closing(Server(context)) as server:
        yield server


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(httpcore, "default_ssl_context", lambda: context)


Resolver = Callable[[str, int], list[str]]


@pytest.fixture
def here() -> Resolver:
    return lambda host, port: ["127.0.0.1"]


@pytest.mark.usefixtures("trusted")
def test_https_is_for_the_name_and_not_the_address(secure: Server, here: Resolver, tmp_path: Path) -> None:
    assert over_web(secure.url("good", "shop.example", "https"), tmp_path, resolve=here) == PHOTO
    assert (
        reason(over_web(secure.url("good", "cdn.shop.example", "https"), tmp_path, resolve=here)) == "unavailable"
    )


def test_a_certificate_of_nobody_is_refused(secure: Server, here: Resolver, tmp_path: Path) -> None:
    url = secure.url("good", "shop.example", "https")
    assert reason(over_web(url, tmp_path, resolve=here)) == "unavailable"
    assert not secure.asked


@pytest.mark.usefixtures("trusted")
def test_a_redirect_from_https_to_http_is_refused(
    secure: Server, server: Server, here: Resolver, tmp_path: Path
) -> None:
    url = secure.url(f"to/?{server.url('good')}", "shop.example", "https")
    assert reason(over_web(url, tmp_path, resolve=here)) == "refused"
    assert not server.asked


# --- batches -------------------------------------------------------------------------------------


def test_order_is_kept_over_a_mix(server: Server, tmp_path: Path) -> None:
    kinds: list[tuple[bytes | str | None, object]] = []
    for number in range(200):
        (tmp_path / f"{number}.jpg").write_bytes(b"file %d" % number)
        kinds.append(
            [(b"bytes %d" % number, b"bytes %d" % number), (f"{number}.jpg", b"file %d" % number), (None, None),
             (f"{number}.png", "not_found"), (server.url("good"), PHOTO), (server.url("status/404"), "not_found")]
            [number % 6]
        )  # fmt: skip
    settings = {"urls": True, "hosts": ("127.0.0.1",), "allow": LOOPBACK.__eq__}
    results = fetched([reference for reference, _ in kinds], tmp_path, **settings)
    assert [r.reason if isinstance(r, Problem) else r for r in results] == [wanted for _, wanted in kinds]


def test_connections_are_kept_for_the_next(server: Server, tmp_path: Path) -> None:
    asked = []

    def counted(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    settings = {"urls": True, "hosts": ["shop.example"], "allow": LOOPBACK.__eq__, "resolve": counted}
    results = fetched([server.url("good", "shop.example")] * 20, tmp_path, num_connections=2, **settings)
    assert results == [PHOTO] * 20
    assert len(asked) <= 2


@pytest.fixture(scope="module")
def wary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fetcher]:
    def nobody(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    root = tmp_path_factory.mktemp("wary")
    settings = FetchSettings(urls=True, retries=0, num_connections=1)
    with closing(Fetcher(str(root), settings, resolve=nobody)) as fetcher:
        yield fetcher


STARTS = [
    "",
    "http://",
    "https://",
    "HTTP://[",
    "http://a:",
    "file://",
    "file:///",
    "memory://",
    "ftp://",
    "../",
    "//",
]


@given(start=st.sampled_from(STARTS), rest=st.text())
def test_no_reference_raises(start: str, rest: str, wary: Fetcher) -> None:
    (result,) = wary.fetch([start + rest])
    assert result is None or reason(result)


@given(
    scheme=st.sampled_from(["http", "https", "sftp", "ftp", "memory", "file"]),
    user=st.text(max_size=5),
    password=st.text(max_size=5),
    path=st.text(max_size=8),
)
def test_no_message_holds_credentials(scheme: str, user: str, password: str, path: str, wary: Fetcher) -> None:
    (result,) = wary.fetch([f"{scheme}://{user}:{password}SECRET{password}@shop.example/{path}?token=SECRET"])
    assert "SECRET" not in str(result)


def test_a_long_reference_is_shown_cut_and_at_once(wary: Fetcher) -> None:
    before = time.monotonic()
    results = wary.fetch(["ftp://" + "//:" * 1_000_000, "//:@" * 1_000_000, "http://" + "?#" * 1_000_000])
    assert all(reason(result) for result in results)
    assert time.monotonic() - before < 3
