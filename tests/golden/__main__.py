"""Golden renderings, made through the CLI itself: `python -m tests.golden` from the top of the repository.

Each folder here holds `command.txt` (what a user types) and `app.py` (what `--dry-run` then prints, by the byte).
To add a case, add a folder with a `command.txt` and run this.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]  # where commands are typed


def cases() -> list[Path]:
    """The folders, by name."""
    return sorted(path.parent for path in HERE.glob("*/command.txt"))


def of(verb: str) -> list[Path]:
    """The cases of a verb."""
    return [case for case in cases() if words(case)[0] == verb]


def words(case: Path) -> list[str]:
    """The command line of a case, without `gpuctl`."""
    program, *rest = shlex.split((case / "command.txt").read_text(encoding="utf-8"))
    assert program == "gpuctl", case
    return rest


def rendered(case: Path) -> str:
    """What the CLI prints for a case."""
    from gpuctl.__main__ import main

    verb, *rest = words(case)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
        code = main([verb, "--dry-run", *rest])
    if code != 0:
        raise AssertionError(f"{case.name}: exit {code}: {err.getvalue()}")
    # A function's file stands there by its whole path.
    return out.getvalue().replace(f'"{ROOT}/', '"/home/ann/gpuctl/')


if __name__ == "__main__":
    for folder in cases():
        source = rendered(folder)
        golden = folder / "app.py"
        before = golden.read_text(encoding="utf-8") if golden.exists() else None
        golden.write_text(source, encoding="utf-8")
        if source != before:
            print(f"{'changed' if before else 'new'}: {folder.name}", file=sys.stderr)
