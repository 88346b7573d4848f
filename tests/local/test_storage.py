"""Volumes, Secrets, environments, prices: the SDK in functions and outside, and the whole command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import grpclib
import pytest
from modal_proto import api_pb2

from .planes import TestPlane
from .rpc import call

if TYPE_CHECKING:
    from pathlib import Path


def run(plane: TestPlane, app: str, **extra: str) -> Any:
    """What an app prints, as JSON."""
    return json.loads(plane.modal("run", "-q", app, **extra).stdout.splitlines()[-1])


def test_volumes(plane: TestPlane) -> None:
    found = run(plane, "storage.py")
    assert found.pop("read only") == ["one", "OSError: [Errno 30] Read-only file system: '/data/denied'"]
    assert found.pop("removed").endswith("No such file or directory: 'up'.")
    assert found.pop("missing").startswith("FileNotFoundError: ")
    assert found.pop("gone").endswith("Volume 'storage-more' not found in environment 'main'.")
    assert found == {
        "two places": ["x"],
        "concurrent": [0, 1, 2, 3],
        "lines": 200,
        "sub path": ["0", "1", "2", "3"],
        "zeros": [True, True],
        "code": True,
        "listdir": ["up/all", "up/code.py", "up/zeros", "up/zeros again"],
        "iterdir": 4,
        "copied": ["a/b.txt", "a/code.py", "a/shared.txt"],
        "info": "storage-data",
        "ephemeral": ["x"],
        "objects": True,
    }
    # An empty one is of a request that the client made twice: on a machine that is busy it repeats what takes long.
    uploads = (plane.state_dir / "volumes/.uploads").iterdir()
    assert [file for file in uploads if file.stat().st_size] == []


def test_secrets(plane: TestPlane) -> None:
    plane.quick("secret", "create", "storage-secret", "B=named", "C=c d=e", "--force")
    found = run(plane, "variables.py", T_LOCAL="local")
    assert found == {
        "A": "from dict",
        "B": "named",
        "C": "c d=e",
        "FROM_FILE": "file value",
        "EMPTY": "",
        "T_LOCAL": "local",
        "NONE": None,
    }
    plane.quick("secret", "delete", "storage-secret", "--yes")
    done = plane.modal("run", "-q", "variables.py", check=False, T_LOCAL="local")
    assert done.returncode == 1
    said = " ".join((done.stdout + done.stderr).split())
    assert "Secret 'storage-secret' not found in environment 'main'" in said


def test_secret_files(plane: TestPlane, tmp_path: Path) -> None:
    dotenv = tmp_path / "x.env"
    dotenv.write_text("A=1\nB='two words'\n")
    plane.quick("secret", "create", "dotted", "--from-dotenv", str(dotenv))
    listed = {row["name"]: row for row in plane.json("secret", "list")}
    assert listed["dotted"]["created_by"] == "local"
    plane.quick("secret", "delete", "dotted", "--yes")
    gone = plane.quick("secret", "delete", "dotted", "--yes", check=False)
    assert gone.returncode == 1
    plane.quick("secret", "delete", "dotted", "--yes", "--allow-missing")


@pytest.mark.parametrize("version", ["1", "2"])
def test_the_volume_command_line(plane: TestPlane, tmp_path: Path, version: str) -> None:
    folder = tmp_path / "folder"
    (folder / "in").mkdir(parents=True)
    for name in ("a", "in/b", "in/c"):
        (folder / name).write_text(name)
    (folder / "large").write_bytes(os.urandom(9 << 20))  # more than one block, and more than one message
    plane.quick("volume", "create", "cli", "--version", version)
    again = plane.quick("volume", "create", "cli", check=False)
    assert again.returncode == 1
    assert "Volume 'cli' already exists" in " ".join((again.stdout + again.stderr).split())
    plane.quick("volume", "put", "cli", str(folder), "/up")
    assert sorted(f["filename"] for f in plane.json("volume", "ls", "cli", "up")) == [
        "up/a",
        "up/in",
        "up/large",
    ]
    assert plane.quick("volume", "put", "cli", str(folder / "a"), "up/a", check=False).returncode == 2
    (folder / "a").write_text("another")
    plane.quick("volume", "put", "cli", str(folder / "a"), "up/a", "--force")
    assert plane.quick("volume", "get", "cli", "up/in/b", "-").stdout.startswith("in/b")
    (tmp_path / "back").mkdir()
    plane.quick("volume", "get", "cli", "up", str(tmp_path / "back"))
    assert (tmp_path / "back/up/in/c").read_text() == "in/c"
    assert (tmp_path / "back/up/a").read_text() == "another"
    assert (tmp_path / "back/up/large").read_bytes() == (folder / "large").read_bytes()
    exists = plane.quick("volume", "get", "cli", "up", str(tmp_path / "back"), check=False)
    assert "already exists" in exists.stderr
    plane.quick("volume", "get", "cli", "up", str(tmp_path / "back"), "--force")
    copied = plane.quick("volume", "cp", "-r", "cli", "up/in", "other", check=version == "2")
    if version == "1":
        assert "`recursive` is not supported for V1 volumes" in copied.stdout + copied.stderr
        plane.quick("volume", "cp", "cli", "up/in/b", "other")
    missing = plane.quick("volume", "rm", "cli", "never", check=False)
    assert missing.returncode != 0
    plane.quick("volume", "rm", "cli", "up", "-r")
    assert [f["filename"] for f in plane.json("volume", "ls", "cli")] == ["other"]
    plane.quick("volume", "rename", "cli", "cli-two", "--yes")
    assert {"cli-two"} == {v["name"] for v in plane.json("volume", "list")} & {"cli", "cli-two"}
    plane.quick("volume", "delete", "cli-two", "--yes")
    for command in (["ls", "cli"], ["put", "cli", __file__], ["get", "cli", "x"], ["delete", "cli", "--yes"]):
        done = plane.quick("volume", *command, check=False)
        assert done.returncode == 1, command
        assert "Volume 'cli' not found in environment 'main'" in " ".join((done.stdout + done.stderr).split())


def test_what_a_volume_refuses(plane: TestPlane) -> None:
    """By the client's own errors, which name what was asked for and nothing of this machine."""
    made = api_pb2.VolumeGetOrCreateRequest(deployment_name="refuses", object_creation_type=1)
    volume = call(plane.now, "VolumeGetOrCreate", made).volume_id
    root = plane.state_dir / "volumes" / volume
    (root / "folder/in").mkdir(parents=True)
    (root / "file").write_text("x")
    put, copy = api_pb2.VolumePutFiles2Request, api_pb2.VolumeCopyFiles2Request
    long = "x" * 300
    for request, said in (
        (put(files=[put.File(path="file/under")]), "'file/under' cannot be made: 'file' is not a directory."),
        (put(files=[put.File(path="a"), put.File(path="a/b")]), "File exists: 'a'"),
        (put(files=[put.File(path="folder")]), "'folder' is a directory."),
        (put(files=[put.File(path=long)]), f"File name too long: '{long}'"),
        (copy(src_paths=["file"], dst_path="file"), "'file' and 'file' are the same file."),
        (copy(src_paths=["file"], dst_path="nowhere/"), "'nowhere/' is not a directory."),
        (copy(src_paths=["folder"], dst_path="other"), "'folder' is a directory; copy it recursively."),
        (
            copy(src_paths=["folder"], dst_path="folder/in", recursive=True),
            "The directory 'folder' cannot be copied into itself.",
        ),
        (
            copy(src_paths=["folder"], dst_path="file", recursive=True),
            "'file' is not a directory, and 'folder' is.",
        ),
    ):
        request.volume_id = volume
        name = "VolumePutFiles2" if isinstance(request, put) else "VolumeCopyFiles2"
        error = call(plane.now, name, request)
        assert isinstance(error, grpclib.GRPCError), request
        assert error.message == said
        assert error.status is not grpclib.Status.INTERNAL
    assert sorted(p.name for p in root.rglob("*")) == ["a", "file", "folder", "in"]


def test_environments(plane: TestPlane) -> None:
    plane.quick("environment", "create", "nest")
    plane.quick("volume", "create", "egg", "-e", "nest")
    plane.quick("secret", "create", "shell", "A=1", "-e", "nest")
    kept = list((plane.state_dir / "secrets").iterdir()), list((plane.state_dir / "volumes").iterdir())
    plane.quick("environment", "update", "nest", "--set-name", "tree")
    assert [v["name"] for v in plane.json("volume", "list", "-e", "tree")] == ["egg"]
    for option in ("--set-web-suffix", "--set-image-builder-version"):
        refused = plane.quick("environment", "update", "tree", option, "2024.10", check=False)
        assert refused.returncode == 1
        assert f"{option[6:].replace('-', '_')} cannot be set here" in refused.stdout + refused.stderr
    taken = plane.quick("environment", "create", "tree", check=False)
    assert taken.returncode == 1
    plane.quick("environment", "delete", "tree", "--yes")
    assert "tree" not in [e["name"] for e in plane.json("environment", "list")]
    now = list((plane.state_dir / "secrets").iterdir()), list((plane.state_dir / "volumes").iterdir())
    assert [len(before) - len(after) for before, after in zip(kept, now, strict=True)] == [1, 1]
    default = plane.quick("environment", "delete", "main", "--yes", check=False)
    assert default.returncode == 1


def test_prices(plane: TestPlane) -> None:
    rates = json.loads(plane.quick("billing", "rates", "--json").stdout)
    assert rates["gpu_hour_cost_t4"] == "0.5904"
    said = plane.quick("billing", "rates").stdout
    assert "Nothing is billed on this machine" in said
    assert "0.5904" in said


def test_app_tags(plane: TestPlane) -> None:
    code = (
        "import json, modal\n"
        "app = modal.App.lookup('tagged', create_if_missing=True)\n"
        "before = app.get_tags()\n"
        "app.set_tags({'team': 'a-b', 'kind': 'x'})\n"
        "print(json.dumps([before, modal.App.lookup('tagged').get_tags()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=plane.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [{}, {"team": "a-b", "kind": "x"}]
    plane.quick("app", "stop", "tagged", "--yes")
