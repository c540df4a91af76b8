"""What a sandbox is told: at birth by its launcher, later by the daemon over the control socket (`/init`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from penstock.guest.users import User

ENVD_VERSION: Final = "0.6.13"  # the protocol version we answer to; the SDKs compare it
PATH_DEFAULT: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
USER_DEFAULT: Final = "root"  # until somebody says otherwise
NOTICE_PATH: Final = "/run/penstock/notice.json"  # there while a drain wants the sandbox to end; see `notices`


class Settings:
    """Mutable by `take` and `/init` only. `env` is what the creator of the sandbox asked for, never our own names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.take(config)

    def take(self, config: Mapping[str, Any]) -> None:
        """Everything anew from `config`, which has the fields of `node.ports.GuestConfig`."""
        self.sandbox_id: str = config["sandbox_id"]
        self.template_id: str = config["template_id"]
        self.hostname: str = config.get("hostname") or self.sandbox_id
        self.access_token: str | None = config.get("access_token") or None
        self.user: str = config.get("user") or USER_DEFAULT
        self.workdir: str = config.get("workdir") or ""  # empty: the user's home
        self.env: dict[str, str] = dict(config.get("env") or {})
        self.cpu_count: int = config.get("cpu_count") or 0  # limits of the sandbox; 0: those of the machine
        self.memory_bytes_total: int = config.get("memory_bytes_total") or 0

    @property
    def identity(self) -> dict[str, str]:
        """By which programs learn that they are in a sandbox, and in which."""
        return {"E2B_SANDBOX": "true", "E2B_SANDBOX_ID": self.sandbox_id, "E2B_TEMPLATE_ID": self.template_id}

    @property
    def own_env(self) -> dict[str, str]:
        """Names nobody in the sandbox's API can override."""
        return self.identity | {"PENSTOCK_NOTICE": NOTICE_PATH}

    def public_env(self) -> dict[str, str]:
        """What GET /envs answers."""
        return self.env | self.own_env

    def process_env(self, user: User, extra: Mapping[str, str]) -> dict[str, str]:
        """The environment of a process of `user`: basics, the sandbox's, the call's, ours; the last one wins."""
        basics = {"PATH": PATH_DEFAULT, "HOME": user.home, "USER": user.name, "LOGNAME": user.name}
        return basics | self.env | dict(extra) | self.own_env
