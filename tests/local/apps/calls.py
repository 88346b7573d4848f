"""Functions of every kind that can be called. Each prints or returns something that only it can."""

import asyncio
import os

import modal

app = modal.App(os.environ.get("T_NAME", "calls"))


@app.function()
def square(x, power=2):
    return x**power


@app.function()
async def double(x):
    await asyncio.sleep(0.01)
    return 2 * x


@app.local_entrypoint()
def main(n: int = 5, word: str = "hi"):
    print("remote", square.remote(n), "local", square.local(n), word)
    print("map", list(square.map(range(n))))
