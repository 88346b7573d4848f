"""What becomes of the pictures that answers name: files beside them, or a part of them. May import: errors, batch's
formats, rows, seen.

In the job's Volume they are files, and an answer names them: `{"data": [{"file": "pictures/000012/000012345-0.png"}]}`.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import secrets
import shutil
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING

from gpuctl.batch.formats import by_name
from gpuctl.batch.seen import Seen

if TYPE_CHECKING:
    from gpuctl.batch.rows import Result


class Names:
    """Of the files of rows in a folder: called as the row is, `talks/1.mp3` becomes `talks/1.srt`."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._taken = Seen()

    def of(self, result: Result, count: int = 1) -> list[Path]:
        """Places in the folder and nowhere else, whatever a row calls itself, and that are its own: also where the
        file system takes small and large letters for the same.
        """
        parts = [
            part for part in PurePosixPath(result.id.replace("\0", "")).parts if part not in ("/", "//", "..")
        ]
        *folders, name = [part.encode(errors="replace")[:200].decode(errors="ignore") for part in parts] or [
            "row"
        ]
        # No folder is called as a file is, whose place it would take.
        folders = [f"{part}_" if part.casefold().endswith(f".{self._suffix}") else part for part in folders]
        stem = PurePath(name).stem if by_name(name) else name
        others = (f"{name}-{result.number}-{n}" for n in itertools.count(1))
        for one in itertools.chain((stem, name, f"{name}-{result.number}"), others):
            ends = [""] if count == 1 else [f"-{n}" for n in range(1, count + 1)]
            paths = [Path(*folders, f"{one}{end}.{self._suffix}") for end in ends]
            if all(self._taken.add(str(path).casefold()) for path in paths):
                return paths
        raise AssertionError("there is no end of names")


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
