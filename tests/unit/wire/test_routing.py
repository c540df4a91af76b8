"""Hosts and headers → sandbox and port, as E2B's edge reads them."""

from __future__ import annotations

import pytest

from penstock.wire.routing import RoutingError, Target, route


@pytest.mark.parametrize(
    ("host", "target"),
    [
        (b"8000-iabc.example.org", Target("iabc", 8000)),
        (b"8000-iabc.sbx.localhost:3943", Target("iabc", 8000)),
        (b"49983-iabc-00000000.example.org", Target("iabc", 49983)),
        (b"8000-IABC.EXAMPLE.org", Target("iabc", 8000)),
        (b"8000-iabc.", Target("iabc", 8000)),
    ],
)
def test_a_host_names_sandbox_and_port(host: bytes, target: Target) -> None:
    assert route(host, None, None) == target
    assert route(host, b"other", b"1") == target  # under such a host the headers do not count


@pytest.mark.parametrize(
    "host", [b"localhost", b"localhost:3002", b"127.0.0.1:3002", b"[::1]:3002", b"sandbox.example.org"]
)
def test_headers_count_where_the_host_cannot_say(host: bytes) -> None:
    assert route(host, b"iabc", b"49983") == Target("iabc", 49983)


@pytest.mark.parametrize(
    ("host", "sandbox", "port", "message"),
    [
        (b"localhost", b"iabc", None, "missing header"),
        (b"localhost", b"", b"49983", "missing header"),
        (b"localhost", None, None, "Invalid host"),
        (b"localhost", b"iabc", b"0", "Invalid sandbox port"),
        (b"localhost", b"iabc", b"65536", "Invalid sandbox port"),
        (b"localhost", b"iabc", "٥".encode(), "Invalid sandbox port"),
        (b"localhost", b"../x", b"1", "Invalid sandbox ID"),
        (b"sandbox.", b"iabc", b"1", "Invalid host"),
        (b"", None, None, "Invalid host"),
        (b"nodot", None, None, "Invalid host"),
        (b"plain.example.org", None, None, "Invalid host"),
        (b"x-iabc.example.org", None, None, "Invalid sandbox port"),
        (b"80-.example.org", None, None, "Invalid sandbox ID"),
        (b"80-i_b.example.org", None, None, "Invalid sandbox ID"),
        (b"99999-iabc.example.org", None, None, "Invalid sandbox port"),
        (b"\xff-\xfe.x", None, None, "Invalid sandbox ID"),
    ],
)
def test_what_names_no_target_is_refused(host: bytes, sandbox: bytes | None, port: bytes | None, message: str) -> None:
    with pytest.raises(RoutingError) as refused:
        route(host, sandbox, port)
    assert (refused.value.status, refused.value.message) == (400, message)
