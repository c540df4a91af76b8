"""Records of the store as an operator may read them: their JSON, without what is secret in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from penstock.model import keys
from penstock.model.records import Record

HIDDEN: Final = "(hidden)"
_SECRET_NAMES: Final = ("token", "secret", "password", "authorization", "signature", "seed")


def shown(record: Record) -> dict[str, Any]:
    """One record. A value that is no JSON is told by its size: only the store's own records may be such."""
    return {
        "key": record.key,
        "value": value(record),
        "labels": {name: HIDDEN if name == "hash" else text for name, text in record.labels.items()},
        "createRevision": record.create_revision,
        "revision": record.mod_revision,
        "version": record.version,
    }


def value(record: Record) -> Any:
    try:
        told = msgspec.json.decode(record.value)
    except msgspec.DecodeError:
        return f"({len(record.value)} bytes)"
    for prefix, hide in _HIDING.items():
        if record.key.startswith(prefix) and isinstance(told, dict):
            hide(told)
    return _without_secrets(told)


def _hide_environment(told: dict[str, Any]) -> None:
    if isinstance(told.get("env"), dict):
        told["env"] = dict.fromkeys(told["env"], HIDDEN)


def _hide_hash(told: dict[str, Any]) -> None:
    told["hash"] = HIDDEN


def _hide_digest(told: dict[str, Any]) -> None:
    told["digest"] = HIDDEN  # of a request with its environment: short values could be guessed from it


_HIDING: Final[dict[str, Callable[[dict[str, Any]], None]]] = {
    keys.SANDBOX_SPEC: _hide_environment,
    keys.BUILD: _hide_environment,
    keys.API_KEY: _hide_hash,
    keys.IDEMPOTENCY: _hide_digest,
}


def _without_secrets(told: Any) -> Any:
    """The second net: a field whose name says that it is a secret is not shown, whatever record it came into."""
    if isinstance(told, dict):
        return {
            name: HIDDEN if any(part in name.lower() for part in _SECRET_NAMES) else _without_secrets(item)
            for name, item in told.items()
        }
    return [_without_secrets(item) for item in told] if isinstance(told, list) else told
