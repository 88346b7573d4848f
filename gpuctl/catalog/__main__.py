"""`python -m gpuctl.catalog`: make what is read of the tables again, after a change of the TOML files."""

from __future__ import annotations

from gpuctl.catalog.tables import compile_all

if __name__ == "__main__":
    for path in compile_all():
        print(f"wrote {path}")
