"""Secrets, Volumes, environments, logs, app history: through the real CLI, and what the wire must not allow."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING

import grpclib
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modal_proto import api_pb2

from .planes import TestPlane, eventually, http
from .rpc import call

if TYPE_CHECKING:
    from pathlib import Path


# ---- secrets


def test_secrets(plane: TestPlane, tmp_path: Path) -> None:
    values = tmp_path / "values.json"
    values.write_text(json.dumps({"API_KEY": "s3cr3t-of-the-test", "OTHER": "x"}))
    plane.quick("secret", "create", "from-file", "--from-json", str(values))
    again = plane.quick("secret", "create", "from-file", "A=b", check=False)
    assert again.returncode == 1
    assert "already exists" in again.stdout + again.stderr
    plane.quick("secret", "create", "from-file", "--from-json", str(values), "--force")
    assert "from-file" in [s["name"] for s in plane.json("secret", "list")]
    # The values are in a file that only the user can read, and nowhere else.
    kept = [p for p in (plane.state_dir / "secrets").iterdir() if "s3cr3t-of-the-test" in p.read_text()]
    assert len(kept) == 1
    assert stat.S_IMODE(kept[0].stat().st_mode) == 0o600
    for name in ("plane.db", "plane.db-wal", "plane.log"):
        assert b"s3cr3t-of-the-test" not in (plane.state_dir / name).read_bytes()
    plane.quick("secret", "delete", "from-file", "--yes")
    assert "from-file" not in [s["name"] for s in plane.json("secret", "list")]
    assert not kept[0].exists()


def test_a_secret_that_is_missing_or_lacks_a_key(plane: TestPlane) -> None:
    def ask(**fields: object) -> grpclib.GRPCError:
        error = call(plane.now, "SecretGetOrCreate", api_pb2.SecretGetOrCreateRequest(**fields))  # type: ignore[arg-type]
        assert isinstance(error, grpclib.GRPCError)
        return error

    missing = ask(deployment_name="nowhere")
    assert missing.status is grpclib.Status.NOT_FOUND
    assert missing.message == "Secret 'nowhere' not found in environment 'main'."
    plane.quick("secret", "create", "partial", "A=1")
    lacking = ask(deployment_name="partial", required_keys=["A", "B"])
    assert lacking.status is grpclib.Status.NOT_FOUND
    assert lacking.message == "Secret is missing key(s): B"


# ---- volumes


def test_volumes(plane: TestPlane, tmp_path: Path) -> None:
    big = tmp_path / "big.bin"
    big.write_bytes(os.urandom((20 << 20) + 17))  # three blocks
    plane.quick("volume", "create", "things")
    plane.quick("volume", "put", "things", str(big), "/deep/big.bin")
    plane.quick("volume", "put", "things", "plain.py", "/a b#c%20.py")
    assert plane.quick("volume", "put", "things", "plain.py", "/deep/big.bin", check=False).returncode == 2
    names = [f["filename"] for f in plane.json("volume", "ls", "things")]
    assert sorted(names) == ["a b#c%20.py", "deep"]
    plane.quick("volume", "get", "things", "deep/big.bin", str(tmp_path / "back.bin"))
    assert (tmp_path / "back.bin").read_bytes() == big.read_bytes()
    plane.quick("volume", "get", "things", "a b#c%20.py", str(tmp_path / "odd.py"))
    plane.quick("volume", "cp", "things", "deep/big.bin", "copy.bin")
    plane.quick("volume", "rm", "things", "deep", "--recursive")
    assert sorted(f["filename"] for f in plane.json("volume", "ls", "things")) == ["a b#c%20.py", "copy.bin"]
    assert list((plane.state_dir / "volumes" / ".uploads").iterdir()) == []
    assert "things" in [v["name"] for v in plane.json("volume", "list")]
    plane.quick("volume", "rename", "things", "stuff", "--yes")
    plane.quick("volume", "delete", "stuff", "--yes")
    assert "stuff" not in [v["name"] for v in plane.json("volume", "list")]


def test_a_volume_is_at_its_path_in_the_container(plane: TestPlane) -> None:
    url = plane.deploy("writes", open=1, scaledown=2)
    plane.ready(f"{url}/who")
    plane.quick("app", "stop", "writes", "--yes")
    assert [f["filename"] for f in plane.json("volume", "ls", "writes-data")] == ["exits"]


_PATHS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(["..", ".", "", "a", "outside", "etc", "passwd", "\0", "~"]), max_size=6).map(
        "/".join
    ),
)


@given(path=_PATHS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_path_leaves_a_volume(plane: TestPlane, path: str) -> None:
    made = api_pb2.VolumeGetOrCreateRequest(deployment_name="walls", object_creation_type=1)
    volume_id = call(plane.now, "VolumeGetOrCreate", made).volume_id
    root = plane.state_dir / "volumes" / volume_id
    if not (root / "outside").is_symlink():
        (root / "outside").symlink_to(plane.state_dir)
    before = sorted(p.name for p in plane.state_dir.iterdir())
    file = api_pb2.VolumePutFiles2Request.File(path=path, size=0)
    call(plane.now, "VolumePutFiles2", api_pb2.VolumePutFiles2Request(volume_id=volume_id, files=[file]))
    for name, request in (
        (
            "VolumeGetFile2",
            api_pb2.VolumeGetFile2Request(volume_id=volume_id, path=path + "/../../../plane.json"),
        ),
        ("VolumeGetFile2", api_pb2.VolumeGetFile2Request(volume_id=volume_id, path="outside/plane.json")),
        ("VolumeListFiles2", api_pb2.VolumeListFiles2Request(volume_id=volume_id, path="outside/")),
        ("VolumeRemoveFile2", api_pb2.VolumeRemoveFile2Request(volume_id=volume_id, path="outside/lock")),
        (
            "VolumeCopyFiles2",
            api_pb2.VolumeCopyFiles2Request(volume_id=volume_id, src_paths=["outside/lock"], dst_path="x"),
        ),
    ):
        assert isinstance(call(plane.now, name, request), grpclib.GRPCError), (name, request)
    assert sorted(p.name for p in plane.state_dir.iterdir()) == before


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "x" * 65, "a b", "é"])
def test_names_are_checked(plane: TestPlane, name: str) -> None:
    requests = [
        ("VolumeGetOrCreate", api_pb2.VolumeGetOrCreateRequest(deployment_name=name, object_creation_type=2)),
        ("SecretGetOrCreate", api_pb2.SecretGetOrCreateRequest(deployment_name=name, object_creation_type=2)),
        ("EnvironmentCreate", api_pb2.EnvironmentCreateRequest(name=name)),
    ]
    for rpc, request in requests[1:] if not name else requests:  # a Volume without a name is an anonymous one
        error = call(plane.now, rpc, request)
        assert isinstance(error, grpclib.GRPCError), rpc
        assert error.status is grpclib.Status.INVALID_ARGUMENT, rpc


def test_ids_and_hashes_are_checked(plane: TestPlane) -> None:
    for bad in ("../../plane.db", "vo-../../../../../../etc/x", "", "x" * 64):
        for name, request in (
            ("VolumeReload", api_pb2.VolumeReloadRequest(volume_id=bad)),
            ("SecretGetInfo", api_pb2.SecretGetInfoRequest(secret_id=bad)),
            ("BlobGet", api_pb2.BlobGetRequest(blob_id=bad)),
            ("MountPutFile", api_pb2.MountPutFileRequest(sha256_hex=bad, data=b"x")),
            (
                "MountBatchedCheckExistence",
                api_pb2.MountBatchedCheckExistenceRequest(sha256_hex_hashes=[bad]),
            ),
        ):
            assert isinstance(call(plane.now, name, request), grpclib.GRPCError), (name, bad)


def test_blob_urls_are_signed(plane: TestPlane) -> None:
    request = api_pb2.BlobCreateRequest(content_sha256_base64="AAAA", content_length=1)
    url = call(plane.now, "BlobCreate", request).upload_urls.items[0]
    base, _, signature = url.partition("?")
    assert http(url, data=b"x", method="PUT").status == 200
    assert http(base, data=b"x", method="PUT").status == 403
    assert http(f"{base}x?{signature}", data=b"x", method="PUT").status == 403
    assert http(f"{base.rpartition('/')[0]}/../../plane.json?{signature}").status == 403


# ---- environments


def test_environments_are_separate(plane: TestPlane) -> None:
    plane.quick("environment", "create", "dev")
    assert sorted(e["name"] for e in plane.json("environment", "list")) == ["dev", "main"]
    plane.quick("secret", "create", "only-dev", "A=1", "-e", "dev")
    assert "only-dev" not in [s["name"] for s in plane.json("secret", "list")]
    assert [s["name"] for s in plane.json("secret", "list", "-e", "dev")] == ["only-dev"]
    first = plane.deploy("twice", open=1)
    second = plane.deploy("twice", "-e", "dev", open=1)
    assert first != second
    assert [a["description"] for a in plane.json("app", "list", "-e", "dev")] == ["twice"]
    plane.quick("app", "stop", "twice", "-e", "dev", "--yes")
    assert http(first).status == 503
    plane.quick("app", "stop", "twice", "--yes")
    unknown = plane.quick("app", "list", "-e", "nowhere", check=False)
    assert unknown.returncode == 1
    assert "Environment 'nowhere' not found" in unknown.stdout + unknown.stderr
    deploy = plane.modal("deploy", "plain.py", "-e", "nowhere", check=False, T_NAME="x")
    assert deploy.returncode == 1
    plane.quick("environment", "delete", "dev", "--yes")
    assert [e["name"] for e in plane.json("environment", "list")] == ["main"]


# ---- logs


def test_logs_are_filtered(plane: TestPlane) -> None:
    url = plane.deploy("talks", open=1, min=1)
    task = plane.ready(f"{url}/who").json["task"]
    eventually(lambda: "listening" in plane.logs("talks"), every=0.5)
    assert plane.logs("talks", "--source", "stdout") == "enter: version 1\nlistening\n"
    assert "Ready for task" in plane.logs("talks", "--source", "stderr")
    assert plane.logs("talks", "--source", "system") == ""
    assert plane.logs("talks", "--search", "version 1") == "enter: version 1\n"
    assert plane.logs("talks", "--source", "stdout", "--tail", "1") == "listening\n"
    assert plane.logs("talks", "--container", task, "--source", "stdout").count("\n") == 2
    assert plane.logs("talks", "--container", "ta-0000000000000000000000") == ""
    assert "listening" in plane.logs("talks", "--since", "1h")
    assert plane.logs("talks", "--since", "2h", "--until", "1h") == ""
    assert task in plane.logs("talks", "--show-container-id", "--timestamps")
    assert "listening" in plane.quick("container", "logs", task).stdout
    plane.quick("app", "stop", "talks", "--yes")
    assert plane.logs("talks", "--source", "system") == "app stopped\n"


def test_many_lines_come_out_in_order(plane: TestPlane) -> None:
    url = plane.deploy("chats", open=1, min=1)
    plane.ready(f"{url}/who")
    log = plane.logs("chats", "--tail", "2", "--source", "stdout")
    assert log.splitlines() == ["enter: version 1", "listening"]
    plane.quick("app", "stop", "chats", "--yes")


# ---- apps


def test_history_tags_and_what_is_refused(plane: TestPlane) -> None:
    plane.deploy("story", "--tag", "first", open=1)
    plane.deploy("story", open=1, version=2)
    plane.quick("app", "rollback", "story")
    rows = plane.json("app", "history", "story")
    assert [row["version"] for row in rows] == ["v3", "v2", "v1"]
    assert rows[-1]["tag"] == "first"
    plane.quick("app", "stop", "story", "--yes")
    for app, words in (
        ("web.py", "is a web function"),
        ("experimental_server.py", "@modal.experimental.http_server"),
        ("nosecret.py", "Secret 'not-there' not found"),
    ):
        done = plane.modal("deploy", app, check=False)
        assert done.returncode == 1, app
        assert words in done.stdout + done.stderr
    # What failed to deploy is not left behind.
    states = {a["description"]: a["state"] for a in plane.json("app", "list")}
    assert states["t-web"] == states["t-nosecret"] == "stopped"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("web method", "'Site.answers' is a web function"),
        ("bucket", "'reads' mounts the bucket 'some-bucket' at /data: Cloud bucket mounts do not exist"),
        ("cluster", "'trains' is clustered (modal.clustered): Clustered functions do not exist"),
    ],
)
def test_what_is_refused_is_named_with_who_wants_it(plane: TestPlane, what: str, words: str) -> None:
    done = plane.modal("deploy", "refused.py", check=False, T_WHAT=what)
    assert done.returncode == 1
    assert words in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr


def test_what_differs_is_said_when_deploying(plane: TestPlane) -> None:
    done = plane.modal("deploy", "differs.py")
    said = " ".join((done.stdout + done.stderr).split())
    assert "Served: GPU H100:2 or A100-80GB:1 asked for" in said
    plane.quick("app", "stop", "t-differs", "--yes")


def test_an_upload_that_finds_no_room_is_refused_before_it_begins(plane: TestPlane) -> None:
    request = api_pb2.VolumeGetOrCreateRequest(
        deployment_name="no-room", object_creation_type=api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING
    )
    volume_id = call(plane.now, "VolumeGetOrCreate", request).volume_id
    block = api_pb2.VolumePutFiles2Request.Block(contents_sha256=b"0" * 32)
    file = api_pb2.VolumePutFiles2Request.File(path="huge", size=1 << 60, blocks=[block])
    answer = call(
        plane.now, "VolumePutFiles2", api_pb2.VolumePutFiles2Request(volume_id=volume_id, files=[file])
    )
    assert answer.status is grpclib.Status.FAILED_PRECONDITION
    assert "No room for 1,152,921,504,606,846,976 bytes" in answer.message
