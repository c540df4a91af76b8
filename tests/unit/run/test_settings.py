"""Settings: what a person may write, and that what is wrong is told by its name before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.model.errors import Invalid
from penstock.run.settings import OnStop, load


def from_file(tmp_path: Path, text: str):
    (tmp_path / "penstock.toml").write_text(text)
    return load({"data": str(tmp_path)}, environ={})


def test_the_command_line_wins_over_the_environment_over_the_file_over_defaults(tmp_path):
    (tmp_path / "penstock.toml").write_text('drain_s = 1\napi = "[::1]:1"\ntls = "127.0.0.1:1"\non_stop = "keep"')
    environ = {"PENSTOCK_API": "127.0.0.1:2", "PENSTOCK_TLS": "127.0.0.1:2", "PENSTOCK_UPLINK": "no"}
    settings = load({"data": str(tmp_path), "tls": "127.0.0.1:3", "domain": None}, environ=environ)
    assert (settings.drain_s, settings.api, settings.tls) == (1, "127.0.0.1:2", "127.0.0.1:3")
    assert (settings.on_stop, settings.uplink, settings.domain) == (OnStop.KEEP, False, "sbx.localhost")


@pytest.mark.parametrize(
    "text",
    [
        "on_stop = 5",
        'on_stop = "maybe"',
        "drain_s = true",
        "drain_s = nan",
        "drain_s = -1",
        'drain_s = "soon"',
        "team_timeout_s_max = -1",
        "team_timeout_s_max = 1e300",
        "slots_max = 1.5",
        "slots_max = true",
        "slots_max = 0",
        "uplink = 3",
        'uplink = "perhaps"',
        "api = 3000",
        'ingress = "nonsense"',
        'tls = "127.0.0.1:99999"',
        'network_cidr = "foo"',
        'network_cidr = "10.0.0.1/8"',
        'network_cidr = "127.0.0.0/8"',
        'network_cidr = "169.254.0.0/16"',
        'network_cidr = "8.8.0.0/16"',
        'network_cidr = "0.0.0.0/0"',
        'network_cidr = "10.0.0.0/30"',
        'network_cidr = "10.0.0.0/22"',
        'network_cidr = "10.0.0.0/21"\nslots_max = 1025',
        'log_level = "loud"',
        'domain = "bad domain!"',
        'domain = ".sbx"',
        'domain = ""',
        'tls_cert = "/dev/null"',
        'tls_cert = "/nonexistent"\ntls_key = "/nonexistent"',
    ],
)
def test_a_bad_value_is_refused_by_its_name(tmp_path, text):
    with pytest.raises(Invalid) as refused:
        from_file(tmp_path, text)
    assert text.split(" ")[0] in str(refused.value)


@pytest.mark.parametrize("text", ["[[[", "nope = 1", "\udcff"])
def test_a_bad_file_is_named(tmp_path, text):
    (tmp_path / "penstock.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(Invalid, match=r"penstock\.toml"):
        load({"data": str(tmp_path)}, environ={})


def test_a_file_that_was_named_must_be_there(tmp_path):
    with pytest.raises(Invalid, match="does not exist"):
        load({"data": str(tmp_path)}, environ={}, config=str(tmp_path / "nosuch"))
    with pytest.raises(Invalid, match="cannot be read"):
        load({"data": str(tmp_path)}, environ={}, config=str(tmp_path))


def test_sizes_are_written_as_people_write_them(tmp_path):
    assert from_file(tmp_path, 'disk_free_min = "2 GiB"').disk_free_min == 2 << 30
    assert from_file(tmp_path, "disk_free_min = 1000").disk_free_min == 1000
    with pytest.raises(Invalid, match="disk_free_min"):
        from_file(tmp_path, 'disk_free_min = "much"')


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"SHUTDOWN_DRAIN_TIMEOUT": "90"}, (OnStop.DRAIN, 90, 0)),
        ({"SHUTDOWN_DRAIN_TIMEOUT": "0"}, (OnStop.DRAIN, 0, 0)),
        ({"SHUTDOWN_DRAIN_TIMEOUT": "5m", "PENSTOCK_ON_STOP": "keep"}, (OnStop.KEEP, 300, 0)),
        ({"FORCE_STOP": "true", "SHUTDOWN_DRAIN_TIMEOUT": "90"}, (OnStop.FORCE, 90, 0)),
        ({"FORCE_STOP": "false"}, (None, 30, 0)),
        ({"DRAIN_PROPAGATION_DELAY": "15"}, (None, 30, 15)),
        ({"PENSTOCK_DRAIN_S": "0"}, (None, 0, 0)),
    ],
)
def test_the_variables_of_other_platforms_say_how_to_stop(tmp_path: Path, environ: dict[str, str], told: object):
    settings = load({"data": str(tmp_path)}, environ=environ)
    assert (settings.on_stop, settings.drain_s, settings.drain_propagation_s) == told


def test_a_bad_value_in_a_variable_of_theirs_is_refused_by_that_name(tmp_path: Path):
    for name in ("SHUTDOWN_DRAIN_TIMEOUT", "FORCE_STOP", "DRAIN_PROPAGATION_DELAY"):
        with pytest.raises(Invalid, match=name):
            load({"data": str(tmp_path)}, environ={name: "soon"})
