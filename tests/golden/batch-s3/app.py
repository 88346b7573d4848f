# Made with gpuctl 0.1.0, by this command:
#
#     gpuctl batch qwen3 's3://reviews-eu/2026/*.jsonl' --prompt 'Summarise: {text}' -o s3://reviews-eu/summaries/2026.jsonl --bucket-secret aws-reviews --gpu L40S --max-containers 4 --max-cost 20
"""A bulk job: rows of a Volume in, an answer or an error for each of them out.

gpuctl puts into the Volume what reads the rows where they are (`code/`). `modal deploy`
of this file makes the App, and `modal run` of it starts the job, or resumes it where it
stopped. Written for modal 1.6.4; it needs no other package on the machine that deploys it.
"""

import asyncio
import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import gzip
import heapq
import inspect
import itertools
import json
import logging
import os
import pathlib
import pkgutil
import queue
import random
import secrets
import shutil
import sys
import threading
import time
import traceback
import types
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, Protocol

import modal

APP_NAME = "gpuctl-batch-job-ccfe6f69"
DATA = pathlib.Path("/job")  # where containers have the Volume
MAX_CONTAINERS = 4
# Shards that a container works on at once: while the last rows of one are answered, it is
# busy with those of the next.
SHARDS_AT_ONCE = 3
# Shards handed out at once: what the containers can take, and as many waiting for them.
AT_ONCE = 2 * MAX_CONTAINERS * SHARDS_AT_ONCE
# A call, whose own costs are a second or so, hands out as many shards as take so many
# seconds, of so many bytes at most.
WORTH_SECONDS, MOST_BYTES = 5.0, 2 << 20
RETRIES = 2  # further tries of a row that failed
USD_PER_SECOND: float | None = 0.0005439201388888889  # of a container, at most
MAX_USD: float | None = 20.0  # the job stops in order when so much is spent
SHIFT_SECONDS = 20 * 3600  # of a driver, which the next then relieves
SAVE_SECONDS = 2  # what has ended is saved so often, and said to be done only then
PATIENCE = 60  # seconds of a Volume that cannot be written: then the job stops
DEATHS = 2  # of containers in a shard, after which its rows are tried few at a time:
WAVE = 32  # so many, and ever fewer, in the end one alone
DEATHS_ALONE = 3  # with the same row, after which that is the reason
DIED = "the container died each time that it tried this row, in the end alone"
MOST_UNLOADED = 3  # containers, where none has answered anything
UNLOADED = "unloaded"
MOST_FAILURES = 10  # of one shard in which nothing ends, after which the job stops
MOST_DEADLY = 32  # rows of one shard of which containers died: neither
BEGAN = time.time()
TASK = os.environ.get("MODAL_TASK_ID", "")
MODEL = "Qwen/Qwen3-8B"
# Not an exact commit: what this names may change between two starts.
REVISION = "main"
# What a request may give as its model; answers carry the first.
SERVED_NAMES = [
    "qwen3",
    "Qwen/Qwen3-8B",
]

VLLM_VERSION = "0.32.0"
GPU = "L40S"
TENSOR_PARALLEL = 1  # the model is split over so many devices
GPU_MEMORY_UTILIZATION = 0.92  # the share of a GPU that the engine may take
MAX_MODEL_LEN = 40960  # tokens, question and answer together
VOLUME = DATA  # with `code/`, which reads rows and writes answers: gpuctl put it there
# What of the cloud is where in the container that does that.
MOUNTS: dict[str, dict[str, str]] = {
    "read": {
        "s3://reviews-eu/2026": "/mnt/in-0",
    },
    "write": {
        "s3://reviews-eu/summaries": "/mnt/out-0",
    },
}

app = modal.App(
    APP_NAME,
    tags={
        "managed-by": "gpuctl",
    },
)
volume = modal.Volume.from_name(APP_NAME, create_if_missing=True, version=2)
# How far each container is, and the word to stop. What must last is in the Volume.
live = modal.Dict.from_name(APP_NAME, create_if_missing=True)

image = (
    modal.Image.from_registry(
        "nvidia/cuda:13.0.2-devel-ubuntu22.04",
        add_python="3.12",
    )
    .entrypoint([])
    .uv_pip_install(f"vllm=={VLLM_VERSION}")
    .env(
        {
            "HF_XET_HIGH_PERFORMANCE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
    )
)


files_image = modal.Image.debian_slim(python_version="3.12").pip_install(
    "jinja2==3.1.6",
    "pyarrow==26.0.1",
)
# The Volumes beside the job's own that it reads and writes.
others: list[modal.Volume] = []


@app.cls(
    image=image,
    gpu=GPU,
    volumes={
        str(DATA): volume,
        "/root/.cache/huggingface": modal.Volume.from_name(
            "huggingface-cache",
            create_if_missing=True,
        ),
        "/root/.cache/vllm": modal.Volume.from_name(
            "vllm-cache",
            create_if_missing=True,
        ),
    },
    max_containers=MAX_CONTAINERS,
    scaledown_window=30,
    startup_timeout=960,
    timeout=24 * 3600,
    retries=modal.Retries(max_retries=3, initial_delay=1.0),
)
@modal.concurrent(max_inputs=SHARDS_AT_ONCE)
class Worker:
    line: "Line"

    @modal.enter()
    def start(self) -> None:
        with loading():
            processor = VllmProcessor()
        self.line = Line(processor)

    @modal.method()
    def work(
        self, shards: list[int], run: str, retry_failed: bool, driver: str = ""
    ) -> tuple[list[dict[str, Any]], float]:
        """Answer the rows of some shards; what those of each came to, and whether that
        is all; and the seconds that it took."""
        return self.line.work(shards, run, retry_failed, driver)

    @modal.exit()
    def stop(self) -> None:
        self.line.leave()


@app.function(
    image=modal.Image.debian_slim(python_version="3.12"),
    volumes={str(DATA): volume},
    cpu=0.25,
    max_containers=1,
    scaledown_window=2,
    timeout=24 * 3600,
    retries=modal.Retries(max_retries=10, initial_delay=1.0),
)
async def drive(run: str, retry_failed: bool) -> dict[str, Any]:
    """Have the rows read, hand out the shards that have not ended, keep the ledger, and
    have the answers written."""
    return await whole_way(run, retry_failed)


@app.function(
    image=files_image,
    volumes={
        str(VOLUME): volume,
        "/mnt/in-0": modal.CloudBucketMount(
            bucket_name="reviews-eu",
            key_prefix="2026/",
            secret=modal.Secret.from_name(
                "aws-reviews",
                required_keys=[
                    "AWS_ACCESS_KEY_ID",
                    "AWS_SECRET_ACCESS_KEY",
                ],
            ),
            read_only=True,
        ),
        "/mnt/out-0": modal.CloudBucketMount(
            bucket_name="reviews-eu",
            key_prefix="summaries/",
            secret=modal.Secret.from_name(
                "aws-reviews",
                required_keys=[
                    "AWS_ACCESS_KEY_ID",
                    "AWS_SECRET_ACCESS_KEY",
                ],
            ),
            read_only=False,
        ),
    },
    cpu=1.0,
    max_containers=1,
    scaledown_window=2,
    timeout=24 * 3600,
    retries=modal.Retries(max_retries=3, initial_delay=1.0),
)
def files(step: str, stamp: str = "") -> dict[str, Any]:
    """Read the rows where they are (`begin`), look whether they are still the same
    (`check`), or write the answers where they belong (`publish`)."""
    for one in (volume, *others):
        one.reload()
    sys.path.insert(0, str(VOLUME / "code" / "gpuctl.zip"))
    sys.dont_write_bytecode = True
    do = pkgutil.resolve_name("gpuctl.batch.cloud:run")
    data = VOLUME / "runs" / stamp if stamp else VOLUME
    told: dict[str, Any] = do(step, str(VOLUME), str(data), MOUNTS, stamp)
    for one in (volume, *others):
        one.commit()
    return told


async def whole_way(run: str, retry_failed: bool) -> dict[str, Any]:
    """The rows are read, where they are not there yet; answered; the answers written."""
    began = time.time()
    stamp = ""
    new = not (DATA / "job.json").exists()
    if new:
        DATA.mkdir(parents=True, exist_ok=True)
    reading = asyncio.ensure_future(files.remote.aio("begin", stamp))
    while not reading.done():
        if new:
            await put_status(status_of(run, began, "running", None))
        await asyncio.wait([reading], timeout=SAVE_SECONDS)
    told = what_came_of(reading)
    await volume.reload.aio()  # type: ignore[no-untyped-call]
    if "problems" in told:
        said = "; ".join(told["problems"])
        status = {**status_of(run, began, "failed", said), **told}
        return await put_status(status)
    return await Driver(run, retry_failed).drive()


def what_came_of(job: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
    """What `files` told, or that it failed each time that it was tried."""
    error = job.exception()
    if error is None:
        return job.result()
    say(f"{type(error).__name__}: {error}")
    return {"problems": [f"{type(error).__name__}: {error}"], "usage": False}


def status_of(
    run: str, began: float, state: str, problem: str | None
) -> dict[str, Any]:
    """The figures of a run of which no row is known yet."""
    return {
        "run": run,
        "state": state,
        "phase": "reading",
        "problem": problem,
        "time": round(time.time(), 3),
        "began": round(began, 3),
        **{name: 0 for name in ("rows", "done", "failed", "tokens_in", "tokens_out")},
        **{name: 0 for name in ("shards", "shards_ended")},
        **{name: 0 for name in ("containers", "containers_loading")},
        "container_seconds": 0.0,
        "usd": None if USD_PER_SECOND is None else 0.0,
    }


async def put_status(status: dict[str, Any]) -> dict[str, Any]:
    """Into the Volume, and as a line into the App's logs."""
    file = json.dumps({"containers_up": {}, **status}).encode()
    write_whole(DATA / "status.json", file)
    await volume.commit.aio()  # type: ignore[no-untyped-call]
    print("@gpuctl " + json.dumps(status, separators=(",", ":")), flush=True)
    return status


@app.local_entrypoint()
def start(retry_failed: bool = False) -> None:
    """Start the job, or resume it: in the cloud, whatever becomes of this machine."""
    run = f"{time.time():.3f}"
    call = modal.Function.from_name(APP_NAME, "drive").spawn(run, retry_failed)
    print(json.dumps({"run": run, "call": call.object_id}))


@app.local_entrypoint()
def check() -> None:
    """Tell whether the rows are still those that the job has read."""
    print(json.dumps(files.remote("check")))


# -- the files of the job


def input_file(shard: int) -> pathlib.Path:
    return DATA / "input" / f"{shard:06}.jsonl.gz"


def answers_file(shard: int) -> pathlib.Path:
    return DATA / "answers" / f"{shard:06}.jsonl.gz"


def parts_folder(shard: int) -> pathlib.Path:
    return DATA / "parts" / f"{shard:06}"


def read_gzip(file: pathlib.Path) -> list[bytes]:
    return gzip.decompress(file.read_bytes()).splitlines(keepends=True)


def read_rows(shard: int) -> list[dict[str, Any]]:
    """All at once: half of what a line costs to parse is the call."""
    lines = read_gzip(input_file(shard))
    rows: list[dict[str, Any]] = json.loads(b"[" + b",".join(lines) + b"]")
    return rows


def write_whole(file: pathlib.Path, content: bytes) -> None:
    """Replace a file, or leave it as it is: there is never half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with new.open("xb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        new.replace(file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def append(file: pathlib.Path, content: bytes, *, sync: bool = True) -> None:
    """Add all of it to a file that only this process writes to, or nothing. The file is
    never left open: a Volume with open files cannot be reloaded."""
    with file.open("ab", buffering=0) as opened:
        before = opened.tell()
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[opened.write(rest) :]
            if sync:
                os.fsync(opened.fileno())
        except BaseException:
            # The disk is full: half of a line would spoil the next one.
            opened.truncate(before)
            raise


def find_room() -> None:
    """Write something and remove it: an OSError where the disk has no room for more."""
    file = DATA / f".room-{secrets.token_hex(4)}"
    try:
        write_whole(file, bytes(1 << 16))
    finally:
        file.unlink(missing_ok=True)


def read_parts(shard: int, driver: str) -> "Parts":
    """What earlier attempts at a shard left behind. `driver`: who hands it out now."""
    found = Parts(driver)
    folder = parts_folder(shard)
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        found.add(file.read_bytes())
    return found


class Parts:
    """The results of a shard's attempts, each of which writes a file of its own, line by
    line: {"begin": …} first, a result for each row that ended, {"end": …} last.

    An attempt without its end died, if the driver that handed it out lives: that hands a
    shard out again only when nobody has it. Of one that another driver handed out nothing
    is known: it may still be going on, and what killed the driver may have killed it.

    {"trying": […]} says which rows are in the processor from now on, which an attempt
    writes when earlier ones died; [] for none, of which it cannot die, and null for
    nobody knows. With "alone": true it tries a single row, and nothing else in its
    container: when it died so DEATHS_ALONE times, that row is the reason.
    """

    def __init__(self, driver: str) -> None:
        self.driver = driver
        self.results: dict[int, bytes] = {}
        self.deaths = 0  # since the last row that was found to be the reason
        self.suspects: list[int] = []  # what the last that died was trying
        # How often an attempt died with this row alone.
        self.alone: collections.Counter[int] = collections.Counter()
        self.guilty: int | None = None  # that it died of

    def add(self, content: bytes) -> None:
        """The next attempt, in the order in which they began."""
        ended = False
        trying: list[int] | None = None
        alone = False
        lines = content.split(b"\n")[:-1]  # the last was being written when it died
        for line in lines:
            if line.startswith(b'{"row":'):
                row = int(line[7 : line.index(b",")])
                self.results.setdefault(row, line + b"\n")
                if b'"container_died"' in line:
                    self.deaths = 0
            elif line.startswith(b'{"trying":'):
                wave = json.loads(line)
                trying, alone = wave["trying"], wave["alone"]
            elif line.startswith(b'{"end":'):
                ended = True
        if ended or not lines or json.loads(lines[0]).get("driver") != self.driver:
            return
        suspects = [row for row in trying or () if row not in self.results]
        if trying is not None and not suspects:
            return  # it had nothing in the processor
        self.deaths += 1
        self.suspects = suspects
        self.guilty = None
        if alone:
            self.alone.update(suspects)
            if self.alone[suspects[0]] >= DEATHS_ALONE:
                self.guilty = suspects[0]


def forget_failed(shard: int, run: str) -> None:
    """Make of a shard that ended one in which the rows that failed are still to do: once
    in a run. What was wrong with the input stays so."""
    file, mark = answers_file(shard), DATA / "retried" / f"{shard:06}"
    if (mark.exists() and mark.read_text() == run) or not file.exists():
        return
    rows = read_rows(shard)
    never = {row["row"] for row in rows if "bad" in row}
    kept = [b'{"begin":"retry"}\n']
    for line in read_gzip(file):
        result = json.loads(line)
        if "error" not in result or result["row"] in never:
            kept.append(line)
    kept.append(b'{"end":"retry"}\n')
    write_whole(parts_folder(shard) / "0.jsonl", b"".join(kept))
    write_whole(mark, run.encode())
    file.unlink()


def result_line(
    row: dict[str, Any], answer: object, error: dict[str, str] | None
) -> bytes:
    """How a row ended. A ValueError where its answer is not JSON."""
    # The same names in each line: only what differs is encoded.
    text = '{"row":' + str(row["row"]) + ',"id":' + encode(row["id"])
    if error is None:
        text += ',"answer":' + encode(answer)
    else:
        text += ',"error":' + encode(error)
    if "columns" in row:
        text += ',"columns":' + encode(row["columns"])
    text += "}\n"
    return text.encode("utf-8", "surrogatepass")


encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":")
).encode


def cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"


def say(text: str) -> None:
    print(f"[batch] {text}", flush=True)


# -- what a container does


class Unwritable(Exception):
    """The job's Volume takes nothing: its disk is full, or it cannot commit."""


def saved(write: Callable[[], object]) -> None:
    """Write to the Volume, and commit it. Unwritable where either fails."""
    try:
        write()
    except FileNotFoundError:  # no fault of the disk
        raise
    except OSError as error:
        raise Unwritable(cause(error)) from error
    commit()


def commit(*, reload: bool = False) -> None:
    try:
        volume.commit()
        if reload:
            volume.reload()
    except Exception as error:
        raise Unwritable(cause(error)) from error


class Refused(Exception):
    """A row that can never be answered, known before it is tried."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclasses.dataclass
class Failed:
    """A row that was tried and has no answer; `retry`: another try may have one."""

    code: str
    message: str
    retry: bool


class Processor(Protocol):
    """What answers rows: as many at a time as `capacity`, in any order."""

    capacity: int

    def start(self, key: int, row: dict[str, Any]) -> None:
        """Take a row; Refused where it can have no answer."""

    def step(self) -> list[tuple[int, object]]:
        """The rows that ended since: each with its answer, or with a Failed. It waits a
        little where none has. Whatever it raises ends the container."""

    def give_back(self) -> list[int]:
        """The rows that it has not begun with, and that are not its any more."""


@dataclasses.dataclass
class Counts:
    """What the rows of a shard came to so far."""

    rows: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    @classmethod
    def of_lines(cls, lines: Iterable[bytes]) -> "Counts":
        counts = cls()
        for line in lines:
            result = json.loads(line)
            counts.add(result.get("answer"), failed="error" in result)
        return counts

    def add(self, answer: object, *, failed: bool) -> None:
        self.rows += 1
        self.failed += failed
        usage = answer.get("usage") if isinstance(answer, dict) else None
        if isinstance(usage, dict):
            self.tokens_in += usage.get("prompt_tokens") or 0
            self.tokens_out += usage.get("completion_tokens") or 0


class Shard:
    """An attempt at a shard: its rows, and the results so far."""

    def __init__(self, number: int, driver: str = "") -> None:
        self.number = number
        lines = read_rows(number)
        earlier = read_parts(number, driver)
        self.results = earlier.results
        self.total = len(lines)
        self.counts = Counts.of_lines(self.results.values())
        self.saved = dataclasses.replace(self.counts)  # what of that is on the disk
        self.unsaved: collections.deque[bytes] = collections.deque()
        self.in_flight = 0  # rows that were started and have not ended
        self.settled = threading.Event()  # every row ended, or no more are started
        self.overtaken = False  # another attempt has published all of it
        self.published = False  # this one has
        name = f"{time.time_ns():020}-{secrets.token_hex(4)}.jsonl"
        self.part = parts_folder(number) / name
        self.part.parent.mkdir(parents=True, exist_ok=True)
        # Not synced: it is for whoever finds that this container has died, and is in the
        # Volume by a commit before a row is started.
        begin = {"begin": TASK, "driver": driver}
        append(self.part, json.dumps(begin).encode() + b"\n", sync=False)
        self.idle = False  # it has said that none of its rows are in the processor
        self.careful = earlier.deaths >= DEATHS
        self.suspects = set(earlier.suspects) if self.careful else set[int]()
        rows = [row for row in lines if row["row"] not in self.results]
        if self.suspects:
            rows.sort(key=lambda row: row["row"] not in self.suspects)
        self.rows = collections.deque(rows)
        self.tries: dict[int, int] = {}  # of rows that failed alone
        self.rests_until = 0.0  # when the next of those is tried again
        for row in rows if earlier.guilty is not None else ():
            if row["row"] == earlier.guilty:
                self.rows.remove(row)
                self.suspects.clear()
                self.end(row, None, {"code": "container_died", "message": DIED})

    def next_wave(self) -> int:
        """How many rows to try next, after deaths: ever fewer of those that were being
        tried when it died, in the end one, alone; of the others some."""
        return max(1, len(self.suspects) // 8) if self.suspects else WAVE

    @property
    def next_is_alone(self) -> bool:
        return bool(self.suspects) and self.next_wave() == 1

    def wave(self) -> list[dict[str, Any]]:
        """Take the next rows, when it is on the disk which they are."""
        alone = self.next_is_alone
        size = min(self.next_wave(), len(self.rows))
        rows = list(itertools.islice(self.rows, size))
        numbers = [row["row"] for row in rows]
        saved(lambda: self.mark(numbers, alone=alone))
        for _ in rows:
            self.rows.popleft()
        self.suspects.difference_update(numbers)
        return rows

    def mark(self, trying: list[int] | None, *, alone: bool = False) -> None:
        """Say which rows are in the processor from now on, and save what has ended."""
        wave = {"trying": trying, "alone": alone}
        self.save(json.dumps(wave, separators=(",", ":")).encode() + b"\n")
        self.idle = trying == []

    def put_back(self, row: dict[str, Any], tries: int, later: float) -> None:
        """A row that failed alone comes next, and alone again."""
        self.rows.appendleft(row)
        self.suspects.add(row["row"])
        self.tries[row["row"]] = tries
        self.rests_until = later

    def end(
        self, row: dict[str, Any], answer: object, error: dict[str, str] | None
    ) -> None:
        try:
            line = result_line(row, answer, error)
        except (TypeError, ValueError, RecursionError) as wrong:
            error = {"code": "not_json", "message": f"the answer is not JSON: {wrong}"}
            answer, line = None, result_line(row, None, error)
        self.results[row["row"]] = line
        self.unsaved.append(line)
        self.counts.add(answer, failed=error is not None)

    @property
    def complete(self) -> bool:
        return len(self.results) == self.total

    def save(self, last: bytes = b"") -> None:
        counts = dataclasses.replace(self.counts)
        lines = list(self.unsaved)
        if self.overtaken or not (lines or last):
            return
        try:
            append(self.part, b"".join(lines) + last)
        except FileNotFoundError:
            # A driver that came back gave the shard to another container, too.
            if not answers_file(self.number).exists():
                raise
            self.overtaken = True
            return
        for _ in lines:
            self.unsaved.popleft()
        self.saved = counts

    def close(self) -> None:
        """All results in one file, in the order of the rows; the parts are not needed any
        more. Where not every row ended, those stay."""
        file = answers_file(self.number)
        if not file.exists():  # by another attempt
            if not self.complete:
                self.save(b'{"end":"stopped"}\n')
                return
            lines = [self.results[row] for row in sorted(self.results)]
            write_whole(file, gzip.compress(b"".join(lines), compresslevel=1))
            self.saved = self.counts
            self.unsaved.clear()
            self.published = True
        shutil.rmtree(self.part.parent, ignore_errors=True)


Told = dict[str, Any]  # what a shard came to, and whether that is all of it


def told(counts: Counts, *, ended: bool, **more: str) -> Told:
    return {**dataclasses.asdict(counts), "ended": int(ended), **more}


def told_of_file(shard: int) -> Told:
    counts = Counts.of_lines(read_gzip(answers_file(shard)))
    return told(counts, ended=True)


class Line:
    """The way of rows through the processor, which is kept full with those of all shards
    at hand: the end of one is no pause for the others.

    One thread has the processor and all rows; one saves what has ended every
    SAVE_SECONDS; and each call of `work` brings shards and waits for their end. What a
    call costs itself, most of it commits of the Volume, its shards share.

    While the Volume cannot be written no row is started, and after PATIENCE seconds each
    call says so and ends.
    """

    def __init__(self, processor: Processor) -> None:
        self.ready = time.time()
        self.busy_seconds = 0.0  # while rows waited for room in the processor,
        self.busy_rows = 0  # and the rows that ended then
        self.processor = processor
        self.arriving: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        self.shards: list[Shard] = []  # of which rows are still to end,
        self.open: list[Shard] = []  # and those too that are not closed yet
        self.flights: dict[int, tuple[Shard, dict[str, Any], int]] = {}
        self.again: list[tuple[float, int, Shard, dict[str, Any], int]] = []
        self.keys = itertools.count()
        self.disk = threading.RLock()  # held by whoever has a file of the Volume open
        self.alone: Shard | None = None  # whose next row gets the processor to itself
        self.stopping = threading.Event()
        self.run_id = ""
        self.counted: dict[int, dict[str, int]] = {}
        self.unwritten: float | None = None  # since when the Volume takes nothing
        threading.Thread(target=self.run_rows, name="rows", daemon=True).start()
        threading.Thread(target=self.keep_saving, name="saver", daemon=True).start()

    # -- called by each shard's own thread

    def work(
        self,
        numbers: list[int],
        run: str,
        retry_failed: bool = False,
        driver: str = "",
    ) -> tuple[list[Told], float]:
        """Answer the rows of some shards that have no answer yet; what those of each came
        to, and whether that is all (`ended`), and how many seconds all took. With
        `retry_failed` an error is no answer. Where the Volume cannot be written: what of
        a shard is there, and why (`unwritable`)."""
        began = time.monotonic()
        if run != self.run_id:
            self.run_id = run
            self.stopping.clear()
        shards: dict[int, Shard] = {}

        def begin() -> None:
            commit(reload=True)  # what other containers did
            saved(lambda: self.begin(shards, numbers, run, retry_failed, driver))

        try:
            self.patiently(begin)
        except Unwritable as error:
            none = told(Counts(), ended=False, unwritable=str(error))
            return [none for _ in numbers], time.monotonic() - began
        with self.disk:
            self.open += shards.values()
        for shard in shards.values():
            self.arriving.put(shard)
        for shard in shards.values():
            shard.settled.wait()
        ends = self.close(list(shards.values()))
        with contextlib.suppress(Exception):  # figures, and no rows
            self.report()  # a job may be over before the saver comes round
        with self.disk:
            for number in numbers:
                if number not in ends:  # an attempt that was given up did it
                    ends[number] = told_of_file(number)
        return [ends[number] for number in numbers], time.monotonic() - began

    def begin(
        self,
        shards: dict[int, Shard],
        numbers: list[int],
        run: str,
        retry_failed: bool,
        driver: str,
    ) -> None:
        """Add an attempt at each shard that has none, and that nobody has published."""
        for number in numbers:
            if retry_failed:
                forget_failed(number, run)
            if number not in shards and not answers_file(number).exists():
                shards[number] = Shard(number, driver)

    def close(self, shards: list[Shard]) -> dict[int, Told]:
        """Publish what shards came to, of which no row is on its way any more."""

        def close() -> None:
            for shard in shards:
                if not shard.published:
                    shard.close()

        try:
            if shards:
                self.patiently(lambda: saved(close))
        except Unwritable as error:
            reason = str(error)
            return {
                one.number: told(one.saved, ended=False, unwritable=reason)
                for one in shards
            }
        finally:
            with self.disk:
                self.open = [shard for shard in self.open if shard not in shards]
        return {shard.number: self.end_of(shard) for shard in shards}

    def end_of(self, shard: Shard) -> Told:
        if shard.published:
            return told(shard.counts, ended=True)
        with self.disk:
            if answers_file(shard.number).exists():
                return told_of_file(shard.number)
        return told(shard.saved, ended=False)

    def patiently(self, write: Callable[[], Any]) -> Any:
        """Try again and again, until the Volume was unwritable for too long."""
        began = time.monotonic()
        while True:
            try:
                with self.disk:
                    return write()
            except Unwritable as error:
                self.failed_to_write(error)
                if time.monotonic() - began > PATIENCE:
                    raise
                time.sleep(SAVE_SECONDS)

    def failed_to_write(self, error: Unwritable) -> None:
        if self.unwritten is None:
            self.unwritten = time.monotonic()
            say(f"not saved: {error}")

    @property
    def gives_up(self) -> bool:
        since = self.unwritten
        return since is not None and time.monotonic() - since > PATIENCE

    # -- the thread of the rows

    def run_rows(self) -> None:
        try:
            while True:
                self.step()
        except BaseException as error:  # noqa: BLE001
            # The processor is not to be trusted any more. Whoever ends like this is
            # replaced, and its shards are given to others.
            say(f"the container ends: {type(error).__name__}: {error}")
            traceback.print_exc()
            try:
                self.save()
            finally:
                os._exit(1)

    def step(self) -> None:
        while not self.arriving.empty() or not (self.shards or self.flights):
            self.shards.append(self.arriving.get())
        try:
            self.feed()
        except Unwritable as error:
            self.failed_to_write(error)
        if self.flights:
            waiting = any(shard.rows for shard in self.shards)
            before = time.monotonic()
            ended = self.processor.step()
            for key, outcome in ended:
                self.land(key, outcome)
            if waiting:
                self.busy_seconds += time.monotonic() - before
                self.busy_rows += len(ended)
        elif any(shard.rows or shard.in_flight for shard in self.shards):
            time.sleep(0.02)  # until one may be tried again, or the Volume be written
        stopping = self.stopping.is_set() or self.gives_up
        for shard in list(self.shards):
            if shard.overtaken:
                shard.rows.clear()
            idle = shard.in_flight == 0 and not shard.rows
            if idle or (stopping and not self.flights):
                self.shards.remove(shard)
                self.alone = None if self.alone is shard else self.alone
                shard.settled.set()

    def feed(self) -> None:
        if self.stopping.is_set() or self.unwritten is not None:
            self.take_back()
            return
        for shard in self.shards:
            if self.alone is None and shard.careful:
                self.feed_carefully(shard)
        if self.alone is not None:
            self.take_back()
            if not self.flights:
                self.start_alone(self.alone)
            return
        while self.again and self.again[0][0] <= time.monotonic() and self.has_room():
            _, _, shard, row, tries = heapq.heappop(self.again)
            shard.in_flight -= 1
            self.start(shard, row, tries)
        for shard in self.shards:
            while not shard.careful and shard.rows and self.has_room():
                self.start(shard, shard.rows.popleft(), 0)

    def feed_carefully(self, shard: Shard) -> None:
        """The next wave of a shard in which containers died. When that is a single row, it
        waits until nothing else is in the processor: of which the container may die too."""
        if shard.in_flight or not shard.rows or time.monotonic() < shard.rests_until:
            return
        if shard.next_is_alone:
            self.alone = shard
            return
        with self.disk:
            rows = shard.wave()
        for row in rows:
            self.start(shard, row, 0)

    def start_alone(self, shard: Shard) -> None:
        def rest() -> None:
            for other in self.shards:
                if other is not shard and not other.idle:
                    other.mark([])

        with self.disk:
            saved(rest)
            (row,) = shard.wave()
        self.start(shard, row, shard.tries.get(row["row"], 0))
        if not self.flights:
            self.alone = None

    def take_back(self) -> None:
        """Have no more rows in the processor than it is busy with."""
        if self.alone is not None and self.alone.in_flight:
            return  # it is alone there
        for key in reversed(self.processor.give_back()):
            shard, row, tries = self.flights.pop(key)
            if tries:
                heapq.heappush(self.again, (time.monotonic(), key, shard, row, tries))
                continue
            shard.in_flight -= 1
            shard.rows.appendleft(row)
            if shard.careful:  # as a row of which nothing is known yet
                shard.suspects.add(row["row"])

    def has_room(self) -> bool:
        return len(self.flights) < self.processor.capacity

    def start(self, shard: Shard, row: dict[str, Any], tries: int) -> None:
        if "bad" in row:
            shard.end(row, None, row["bad"])
            return
        if shard.idle:
            self.write(lambda: shard.mark(None))
        if "media" in row:
            place(row)
        key = next(self.keys)
        try:
            self.processor.start(key, row)
        except Refused as error:
            shard.end(row, None, {"code": error.code, "message": error.message})
            return
        shard.in_flight += 1
        self.flights[key] = (shard, row, tries)

    def land(self, key: int, outcome: object) -> None:
        shard, row, tries = self.flights.pop(key)
        alone = self.alone is shard
        if not isinstance(outcome, Failed):
            shard.in_flight -= 1
            shard.end(row, outcome, None)
        elif outcome.retry and tries < RETRIES:
            # Seconds doubled with each try, and no two rows at the same time.
            later = time.monotonic() + min(60, 2**tries) * random.uniform(0.5, 1.0)
            if alone:
                shard.in_flight -= 1
                shard.put_back(row, tries + 1, later)
            else:
                heapq.heappush(self.again, (later, key, shard, row, tries + 1))
        else:
            shard.in_flight -= 1
            message = outcome.message
            if tries:
                message += f" (tried {tries + 1} times)"
            shard.end(row, None, {"code": outcome.code, "message": message})
        if alone:
            self.alone = None
            self.write(lambda: shard.mark([]))

    def write(self, write: Callable[[], object]) -> None:
        try:
            with self.disk:
                saved(write)
        except Unwritable as error:
            self.failed_to_write(error)

    # -- the thread that saves

    def keep_saving(self) -> None:
        while True:
            time.sleep(SAVE_SECONDS)
            try:
                self.save()
                self.report()
            except Unwritable as error:
                # Next time: nothing that is not saved is said to be done.
                self.failed_to_write(error)
            except Exception as error:  # noqa: BLE001
                say(f"not told: {type(error).__name__}: {error}")

    def save(self) -> None:
        shards = list(self.open)

        def save() -> None:
            if self.unwritten is not None:
                find_room()
            for shard in shards:
                if shard.settled.is_set() and shard.complete:
                    shard.close()
                else:
                    shard.save()

        with self.disk:
            if self.unwritten is not None or any(shard.unsaved for shard in shards):
                saved(save)
            self.unwritten = None
            self.counted = {
                shard.number: dataclasses.asdict(shard.saved) for shard in shards
            }

    def leave(self) -> None:
        """The container is told to end: it does not die of its rows."""
        with self.disk:
            for shard in list(self.open):
                if not shard.published:
                    shard.save(b'{"end":"left"}\n')
            volume.commit()

    def report(self) -> None:
        """Say how far it is, and hear whether to stop."""
        tell_driver(self.ready, self.busy_seconds, self.busy_rows, self.counted)
        if live.get("stop") == self.run_id:
            self.stopping.set()


def tell_driver(
    ready: float | None,
    busy_seconds: float,
    busy_rows: int,
    shards: dict[int, dict[str, int]],
) -> None:
    """That this container is up, and since when it could answer (None: not yet)."""
    up = [BEGAN, time.time(), ready, busy_seconds, busy_rows]
    live.put(TASK, {"up": up, "shards": shards})


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Say that the container is up, and cannot answer yet: a model takes minutes, which
    are paid for, too. And say why nothing was loaded: Modal starts container after
    container, for ever where a process ended by itself, which it takes for in order."""
    loaded = threading.Event()

    def tell() -> None:
        while not loaded.wait(SAVE_SECONDS):
            with contextlib.suppress(Exception):  # figures, and no rows
                tell_driver(None, 0.0, 0, {})

    teller = threading.Thread(target=tell, name="loading", daemon=True)
    teller.start()
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            live.put(f"{UNLOADED} {TASK}", [time.time(), reason])
        raise RuntimeError(reason) from error
    finally:
        loaded.set()
        teller.join(timeout=10)  # what is said of it next is not to be overtaken


def place(row: dict[str, Any]) -> None:
    """Say where the files of a row are, in its request: as a path for a function, which
    may want to open it, and as a URL where OpenAI's API has one."""
    files = [str(DATA / name) for name in row.pop("media")]
    if row["url"] != "function":
        files = ["file://" + urllib.parse.quote(file) for file in files]
    row["body"] = with_files(row["body"], files)
    if row["url"] == "/v1/audio/transcriptions" and "file" in row["body"]:
        row["body"]["file_url"] = row["body"].pop("file")


def with_files(value: Any, files: list[str]) -> Any:
    if isinstance(value, list):
        return [with_files(one, files) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$media"} and isinstance(value["$media"], int):
        return files[value["$media"]]
    return {name: with_files(one, files) for name, one in value.items()}


def engine_arguments() -> list[str]:
    return [
        "--model",
        MODEL,
        "--revision",
        REVISION,
        "--served-model-name",
        *SERVED_NAMES,
        "--tensor-parallel-size",
        str(TENSOR_PARALLEL),
        "--gpu-memory-utilization",
        str(GPU_MEMORY_UTILIZATION),
        "--max-model-len",
        str(MAX_MODEL_LEN),
        "--allowed-local-media-path",
        str(DATA),
    ]


class VllmProcessor:
    """vLLM's offline engine behind the request handlers of its own API server.

    A row is answered as the server would answer it, by the same code: all fields of a
    request, chat templates, tools, adapters. What is left out is what a server needs and
    a job does not: HTTP, streams, a task for each token.

    Everything runs in the thread that calls; the engine is a process of its own.
    """

    def __init__(self) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.cli_args import (
            make_arg_parser,
            validate_parsed_serve_args,
        )
        from vllm.envs import enable_envs_cache
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.llm_engine import LLMEngine

        for name, limit in LIMITS.items():
            os.environ.setdefault(name, limit)
        parser = make_arg_parser(FlexibleArgumentParser(prog="vllm"))
        parser.error = refuse_arguments  # pages of usage, otherwise, and an end
        args = parser.parse_args(engine_arguments())
        validate_parsed_serve_args(args)
        args.disable_log_stats = True
        # As many rows at once, and tokens in a step, as vLLM takes offline.
        config = EngineArgs.from_cli_args(args).create_engine_config(
            UsageContext.LLM_CLASS
        )
        if config.parallel_config.data_parallel_size > 1:
            raise ValueError("--data-parallel-size: use more containers instead")
        self.engine = LLMEngine.from_vllm_config(
            config, UsageContext.LLM_CLASS, disable_log_stats=True
        )
        self.client = EngineClient(self.engine)
        # Half of them wait in the engine while the others are worked on.
        self.capacity = 2 * config.scheduler_config.max_num_seqs
        if self.engine.model_config.is_multimodal_model:
            self.capacity = min(self.capacity, MOST_MEDIA)
        self.tasks: set[asyncio.Task[None]] = set()
        self.ended: list[tuple[int, object]] = []
        self.dead: BaseException | None = None
        self.loop = asyncio.new_event_loop()
        quicken(self.engine)
        self.state = types.SimpleNamespace()
        tasks = self.engine.get_supported_tasks()
        self.loop.run_until_complete(
            init_app_state(self.client, self.state, args, tasks)
        )
        self.handlers = handlers(self.state)
        enable_envs_cache()
        # What is wrong with a row stands in its result: not in the log, a million times.
        logging.getLogger("vllm.entrypoints.openai").setLevel(logging.CRITICAL)
        # What is here now stays: collections need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000)

    def start(self, key: int, row: dict[str, Any]) -> None:
        handler = self.handlers.get(row["url"])
        if handler is None:
            can = ", ".join(sorted(self.handlers)) or "nothing"
            message = f"the model cannot answer {row['url']}, but {can}"
            raise Refused("unsupported", message)
        task = self.loop.create_task(self.answer(key, handler, row["body"]))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def answer(self, key: int, handler: "Handler", body: dict[str, Any]) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            outcome = as_outcome(await handler(body))
        except EngineDeadError as error:
            self.dead = error
            return
        except Exception as error:  # noqa: BLE001
            outcome = as_failure(error)
        self.ended.append((key, outcome))

    def step(self) -> list[tuple[int, object]]:
        self.turn()
        self.client.send()
        if self.engine.has_unfinished_requests():
            if self.output_is_there():
                for output in self.engine.step():
                    self.client.land(output)
                self.turn()
        elif self.tasks and not self.ended:
            # They wait for something else: a picture, a thread.
            self.loop.run_until_complete(
                asyncio.wait(
                    self.tasks, timeout=0.05, return_when=asyncio.FIRST_COMPLETED
                )
            )
        if self.dead is not None:
            raise self.dead
        ended, self.ended = self.ended, []
        return ended

    def give_back(self) -> list[int]:
        return []  # it begins with all of them at once

    def turn(self) -> None:
        """Let each task go on that can, once."""
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def output_is_there(self) -> bool:
        """Wait for it a little; an engine that was killed says nothing any more."""
        core = self.engine.engine_core
        outputs = core.outputs_queue
        with outputs.not_empty:
            if not outputs.queue and not outputs.not_empty.wait(0.05):
                core.ensure_alive()
                return False
        return True


# Of the sound in a row: the server's own are for strangers' requests.
LIMITS = {
    "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB": "1024",
    "VLLM_MAX_AUDIO_DECODE_DURATION_S": "14400",
    "VLLM_MAX_AUDIO_DECODE_BYTES": "4294967296",
}
MOST_SAID = 5  # of what is wrong with a request
MOST_MEDIA = 256  # rows in flight: each may be some ten megabytes of pictures or sound

Handler = Callable[[Any], Awaitable[Any]]


class EngineClient:
    """What the request handlers want of an engine, by the names that they use."""

    errored = False  # an engine that died raises

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.vllm_config = engine.vllm_config
        self.model_config = engine.model_config
        self.renderer = engine.renderer
        self.input_processor = engine.input_processor
        self.number = 0
        self.waiting: dict[str, asyncio.Future[Any]] = {}
        # The engine's process gets many at once: each message that comes alone wakes
        # threads here and there, beside an engine that is busy.
        self.unsent: list[tuple[str, Any]] = []
        self.add_request = engine.engine_core.add_request
        engine.engine_core.add_request = self.send_later

    def send_later(self, request: Any) -> None:
        self.unsent.append((str(self.number), request))

    def send(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        unsent = list(self.unsent)
        self.unsent.clear()
        for number, request in unsent:
            try:
                self.add_request(request)
            except EngineDeadError:
                raise
            except Exception as error:  # noqa: BLE001
                # It cannot be packed: that is the fault of its row, and of no other.
                if future := self.waiting.pop(number, None):
                    future.set_exception(error)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """There are never more than the engine wants."""

    async def generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: Any = None,
        priority: int = 0,
        session_id: str | None = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> AsyncIterator[Any]:
        number = self.next_number()
        text = None
        if reasoning_ended is not None or reasoning_parser_kwargs is not None:
            text = prompt.get("prompt")
            prompt = self.input_processor.process_inputs(
                number,
                prompt,
                sampling_params,
                self.engine.get_supported_tasks(),
                lora_request=lora_request,
                priority=priority,
                session_id=session_id,
            )
            prompt.reasoning_ended = reasoning_ended
            prompt.reasoning_parser_kwargs = reasoning_parser_kwargs
            sampling_params = prompt.params
        yield await self.answer(
            number,
            prompt,
            sampling_params,
            lora_request=lora_request,
            priority=priority,
            session_id=session_id,
            prompt_text=text,
        )

    async def encode(
        self,
        prompt: Any,
        pooling_params: Any,
        request_id: str,
        lora_request: Any = None,
        trace_headers: Any = None,
        priority: int = 0,
        **_: Any,
    ) -> AsyncIterator[Any]:
        yield await self.answer(
            self.next_number(),
            prompt,
            pooling_params,
            lora_request=lora_request,
            priority=priority,
        )

    def next_number(self) -> str:
        self.number += 1  # the row's own id may come twice
        return str(self.number)

    async def answer(self, number: str, *request: Any, **options: Any) -> Any:
        self.engine.add_request(number, *request, **options)
        future = asyncio.get_running_loop().create_future()
        self.waiting[number] = future
        if len(self.unsent) >= BURST:
            self.send()
        return await future

    def land(self, output: Any) -> None:
        if output.finished and (future := self.waiting.pop(output.request_id, None)):
            future.set_result(output)

    async def add_lora(self, lora_request: Any) -> bool:
        return bool(self.engine.add_lora(lora_request))


BURST = 16  # requests that are sent together


def refuse_arguments(message: str) -> Any:
    """What is wrong with them, as a reason that a job can give."""
    raise ValueError(f"vLLM takes other arguments: {message}")


def quicken(engine: Any) -> None:
    """Prepare prompts of texts where they are wanted, not in threads: with thousands of
    short ones, most of the time went into handing them over."""
    renderer = engine.renderer
    renderer.get_eos_token_id = functools.cache(renderer.get_eos_token_id)
    if tokenize := tokenized_plainly(renderer):
        renderer._tokenize_prompt = tokenize
    for name in ("render_chat", "render_cmpl"):
        render = with_lengths(getattr(renderer, name))
        setattr(renderer, name, render)
        if not engine.model_config.is_multimodal_model:
            setattr(renderer, f"{name}_async", inline(render))


def tokenized_plainly(renderer: Any) -> Callable[[Any, Any], Any] | None:
    """How a text becomes tokens, by what transformers calls in the end: what it does
    before for batches, pairs and padding takes longer than a short text. None for a
    tokenizer that has ways of its own."""
    from transformers import PreTrainedTokenizerBase, TokenizersBackend

    tokenizer = renderer.tokenizer
    # Without what vLLM puts before it, for threads and to keep what does not change.
    kinds = type(tokenizer).__mro__
    kind: Any = next(one for one in kinds if one.__module__ != VLLM_S_OWN)
    if (
        not isinstance(tokenizer, TokenizersBackend)
        or kind.__call__ is not PreTrainedTokenizerBase.__call__
        or kind._encode_plus is not TokenizersBackend._encode_plus
        or hasattr(tokenizer, "_switch_to_input_mode")
    ):
        return None
    core = copy.deepcopy(tokenizer._tokenizer)
    core.no_truncation()
    core.no_padding()
    core.encode_special_tokens = tokenizer.split_special_tokens
    by_vllm = renderer._tokenize_prompt

    def tokenize(prompt: Any, params: Any) -> Any:
        asked = params.get_encode_kwargs()
        if asked.keys() <= PLAIN and not params.return_token_offsets:
            (found,) = core.encode_batch_fast(
                [prompt["prompt"]], add_special_tokens=asked["add_special_tokens"]
            )
            if not asked["truncation"] or len(found) <= asked["max_length"]:
                return renderer._build_tokens_prompt(found.ids, prompt)
        return by_vllm(prompt, params)

    return tokenize


VLLM_S_OWN = "vllm.tokenizers.hf"
PLAIN = {"truncation", "max_length", "add_special_tokens"}


def inline(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """As a coroutine that runs where it is awaited, and in no thread."""

    async def run(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    return run


def with_lengths(render: Callable[..., Any]) -> Callable[..., Any]:
    """Count the tokens of a prompt that is too long: vLLM counts up to its limit only."""
    from vllm.exceptions import VLLMValidationError

    def rendered(*args: Any, **options: Any) -> Any:
        try:
            return render(*args, **options)
        except VLLMValidationError as error:
            by_text = error.parameter == "input_text" and error.value <= MOST_COUNTED
            if error.parameter != "input_tokens" and not by_text:
                raise
        call = inspect.signature(render).bind(*args, **options)
        limits = call.arguments["tok_params"]
        unlimited = dataclasses.replace(limits, max_total_tokens=None)
        call.arguments["tok_params"] = unlimited
        prompts = render(*call.args, **call.kwargs)
        if isinstance(prompts, tuple):  # and the conversations
            prompts = prompts[1]
        tokens = max(len(prompt["prompt_token_ids"]) for prompt in prompts)
        raise TooLong(tokens, limits.max_total_tokens)

    return rendered


MOST_COUNTED = 4_000_000  # characters: some seconds


class Transcriber:
    """Files of sound to texts. So much of it is in work at once as fits into memory: what
    a file takes grows tenfold and more when it is decoded."""

    def __init__(self, serving: Any) -> None:
        self.serving = serving
        self.decode = serving._decode_and_chunk_speech_async
        serving._decode_and_chunk_speech_async = self.decoded
        self.room = MOST_SOUND
        self.left = asyncio.Condition()

    async def __call__(self, body: dict[str, Any]) -> Any:
        from vllm.entrypoints.launchers.run_batch import (
            BatchTranscriptionRequest,
            download_bytes_from_url,
        )
        from vllm.entrypoints.speech_to_text.transcription.protocol import (
            TranscriptionRequest,
        )

        body = unstreamed(body)
        if "file" in body:  # OpenAI's name for it
            body["file_url"] = body.pop("file")
        request = BatchTranscriptionRequest.model_validate(body)
        fields = request.model_dump(exclude={"file_url"}, by_alias=True)
        asked = TranscriptionRequest.model_construct(**fields)
        file = path_of(request.file_url)
        try:
            size = len(request.file_url) if file is None else file.stat().st_size
            size = min(size, MOST_SOUND)
            async with self.left:
                await self.left.wait_for(lambda: self.room >= size)
                self.room -= size
        except OSError as error:
            raise Unreadable(f"{error.strerror}: {file}") from error
        try:
            if file is None:
                sound = await download_bytes_from_url(request.file_url)
            else:
                sound = await asyncio.to_thread(file.read_bytes)
            return await self.serving.create_transcription(sound, asked)
        finally:
            async with self.left:
                self.room += size
                self.left.notify_all()

    async def decoded(self, sound: bytes) -> Any:
        try:
            return await self.decode(sound)
        except ValueError as error:
            raise Unreadable(str(error)) from error


MOST_SOUND = 256 * 2**20  # bytes, as they are in the files


def path_of(url: str) -> pathlib.Path | None:
    """The file of this machine that is meant, if any."""
    if url.startswith("/"):
        return pathlib.Path(url)
    parts = urllib.parse.urlsplit(url[:5000])
    if parts.scheme != "file":
        return None
    return pathlib.Path(urllib.parse.unquote(parts.path))


class Unreadable(Exception):
    """Sound that nothing can be made of."""


class TooLong(Exception):
    """A prompt has more tokens than the model's context."""

    def __init__(self, tokens: int, context: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens, and the model's context {context}"
        )


def handlers(state: Any) -> dict[str, Handler]:
    """What the model can be asked, by the path of OpenAI's API."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest

    found: dict[str, Handler] = {}

    def add(url: str, requests: Requests, handle: Handler) -> None:
        async def answer(body: dict[str, Any]) -> Any:
            return await handle(requests.of(body))

        found[url] = answer

    if chat := getattr(state, "openai_serving_chat", None):
        alike = chat.parser_cls is None  # which may change a request by what it asks
        requests = Requests(ChatCompletionRequest, "messages", alike=alike)
        add("/v1/chat/completions", requests, chat.create_chat_completion)
    if completion := getattr(state, "openai_serving_completion", None):
        requests = Requests(CompletionRequest, "prompt", alike=True)
        add("/v1/completions", requests, completion.create_completion)
    if embedding := getattr(state, "serving_embedding", None):
        if not embedding.model_config.is_multimodal_model:
            embedding.io_processor.render_async = inline(embedding.io_processor.render)
        embedding._postprocessing_async = inline(embedding._postprocessing)
        add("/v1/embeddings", Requests(EmbeddingRequest, "input"), embedding)
    if transcription := getattr(state, "openai_serving_transcription", None):
        found["/v1/audio/transcriptions"] = Transcriber(transcription)
    return found


class Requests:
    """Bodies as requests, checked by vLLM. Most rows of a job differ in `what` they ask
    only: where that is a plain text or dialogue, the rest is checked once for all that
    have the same. Checking each takes longer than answering from a small model.
    `alike`: and so is what vLLM makes of the rest."""

    def __init__(self, request: Any, what: str, *, alike: bool = False) -> None:
        import pydantic

        self.validate = pydantic.TypeAdapter(request).validate_python
        shared = sharing(request) if alike else request
        self.validate_shared = pydantic.TypeAdapter(shared).validate_python
        self.what = what
        self.known: dict[tuple[Any, ...], Any] = {}

    def of(self, body: dict[str, Any]) -> Any:
        from vllm.utils import random_uuid

        body = unstreamed(body)
        asked = body.get(self.what)
        rest = [(name, value) for name, value in body.items() if name != self.what]
        simple = all(value is None or type(value) in SCALARS for _, value in rest)
        if not simple or not is_plain(asked) or "request_id" in body:
            return self.validate(body)
        # 1, 1.0 and True are equal, and not the same to a check.
        key = (*rest, *(type(value) for _, value in rest))
        known = self.known.get(key)
        if known is None:
            known = self.validate_shared(body)
            if len(self.known) < MOST_KNOWN:
                self.known[key] = known
        return known.model_copy(update={self.what: asked, "request_id": random_uuid()})


def sharing(request: Any) -> Any:
    """The same kind of request, of which copies share what vLLM makes of them: all but
    what they ask is the same."""
    import pydantic

    class Shared(request):  # type: ignore[misc]
        _made: dict[Any, Any] = pydantic.PrivateAttr(default_factory=dict)

        def build_tok_params(self, *of: Any) -> Any:
            made = self.__pydantic_private__["_made"]
            if (found := made.get("tokens")) is None:
                found = made["tokens"] = super().build_tok_params(*of)
            return found

        def to_sampling_params(self, max_tokens: int, *of: Any) -> Any:
            made = self.__pydantic_private__["_made"]
            last, found = made.get("sampling", (None, None))
            if last != max_tokens:
                found = super().to_sampling_params(max_tokens, *of)
                made["sampling"] = max_tokens, found
            return copy.copy(found)

    for name, field in request.model_fields.items():
        if field.deprecated:
            setattr(Shared, name, None)  # instead of a warning for each row
    return Shared


SCALARS = {str, int, float, bool}
MOST_KNOWN = 1000


def is_plain(asked: Any) -> bool:
    """A text, or texts of the usual roles: nothing that a check could change or refuse."""
    if not isinstance(asked, list):
        return isinstance(asked, str)
    return bool(asked) and all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and message["role"] in ("system", "user", "assistant")
        and isinstance(message["content"], str)
        for message in asked
    )


def unstreamed(body: dict[str, Any]) -> dict[str, Any]:
    """A request for a stream wants the same answer."""
    streams = ("stream", "stream_options")
    return {name: value for name, value in body.items() if name not in streams}


def as_outcome(response: Any) -> object:
    """What a handler returned, as an answer or a failure."""
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if isinstance(response, ErrorResponse):
        return refusal(response.error)
    if hasattr(response, "model_dump"):
        return response.model_dump(mode="json")
    try:
        return json.loads(response.body)
    except (AttributeError, ValueError):
        message = "the answer is a line of JSON: encoding_format is float or base64"
        return Failed("invalid_request", message, retry=False)


def as_failure(error: Exception) -> Failed:
    """What a handler raised, as the server would say it."""
    import pydantic
    from vllm.entrypoints.serve import create_error_response

    if isinstance(error, TooLong):
        return Failed("context_length_exceeded", str(error), retry=False)
    if isinstance(error, Unreadable):
        return Failed("unreadable_audio", str(error), retry=False)
    if isinstance(error, pydantic.ValidationError):
        wrong = list(dict.fromkeys(map(said, error.errors(include_url=False))))
        more = [f"and {len(wrong) - MOST_SAID} more"] if len(wrong) > MOST_SAID else []
        says = "; ".join([*wrong[:MOST_SAID], *more])
        return Failed("invalid_request", says, retry=False)
    return refusal(create_error_response(error).error)


def said(problem: Any) -> str:
    """Where it is, less the members of a union that a field might be, and what."""
    where = [
        str(part)
        for part in problem["loc"]
        if isinstance(part, int) or part.isidentifier()
    ]
    return f"{'.'.join(where)}: {problem['msg']}"


def refusal(error: Any) -> Failed:
    """vLLM's own words, under one of our codes. Errors of the server may pass."""
    if error.code >= 500:
        return Failed("engine_error", error.message, retry=True)
    if error.message.startswith("Failed to load image"):
        return Failed("unreadable_image", error.message, retry=False)
    if "context length" in error.message:
        return Failed("context_length_exceeded", error.message, retry=False)
    code = "model_not_found" if error.code == 404 else "invalid_request"
    return Failed(code, error.message, retry=False)


# -- who hands out the work


class Ledger:
    """What is known of the job, in two files that only the driver writes: `ledger.jsonl`
    has a line for each shard that ended, `status.json` the whole in figures."""

    def __init__(self) -> None:
        job = json.loads((DATA / "job.json").read_bytes())
        self.shards: int = job["shards"]
        self.rows: int = job["rows"] - job["copies"]
        self.ended: dict[int, dict[str, Any]] = {}
        self.now: dict[int, dict[str, int]] = {}  # shards that are being worked on
        # When each began, was last seen, and could answer (None: not yet); for how many
        # seconds rows waited for it, and how many ended then.
        self.containers: dict[str, list[Any]] = {}
        file = DATA / "ledger.jsonl"
        for line in file.read_bytes().splitlines() if file.exists() else ():
            with contextlib.suppress(ValueError):  # torn by a crash
                entry = json.loads(line)
                self.ended[entry.pop("shard")] = entry
        self.status: dict[str, Any] = {}  # that was told last
        with contextlib.suppress(OSError, ValueError):
            self.status = json.loads((DATA / "status.json").read_bytes())
            up = self.status["containers_up"]
            self.containers = {task: one for task, one in up.items() if len(one) == 5}

    def end(self, run: str, ended: dict[int, dict[str, Any]]) -> None:
        """What shards came to. The last line of a shard is the one that holds."""
        entries = {shard: {**counts, "run": run} for shard, counts in ended.items()}
        lines = [
            json.dumps({"shard": shard, **entry}, separators=(",", ":"))
            for shard, entry in entries.items()
        ]
        # Lines of their own, also after one that a crash tore.
        append(DATA / "ledger.jsonl", ("\n" + "\n".join(lines) + "\n").encode())
        self.ended |= entries
        for shard in entries:
            self.now.pop(shard, None)

    def heard(self, reports: Iterable[tuple[str, Any]]) -> None:
        """What the containers last said of themselves."""
        for task, report in reports:
            if isinstance(report, dict):
                self.containers[task] = report["up"]
                for shard, counts in report["shards"].items():
                    if shard not in self.ended:
                        self.now[shard] = counts

    def alive(self) -> dict[str, list[Any]]:
        """The containers that were heard of lately."""
        late = time.time() - 3 * SAVE_SECONDS - 10
        return {task: one for task, one in self.containers.items() if one[1] > late}

    def figures(self) -> dict[str, Any]:
        counted = [*self.ended.values(), *self.now.values()]
        total = {
            name: sum(counts[name] for counts in counted)
            for name in ("rows", "failed", "tokens_in", "tokens_out")
        }
        up, now = self.containers.values(), self.alive().values()
        seconds = sum(seen - began for began, seen, *_ in up)
        working = sum(seen - ready for _, seen, ready, *_ in up if ready is not None)
        return {
            "rows": self.rows,
            "done": total["rows"] - total["failed"],
            "failed": total["failed"],
            "tokens_in": total["tokens_in"],
            "tokens_out": total["tokens_out"],
            "shards": self.shards,
            "shards_ended": len(self.ended),
            # Of more, some have died, and have not been silent for long.
            "containers": min(len(now), MAX_CONTAINERS),
            "containers_loading": min(
                sum(one[2] is None for one in now), MAX_CONTAINERS
            ),
            "containers_started": len(up),
            "container_seconds": round(seconds, 1),
            "working_seconds": round(working, 1),
            "busy_seconds": round(sum(busy for *_, busy, _ in up), 3),
            "busy_rows": round(sum(rows for *_, rows in up)),
            "usd": None
            if USD_PER_SECOND is None
            else round(seconds * USD_PER_SECOND, 6),
            "max_usd": MAX_USD,
        }


class Driver:
    """One run over the shards that have not ended."""

    def __init__(self, run: str, retry_failed: bool) -> None:
        self.run = run
        self.retry_failed = retry_failed
        self.ledger = Ledger()
        self.began = time.time()
        told = self.ledger.status
        self.run_began = self.began  # maybe with another driver
        self.ended_before = 0  # rows, in earlier runs
        if told.get("run") == run:
            self.run_began = told["began"]
            self.ended_before = told.get("ended_before", 0)
        elif told:
            kept = ("done",) if retry_failed else ("done", "failed")
            self.ended_before = sum(told[name] for name in kept)
        self.name = secrets.token_hex(4)  # of this driver: the next one has another
        self.problem: str | None = None  # why the run is to end before the rows do
        self.state = "running"
        self.over = False  # nothing is being worked on any more
        self.together = 1  # shards of a call
        self.failures: dict[int, int] = {}
        self.failed = 0  # calls, of all shards
        self.works = False  # a row was answered
        self.reached: dict[int, int] = {}  # rows that had ended at its last failure
        self.unwritten: float | None = None  # since when the Volume takes nothing
        self.phase = "answering"
        self.wrong: dict[str, Any] = {}  # with where the answers belong

    async def drive(self) -> dict[str, Any]:
        todo = collections.deque(filter(self.is_to_do, range(self.ledger.shards)))
        running: set[asyncio.Task[None]] = set()
        watcher = asyncio.create_task(self.watch())
        try:
            while (todo and self.goes_on()) or running:
                while todo and self.goes_on() and len(running) < AT_ONCE:
                    shards = self.next_shards(todo)
                    running.add(asyncio.create_task(self.work(shards, todo)))
                ended, running = await asyncio.wait(
                    running, timeout=1, return_when=asyncio.FIRST_COMPLETED
                )
                for task in ended:
                    task.result()  # raises what went wrong
                if self.state == "stopped" and self.waited_in_vain(2 * PATIENCE):
                    break  # what cannot be written may keep the calls, too
        finally:
            watcher.cancel()
        # What they said last: figures, and no rows.
        with contextlib.suppress(Exception):
            await self.hear()
        if self.state == "stopped" and self.unwritten is None and self.all_ended():
            self.state, self.problem = "running", None  # it came too late
        if self.state == "running" and todo:
            # A call may take a day: the next goes on.
            await drive.spawn.aio(self.run, self.retry_failed)
        elif self.state == "running":
            await self.publish()
        self.over = True
        return await self.tell_the_end()

    async def publish(self) -> None:
        """Have the answers written where they belong."""
        self.phase = "writing"
        stamp = ""
        writing = asyncio.ensure_future(files.remote.aio("publish", stamp))
        while not writing.done():
            try:
                await self.tell()
            except Exception as error:  # noqa: BLE001
                self.failed_to_write(error)
            await asyncio.wait([writing], timeout=SAVE_SECONDS)
        told = what_came_of(writing)
        if "problems" in told:
            self.state, self.problem = "failed", "; ".join(told["problems"])
            self.wrong = {"hint": told.get("hint")}
        else:
            self.state = "done"

    def goes_on(self) -> bool:
        return self.state == "running" and time.time() - self.began < SHIFT_SECONDS

    def is_to_do(self, shard: int) -> bool:
        ended = self.ledger.ended.get(shard)
        if ended is None:
            return True
        retried = ended.get("run") == self.run
        return self.retry_failed and ended["failed"] > 0 and not retried

    def retrying(self) -> int:
        """Rows that ended with an error, and are tried again."""
        ended = self.ledger.ended
        return sum(ended[shard]["failed"] for shard in ended if self.is_to_do(shard))

    def all_ended(self) -> bool:
        return not any(map(self.is_to_do, range(self.ledger.shards)))

    def next_shards(self, todo: collections.deque[int]) -> list[int]:
        """Those of the next call: more than one where they are quick. They are small
        ones, so that a container has room for them, and leave enough for all others. One
        that failed is handed out alone."""
        most = max(1, min(self.together, len(todo) // (2 * AT_ONCE)))
        shards = [todo.popleft()]
        size = input_file(shards[0]).stat().st_size if most > 1 else 0
        while len(shards) < most and not self.failures.get(shards[0]):
            size += input_file(todo[0]).stat().st_size
            like = (todo[0] in self.ledger.ended) == (shards[0] in self.ledger.ended)
            if size > MOST_BYTES or self.failures.get(todo[0]) or not like:
                break
            shards.append(todo.popleft())
        return shards

    async def work(self, shards: list[int], todo: collections.deque[int]) -> None:
        try:
            retry = self.retry_failed and shards[0] in self.ledger.ended
            worker = Worker()
            told, seconds = await worker.work.remote.aio(
                shards, self.run, retry, self.name
            )
        except Exception as error:  # noqa: BLE001
            self.failed += 1
            for shard in shards:
                self.fail(shard, todo, error)
            return
        # So many that they take as long as a call is worth, at most twice as many.
        more = min(2.0, WORTH_SECONDS / max(seconds, 0.001))
        self.together = max(1, int(len(shards) * more))
        ended: dict[int, dict[str, Any]] = {}
        for shard, counts in zip(shards, told, strict=True):
            is_all, reason = counts.pop("ended"), counts.pop("unwritable", None)
            if reason is not None:
                self.stop_unwritten(reason)
            if is_all:
                ended[shard] = counts
            if shard not in self.ledger.ended:
                self.ledger.now[shard] = counts
        while ended:
            try:
                self.ledger.end(self.run, ended)
                break
            except OSError as error:
                self.failed_to_write(error)
            if self.state != "running":
                break  # its answers are there, and the next run finds them
            await asyncio.sleep(SAVE_SECONDS)

    def fail(self, shard: int, todo: collections.deque[int], error: Exception) -> None:
        """A shard comes again, and again; but a job of which nothing works is ended."""
        say(f"shard {shard}: {cause(error)}")
        results = list(map(json.loads, read_parts(shard, self.name).results.values()))
        errors = [result["error"] for result in results if "error" in result]
        deadly = sum(error["code"] == "container_died" for error in errors)
        if len(results) > self.reached.get(shard, 0):
            self.reached[shard] = len(results)
            self.failures[shard] = 0
        self.failures[shard] = self.failures.get(shard, 0) + 1
        self.works = self.works or bool(self.ledger.ended) or len(results) > len(errors)
        hopeless = not self.works and self.failed >= 3
        if hopeless or self.failures[shard] >= MOST_FAILURES or deadly > MOST_DEADLY:
            self.state = "failed"
            self.problem = f"shard {shard}: {cause(error)}"
        else:
            todo.append(shard)

    def failed_to_write(self, error: Exception) -> None:
        """Try again later; whoever cannot write for too long stops in order."""
        if self.unwritten is None:
            self.unwritten = time.monotonic()
            say(f"not written: {cause(error)}")
        elif self.waited_in_vain(PATIENCE):
            self.stop_unwritten(cause(error))

    def waited_in_vain(self, seconds: float) -> bool:
        since = self.unwritten
        return since is not None and time.monotonic() - since > seconds

    def stop_unwritten(self, reason: str) -> None:
        if self.state in ("running", "done"):
            self.state = "stopped"
            self.problem = f"the job's Volume cannot be written: {reason}"

    async def watch(self) -> None:
        """Every other second: hear the containers, say how far it is, and whether to stop."""
        while True:
            try:
                await self.hear()
                self.stop_if_told(await self.tell())
            except Exception as error:  # noqa: BLE001
                self.failed_to_write(error)
                self.say_status()
            else:
                self.unwritten = None
            if self.state != "running":
                with contextlib.suppress(Exception):  # next time
                    await live.put.aio("stop", self.run)
            await asyncio.sleep(SAVE_SECONDS)

    async def hear(self) -> None:
        items = [item async for item in live.items.aio()]
        self.ledger.heard(items)
        self.end_where_nothing_loads(items)

    def end_where_nothing_loads(self, items: Iterable[tuple[str, Any]]) -> None:
        """Each of the calls would be tried in several containers, all of them in vain. Where
        most of them are up or still load, it was bad luck, and others go on."""
        told = {key: report for key, report in items if key.startswith(UNLOADED)}
        failed = {
            key.split()[1]: said for key, said in told.items() if said[0] >= self.began
        }
        alive = self.ledger.alive().items()
        others = [one for task, one in alive if task not in failed]
        can_answer = [one for one in others if one[2] is not None]
        rows = [counts for counts in self.ledger.now.values() if counts["rows"]]
        if self.state != "running" or self.ledger.ended or rows or can_answer:
            return
        if len(failed) >= MOST_UNLOADED and len(failed) > len(others):
            self.state = "failed"
            self.problem = f"it cannot be loaded: {max(failed.values())[1]}"

    def stop_if_told(self, figures: dict[str, Any]) -> None:
        stop = DATA / "control" / "stop"
        if self.state != "running":
            pass
        elif stop.exists():
            self.state, self.problem = "stopped", "it was cancelled"
        elif MAX_USD is not None and (spent := figures["usd"] or 0.0) >= MAX_USD:
            self.state = "stopped"
            self.problem = f"${spent:.2f} were spent, and the cap is ${MAX_USD:.2f}"

    async def tell_the_end(self) -> dict[str, Any]:
        """Where the Volume does not take it, at least the logs do."""
        while True:
            try:
                return await self.tell()
            except Exception as error:  # noqa: BLE001
                self.failed_to_write(error)
                if self.waited_in_vain(PATIENCE):
                    return self.say_status()
            await asyncio.sleep(SAVE_SECONDS)

    def status(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "state": self.state if self.over else "running",
            "problem": self.problem,
            "time": round(time.time(), 3),
            "began": round(self.run_began, 3),
            "ended_before": self.ended_before,
            "retrying": self.retrying(),
            **self.ledger.figures(),
            "phase": self.phase,
            **self.wrong,
        }

    def say_status(self) -> dict[str, Any]:
        status = self.status()
        print("@gpuctl " + json.dumps(status, separators=(",", ":")), flush=True)
        return status

    async def tell(self) -> dict[str, Any]:
        """The figures: into the Volume, and then as a line into the App's logs."""
        status = self.status()
        file = {**status, "containers_up": self.ledger.containers}
        write_whole(DATA / "status.json", json.dumps(file).encode())
        await volume.commit.aio()  # type: ignore[no-untyped-call]
        await volume.reload.aio()  # type: ignore[no-untyped-call]
        return self.say_status()
