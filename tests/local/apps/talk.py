"""Functions whose words can be told apart: by the call, the container, the class."""

import sys
import time

import modal

app = modal.App("talk")


@app.function(max_containers=1)
def say(word):
    print("out", word)
    print("err", word, file=sys.stderr)


@app.cls()
class Speaker:
    name: str = modal.parameter()

    @modal.method()
    def say(self):
        print("I am", self.name)


@app.function()
def pause():
    print("so far", end="", flush=True)
    time.sleep(600)
