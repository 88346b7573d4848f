"""The tables as they are read: JSON that is made from the TOML files. May import: the standard library.

TOML is what people write, with comments and dates. Python reads JSON thirty times as fast, and every dry run and
every completion reads a table; so `python -m gpuctl.catalog` writes `compiled/NAME.json` from `NAME.toml`, and a test
holds the two together. Dates are ISO 8601 texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
NAMES = ("clouds", "engines", "gpus", "models", "overheads")


def table(name: str) -> dict[str, Any]:
    """`NAME.toml`, from what was made of it."""
    found: dict[str, Any] = json.loads((_HERE / "compiled" / f"{name}.json").read_bytes())
    return found


def compiled(name: str) -> str:
    """What `compiled/NAME.json` has to hold: one row to a line, so that a difference can be read."""
    import tomllib

    content = tomllib.loads((_HERE / f"{name}.toml").read_text(encoding="utf-8"))
    return "{\n" + ",\n".join(f"{_json(key)}:{_rows(content[key])}" for key in content) + "\n}\n"


def local_rates() -> str:
    """What `local/rates.json` has to hold: the list prices by the keys of `modal billing rates --json`, USD per hour.

    The local control plane answers with it. It imports nothing of the catalogue, so it is given the prices as data.
    """
    import tomllib
    from decimal import Decimal

    def read(name: str) -> dict[str, Any]:
        return tomllib.loads((_HERE / name).read_text(encoding="utf-8"), parse_float=Decimal)

    pricing, gpus = read("pricing.toml"), {gpu["name"]: gpu for gpu in read("gpus.toml")["gpu"]}
    keys = pricing["rate_keys"]
    rates: dict[str, str] = {}
    days: set[Any] = set()
    for what in ("cpu_core", "memory_gib"):
        row = pricing[f"{what}_hour"]
        rates[keys[what]], days = str(row["usd"]), days | {row["as_of"]}
    for name, key in keys["gpus"].items():
        rates[key] = str((gpus[name]["usd_per_second"] * 3600).normalize())
        days.add(gpus[name]["price_as_of"])
    document = {
        "as_of": [min(days).isoformat(), max(days).isoformat()],
        "rates": dict(sorted(rates.items())),
    }
    return json.dumps(document, indent=1) + "\n"


def compile_all() -> list[Path]:
    """Write them; those that were not as they should be."""
    changed = []
    texts = {_HERE / "compiled" / f"{name}.json": compiled(name) for name in NAMES}
    texts[_HERE.parent / "local" / "rates.json"] = local_rates()
    for path, text in texts.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def _rows(value: object) -> str:
    if not isinstance(value, list):
        return _json(value)
    return "[\n" + ",\n".join(map(_json, value)) + "\n]"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_date)


def _date(value: Any) -> str:
    text: str = value.isoformat()
    return text
