"""What a caller sees while a part of the installation is killed and replaced: an answer, late at most."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.installation import Installation

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    installation = Installation(Path(tmp_path_factory.mktemp("parts")) / "data").up()
    yield installation
    installation.destroy()


def create(one: Installation) -> httpx.Response:
    headers = {"X-API-Key": one.env["E2B_API_KEY"]}
    body = {"templateID": "base", "timeout": 60}
    return httpx.post(f"{one.env['E2B_API_URL']}/v2/sandboxes", json=body, headers=headers, timeout=60)


def zygote(one: Installation) -> int:
    return int(json.loads((one.data / "run/zygote.json").read_text())["pid"])


@pytest.mark.parametrize("pause_s", [0.0, 0.02, 0.1, 0.3])
def test_a_create_while_the_zygote_is_replaced_succeeds(one: Installation, pause_s: float):
    os.kill(zygote(one), signal.SIGKILL)
    time.sleep(pause_s)
    reply = create(one)
    assert reply.status_code == 201, reply.text


def test_a_create_without_a_zygote_says_when_to_come_back_and_no_path(one: Installation):
    """A zygote that never answers: stopped, so that nobody replaces it, with its socket gone."""
    pid, socket = zygote(one), one.data / "run/zygote.sock"
    away = socket.with_name("away.sock")
    socket.rename(away)
    try:
        reply = create(one)
    finally:
        away.rename(socket)
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
    assert str(one.data) not in reply.text
    assert reply.json()["message"].startswith("Failed to place sandbox")
    assert zygote(one) == pid
    assert create(one).status_code == 201
