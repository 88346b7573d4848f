"""The pieces of templates/batch/ as modules of their own, to test each without the app around it.

`source` is what the app would hold: the imports, what every piece finds there (`Failed`, `Refused`, `say`), the
constants, and the pieces. The text imports nothing of ours: it also goes to the interpreter of an image.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from gpuctl import render

IMPORTS = """\
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import gc
import gzip
import hashlib
import heapq
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import pathlib
import queue
import random
import secrets
import shutil
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, Protocol


class Refused(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclasses.dataclass
class Failed:
    code: str
    message: str
    retry: bool


def say(text: str) -> None:
    print(f"[batch] {text}", flush=True)
"""


def source(*pieces: str, constants: dict[str, Any] | None = None, **context: Any) -> str:
    """A program with these pieces (`batch/function.py.jinja`, …); `context` is what their templates ask for."""
    environment = render._environment()
    texts = [environment.get_template(piece).render(context).strip("\n") for piece in pieces]
    values = [f"{name} = {value!r}" for name, value in (constants or {}).items()]
    return "\n\n\n".join(filter(None, [IMPORTS.rstrip(), "\n".join(values), *texts])) + "\n"


_NUMBERS = itertools.count(1)


def module(*pieces: str, folder: Path, constants: dict[str, Any] | None = None, **context: Any) -> ModuleType:
    """The same, imported from a file in `folder`."""
    name = f"piece_{next(_NUMBERS)}"
    file = folder / f"{name}.py"
    file.write_text(source(*pieces, constants=constants, **context), encoding="utf-8")
    made = ModuleType(name)
    made.__file__ = str(file)
    sys.modules[name] = made  # dataclasses look there
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), made.__dict__)
    return made
