"""A model's config.json, offline: one file for each repository, in `configs/`. May import: the catalogue.

Where a repository's own is not there, but that of one with the same architecture is, `models.toml` says which, and what
differs (`config`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl import catalog

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = Path(__file__).parent / "configs"


def config_of(repo: str) -> Mapping[str, Any] | None:
    """The config.json of a repository, as published; None where the catalogue has none."""
    own = _read(repo)
    if own is not None:
        return own
    entry = catalog.of_repo(repo)
    if entry is None or entry.config is None:
        return None
    other = _read(entry.config.of)
    assert other is not None, f"{repo}: {entry.config.of} has no file"
    return {key: value for key, value in other.items() if key not in entry.config.without} | dict(
        entry.config.changed
    )


def _read(repo: str) -> dict[str, Any] | None:
    path = FOLDER / f"{repo.replace('/', '--')}.json"
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return content
