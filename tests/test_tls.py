"""TLS as docs/security.md says that Ray Serve does it: its own server and options, under our application."""

import asyncio
import datetime
import ipaddress
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from ray.serve._private import haproxy_templates
from ray.serve._private.http_util import start_asgi_http_server
from ray.serve.config import HTTPOptions
from ray.serve.schema import ServeDeploySchema
from tests.fakes import FakeSearcher, dashboard

from askew import deploying, endpoint
from askew.errors import StageError
from askew.ports import free_ports

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A key, and a certificate for loopback that it signs itself."""
    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shop")])
    now = datetime.datetime.now(datetime.UTC)
    alone = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).add_extension(alone, critical=False)
    made = made.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    form, pem, none = (
        serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM, serialization.NoEncryption(),
    )  # fmt: skip
    (folder / "tls.key").write_bytes(key.private_bytes(pem, form, none))
    (folder / "tls.crt").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem))
    return {"ssl_keyfile": str(folder / "tls.key"), "ssl_certfile": str(folder / "tls.crt")}


def documented() -> dict[str, object]:
    """The block of the page that has these options."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    [block] = [one for one in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "http_options" in one]
    return dict(yaml.safe_load(block)["http_options"])


def test_the_page_names_the_options_that_there_are() -> None:
    assert version("ray").startswith("2.60."), "look whether docs/security.md is still true of this Ray"
    config = yaml.safe_load((ROOT / "serve_configs" / "search.yaml").read_text())
    config["http_options"] |= documented()
    found = ServeDeploySchema.model_validate(config).http_options
    assert (found.ssl_keyfile, found.ssl_certfile) == ("/etc/askew/tls.key", "/etc/askew/tls.crt")
    del config["http_options"]["ssl_certfile"]
    with pytest.raises(ValueError, match="ssl"):
        HTTPOptions(**{**documented(), "ssl_keyfile": None})


def test_haproxy_has_no_tls() -> None:
    text = Path(haproxy_templates.__file__).read_text()
    assert "bind {{ config.frontend_host }}:{{ config.frontend_port }}\n" in text
    assert not re.search(r"\b(ssl|crt)\b", text)


@asynccontextmanager
async def answering(options: HTTPOptions) -> AsyncIterator[None]:
    """Ray Serve's own server, over our application."""
    app = endpoint.endpoint(FakeSearcher())
    task, server = await start_asgi_http_server(app, options, event_loop=asyncio.get_running_loop())
    try:
        yield
    finally:
        server.should_exit = True
        await task


@pytest.mark.parametrize("authority", [False, True])
def test_searches_are_answered_by_tls_and_only_by_it(files: dict[str, str], authority: bool) -> None:
    """Also where an authority for clients' certificates is named: Ray asks for none."""
    [port] = free_ports(1)
    more = {"ssl_ca_certs": files["ssl_certfile"]} if authority else {}
    options = HTTPOptions(host="127.0.0.1", port=port, **files, **more)

    async def scenario() -> None:
        async with answering(options):
            trusted = ssl.create_default_context(cafile=files["ssl_certfile"])
            body, url = {"query": "mug"}, f"https://127.0.0.1:{port}/search"
            async with httpx.AsyncClient(verify=trusted, trust_env=False) as client:
                assert (await client.post(url, json=body)).json()["hits"]
                with pytest.raises(httpx.RemoteProtocolError):
                    await client.post(url.replace("https", "http"), json=body)
            async with httpx.AsyncClient(trust_env=False) as stranger:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await stranger.post(url, json=body)

    asyncio.run(scenario())


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::", "localhost")])
def test_where_an_endpoint_answers_is_told_with_its_scheme(files: dict[str, str], host: str, shown: str) -> None:
    """By what Ray's dashboard tells of the options that Serve was started with."""
    options = [HTTPOptions(host=host, port=8000, **how) for how in ({}, files)]

    def told(_: str) -> object:
        return {"http_options": options[0].model_dump(mode="json", exclude_unset=True)}

    with dashboard(told) as port:
        address = f"http://localhost:{port}"
        assert deploying.url(address) == f"http://{shown}:8000"
        del options[0]
        assert deploying.url(address) == f"https://{shown}:8000"


def test_who_signed_the_certificate_is_told_by_the_environment(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [port] = free_ports(1)
    url = f"https://127.0.0.1:{port}"

    async def scenario() -> None:
        async with answering(HTTPOptions(host="127.0.0.1", port=port, **files)):
            with pytest.raises(StageError, match=r"CERTIFICATE_VERIFY_FAILED.*as --endpoint.*SSL_CERT_FILE"):
                await asyncio.to_thread(deploying.await_ready, url, 0.2)
            monkeypatch.setenv("SSL_CERT_FILE", files["ssl_certfile"])
            await asyncio.to_thread(deploying.await_ready, url, 5)

    asyncio.run(scenario())


def test_a_config_without_a_host_is_for_loopback(tmp_path: Path) -> None:
    config = tmp_path / "search.yaml"
    config.write_text("applications: [{name: s, import_path: 'askew.serving:build', args: {model: shop}}]")
    assert deploying.read(config)["http_options"] == {"host": "127.0.0.1"}
    config.write_text(f"http_options: {{host: 10.0.0.7, port: 1}}\n{config.read_text()}")
    assert deploying.read(config)["http_options"] == {"host": "10.0.0.7", "port": 1}
