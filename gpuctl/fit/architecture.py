"""What a config.json says of a model. May import: gpuctl.errors, gpuctl.fit.values, the standard library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """A model's shapes."""

    family: str
