"""Functions for `gpuctl batch`, as users write them."""

import os
import signal
import time


def square(row):
    if row["n"] % 100 == 99:
        raise ValueError(f"{row['n']} is not liked")
    return {"square": row["n"] ** 2}


def slowly(row):
    time.sleep(row.get("seconds", 0.002))
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
