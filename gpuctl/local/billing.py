"""What things would cost: list prices, in the keys of the cloud's answer. Imports wire.

Nothing is billed here. The prices come as data, in `rates.json`: gpuctl's catalogue writes it, with the days on which
its sources said so (`python -m gpuctl.catalog`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modal_proto import api_pb2

from gpuctl.local.wire import Call, rpc

_RATES = Path(__file__).with_name("rates.json")


class Billing:
    """`modal billing rates`."""

    @rpc("WorkspaceBillingRates", differs="the catalogue's dated list prices; nothing is billed here")
    async def rates(self, _request: Any, _call: Call) -> Any:
        document = json.loads(_RATES.read_text(encoding="utf-8"))
        rates: dict[str, str] = document["rates"]
        first, last = document["as_of"]
        width = max(map(len, rates))
        lines = [
            f"List prices in USD per hour, as of {first} to {last}. Nothing is billed on this machine.",
            "",
        ]
        lines += [f"{key:{width}}  {value}" for key, value in rates.items()]
        return api_pb2.WorkspaceBillingRatesResponse(rates=rates, formatted="\n".join(lines))
