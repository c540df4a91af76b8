"""The TLS listener, and the local authority behind it."""

from __future__ import annotations

import asyncio
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from penstock.core.clock import SystemClock
from penstock.ingress.authority import LEAF_DAYS, RENEW_DAYS, issue
from penstock.ingress.listen import Listeners, bind
from tests.unit.ingress.conftest import SANDBOX, Fixture, echo, read_response, running

NOW = 1_795_000_000.0
DAY = 86_400.0


def leaf_of(path: str) -> x509.Certificate:
    return x509.load_pem_x509_certificates(Path(path).read_bytes())[0]


def test_a_certificate_is_kept_until_it_is_nearly_over(tmp_path: Path):
    first = issue(tmp_path / "tls", "sbx.localhost:8443", NOW)
    again = issue(tmp_path / "tls", "sbx.localhost", NOW + DAY)
    number = leaf_of(first.leaf).serial_number
    assert leaf_of(again.leaf).serial_number == number
    authority = Path(first.authority).read_bytes()
    issue(tmp_path / "tls", "sbx.localhost", NOW + (LEAF_DAYS - RENEW_DAYS + 1) * DAY)
    assert leaf_of(first.leaf).serial_number != number
    assert Path(first.authority).read_bytes() == authority


def test_keys_are_private_and_the_authority_signs_for_its_domain_only(tmp_path: Path):
    issued = issue(tmp_path / "tls", "sbx.localhost", NOW)
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700
    for path in (tmp_path / "tls").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    authority = x509.load_pem_x509_certificate(Path(issued.authority).read_bytes())
    constraints = authority.extensions.get_extension_for_class(x509.NameConstraints).value
    assert constraints.permitted_subtrees == [x509.DNSName("sbx.localhost")]
    other = issue(tmp_path / "tls", "other.example", NOW)
    assert x509.load_pem_x509_certificate(Path(other.authority).read_bytes()) != authority


@pytest.mark.parametrize("damaged", ["ca.pem", "ca-key.pem", "leaf.pem"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damaged: str):
    issue(tmp_path, "sbx.localhost", NOW)
    (tmp_path / damaged).write_text("-----BEGIN CERTIFICATE-----\nnonsense\n")
    issued = issue(tmp_path, "sbx.localhost", NOW)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.leaf)
    authority = x509.load_pem_x509_certificate(Path(issued.authority).read_bytes())
    leaf_of(issued.leaf).verify_directly_issued_by(authority)


async def serve_tls(ingress: Fixture, folder: Path) -> tuple[Listeners, int, ssl.SSLContext]:
    issued = issue(folder / "tls", "sbx.localhost", SystemClock().wall())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.leaf)
    sock = bind("127.0.0.1", 0)
    listeners = Listeners(ingress.hub)
    listeners.serve_tls(sock, context)
    return listeners, sock.getsockname()[1], ssl.create_default_context(cafile=issued.authority)


async def test_requests_and_large_bodies_over_tls(tmp_path: Path):
    async with running(tmp_path) as ingress:
        listeners, port, trust = await serve_tls(ingress, tmp_path)
        await ingress.port(8000, echo)
        name = f"8000-{SANDBOX}.sbx.localhost"
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust, server_hostname=name)
        for number in range(2):
            writer.write(f"GET /{number} HTTP/1.1\r\nHost: {name}:{port}\r\n\r\n".encode())
            assert (await read_response(reader))[1].startswith(b"GET /%d " % number)

        async def large(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8388608\r\n\r\n")
            for _ in range(128):
                writer.write(b"z" * 65536)
                await writer.drain()

        await ingress.port(8001, large)
        writer.write(f"GET / HTTP/1.1\r\nHost: 8001-{SANDBOX}.sbx.localhost\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        assert len(await asyncio.wait_for(reader.readexactly(8388608), 20)) == 8388608
        writer.close()
        listeners.close()


async def test_a_stream_over_tls_is_cut_when_its_sandbox_ends(tmp_path: Path):
    async with running(tmp_path) as ingress:
        listeners, port, trust = await serve_tls(ingress, tmp_path)

        async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n.\r\n")
            await reader.read()

        await ingress.port(8000, stream)
        name = f"8000-{SANDBOX}.sbx.localhost"
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust, server_hostname=name)
        writer.write(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        await reader.readuntil(b".\r\n")
        ingress.hub.table.put(SANDBOX, None)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 2)
        writer.transport.abort()
        listeners.close()


async def test_handshakes_that_never_come_are_bounded(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("penstock.ingress.listen.HANDSHAKES_MAX", 4)
    async with running(tmp_path) as ingress:
        listeners, port, _ = await serve_tls(ingress, tmp_path)
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
        await asyncio.sleep(0.1)
        assert ingress.hub.handshakes <= 4
        for _, writer in silent:
            writer.transport.abort()
        for _ in range(100):
            if not ingress.hub.handshakes:
                break
            await asyncio.sleep(0.01)
        assert ingress.hub.handshakes == 0
        listeners.close()
