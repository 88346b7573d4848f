"""What this machine's installers say when they fail, as the builds of images pass it on."""

from __future__ import annotations

import asyncio
import sys

import pytest

from gpuctl.local.installers import ImageBuildError, run

_CONFLICT = """\
Collecting a
ERROR: Cannot install a==1 and b==2 because these package versions have conflicting dependencies.

The conflict is caused by:
    a 1 depends on c==1
    b 2 depends on c==2
ERROR: ResolutionImpossible: for help visit pip's documentation
"""


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (
            f"print({_CONFLICT!r}); sys.exit(1)",
            "\n".join(line for line in _CONFLICT.splitlines()[1:] if line),
        ),
        ("print(*range(99), sep='\\n'); raise ValueError('what it was')", "ValueError: what it was"),
        ("print(*range(99), sep='\\n'); sys.exit(1)", "\n".join(map(str, range(87, 99)))),
        (
            "print('E: no package\\n', *range(50), sep='\\n'); print('fatal: it is full'); sys.exit(1)",
            "fatal: it is full",
        ),
        ("sys.exit(1)", ""),
    ],
)
def test_the_error_and_not_all_that_was_done(does: str, says: str) -> None:
    log: list[str] = []
    with pytest.raises(ImageBuildError) as caught:
        asyncio.run(run([sys.executable, "-c", f"import sys; {does}"], log=log.append, name="it"))
    assert str(caught.value) == f"it ended with exit code 1:\n{says}"
