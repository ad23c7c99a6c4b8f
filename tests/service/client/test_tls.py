"""TLS between a client and a server that has a certificate: who trusts whom."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn

from service.client import Unavailable
from service.http.protocol import ConnectionLimits, protocol_of

Connect = Callable[..., Any]
KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


class Papers(NamedTuple):
    """An authority's certificate, and a certificate with its key that it has signed."""

    authority: Path
    certificate: Path
    key: Path


def papers(directory: Path) -> Papers:
    """Made anew."""
    directory.mkdir()

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True)

    (directory / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    openssl("req", "-x509", *KEY, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    openssl("req", *KEY, "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=localhost")
    signing = ("x509", "-req", "-in", "own.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
    openssl(*signing, "-out", "own.pem", "-extfile", "names")
    return Papers(directory / "ca.pem", directory / "own.pem", directory / "own.key")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    if shutil.which("openssl") is None:
        assert "CI" not in os.environ, "no openssl is installed"
        pytest.skip("no openssl is installed")
    return papers(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def theirs(ours: Papers, tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return papers(tmp_path_factory.mktemp("tls") / "theirs")


class TlsServer:
    """Says that it is ready, over TLS, as a proxy before the service would."""

    def __init__(self, **options: Any) -> None:
        protocol = protocol_of(ConnectionLimits())
        quiet = {"interface": "asgi3", "lifespan": "off", "log_level": "critical"}
        config = uvicorn.Config(self._app, port=0, http=protocol, **quiet, **options)
        self._server = uvicorn.Server(config)
        self.asked = 0
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server ended at start"
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return f"https://localhost:{self._server.servers[0].sockets[0].getsockname()[1]}"

    async def _app(self, _scope: Any, _receive: Any, send: Any) -> None:
        self.asked += 1
        headers = [(b"content-type", b"application/json"), (b"content-length", b"14")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"ready":true}'})

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(30)


@pytest.fixture
def server(ours: Papers) -> Iterator[TlsServer]:
    running = TlsServer(ssl_certfile=ours.certificate, ssl_keyfile=ours.key)
    yield running
    running.stop()


@pytest.fixture
def suspicious(ours: Papers) -> Iterator[TlsServer]:
    """Wants a certificate of its callers, too."""
    asks = {"ssl_ca_certs": str(ours.authority), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    running = TlsServer(ssl_certfile=ours.certificate, ssl_keyfile=ours.key, **asks)
    yield running
    running.stop()


def test_an_authority_of_ones_own_is_trusted_as_a_file_a_context_or_by_the_environment(
    server: TlsServer, ours: Papers, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.create_default_context(cafile=ours.authority)
    for verify in (ours.authority, str(ours.authority), context):
        connect(server.url, verify=verify, patience_s=5).wait_until_ready()
    monkeypatch.setenv("SSL_CERT_FILE", str(ours.authority))
    connect(server.url, patience_s=5).wait_until_ready()

    assert server.asked == 4


def test_an_authority_that_is_unknown_is_refused_at_once_unless_any_is_trusted(
    server: TlsServer, theirs: Papers, connect: Connect
) -> None:
    waits: list[Any] = []
    for verify in (True, theirs.authority):
        client = connect(server.url, verify=verify, on_wait=waits.append)
        with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
            client.wait_until_ready()
        assert client.ready() is False
    assert (server.asked, waits) == (0, [])

    assert connect(server.url, verify=False).ready()


def test_a_certificate_of_another_name_is_refused_at_once(server: TlsServer, ours: Papers, connect: Connect) -> None:
    context = ssl.create_default_context(cafile=ours.authority)
    client = connect(server.url.replace("localhost", "[::ffff:127.0.0.1]"), verify=context)

    with pytest.raises(Unavailable, match="IP address mismatch"):
        client.wait_until_ready()

    assert server.asked == 0


def test_a_client_shows_its_own_certificate_where_it_is_asked_for_one(
    suspicious: TlsServer, ours: Papers, connect: Connect
) -> None:
    with pytest.raises(Unavailable, match="localhost"):
        connect(suspicious.url, verify=ours.authority, patience_s=0).wait_until_ready()
    assert suspicious.asked == 0

    context = ssl.create_default_context(cafile=ours.authority)
    context.load_cert_chain(ours.certificate, ours.key)
    connect(suspicious.url, verify=context, patience_s=5).wait_until_ready()

    assert suspicious.asked == 1


def test_what_speaks_no_tls_is_told_at_once(service: Any, connect: Connect) -> None:
    with pytest.raises(Unavailable, match="SSL"):
        connect(str(service.http.base_url).replace("http:", "https:")).wait_until_ready()


def test_a_file_without_certificates_is_refused_as_the_client_is_made(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    for path in (tmp_path / "empty.pem", tmp_path / "none.pem"):
        with pytest.raises(ValueError, match=r"\.pem has no certificates of authorities"):
            connect("https://localhost", verify=path)
