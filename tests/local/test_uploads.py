"""Blocks of Volume files by HTTP, as a client may send them, or need not send them."""

from __future__ import annotations

import hashlib
import http.client
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from grpclib import Status
from modal_proto import api_pb2

from .planes import TestPlane
from .rpc import call

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 8 << 20
SIZE = BLOCK + (2 << 20)  # two blocks, both large enough to be looked for


class Upload:
    """A file on its way into a new Volume."""

    def __init__(self, plane: TestPlane, name: str, content: bytes) -> None:
        made = api_pb2.VolumeGetOrCreateRequest(deployment_name=name, object_creation_type=1)
        self._plane = plane
        self._volume = call(plane.now, "VolumeGetOrCreate", made).volume_id
        self.blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
        self._size = len(content)
        self.place = plane.state_dir / "volumes" / self._volume / "file"
        self.urls = [urlsplit(missing.put_url) for missing in self.ask([]).missing_blocks]

    def ask(self, names: list[bytes]) -> Any:
        """What the plane says of the file, whose blocks have these names by now."""
        digests = [hashlib.sha256(block.rstrip(b"\0")).digest() for block in self.blocks]
        blocks = [
            api_pb2.VolumePutFiles2Request.Block(contents_sha256=digest, put_response=name)
            for digest, name in zip(digests, names or [b""] * len(digests), strict=True)
        ]
        file = api_pb2.VolumePutFiles2Request.File(path="file", size=self._size, blocks=blocks, mode=0o644)
        request = api_pb2.VolumePutFiles2Request(volume_id=self._volume, files=[file])
        return call(self._plane.now, "VolumePutFiles2", request)

    def put(self, number: int, body: bytes | None, length: int | None = None) -> tuple[int, bytes]:
        """The answer to a block; without a body nothing but its headers is sent."""
        url = self.urls[number]
        length = len(self.blocks[number] if body is None else body) if length is None else length
        connection = http.client.HTTPConnection("127.0.0.1", url.port or 0, timeout=60)
        connection.putrequest("PUT", f"{url.path}?{url.query}")
        connection.putheader("Content-Length", str(length))
        connection.endheaders(body)
        try:
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def test_what_its_sender_has_in_a_file_need_not_be_sent(plane: TestPlane, tmp_path: Path) -> None:
    content = os.urandom(SIZE)
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "other").write_bytes(os.urandom(SIZE))
    upload = Upload(plane, "unsent", content)
    with (tmp_path / "other").open("rb"), (tmp_path / "file").open("rb"):
        answers = [upload.put(number, None) for number in range(2)]
        assert upload.put(1, None) == answers[1]  # as a client asks again that lost the answer
    assert [status for status, _ in answers] == [200, 200]
    assert not upload.place.exists()
    assert not upload.ask([name for _, name in answers]).missing_blocks
    assert upload.place.read_bytes() == content


def test_what_differs_from_its_senders_file_is_sent(plane: TestPlane, tmp_path: Path) -> None:
    """A file of the same size is open in the process, begins with the same block, and is not what it sends."""
    content = os.urandom(SIZE)
    (tmp_path / "file").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    upload = Upload(plane, "differs", content)
    with (tmp_path / "file").open("rb"):
        first = upload.put(0, None)
        second = upload.put(1, upload.blocks[1])
    assert [first[0], second[0]] == [200, 200]
    assert not upload.ask([first[1], second[1]]).missing_blocks
    assert upload.place.read_bytes() == content


def test_a_block_that_its_sender_is_reading_is_answered_before_it_is_read(
    plane: TestPlane, tmp_path: Path
) -> None:
    """The client computes an MD5 of all that it sends until it has the answer."""
    content = os.urandom(3 * BLOCK)
    (tmp_path / "file").write_bytes(content)
    upload = Upload(plane, "read", content)
    with (
        (tmp_path / "file").open("rb", buffering=0) as one,
        (tmp_path / "file").open("rb", buffering=0) as two,
    ):
        answers = [upload.put(0, None)]
        one.seek(BLOCK + 1)
        two.seek(3 * BLOCK - 1)
        answers += [upload.put(number, None) for number in (1, 2)]
    assert [status for status, _ in answers] == [200] * 3
    assert not upload.ask([name for _, name in answers]).missing_blocks
    assert upload.place.read_bytes() == content


def test_a_file_that_changes_while_it_is_sent(plane: TestPlane, tmp_path: Path) -> None:
    content = os.urandom(SIZE)
    (tmp_path / "file").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    upload = Upload(plane, "changes", content)
    with (tmp_path / "file").open("rb", buffering=0) as file:
        first = upload.put(0, None)
        file.seek(BLOCK + 1)
        second = upload.put(1, None)
    assert [first[0], second[0]] == [200, 200]
    refused = upload.ask([first[1], second[1]])
    assert (refused.status, "upload the file again" in refused.message) == (Status.FAILED_PRECONDITION, True)
    assert not upload.place.exists()


def test_a_file_that_is_no_longer_there(plane: TestPlane, tmp_path: Path) -> None:
    """It was cut short, and is closed, while its blocks are on the way."""
    content = os.urandom(SIZE)
    path = tmp_path / "file"
    path.write_bytes(content)
    upload = Upload(plane, "cut", content)
    with path.open("rb"):
        first = upload.put(0, None)
    os.truncate(path, BLOCK + 1)
    second = upload.put(1, upload.blocks[1])
    assert not upload.ask([first[1], second[1]]).missing_blocks
    assert upload.place.read_bytes() == content


def test_a_wrong_block_leaves_nothing(plane: TestPlane) -> None:
    content = b"a" * 1000 + bytes(SIZE - 1000)  # the client sends no zeros at the end of a block
    upload = Upload(plane, "wrong", content)
    assert upload.put(0, os.urandom(3 << 20))[0] == 400
    first = upload.put(0, content[:1000])
    assert first[0] == 200
    second = upload.put(1, b"")
    assert not upload.ask([first[1], second[1]]).missing_blocks
    assert upload.place.read_bytes() == content


_IN_MEMORY = """
import io, modal, sys

content = bytearray(open(sys.argv[1], "rb").read())
content[0] ^= 1
with open(sys.argv[1], "rb"), modal.Volume.from_name("memory", create_if_missing=True).batch_upload() as batch:
    batch.put_file(sys.argv[1], "file")
    batch.put_file(io.BytesIO(content), "changed")
"""


def test_the_sdk(plane: TestPlane, tmp_path: Path) -> None:
    """A file, and what is in memory only and looks like it."""
    path = tmp_path / "file"
    content = os.urandom(2 * BLOCK) + bytes(BLOCK) + os.urandom(BLOCK)
    path.write_bytes(content)
    argv = [sys.executable, "-c", _IN_MEMORY, str(path)]
    subprocess.run(argv, env=plane.environment(), check=True, timeout=120)
    for name, first in (("file", content[0]), ("changed", content[0] ^ 1)):
        plane.quick("volume", "get", "memory", name, str(tmp_path / f"back-{name}"))
        assert (tmp_path / f"back-{name}").read_bytes() == bytes([first]) + content[1:]
