"""What the local control plane costs: CPU of the plane for each no-op input of a `.map`, boots, and a plane at rest.

    python benchmarks/calls.py [--inputs 10000] [--boots 5] [--rounds 3]

Measured on a plane of its own, through the real client in this process and in real containers. Ray's published figures
stand beside it for the reader. `--rounds N`: that many times in turn on two planes, of which one answers by grpclib's
server instead of the plane's own (gpuctl/local/http2.py), and nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpuctl.local import client
from tests.local.planes import TestPlane, eventually, image_cache

APP = """
import time
import modal

app = modal.App("bench-calls")

@app.function(min_containers=1, max_containers={containers})
def noop(x):
    return x

@app.function(single_use_containers=True)
def boot():
    return time.time()
"""
CONTAINERS = 2
_TICK = os.sysconf("SC_CLK_TCK")
# ray-project/ray, release/perf_metrics/microbenchmark.json at 08444c4cf99b: wall clock on Ray's own release machine.
RAY = "Ray publishes 8041 tasks/s sent ahead and 981 tasks/s one by one (single_client_tasks_async, …_sync)"


def cpu_seconds(pid: int) -> float:
    """User and system time of a process that lives."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def container_pids(plane: TestPlane) -> list[int]:
    """The processes of the plane's containers, and all below them."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [plane.now.pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def per_input(plane: TestPlane, inputs: int) -> None:
    """CPU of plane, client and containers for each input of a `.map` that does nothing."""
    import modal

    noop = modal.Function.from_name("bench-calls", "noop")
    for _ in noop.map(range(500)):
        pass
    pids = container_pids(plane)

    def taken() -> tuple[float, float, float]:
        return cpu_seconds(plane.now.pid), time.process_time(), sum(cpu_seconds(pid) for pid in pids)

    before, began = taken(), time.perf_counter()
    assert list(noop.map(range(inputs))) == list(range(inputs))
    wall = time.perf_counter() - began
    spent = [(after - start) / inputs * 1000 for start, after in zip(before, taken(), strict=True)]
    print(f"{inputs} no-op inputs, {CONTAINERS} containers: {inputs / wall:.0f} inputs/s")
    for name, value in zip(("plane", "client", "containers"), spent, strict=True):
        print(
            f"  {name:<12}{value:6.3f} ms of CPU for each input"
            + ("   (wanted: 0.5)" if name == "plane" else "")
        )
    print(f"  {'beside it':<12}{RAY}")


def in_turn(folder: Path, app: Path, inputs: int, rounds: int) -> None:
    """The plane's CPU for each input with its own HTTP/2 server and with grpclib's, in turn."""
    programs = {
        "http2.py": ["-m", "gpuctl.local.daemon"],
        "grpclib": [str(Path(__file__).with_name("grpclib_plane.py"))],
    }
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            plane = TestPlane(folder / name)
            folders = ["--state-dir", str(plane.state_dir), "--cache-dir", str(image_cache())]
            subprocess.run([sys.executable, *program, "--detach", *folders], check=True)
            eventually(lambda: client.running(plane.state_dir))  # noqa: B023
            try:
                plane.modal("deploy", str(app))
                command = [sys.executable, __file__, "--child", "--inputs", str(inputs)]
                environment = plane.environment(BENCH_STATE_DIR=str(plane.state_dir))
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=True
                ).stdout
                taken[name].append(float(done.partition("plane")[2].split()[0]))
            finally:
                plane.down()
    for name, values in taken.items():
        shown = ", ".join(f"{value:.3f}" for value in sorted(values))
        print(f"{name:<10}{statistics.median(values):6.3f} ms of the plane's CPU for each input  ({shown})")


def boots(count: int) -> None:
    """From the call to the first line of the function, in a container that was not there."""
    import modal

    boot = modal.Function.from_name("bench-calls", "boot")
    imports, starts = [], []
    for _ in range(count):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import modal"], check=True)
        imports.append(time.perf_counter() - began)
        called = time.time()
        starts.append(boot.remote() - called)
        time.sleep(1)  # its container ends meanwhile
    one, other = statistics.median(imports), statistics.median(starts)
    print(
        f'boot to first input {other:.3f} s; python -c "import modal" {one:.3f} s: {other / one:.2f} (wanted: 1.5)'
    )


def at_rest(plane: TestPlane, seconds: float) -> None:
    """A plane that has an app with a container that waits, and one where nothing runs; with its supervisor."""
    pids = [plane.now.pid, *plane.supervisors()]
    for state in ("one container waits", "nothing runs"):
        before = sum(map(cpu_seconds, pids))
        time.sleep(seconds)
        share = (sum(map(cpu_seconds, pids)) - before) / seconds * 100
        memory = sum(map(resident_mb, pids))
        print(f"at rest, {state}: {share:.2f} % of a core (wanted: 1), {memory:.0f} MB (wanted: 150)")
        plane.modal("app", "stop", "bench-calls", "--yes", check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--boots", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # of --rounds
    options = parser.parse_args()
    if options.child:
        per_input(TestPlane(Path(os.environ["BENCH_STATE_DIR"])), options.inputs)
        return
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "bench_calls.py"
        app.write_text(APP.format(containers=CONTAINERS))
        if options.rounds:
            in_turn(Path(folder), app, options.inputs, options.rounds)
            return
        plane = TestPlane(Path(folder) / "state")
        plane.up()
        try:
            plane.modal("deploy", str(app))
            os.environ.update(plane.environment())
            per_input(plane, options.inputs)
            boots(options.boots)
            at_rest(plane, 20.0)
        finally:
            plane.down()


if __name__ == "__main__":
    main()
