"""What the commands take for an id."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.cli.show import plain_id

COMMANDS = (
    "sandbox show",
    "sandbox exec",
    "sandbox logs",
    "sandbox kill",
    "sandbox pause",
    "sandbox resume",
    "sandbox snapshot",
    "node show",
    "node undrain",
    "key revoke",
    "why",
)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("id", ["", "../templates/base", "a/b", "a?b", "a#b", "a\nb", ".."])
def test_what_would_change_the_path_of_a_request_is_not_an_id(command: str, id: str) -> None:
    ran = CliRunner().invoke(app, [*command.split(), "--data", "/nonexistent", "--", id])
    assert (ran.exit_code, "is not an id" in ran.output) == (2, True), ran.output


@pytest.mark.parametrize("id", ["itb1tauv8027b4yka2nv7", "drain-local-1", "local", "s1:default", "base"])
def test_ids_of_every_kind_are(id: str) -> None:
    assert plain_id(id) == id
