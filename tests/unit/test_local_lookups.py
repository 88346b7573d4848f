"""What the plane looks up for each call it finds by an index: the time of a call must not grow with their number."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gpuctl.local.items import Items
from gpuctl.local.ledger import CallRow, Ledger
from gpuctl.local.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _call(number: int) -> CallRow:
    return CallRow(0, f"fc-{number}", "ap-1", "fu-1", 1, 3, f"in-{number}:0", 1.0)


async def _calls(ledger: Ledger) -> None:
    ledger.add(_call(1), "key", [(0, b"one")])
    again, new = ledger.add(_call(2), "key", [(0, b"one")])
    assert (again.id, new) == ("fc-1", False)
    assert [child.id for child in ledger.children("in-1:0")] == ["fc-1"]
    assert ledger.put(again, [(0, b"one"), (1, b"two")]) == {1}
    assert len(ledger.unfinished_inputs(again)) == 2


@pytest.mark.parametrize(
    "look",
    [
        lambda store: asyncio.run(_calls(Ledger(store))),
        lambda store: store.volume_named("en-1", "mine"),
        lambda store: store.secret_named("en-1", "mine"),
        lambda store: Items(store).named("dict", "en-1", "mine"),
    ],
    ids=["calls", "volume", "secret", "dict"],
)
def test_no_lookup_reads_a_whole_table(tmp_path: Path, look: Callable[[Store], object]) -> None:
    store = Store(tmp_path / "plane.db")
    db = store.extend("")
    asked: list[str] = []
    db.set_trace_callback(asked.append)
    look(store)
    db.set_trace_callback(None)
    asked = [statement for statement in asked if statement.startswith("SELECT")]
    assert asked
    for statement in asked:
        plan = [row["detail"] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}")]
        assert not [step for step in plan if step.startswith("SCAN")], statement
