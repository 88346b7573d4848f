"""A plain HTTP server, for the tests of the control plane. Settings come by environment variables, when deployed."""

import os
import subprocess
from pathlib import Path

import modal

NAME = os.environ.get("T_NAME", "plain")
app = modal.App(NAME)


def number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


BASE = os.environ.get("T_BASE")  # of a registry


@app.server(
    image=(modal.Image.from_registry(BASE) if BASE else modal.Image.debian_slim()).add_local_file(
        Path(__file__).with_name("echo_server.py"), "/root/echo_server.py"
    ),
    port=8000,
    routing_region="us-east",
    unauthenticated=os.environ.get("T_OPEN") == "1",
    startup_timeout=number("T_STARTUP", 30),
    exit_grace_period=number("T_EXIT_GRACE", 2),
    min_containers=number("T_MIN", 0),
    max_containers=number("T_MAX", 2),
    target_concurrency=number("T_TARGET", 2),
    max_concurrency=number("T_LIMIT", 2),
    scaledown_window=number("T_SCALEDOWN", 60),
    secrets=[
        modal.Secret.from_dict(
            {"T_MODE": os.environ.get("T_MODE", ""), "T_VERSION": os.environ.get("T_VERSION", "1")}
        )
    ],
    volumes={"/data": modal.Volume.from_name(f"{NAME}-data", create_if_missing=True)},
)
class Server:
    @modal.enter()
    def start(self):
        mode = os.environ["T_MODE"]
        print(f"enter: version {os.environ['T_VERSION']}", flush=True)
        if mode == "crash":
            raise RuntimeError("this server never comes up")
        if mode == "die":
            os._exit(7)
        if mode == "hang":
            return  # nothing ever listens
        self.process = subprocess.Popen(["python", "/root/echo_server.py"])

    @modal.exit()
    def stop(self):
        print("exit: hook ran", flush=True)
        with Path("/data/exits").open("a") as file:
            file.write("exit\n")
        self.process.terminate()
        self.process.wait()
