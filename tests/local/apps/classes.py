"""Classes, and functions that take several inputs at once."""

import asyncio
import os
import threading
import time
from pathlib import Path

import modal

app = modal.App(os.environ.get("T_NAME", "classes"))
marks = modal.Volume.from_name("calls-marks", create_if_missing=True)


def mark(name: str) -> None:
    with Path("/marks", name).open("a") as file:
        file.write("x")


@app.cls(enable_memory_snapshot=True, volumes={"/marks": marks}, scaledown_window=2)
class Greeter:
    word: str = modal.parameter(default="hello")
    times: int = modal.parameter(default=1)

    @modal.enter(snap=True)
    def first(self):
        self.order = ["snap"]

    @modal.enter(snap=False)
    def second(self):
        self.order.append("enter")

    @modal.exit()
    def last(self):
        mark(f"exit-{self.word}")

    @modal.method()
    def greet(self, name):
        return f"{self.word * self.times} {name}", self.order

    @modal.method()
    async def spell(self):
        for letter in self.word:
            yield letter

    @modal.method()
    def where(self):
        return os.environ["MODAL_TASK_ID"], os.environ.get("EXTRA")


@app.function()
@modal.concurrent(max_inputs=4)
async def together(x):
    await asyncio.sleep(0.5)
    return os.environ["MODAL_TASK_ID"]


@app.function(max_containers=1)
@modal.concurrent(max_inputs=3)
def in_threads(x):
    time.sleep(0.3)
    return threading.current_thread().name


@app.function(max_containers=1)
@modal.batched(max_batch_size=4, wait_ms=500)
def batch(xs):
    return [(x, len(xs)) for x in xs]


@app.function(single_use_containers=True)
def once(x):
    return os.environ["MODAL_TASK_ID"]


@app.function(max_containers=2)
def two_at_most(x):
    time.sleep(0.2)
    return os.environ["MODAL_TASK_ID"]


@app.function(min_containers=1, scaledown_window=2)
def warm():
    return os.environ["MODAL_TASK_ID"]


@app.function(cpu=64)
def needs_64_cores(x):
    time.sleep(0.3)
    return os.environ["MODAL_TASK_ID"]
