"""Functions for `gpuctl batch`, as users write them."""

import os
import signal
import time
from pathlib import Path


def square(row):
    if row["n"] == 7:
        print("square of 7", flush=True)
    if row["n"] % 100 == 99:
        raise ValueError(f"{row['n']} is not liked")
    return {"square": row["n"] ** 2}


def slowly(row):
    time.sleep(row.get("seconds", 0.002))
    return square(row)


def gated(row):
    """Quick up to row 200, and then only once the gate is open."""
    if row["n"] > 200 and not Path("/gate/open").exists():
        time.sleep(2)
    return square(row)


def poisoned(row):
    if row.get("poison"):
        os.kill(os.getpid(), signal.SIGKILL)
    return row["n"] + 1


class Adder:
    def __init__(self):
        self.calls = 0

    def process(self, rows):
        self.calls += 1
        return [{"n": row["n"], "of": len(rows)} for row in rows]
