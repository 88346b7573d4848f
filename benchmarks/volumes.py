"""A large file into a Volume of the local control plane and out of it, against `cp` of the same file, in turns.

    .venv/bin/python benchmarks/volumes.py [--gigabytes 5] [--rounds 3] [--check]

Target: at least half the speed of `cp`, both ways. Each is paired with a `cp` just before it. Both end with the data in
the kernel's cache, and write to a name that is new. "mount in" and "mount out" are `cp` by a container, from its own
disk into the Volume that it has mounted, and back, against `cp` within its own disk; of these the CPU time is printed
too, which tells what the mount costs where the disk and the machine's memory are slow at one time and fast at another.
The plane and the Volume are made for this run and removed after it.

What the plane cannot change is printed apart: "client alone" is the unmodified client's own transfer of the file, with
a stand-in for the plane that takes no time: it answers each block as soon as it begins to come, as the plane does when
it has found the client's file, and sends what is asked for. "Of which hashing" is what passes before the client says
anything to anybody. And the CPU time of both sides, which says more than the clock on a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpuctl.local import client
from tests.local.planes import image_cache

TARGET = 0.5
BLOCK = 8 << 20  # of a Volume's file


APP = """
import json
import resource
import subprocess
import time

import modal

app = modal.App("bench-volumes")

@app.function(volumes={"/volume": modal.Volume.from_name("bench")}, timeout=3600)
def copies():
    def cpu():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def cp(source, target):
        subprocess.run(["sync"], check=True)
        used, began = cpu(), time.monotonic()
        subprocess.run(["cp", source, target], check=True)
        return time.monotonic() - began, cpu() - used

    def pair(source, target):
        beside = cp("/tmp/file", "/tmp/beside")
        subprocess.run(["rm", "/tmp/beside"], check=True)
        took = cp(source, target)
        subprocess.run(["cmp", target, "/tmp/file"], check=True)
        subprocess.run(["rm", target], check=True)
        return beside, took

    cp("/volume/file", "/tmp/file")
    pair("/tmp/file", "/volume/copy")  # what is written first anywhere is slower
    found = pair("/tmp/file", "/volume/copy"), pair("/volume/file", "/tmp/copy")
    subprocess.run(["rm", "/tmp/file"], check=True)
    return found

@app.local_entrypoint()
def main():
    print(json.dumps(copies.remote()))
"""


@dataclass(frozen=True)
class Took:
    """Seconds by the clock, of the client's CPU and of the plane's."""

    wall: float
    client: float
    plane: float


Pair = tuple[float, Took]  # the seconds of `cp` just before, and what was measured


@dataclass(frozen=True)
class Measured:
    """What each took in each round, beside `cp`; of the mount the ratios of CPU time; the client's hashing, alone."""

    pairs: dict[str, list[Pair]]
    processor: dict[str, list[float]]
    hashing: list[float]


def fill(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(size >> 24):
            file.write(os.urandom(1 << 24))


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(argv: list[str], env: dict[str, str] | None = None, plane: int | None = None) -> Took:
    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    os.sync()  # what was written before is not to slow this down
    own, other, began = cpu(), cpu_of(plane) if plane else 0, time.monotonic()
    subprocess.run(argv, check=True, capture_output=True, env=env)
    wall = time.monotonic() - began
    return Took(wall, cpu() - own, (cpu_of(plane) if plane else 0) - other)


def stand_in(path: Path) -> None:
    """A server that answers PUT at once, and GET /N with block N of the file; it says its port first."""

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        scratch, pending = bytearray(1 << 18), b""
        with path.open("rb") as file:
            while True:
                while b"\r\n\r\n" not in pending:
                    if not (data := connection.recv(65536)):
                        return
                    pending += data
                head, _, pending = pending.partition(b"\r\n\r\n")
                first, *lines = head.decode().split("\r\n")
                method, target, _ = first.split()
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                if method == "PUT":
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
                    left, pending = int(headers["content-length"]) - len(pending), b""
                    while left:
                        if not (got := connection.recv_into(scratch, min(left, len(scratch)))):
                            return
                        left -= got
                else:
                    start = int(target[1:]) * BLOCK
                    end = min(start + BLOCK, os.fstat(file.fileno()).st_size)
                    connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {end - start}\r\n\r\n".encode())
                    while start < end:
                        start += os.sendfile(connection.fileno(), file.fileno(), start, end - start)

    with socket.create_server(("127.0.0.1", 0), backlog=256) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()


def client_alone(path: Path, back: Path, port: int) -> None:
    """Prints the seconds that the client's own code takes to send the file, to fetch it, and to hash it at first."""
    from modal import volume
    from modal._utils.blob_utils import FileUploadSpec2
    from modal._utils.http_utils import ClientSessionRegistry
    from modal_proto import api_pb2

    async def run() -> None:
        began = time.monotonic()
        file = await FileUploadSpec2.from_path(
            path, PurePosixPath("file"), asyncio.Semaphore(os.cpu_count() or 1)
        )
        hashed = time.monotonic()
        urls = [f"http://127.0.0.1:{port}/{number}" for number in range(len(file.blocks))]
        missing = [
            api_pb2.VolumePutFiles2Response.MissingBlock(file_index=0, block_index=number, put_url=url)
            for number, url in enumerate(urls)
        ]
        await volume._put_missing_blocks([file], missing, {}, 128, lambda *_, **__: None)
        sent = time.monotonic()

        class Stub:
            async def VolumeGetFile2(self, _request: Any) -> Any:  # noqa: N802
                return api_pb2.VolumeGetFile2Response(get_urls=urls, size=file.size, len=file.size)

        class Client:
            _stub, _snapshotted = Stub(), False

        client: Any = Client()
        of_stub = volume._Volume._new_hydrated(
            "vo-alone", client, api_pb2.VolumeMetadata(version=api_pb2.VOLUME_FS_VERSION_V2)
        )
        with back.open("wb") as target:
            await of_stub._read_file_into_fileobj("file", target, download_semaphore=asyncio.Semaphore(128))
        print(sent - began, time.monotonic() - sent, hashed - began)
        close: Any = ClientSessionRegistry.close_session
        await close()

    asyncio.run(run())


def alone(path: Path, back: Path) -> tuple[float, float, float]:
    """(sending, fetching, hashing before sending): what the client takes with nobody at the other end."""
    this = [sys.executable, __file__]
    with subprocess.Popen([*this, "--stand-in", str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        try:
            port = other.stdout.readline().strip()
            done = subprocess.run(
                [*this, "--client-alone", str(path), str(back), port],
                check=True,
                capture_output=True,
                text=True,
            )
        finally:
            other.kill()
    sending, fetching, hashing = map(float, done.stdout.split())
    return sending, fetching, hashing


Copy = tuple[float, float]  # seconds by the clock and of CPU time


def through_the_mount(folder: Path, environment: dict[str, str]) -> list[tuple[Copy, Copy]]:
    """`cp` by a container, of the file that is in the Volume: (beside it, into it), (beside it, out of it)."""
    (folder / "app.py").write_text(APP)
    run = [sys.executable, "-m", "modal", "run", "-q", str(folder / "app.py")]
    done = subprocess.run(run, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure(folder: Path, plane: client.Plane, rounds: int) -> Measured:
    file, copy, back = folder / "file", folder / "copy", folder / "back"
    environment = {**os.environ, **plane.client_env()}
    modal = [sys.executable, "-m", "modal", "volume"]
    pairs: dict[str, list[Pair]] = {}
    processor: dict[str, list[float]] = {}
    hashing = []

    def cp() -> float:
        took = timed(["cp", str(file), str(copy)])
        copy.unlink()
        return took.wall

    def note(what: str, beside: float, took: Took) -> None:
        pairs.setdefault(what, []).append((beside, took))

    timed([*modal, "create", "bench"], environment)
    cp()
    for _ in range(rounds):
        note("put", cp(), timed([*modal, "put", "bench", str(file), "file"], environment, plane.pid))
        note("get", cp(), timed([*modal, "get", "bench", "file", str(back)], environment, plane.pid))
        same = subprocess.run(["cmp", file, back], check=False).returncode == 0
        assert same, "what came back is not what went in"
        back.unlink()
        into, out = through_the_mount(folder, environment)
        for what, ((beside, own), (took, used)) in (("mount in", into), ("mount out", out)):
            note(what, beside, Took(took, used, 0))
            processor.setdefault(what, []).append(own / used)
        timed([*modal, "rm", "bench", "file"], environment)
        beside = cp()
        sending, fetching, before = alone(file, back)
        note("client alone: put", beside, Took(sending, 0, 0))
        note("client alone: get", beside, Took(fetching, 0, 0))
        hashing.append(before)
        back.unlink()
    return Measured(pairs, processor, hashing)


def show(size: int, measured: Measured) -> bool:
    """Print it; whether the target is met."""
    pairs, hashing = measured.pairs, measured.hashing
    print(f"{size / 1e9:.1f} GB, {len(hashing)} rounds, medians; load average {os.getloadavg()[0]:.1f}")
    print(f"{'cp beside it':>50}{'CPU: client':>24}   plane")
    ratios: dict[str, float] = {}
    walls: dict[str, float] = {}
    for what, taken in pairs.items():
        cp, wall, own, plane = (
            statistics.median(values)
            for values in zip(*((cp, took.wall, took.client, took.plane) for cp, took in taken), strict=True)
        )
        walls[what] = wall
        ratio = ratios[what] = statistics.median(cp / took.wall for cp, took in taken)
        line = f"{what:17} {wall:7.2f} s {size / wall / 1e6:8.0f} MB/s {cp:10.2f} s {ratio:6.2f} x cp"
        if what in ("put", "get"):
            line += f" {own:10.2f} s {plane:6.2f} s"
        if what in measured.processor:
            line += f", {statistics.median(measured.processor[what]):.2f} x by CPU time"
        if what == "client alone: put":
            line += f", of which hashing {statistics.median(hashing):.2f} s"
        print(line)
    for what in ("put", "get"):
        print(f"{what} beyond the client alone: {walls[what] - walls[f'client alone: {what}']:.2f} s")
    met = [ratio >= TARGET for what, ratio in ratios.items() if "alone" not in what]
    for what, ok in zip(("put", "get", "mount in", "mount out"), met, strict=True):
        print(f"target, {what} at least {TARGET} x cp: {'met' if ok else 'missed'}")
    return all(met)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to work; a temporary folder otherwise"
    )
    parser.add_argument("--stand-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--client-alone", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="exit 1 where the target is missed")
    options = parser.parse_args()
    if options.stand_in:
        stand_in(options.stand_in)
    if options.client_alone:
        path, back, port = options.client_alone
        client_alone(Path(path), Path(back), int(port))
        return 0
    size = int(options.gigabytes * 1e9) >> 24 << 24
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free < 4.5 * size:
            print(
                f"{folder} has {free / 1e9:.1f} GB left; this needs {4.5 * size / 1e9:.1f}", file=sys.stderr
            )
            return 1
        fill(folder / "file", size)
        plane = client.up(folder / "state", image_cache())
        try:
            measured = measure(folder, plane, options.rounds)
        finally:
            client.down(folder / "state")
    return 0 if show(size, measured) or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
