"""The one error that gpuctl raises on purpose. Imports nothing of ours, so that every room may import it.

An expected failure is a `GpuctlError`; the boundary in `gpuctl.__main__` prints it once, to stderr, and exits
with its code. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_OK = 0
EXIT_FAILURE = 1  # the outside world failed: network, Modal, the engine, the disk
EXIT_USAGE = 2  # the command was wrong: nothing was written, nothing was started
EXIT_INTERRUPTED = 130  # Ctrl-C


class GpuctlError(Exception):
    """An expected failure: what is wrong (one line per problem), what would help, and the exit code.

    `problems` name the flag or file and line, what was given, and what would work, for example
    `--gpu: unknown type 'H1000'; did you mean 'H100'?`. `hint` is one more line on what to do next.
    """

    def __init__(
        self, problems: str | Sequence[str], *, hint: str | None = None, exit_code: int = EXIT_FAILURE
    ) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        self.hint = hint
        self.exit_code = exit_code
        super().__init__("; ".join(self.problems))


def usage_error(problems: str | Sequence[str], *, hint: str | None = None) -> GpuctlError:
    """Bad input: exit code 2. Raise what this returns."""
    return GpuctlError(problems, hint=hint, exit_code=EXIT_USAGE)
