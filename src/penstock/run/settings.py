"""Settings of one installation: command line, then `PENSTOCK_*` environment, then a file, then defaults.

The file is TOML, `<data>/penstock.toml` unless `--config` names another. Every value that was read is checked here;
a bad one raises `Invalid` naming the field as the person wrote it, and nothing has been started by then.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

import msgspec

from penstock.model.errors import Invalid
from penstock.model.units import parse_bytes, parse_seconds
from penstock.node.linux.claims import SLOTS_PER_BLOCK, blocks_in

DATA_DEFAULT: Final = "/var/lib/penstock"
ENV_PREFIX: Final = "PENSTOCK_"
SHUTDOWN_DRAIN_TIMEOUT: Final = "SHUTDOWN_DRAIN_TIMEOUT"  # seconds; a stop drains for that long, 0: as long as it takes
FORCE_STOP: Final = "FORCE_STOP"  # yes: a stop forces
DRAIN_PROPAGATION_DELAY: Final = "DRAIN_PROPAGATION_DELAY"  # seconds
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
TEAM_TIMEOUT_S_MAX: Final = 366 * 86400.0  # an end of a sandbox must be a date
_DOMAIN: Final = re.compile(r"(?i:[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)(\.(?i:[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?))*")


class OnStop(StrEnum):
    """What stopping the daemon does to sandboxes. `keep` leaves sandboxes, ingress and zygote running."""

    KEEP = "keep"
    DRAIN = "drain"
    FORCE = "force"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One installation. Addresses are HOST:PORT; port 0 takes a free one. Sizes are bytes, times are seconds."""

    data: str = DATA_DEFAULT
    api: str = "127.0.0.1:3000"
    ingress: str = "127.0.0.1:3002"
    tls: str = "127.0.0.1:0"
    tls_cert: str = ""  # PEM files of a wildcard certificate; empty: made by a local authority under <data>/tls
    tls_key: str = ""
    domain: str = "sbx.localhost"
    on_stop: OnStop | None = None  # None: drain on a terminal, keep as a service
    drain_s: float = 30.0  # bound of a drain at stop; then what is left is forced. 0: as long as it takes
    drain_propagation_s: float = 0.0  # how long a stop's drain asks nobody to leave, so that readers learn of it first
    slots_ready: int = 128  # slots and disks kept prepared: 0.25 MiB and 4 descriptors each
    slots_max: int = 1024  # sandboxes on this node at once
    starts_max: int = 6  # starts that run at once; more wait in order
    starts_waiting_max: int = 1000
    team_sandboxes_max: int = 2000
    team_timeout_s_max: float = 24 * 3600.0
    allow_private_egress: bool = False
    network_cidr: str = "10.201.0.0/16"
    disk_free_min: int = 512 * 1024 * 1024  # bytes of the data folder's disk; below it no sandbox is made
    uplink: bool = True  # NAT to the host's default route, when it has one
    log_level: str = "info"


_SECONDS: Final = frozenset({"drain_s", "drain_propagation_s", "team_timeout_s_max"})
_BYTES: Final = frozenset({"disk_free_min"})


def load(given: Mapping[str, Any], *, environ: Mapping[str, str] | None = None, config: str | None = None) -> Settings:
    """Settings from `given` (what the command line set; None means not set), environment, file, defaults.

    Raises Invalid naming the field and where it came from.
    """
    environ = os.environ if environ is None else environ
    values = {name: value for name, value in given.items() if value is not None}
    data = str(values.get("data") or environ.get(f"{ENV_PREFIX}DATA") or DATA_DEFAULT)
    merged = _from_file(Path(config) if config else Path(data) / "penstock.toml", must_exist=config is not None)
    merged |= _from_aliases(environ)
    for name in Settings.__struct_fields__:
        text = environ.get(ENV_PREFIX + name.upper())
        if text is not None:
            merged[name] = _parse(name, text, f"{ENV_PREFIX}{name.upper()}")
    for name, value in values.items():
        merged[name] = _parse(name, value, f"--{name.replace('_', '-')}") if isinstance(value, str) else value
    merged["data"] = str(Path(str(merged.get("data") or data)).absolute())
    for name, value in merged.items():
        _check_type(name, value)
    settings = Settings(**merged)
    _check(settings)
    return settings


def host_port(text: str, *, field: str) -> tuple[str, int]:
    """`"127.0.0.1:3000"` → `("127.0.0.1", 3000)`. Raises Invalid naming `field`."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise Invalid(field, f"{text!r} is not HOST:PORT", now="write it as 127.0.0.1:3000 (port 0 takes a free one)")
    return host.strip("[]"), int(port)


def _from_aliases(environ: Mapping[str, str]) -> dict[str, object]:
    """What other sandbox platforms' variables ask of a stop. A bound for a drain means that there is one."""
    found: dict[str, object] = {}
    if environ.get(SHUTDOWN_DRAIN_TIMEOUT):
        found |= {
            "on_stop": OnStop.DRAIN,
            "drain_s": _parse("drain_s", environ[SHUTDOWN_DRAIN_TIMEOUT], SHUTDOWN_DRAIN_TIMEOUT),
        }
    if environ.get(DRAIN_PROPAGATION_DELAY):
        found["drain_propagation_s"] = _parse(
            "drain_propagation_s", environ[DRAIN_PROPAGATION_DELAY], DRAIN_PROPAGATION_DELAY
        )
    if environ.get(FORCE_STOP) and _parse("uplink", environ[FORCE_STOP], FORCE_STOP):
        found["on_stop"] = OnStop.FORCE
    return found


def _from_file(path: Path, *, must_exist: bool) -> dict[str, Any]:
    try:
        raw = tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        if must_exist:
            raise Invalid("--config", f"{path} does not exist") from None
        return {}
    except OSError as error:
        raise Invalid(str(path), f"cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as bad:
        raise Invalid(str(path), f"is not TOML: {bad}") from bad
    unknown = sorted(set(raw) - set(Settings.__struct_fields__))
    if unknown:
        raise Invalid(
            str(path), f"unknown setting {unknown[0]!r}", now=f"known: {', '.join(Settings.__struct_fields__)}"
        )
    return {
        name: _parse(name, value, f"{path}: {name}") if isinstance(value, str) else value for name, value in raw.items()
    }


def _parse(name: str, value: str, where: str) -> object:
    kind = get_type_hints(Settings).get(name, str)
    kinds = get_args(kind) or (kind,)
    if name in _SECONDS:
        return parse_seconds(value, field=where)
    if bool in kinds:
        lowered = value.lower()
        if lowered not in ("1", "0", "true", "false", "yes", "no", "on", "off"):
            raise Invalid(where, f"{value!r} is not yes or no")
        return lowered in ("1", "true", "yes", "on")
    if int in kinds:
        return parse_bytes(value, field=where) if name in _BYTES else _integer(value, where)
    if OnStop in kinds:
        try:
            return OnStop(value)
        except ValueError:
            raise Invalid(where, f"{value!r} is not one of keep, drain, force") from None
    return value


def _integer(value: str, where: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise Invalid(where, f"{value!r} is not a whole number") from None


def _check_type(name: str, value: object) -> None:
    """The file has types of its own: `uplink = 3` is not what anybody means."""
    kind = get_type_hints(Settings)[name]
    wanted = get_args(kind) or (kind,)
    if type(value) not in wanted and not (float in wanted and type(value) is int):
        known = {str: "text in quotes", bool: "true or false", int: "a whole number", float: "a number of seconds"}
        raise Invalid(name, f"{value!r} is not {known.get(wanted[0], 'one of keep, drain, force')}")


def _check(settings: Settings) -> None:
    for name in ("api", "ingress", "tls"):
        host_port(getattr(settings, name), field=name)
    for name, least, most in (
        ("slots_ready", 0, 256),
        ("slots_max", 1, 16_384),
        ("starts_max", 1, 256),
        ("starts_waiting_max", 0, 100_000),
        ("team_sandboxes_max", 1, 1_000_000),
        ("disk_free_min", 0, 1 << 50),
    ):
        value = getattr(settings, name)
        if not least <= value <= most:
            raise Invalid(name, f"{value!r} is not between {least} and {most}")
    for name in ("drain_s", "drain_propagation_s"):
        if not 0 <= getattr(settings, name) <= 24 * 3600:
            raise Invalid(name, f"{getattr(settings, name)} is not between 0 and a day")
    if not 0 < settings.team_timeout_s_max <= TEAM_TIMEOUT_S_MAX:
        raise Invalid("team_timeout_s_max", f"{settings.team_timeout_s_max} is not between 0 and 366 days")
    if settings.log_level not in LOG_LEVELS:
        raise Invalid("log_level", f"{settings.log_level!r} is not one of {', '.join(LOG_LEVELS)}")
    _check_network(settings.network_cidr, settings.slots_max)
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise Invalid("tls_cert", "a certificate needs its key, and a key its certificate", now="give both or none")
    for name in ("tls_cert", "tls_key"):
        if getattr(settings, name) and not Path(getattr(settings, name)).is_file():
            raise Invalid(name, f"{getattr(settings, name)} is not a file")
    if len(settings.domain) > 190 or not _DOMAIN.fullmatch(settings.domain):
        raise Invalid("domain", f"{settings.domain!r} is not a domain name", now="write it as sbx.example.com")


def _check_network(text: str, slots: int) -> None:
    """Where addresses of sandboxes may come from, and that there is room for those of `slots`."""
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError as bad:
        raise Invalid("network_cidr", str(bad), now="write it as 10.201.0.0/16") from None
    if not network.is_private or network.is_loopback or network.is_link_local or network.prefixlen < 8:
        raise Invalid("network_cidr", f"{text} is not a private network", now="take one such as 10.201.0.0/16")
    room = blocks_in(text) * SLOTS_PER_BLOCK
    if room < slots:
        raise Invalid("network_cidr", f"{text} has addresses for {room} slots, and slots_max is {slots}")
