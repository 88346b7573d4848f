"""Functions of every kind that can be called; each returns or prints something that only it can."""

import asyncio
import os
import socket
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path

import modal

app = modal.App(os.environ.get("T_NAME", "calls"))
marks = modal.Volume.from_name("calls-marks", create_if_missing=True)


class OwnError(Exception):
    """An exception of the app's own."""


def count(name: str) -> int:
    """How often this was called with the name before, over all containers."""
    with Path("/marks", name).open("a+") as file:
        before = file.tell()
        file.write("x")
    return before


@app.function()
def square(x, power=2):
    return x**power


@app.function()
async def double(x):
    await asyncio.sleep(0.01)
    return 2 * x


@app.function()
def add(a, b):
    return a + b


@app.function()
def numbers(n):
    yield from range(n)


@app.function()
async def letters(text):
    for letter in text:
        yield letter
        await asyncio.sleep(0)


@app.function()
def size_of(data):
    return len(data), data[:1] + data[-1:]


@app.function()
def many_bytes(n):
    return b"m" * n


@app.function(block_network=True)
def offline(data, port):
    """Its arguments, large ones too, and how it fails to reach this machine, alone and by the way that those came."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=20)
    except OSError as error:
        alone = str(error)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": "http://127.0.0.1:3128"}))
    try:
        opener.open(f"http://192.0.2.1:{port}", timeout=20)
    except urllib.error.HTTPError as error:
        by_proxy = error.read().decode()
    return data, alone, by_proxy, os.environ.get("HTTP_PROXY")


@app.function(restrict_modal_access=True)
def restricted(x):
    refused = []
    for use in (lambda: square.remote(x), lambda: marks.listdir("/")):
        try:
            use()
        except modal.exception.PermissionDeniedError as error:
            refused.append(str(error))
    return refused


@app.function()
def fail(x):
    if x % 2:
        raise OwnError(f"odd: {x}")
    return x


@app.function()
def sum_of_squares(n):
    return sum(square.map(range(n)))


@app.function()
def factorial(n):
    return n * factorial.remote(n - 1) if n > 1 else 1


@app.function(retries=modal.Retries(max_retries=2, initial_delay=0.1), volumes={"/marks": marks})
def flaky(name, good_from):
    before = count(name)
    if before < good_from:
        raise OwnError(f"attempt {before}")
    return before


@app.function(retries=modal.Retries(max_retries=1, initial_delay=0.0), volumes={"/marks": marks})
def dies(name, times):
    before = count(name)
    if before < times:
        os._exit(9)
    return before


@app.function(timeout=1, volumes={"/marks": marks})
def slow(name, seconds):
    try:
        time.sleep(seconds)
    finally:
        count(name)
    return "slept"


@app.function(volumes={"/marks": marks})
def sleeps(name: str, seconds: float):
    count(f"{name}-began")
    time.sleep(seconds)
    count(f"{name}-ended")
    return "slept"


@app.function(volumes={"/marks": marks}, max_containers=1)
def sleeps_alone(name: str, seconds: float):
    count(f"{name}-in-{os.environ['MODAL_TASK_ID']}")
    sleeps.local(name, seconds)


@app.function(volumes={"/marks": marks})
def waits(name: str):
    """Until somebody writes the file that says go."""
    count(f"{name}-began")
    while not Path("/marks", f"{name}-go").exists():
        time.sleep(0.05)
    count(f"{name}-ended")


@app.function(volumes={"/marks": marks})
def yields_and_waits(name: str):
    yield 1
    try:
        waits.local(name)
    finally:
        count(f"{name}-left")


@app.function()
def consumes(name: str):
    return list(yields_and_waits.remote_gen(name))


@app.function(volumes={"/marks": marks})
def read_mark(name):
    path = Path("/marks", name)
    return len(path.read_text()) if path.exists() else 0


@app.local_entrypoint()
def main(n: int = 5, word: str = "hi", shout: bool = False):
    print("remote", square.remote(n), "local", square.local(n), word.upper() if shout else word)
    print("map", list(square.map(range(n))))
    return f"result {n}"


@app.local_entrypoint()
def errors():
    """What an exception brings with it, where its class is known."""
    try:
        fail.remote(3)
    except OwnError as error:
        print("caught", error, type(error.__traceback__.tb_next.tb_next).__name__)
        print("remote frames", any("calls.py" in line for line in traceback.format_exception(error)[-3:]))
    outcomes = list(fail.map(range(4), return_exceptions=True))
    print("outcomes", [repr(outcome) for outcome in outcomes])


@app.local_entrypoint()
def leaves_work():
    """Ends while a call is under way."""
    print("call", sleeps.spawn(os.environ["T_MARK"], float(os.environ["T_SECONDS"])).object_id)


@app.function(retries=3, max_containers=4)
def survivor(x):
    time.sleep(0.005)
    return x, os.environ["MODAL_TASK_ID"]
