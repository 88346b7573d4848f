"""What becomes of the pictures that answers name: files beside them, or a part of them.

May import: batch's filenames, rows.

In the job's Volume they are files, and an answer names them: `{"data": [{"file": "pictures/000012/000012345-0.png"}]}`.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import secrets
import shutil
from typing import TYPE_CHECKING

from gpuctl.batch.filenames import Names

if TYPE_CHECKING:
    from pathlib import Path

    from gpuctl.batch.rows import Result


class InLines:
    """Pictures as OpenAI's API has them: in the answer, as `b64_json`."""

    def __init__(self, source: Path) -> None:
        self._source = source

    def place(self, result: Result) -> Result:
        data = []
        for one in result.answer["data"]:
            content = (self._source / one["file"]).read_bytes()
            rest = {name: value for name, value in one.items() if name != "file"}
            data.append({"b64_json": base64.b64encode(content).decode("ascii"), **rest})
        return dataclasses.replace(result, answer={**result.answer, "data": data})


class AsFiles:
    """Pictures as files of `folder`; the answer says which are whose."""

    def __init__(self, source: Path, folder: Path) -> None:
        self._source = source
        self._folder = folder
        self._names = Names("png")

    def place(self, result: Result) -> Result:
        made = result.answer["data"]
        data = []
        for one, name in zip(made, self._names.of(result, len(made)), strict=True):
            self._copy(self._source / one["file"], self._folder / name)
            data.append({**one, "file": name.as_posix()})
        return dataclasses.replace(result, answer={**result.answer, "data": data})

    @staticmethod
    def _copy(source: Path, there: Path) -> None:
        """Whole or not at all; the disk may take its time, for there are many."""
        there.parent.mkdir(parents=True, exist_ok=True)
        part = there.with_name(f".{secrets.token_hex(8)}.part")
        try:
            shutil.copyfile(source, part)
            part.replace(there)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
