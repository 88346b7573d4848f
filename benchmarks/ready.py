"""From the engine's first successful answer to gpuctl saying that it is ready.

The first answer is the one that the server's own start-up asks for; when it came is read from the local plane's
log store, since `modal app logs --timestamps` gives whole seconds. Ready is when the first byte of the document of
`gpuctl serve --json` arrives.
"""

from __future__ import annotations

import json
import sqlite3
import statistics
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path

from paired import BIN, clean_environment, line, options

TARGET_SECONDS = 0.5
SERVE = [str(BIN / "gpuctl"), "serve", "tiny", "--local", "--name", "ready", "--yes", "--json"]


def main() -> int:
    arguments = options(__doc__, rounds=3)
    with tempfile.TemporaryDirectory(prefix="gpuctl-benchmark-") as folder:
        env = clean_environment(XDG_STATE_HOME=folder)
        try:
            gaps = [gap(env, number) for number in range(arguments.rounds)]
        finally:
            subprocess.run([BIN / "gpuctl", "local", "down"], env=env, capture_output=True, check=False)
    print(line("engine's first answer to gpuctl saying ready", gaps))
    met = statistics.median(gaps) <= TARGET_SECONDS
    print(f"  target at most {TARGET_SECONDS} s: {'met' if met else 'MISSED'}")
    return 0 if met or not arguments.check else 1


def gap(env: dict[str, str], number: int) -> float:
    """Serve, and stop again: seconds between the two moments."""
    started = time.time()
    with subprocess.Popen(SERVE, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as serve:
        assert serve.stdout is not None
        assert serve.stderr is not None
        first = serve.stdout.read(1)  # stderr is a few dozen lines: the pipe holds them
        ready = time.time()
        document = first + serve.stdout.read()
        talk = serve.stderr.read()
    if serve.returncode != 0:
        raise SystemExit(f"gpuctl serve failed ({serve.returncode}):\n{talk}")
    app_id = json.loads(document)["app_id"]
    answered = first_answer(Path(env["XDG_STATE_HOME"]), app_id, since=started)
    subprocess.run(
        [BIN / "gpuctl", "stop", "ready", "--local", "--yes"], env=env, capture_output=True, check=True
    )
    took = ready - answered
    print(
        f"  serve {number + 1}: ready {took:.3f} s after the first answer, {ready - started:.1f} s in all",
        flush=True,
    )
    return took


def first_answer(state: Path, app_id: str, since: float) -> float:
    """When the engine or the server first logged a completed chat request (Unix time), after `since`."""
    database = state / "gpuctl" / "local" / "plane.db"
    query = """
        SELECT min(at) FROM logs WHERE app_id = ? AND at >= ?
        AND (data LIKE '[serve] ready%' OR data LIKE '%POST /v1/chat/completions%200%')
    """
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        (answered,) = connection.execute(query, (app_id, since)).fetchone()
    if answered is None:
        raise SystemExit(f"{app_id} logged no completed chat request")
    return float(answered)


if __name__ == "__main__":
    raise SystemExit(main())
