"""What the files are called that are made for rows in a folder. May import: batch's formats, rows, seen."""

from __future__ import annotations

import itertools
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
