"""How long ago something was, for people. May import: the standard library."""

from __future__ import annotations

from datetime import UTC, datetime


def age(since: str, *, at: datetime | None = None) -> str:
    """`12s`, `5m`, `3h`, `2d`: how long ago an ISO time was."""
    seconds = max(0, int(((at or datetime.now(UTC)) - datetime.fromisoformat(since)).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
