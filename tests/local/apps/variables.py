"""Secrets of every kind in one function, for the tests: `modal run variables.py` prints what it sees as JSON."""

import json
import os
import tempfile
from pathlib import Path

import modal

app = modal.App("variables")
Path(tempfile.gettempdir(), "t.env").write_text("FROM_FILE=file value\nEMPTY=\n")


@app.function(
    image=modal.Image.debian_slim(),
    secrets=[
        modal.Secret.from_dict({"A": "from dict", "B": "1", "NONE": None}),
        modal.Secret.from_name("storage-secret", required_keys=["B"]),
        modal.Secret.from_dotenv(tempfile.gettempdir(), filename="t.env"),
        modal.Secret.from_local_environ(["T_LOCAL"] if modal.is_local() else []),
    ],
)
def environ():
    return {name: os.environ.get(name) for name in ("A", "B", "C", "FROM_FILE", "EMPTY", "T_LOCAL", "NONE")}


@app.local_entrypoint()
def main():
    print(json.dumps(environ.remote()))
