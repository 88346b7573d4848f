"""How fast it can be at best. May import: gpuctl.fit, the standard library. Estimates: see docs/fit.md."""

from __future__ import annotations
