# Made with gpuctl 0.1.0, by this command:
#
#     gpuctl batch z-image-turbo tests/golden/inputs/texts.jsonl --prompt 'A poster that says: {text}' -o posters/ --format csv --gpu L40S,A100-80GB --max-containers 8 --max-cost 5 --size 1024x768 --steps 9 --guidance 0 --negative-prompt blurred --seed 7 --batch-size 4 --pip numpy==2.4.6 --apt libgl1 --secret huggingface
"""A bulk job: rows of a Volume in, an answer or an error for each of them out.

gpuctl puts the rows there, and fetches the answers. `modal deploy` of this file makes
the App, and `modal run` of it starts the job, or resumes it where it stopped. Written
for modal 1.6.4; it needs no other package on the machine that deploys it.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import gzip
import hashlib
import heapq
import inspect
import io
import itertools
import json
import os
import pathlib
import queue
import random
import secrets
import shutil
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import modal

APP_NAME = "gpuctl-batch-texts-98ff1d4f"
DATA = pathlib.Path("/job")  # where containers have the Volume
MAX_CONTAINERS = 8
# Shards that a container works on at once: while the last rows of one are answered, it is
# busy with those of the next.
SHARDS_AT_ONCE = 3
# Shards handed out at once: what the containers can take, and as many waiting for them.
AT_ONCE = 2 * MAX_CONTAINERS * SHARDS_AT_ONCE
# A call, whose own costs are a second or so, hands out as many shards as take so many
# seconds, of so many bytes at most.
WORTH_SECONDS, MOST_BYTES = 5.0, 2 << 20
RETRIES = 2  # further tries of a row that failed
USD_PER_SECOND: float | None = 0.0006959201388888889  # of a container, at most
MAX_USD: float | None = 5.0  # the job stops in order when so much is spent
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
MODEL = "Tongyi-MAI/Z-Image-Turbo"
# Not an exact commit: what this names may change between two starts.
REVISION = "main"

DIFFUSERS_VERSION = "0.42.1"
# In order of preference.
GPU = [
    "L40S",
    "A100-80GB",
]
BATCH_SIZE = 4  # pictures that are made at once

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
    modal.Image.debian_slim(python_version="3.12")
    .apt_install(
        "libgl1",
    )
    .uv_pip_install(
        f"diffusers=={DIFFUSERS_VERSION}",
        "torch==2.13.0",
        "torchvision==0.28.0",
        "transformers==5.24.0",
        "accelerate==1.15.0",
        "sentencepiece==0.2.3",
        "protobuf==7.36.2",
    )
    .uv_pip_install(
        "numpy==2.4.6",
    )
    .env(
        {
            "HF_XET_HIGH_PERFORMANCE": "1",
        }
    )
)


@app.cls(
    image=image,
    gpu=GPU,
    secrets=[
        modal.Secret.from_name("huggingface"),
    ],
    volumes={
        str(DATA): volume,
        "/root/.cache/huggingface": modal.Volume.from_name(
            "huggingface-cache",
            create_if_missing=True,
        ),
    },
    max_containers=MAX_CONTAINERS,
    scaledown_window=30,
    startup_timeout=840,
    timeout=24 * 3600,
    retries=modal.Retries(max_retries=3, initial_delay=1.0),
)
@modal.concurrent(max_inputs=SHARDS_AT_ONCE)
class Worker:
    line: "Line"

    @modal.enter()
    def start(self) -> None:
        with loading():
            processor = DiffusersProcessor()
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
    """Hand out the shards that have not ended, and keep the ledger."""
    return await Driver(run, retry_failed).drive()


@app.local_entrypoint()
def start(retry_failed: bool = False) -> None:
    """Start the job, or resume it: in the cloud, whatever becomes of this machine."""
    run = f"{time.time():.3f}"
    call = modal.Function.from_name(APP_NAME, "drive").spawn(run, retry_failed)
    print(json.dumps({"run": run, "call": call.object_id}))


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
        self.files: dict[str, bytes] = {}  # of answers, that are not on the disk yet
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
        if isinstance(answer, WithFiles):
            self.files.update(answer.files)
            answer = answer.answer
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
        self.save_files()
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

    def save_files(self) -> None:
        """Before the lines that name them."""
        for name, content in list(self.files.items()):
            write_whole(DATA / name, content)
            del self.files[name]

    def close(self) -> None:
        """All results in one file, in the order of the rows; the parts are not needed any
        more. Where not every row ended, those stay."""
        file = answers_file(self.number)
        if not file.exists():  # by another attempt
            if not self.complete:
                self.save(b'{"end":"stopped"}\n')
                return
            self.save_files()
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


def load_pipeline() -> Any:
    """The model, on the GPU where there is one."""
    import torch
    from diffusers import AutoPipelineForText2Image
    from huggingface_hub import HfApi

    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        sixteen = torch.cuda.is_bf16_supported(including_emulation=False)
        device, dtype = "cuda", torch.bfloat16 if sixteen else torch.float16
        torch.backends.cudnn.deterministic = True
    files = HfApi().list_repo_files(MODEL, revision=REVISION)
    # Of weights that are there in 16 bits too, the others are not needed.
    half = any(".fp16." in file for file in files)
    pipeline = AutoPipelineForText2Image.from_pretrained(
        MODEL,
        revision=REVISION,
        dtype=dtype,
        variant="fp16" if half else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@dataclasses.dataclass
class WithFiles:
    """An answer, and the files of the Volume that belong to it, by their names there."""

    answer: dict[str, Any]
    files: dict[str, bytes]


@dataclasses.dataclass(eq=False)
class Asked:
    """A row on its way: a picture for each of the seeds."""

    key: int
    number: int
    prompt: str
    negative: str | None
    size: tuple[int, int] | None  # width and height
    options: dict[str, Any]
    seeds: list[int]
    alone: bool = False  # something in a call with it failed
    pictures: dict[int, bytes] = dataclasses.field(default_factory=dict)
    made_size: tuple[int, int] = (0, 0)
    failed: Failed | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a call has once, for all pictures in it."""
        same = (self.size, self.negative is None, *sorted(self.options.items()))
        return (*same, self.key if self.alone else None)


Picture = tuple[Asked, int]  # the n-th of a row


class DiffusersProcessor:
    """A pipeline of diffusers that makes pictures of texts.

    The noise that a picture is made of comes from its row's seed alone, and each call
    makes BATCH_SIZE pictures: where fewer wait, the last one again. For what a GPU
    rounds differs with how many it makes at once, and so it is the same picture in
    whatever company and container it is made.
    """

    def __init__(self) -> None:
        self.pipeline = load_pipeline()
        self.takes = inspect.signature(self.pipeline.__call__).parameters
        self.size = BATCH_SIZE
        self.capacity = 4 * BATCH_SIZE
        self.rows: dict[int, Asked] = {}
        self.waiting: dict[tuple[Any, ...], collections.deque[Picture]] = {}
        # While the next pictures are made, these become files.
        self.encoders = concurrent.futures.ThreadPoolExecutor(2, "encoder")
        self.encoding: dict[concurrent.futures.Future[bytes], Picture] = {}

    def give_back(self) -> list[int]:
        return []  # it has no more than four calls' worth, and answers them

    # -- a row

    def start(self, key: int, row: dict[str, Any]) -> None:
        body = row["body"]
        self.check(body)
        first = body.get("seed")
        if first is None:
            first = seed_of(row["id"])
        size = None
        if body.get("size", "auto") != "auto":
            width, height = body["size"].split("x")
            size = (int(width), int(height))
        asked = Asked(
            key=key,
            number=row["row"],
            prompt=body["prompt"],
            negative=body.get("negative_prompt"),
            size=size,
            options={name: body[name] for name in OPTIONS if name in body},
            seeds=[first + n for n in range(body.get("n", 1))],
        )
        self.rows[key] = asked
        for n in range(len(asked.seeds)):
            self.wait((asked, n))

    def check(self, body: dict[str, Any]) -> None:
        """Refuse what this pipeline would not take, or pass over."""
        name = type(self.pipeline).__name__
        wanted = [*OPTIONS, "negative_prompt"]
        if body.get("size", "auto") != "auto":
            wanted += ["width", "height"]
        for option in wanted:
            asks = option in body or option in ("width", "height")
            if asks and option not in self.takes:
                raise Refused("invalid_request", f"{option}: {name} takes none")
        if "true_cfg_scale" in self.takes:
            self.check_scales(body, name)
        for field in ("prompt", "negative_prompt"):
            self.check_length(field, body.get(field))

    def check_scales(self, body: dict[str, Any], name: str) -> None:
        """Refuse what has no effect in a pipeline with two scales: that of its own guidance,
        for models with `guidance_embeds`, and that of a negative prompt, with one only."""
        scale = body.get("true_cfg_scale", self.takes["true_cfg_scale"].default)
        if "negative_prompt" in body and scale <= 1:
            says = f"negative_prompt: {name} needs a true_cfg_scale above 1 with it"
            raise Refused("invalid_request", says)
        if "true_cfg_scale" in body and scale > 1 and "negative_prompt" not in body:
            says = f"true_cfg_scale: {name} needs a negative_prompt with it"
            raise Refused("invalid_request", f'{says}, which may be " "')
        config = getattr(getattr(self.pipeline, "transformer", None), "config", {})
        if "guidance_scale" in body and config.get("guidance_embeds") is False:
            says = "guidance_scale: this model is not guided by it"
            raise Refused("invalid_request", f"{says}, but by true_cfg_scale")

    def check_length(self, field: str, text: str | None) -> None:
        """Refuse a text of which the model would read only the beginning. With several
        text encoders, the one that reads most counts."""
        if text is None:
            return
        longest: tuple[int, int] | None = None
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(self.pipeline, name, None)
            own = getattr(tokenizer, "model_max_length", None)
            if tokenizer is None or not isinstance(own, int):
                continue
            limit = self.takes.get("max_sequence_length")
            most = own
            if limit is not None and isinstance(limit.default, int):
                most = min(own, limit.default)
            if longest is None or most > longest[1]:
                longest = (len(tokenizer(text).input_ids), most)
        if longest is not None and longest[0] > longest[1]:
            says = f"{field} has {longest[0]} tokens, and the model reads {longest[1]}"
            raise Refused("context_length_exceeded", says)

    def wait(self, picture: Picture, *, first: bool = False) -> None:
        line = self.waiting.setdefault(picture[0].kind, collections.deque())
        if first:
            line.appendleft(picture)
        else:
            line.append(picture)

    # -- pictures

    def step(self) -> list[tuple[int, object]]:
        if self.waiting:
            self.make(self.next_pictures())
        elif self.encoding:
            first = concurrent.futures.FIRST_COMPLETED
            concurrent.futures.wait(self.encoding, timeout=0.05, return_when=first)
        for future in [future for future in self.encoding if future.done()]:
            asked, n = self.encoding.pop(future)
            asked.pictures[n] = future.result()
        return list(self.ended())

    def next_pictures(self) -> list[Picture]:
        """Those of the kind that has waited longest among those that fill a call, else
        among all."""
        full = (kind for kind, line in self.waiting.items() if len(line) >= self.size)
        kind = next(full, next(iter(self.waiting)))
        line = self.waiting[kind]
        taken = [line.popleft() for _ in range(min(self.size, len(line)))]
        if not line:
            del self.waiting[kind]
        return [picture for picture in taken if picture[0].failed is None]

    def make(self, pictures: list[Picture]) -> None:
        """One call of the pipeline."""
        if not pictures:
            return
        try:
            made, withheld = self.call(pictures)
        except Exception as error:
            if device_is_lost(error):
                raise  # every further call would fail in this process
            self.failed(pictures, error)
            return
        for picture, image, held in zip(pictures, made, withheld, strict=False):
            asked, n = picture
            asked.made_size = image.size
            if held:
                says = f"the model's safety checker withheld picture {n + 1}"
                says += f" of {len(asked.seeds)} (seed {asked.seeds[n]})"
                asked.failed = Failed("content_policy_violation", says, retry=False)
            elif asked.size not in (None, image.size):
                says = "size: {}x{} was asked, and the model makes {}x{} of it"
                says = says.format(*(asked.size or ()), *image.size)
                asked.failed = Failed("invalid_request", says, retry=False)
            else:
                self.encoding[self.encoders.submit(as_png, image)] = picture

    def call(self, pictures: list[Picture]) -> tuple[list[Any], list[bool]]:
        """Images of Pillow's, and whether each was withheld."""
        import torch

        filled = [*pictures, *[pictures[-1]] * (self.size - len(pictures))]
        asked = pictures[0][0]
        options = dict(asked.options)
        if asked.size is not None:
            options["width"], options["height"] = asked.size
        if asked.negative is not None:
            options["negative_prompt"] = [row.negative for row, _ in filled]
        # Of the CPU, whose numbers are the same beside any GPU.
        seeds = [row.seeds[n] for row, n in filled]
        noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        prompts = [row.prompt for row, _ in filled]
        made = self.pipeline(prompt=prompts, generator=noise, **options)
        withheld = getattr(made, "nsfw_content_detected", None)
        return made.images, withheld or [False] * len(filled)

    def failed(self, pictures: list[Picture], error: Exception) -> None:
        """What becomes of pictures whose call failed: fewer at once where memory did not
        do; else each row alone, and of one that was alone it is the reason."""
        memory = out_of_memory(error)
        rows = list(dict.fromkeys(asked for asked, _ in pictures))
        if memory:
            free_memory()
        if memory and self.size > 1:
            self.size = (self.size + 1) // 2
            say(f"out of memory: {self.size} pictures at once from now on")
        elif len(rows) > 1:
            for asked in rows:
                self.set_alone(asked)
        else:
            rows[0].failed = failure(error, memory=memory)
            return
        for picture in reversed(pictures):
            self.wait(picture, first=True)

    def set_alone(self, asked: Asked) -> None:
        """Its pictures that wait go where only those of this row are."""
        line = self.waiting.pop(asked.kind, collections.deque())
        asked_too = [picture for picture in line if picture[0] is asked]
        others = [picture for picture in line if picture[0] is not asked]
        if others:
            self.waiting[asked.kind] = collections.deque(others)
        asked.alone = True
        for picture in asked_too:
            self.wait(picture)

    def ended(self) -> Iterator[tuple[int, object]]:
        in_work = {asked for asked, _ in self.encoding.values()}
        for key, asked in list(self.rows.items()):
            if asked in in_work:
                continue
            if asked.failed is not None:
                del self.rows[key]
                yield key, asked.failed
            elif len(asked.pictures) == len(asked.seeds):
                del self.rows[key]
                yield key, answer_of(asked)


# Fields of a request that a pipeline takes as they are.
OPTIONS = ("num_inference_steps", "guidance_scale", "true_cfg_scale")


def seed_of(name: str) -> int:
    """A seed for a row that has none, from what it is called."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def as_png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def answer_of(asked: Asked) -> WithFiles:
    """As OpenAI's API has it, but for the picture itself: that is a file."""
    files = {}
    data = []
    for n, seed in enumerate(asked.seeds):
        folder = f"pictures/{asked.number // 1000:06}"
        name = f"{folder}/{asked.number:09}-{n}.png"
        files[name] = asked.pictures[n]
        data.append({"file": name, "seed": seed})
    width, height = asked.made_size
    answer = {
        "created": int(time.time()),
        "data": data,
        "output_format": "png",
        "size": f"{width}x{height}",
    }
    return WithFiles(answer, files)


def failure(error: Exception, *, memory: bool) -> Failed:
    """What a pipeline raised for a row alone. A ValueError is its way to refuse."""
    said = " ".join(str(error).split())[:2000] or type(error).__name__
    if memory:
        says = f"the memory does not do for one picture of this size: {said}"
        return Failed("out_of_memory", says, retry=True)
    if isinstance(error, ValueError):
        return Failed("invalid_request", said, retry=False)
    return Failed("engine_error", f"{type(error).__name__}: {said}", retry=True)


def out_of_memory(error: Exception) -> bool:
    """Of a GPU, or of the machine ("DefaultCPUAllocator: can't allocate memory")."""
    said = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in said or "can't allocate memory" in said)
    )


def free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_is_lost(error: BaseException) -> bool:
    """A GPU that failed in the middle of something is gone for this process."""
    said = str(error)
    return "CUDA error" in said and "out of memory" not in said


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
            self.state = "done"
        self.over = True
        return await self.tell_the_end()

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
