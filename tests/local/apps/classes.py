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


@app.cls(enable_memory_snapshot=True, volumes={"/marks": marks})
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


async def meet(name: str, who: str, number: int) -> None:
    """Wait until so many have said that they are here; each says it once."""
    place = Path("/marks", f"meet-{name}")
    place.mkdir(exist_ok=True)
    (place / who).touch()
    while len(list(place.iterdir())) < number:
        await asyncio.sleep(0.05)


@app.function(volumes={"/marks": marks})
@modal.concurrent(max_inputs=4)
async def together(x, name):
    """Eight of these are under way at once, or none ends."""
    await meet(name, str(x), 8)
    return os.environ["MODAL_TASK_ID"]


barrier = threading.Barrier(3)


@app.function(max_containers=1)
@modal.concurrent(max_inputs=3)
def in_threads(x):
    """Three of these are under way at once in one container, or none ends."""
    barrier.wait()
    return threading.current_thread().name


@app.function(max_containers=1)
@modal.batched(max_batch_size=4, wait_ms=60_000)
def batch(xs):
    return [(x, len(xs)) for x in xs]


@app.function(max_containers=1)
@modal.concurrent(max_inputs=4)
async def deadly(x):
    """The first ends their container while the others are under way."""
    await asyncio.sleep(0.3 if x == 0 else 3.0)
    if x == 0:
        os._exit(1)
    return x


@app.function(single_use_containers=True)
def once(x):
    return os.environ["MODAL_TASK_ID"]


@app.function(max_containers=2, volumes={"/marks": marks})
async def two_at_most(x, name):
    """Ends when two containers have inputs."""
    await meet(name, os.environ["MODAL_TASK_ID"], 2)
    return os.environ["MODAL_TASK_ID"]


@app.function(min_containers=1, scaledown_window=600)
def warm():
    return os.environ["MODAL_TASK_ID"]


@app.function(cpu=64, volumes={"/marks": marks})
def needs_64_cores(x, name):
    """Ends when `go` was called."""
    while not Path("/marks", f"{name}-go").exists():
        time.sleep(0.05)
    return os.environ["MODAL_TASK_ID"]


@app.function(volumes={"/marks": marks})
def go(name):
    mark(f"{name}-go")


@app.function(cpu=1.0)
def one_core(x):
    return x


@app.cls(startup_timeout=1)
class Late:
    @modal.enter()
    def loads(self):
        time.sleep(600)

    @modal.method()
    def never(self):
        pass


class Base:
    @modal.enter()
    def base_enters(self):
        self.order = ["base"]

    @modal.method()
    def inherited(self):
        return self.order

    @modal.exit()
    def base_exits(self):
        mark(f"exit-{self.text}")


@app.cls(volumes={"/marks": marks})
class Derived(Base):
    text: str = modal.parameter()
    number: int = modal.parameter(default=-(2**40))
    flag: bool = modal.parameter(default=False)
    data: bytes = modal.parameter(default=b"\0")

    @modal.enter()
    async def enters(self):
        self.order.append("derived")

    @modal.method()
    async def parameters(self):
        return self.text, self.number, self.flag, self.data

    @modal.method()
    def fails(self):
        raise KeyError(self.text)

    @modal.exit()
    async def exits(self):
        await asyncio.sleep(0.01)
        mark(f"exit-{self.text}")
