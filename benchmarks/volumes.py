"""A large file into a Volume of the local control plane and out of it, against `cp` of the same file, in turns.

    .venv/bin/python benchmarks/volumes.py [--gigabytes 5] [--rounds 3] [--check]

Target: at least half the speed of `cp`, both ways. `cp`, put and get each end with the data in the same cache of the
kernel, and each writes to a name that is new. The plane and the Volume are made for this run and removed after it.

What the plane cannot change is printed apart: "client alone" is the unmodified client's own transfer of the file (it
reads it twice, for a SHA-256 and for an MD5 of each block) with a stand-in for the plane, which throws away what comes,
and sends what is asked for. And the CPU time of both sides, which says more than the clock on a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
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

from gpuctl.local import client

TARGET = 0.5
BLOCK = 8 << 20  # of a Volume's file


@dataclass(frozen=True)
class Took:
    """Seconds by the clock, of the client's CPU and of the plane's."""

    wall: float
    client: float
    plane: float


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

    own, other, began = cpu(), cpu_of(plane) if plane else 0, time.monotonic()
    subprocess.run(argv, check=True, capture_output=True, env=env)
    wall = time.monotonic() - began
    return Took(wall, cpu() - own, (cpu_of(plane) if plane else 0) - other)


def stand_in(path: Path) -> None:
    """A server that throws away what is PUT, and answers GET /N with block N of the file; it says its port first."""

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
                    left, pending = int(headers["content-length"]) - len(pending), b""
                    while left:
                        left -= connection.recv_into(scratch, min(left, len(scratch)))
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
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
    """Prints the seconds that the client's own code takes to send the file, and to fetch it."""
    from modal import volume
    from modal._utils.blob_utils import FileUploadSpec2
    from modal._utils.http_utils import ClientSessionRegistry
    from modal_proto import api_pb2

    async def run() -> None:
        began = time.monotonic()
        file = await FileUploadSpec2.from_path(
            path, PurePosixPath("file"), asyncio.Semaphore(os.cpu_count() or 1)
        )
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
        print(sent - began, time.monotonic() - sent)
        close: Any = ClientSessionRegistry.close_session
        await close()

    asyncio.run(run())


def alone(path: Path, back: Path) -> tuple[float, float]:
    """(sending, fetching): what the client takes with nobody at the other end."""
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
    sending, fetching = map(float, done.stdout.split())
    return sending, fetching


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
        if free < 3.5 * size:
            print(
                f"{folder} has {free / 1e9:.1f} GB left; this needs {3.5 * size / 1e9:.1f}", file=sys.stderr
            )
            return 1
        fill(folder / "file", size)
        plane = client.up(folder / "state", folder / "cache")
        environment = {**os.environ, **plane.client_env()}
        modal = [sys.executable, "-m", "modal", "volume"]
        times: dict[str, list[Took]] = {"cp": [], "put": [], "get": []}
        alone_times: dict[str, list[float]] = {"put": [], "get": []}
        try:
            timed([*modal, "create", "bench"], environment)
            for _ in range(options.rounds):
                times["cp"].append(timed(["cp", str(folder / "file"), str(folder / "copy")]))
                (folder / "copy").unlink()
                times["put"].append(
                    timed([*modal, "put", "bench", str(folder / "file"), "file"], environment, plane.pid)
                )
                times["get"].append(
                    timed([*modal, "get", "bench", "file", str(folder / "back")], environment, plane.pid)
                )
                same = subprocess.run(["cmp", folder / "file", folder / "back"], check=False).returncode == 0
                assert same, "what came back is not what went in"
                (folder / "back").unlink()
                timed([*modal, "rm", "bench", "file"], environment)
                for what, seconds in zip(
                    ("put", "get"), alone(folder / "file", folder / "back"), strict=True
                ):
                    alone_times[what].append(seconds)
                (folder / "back").unlink()
        finally:
            client.down(folder / "state")
    missed = False
    print(f"{size / 1e9:.1f} GB, {options.rounds} rounds, medians; load average {os.getloadavg()[0]:.1f}")
    print("                                          CPU: client   plane    client alone")
    cp = statistics.median(took.wall for took in times["cp"])
    for what, taken in times.items():
        wall, own, plane_cpu = (
            statistics.median(getattr(took, name) for took in taken) for name in ("wall", "client", "plane")
        )
        missed = missed or cp / wall < TARGET
        line = f"{what:4} {wall:7.2f} s {size / wall / 1e6:8.0f} MB/s {cp / wall:6.2f} x cp  {own:10.2f} s"
        if what in alone_times:
            seconds = statistics.median(alone_times[what])
            line += f" {plane_cpu:6.2f} s {seconds:9.2f} s {cp / seconds:5.2f} x cp"
        print(line)
    print(f"target: at least {TARGET} x cp: {'missed' if missed else 'met'}")
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
