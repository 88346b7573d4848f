"""Images: every way of the SDK to make one, built for real and looked at from inside the containers."""

from __future__ import annotations

import json

import pytest

from .planes import TestPlane


@pytest.mark.slow
def test_images_of_every_kind(plane: TestPlane) -> None:
    done = plane.modal("run", "images.py", MODAL_FORCE_BUILD="1")
    assert "downloading weights" in done.stdout + done.stderr  # the build's own log is streamed
    said = " ".join((done.stdout + done.stderr).split())
    for absent in (
        "the base image ubuntu:24.04 is not applied here",
        "system packages are not installed here: another-system-package",
        "system packages are not installed here: no-such-system-package",
        "packages of micromamba are not installed here: numpy",
        "the base image mambaorg/micromamba",
    ):
        assert absent in said, absent
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found == {
        "built": {
            "weights": 65 << 20,
            "config": ["weights", "weights"],
            "cache": "t0ken",
            "hand": "command\n",
            "a": "from env\n",
            "env": ["test", "two words", None],
            "cwd": "/made",
            "source": False,
        },
        "brought": {
            "copied": True,
            "dir": ["__init__.py"],
            "source": "from the package",
            "later": True,
            "mounted": True,
            "entrypoint": "yes",
        },
        "synced": ["2.0.0", "0.10.2"],
        "docker": ["hello args", "hello args", "args hello args\n"],
        "poetic": "iniconfig==1.1.1\n",
        "conda": [3, 11],
        "base": "imported",
        "listed": "1.1.1",
        "project": ["2.0.0", "0.10.2"],
        "older": [3, 12],
    }
    assert plane.quick("volume", "get", "images-data", "from-build", "-").stdout.startswith("built")


@pytest.mark.slow
def test_a_build_that_is_forced(plane: TestPlane) -> None:
    def build(**extra: str) -> str:
        done = plane.modal("run", "images.py::in_brought", **extra)
        return done.stdout + done.stderr

    build()
    assert "RUN cp /srv-files" not in build()
    assert build(MODAL_FORCE_BUILD="1").count("$ cp /srv-files/plain.py /root/copied.py") == 1
