"""Structured logs: one JSON line on stderr per event, with ids as fields. No secret is ever a field."""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

import structlog

_SECRET: Final = ("token", "secret", "api_key", "authorization", "password", "signature", "seed")


def configure(level: str) -> None:
    """For the whole process. `level` is debug, info, warning or error."""
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _hide,
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")


def _hide(_: Any, __: str, event: Any) -> Any:
    """The second net: a field whose name says that it is a secret is never written."""
    for name in event:
        if any(part in name.lower() for part in _SECRET):
            event[name] = "hidden"
    return event
