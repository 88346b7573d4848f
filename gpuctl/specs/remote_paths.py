"""Paths of files that are in the cloud: `s3://BUCKET/KEY`, `gs://BUCKET/KEY`, `volume://NAME/PATH`. May import: errors,
specs.names.

A container reads and writes them in a folder at which the bucket or the Volume is mounted; `mounts` says what has to be
mounted for some paths, and how little of it.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl.errors import usage_error
from gpuctl.specs import names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuctl.specs.reader import Reader

S3, GCS, VOLUME = "s3", "gs", "volume"
SCHEMES = (S3, GCS, VOLUME)
GCS_ENDPOINT = "https://storage.googleapis.com"
# What a secret must hold, by Modal's documentation of CloudBucketMount.
REQUIRED_KEYS = {
    S3: ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    GCS: ("GOOGLE_ACCESS_KEY_ID", "GOOGLE_ACCESS_KEY_SECRET"),
}

_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<place>[^/]*)(?P<path>.*)", re.DOTALL)
# Amazon's rules for names of buckets; Google's and Cloudflare's are no wider but for underscores.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class RemotePath:
    """`scheme://place/path`: `place` is a bucket or a Volume, `path` a file, folder or glob in it, without a slash in
    front; one behind it says that it is a folder. Wildcards count in inputs only.
    """

    scheme: str
    place: str
    path: str

    @property
    def uri(self) -> str:
        return f"{self.scheme}://{self.place}/{self.path}"

    @property
    def in_bucket(self) -> bool:
        return self.scheme != VOLUME

    @property
    def folder(self) -> str:
        """The folder in which it is for sure, as far as its name says that: `a/b` of `a/b/c*/d`; "" is all of it."""
        sure: list[str] = []
        for part in self.path.split("/")[:-1]:
            if _MAGIC.search(part) or "{" in part:  # {date} is known when it is written
                break
            sure.append(part)
        return "/".join(sure)


def is_remote(text: str) -> bool:
    """Whether this names something in the cloud, or tries to."""
    return _URI.fullmatch(text) is not None


def parse(flag: str, text: str) -> RemotePath:
    """A usage error that says what would work, where it is not one of ours."""
    match = _URI.fullmatch(text)
    assert match is not None, text
    scheme, place, path = match["scheme"], match["place"], match["path"].lstrip("/")
    if scheme not in SCHEMES:
        hint = {
            "http": "download it first",
            "https": "download it first",
            "gcs": "gs://BUCKET/KEY",
            "s3a": "s3://BUCKET/KEY",
            "r2": "s3://BUCKET/KEY with --bucket-endpoint https://ACCOUNT.r2.cloudflarestorage.com",
            "modal": "volume://NAME/PATH",
        }.get(scheme.lower(), "in small letters" if scheme.lower() in SCHEMES else "")
        raise usage_error(
            f"{flag}: {text!r}: {scheme}:// is none of s3://BUCKET/KEY, gs://BUCKET/KEY and volume://NAME/PATH"
            + (f"; {hint}" if hint else "")
        )
    if scheme == VOLUME:
        if wrong := names.object_name(place):
            raise usage_error(f"{flag}: {text!r}: {wrong}")
    elif not _BUCKET.fullmatch(place):
        raise usage_error(
            f"{flag}: {text!r}: {place!r} is no name of a bucket: 3 to 63 small letters, digits, '.', '-' or '_'"
        )
    if any(part == ".." for part in path.split("/")) or "\0" in path:
        raise usage_error(f"{flag}: {text!r}: a path in a bucket or a Volume goes down only, without '..'")
    if not path.isprintable():
        raise usage_error(f"{flag}: {text!r}: the path holds characters that cannot be printed")
    folder = path.endswith("/")
    path = posixpath.normpath(path) if path else ""
    return RemotePath(scheme, place, ("" if path == "." else path) + ("/" if folder and path else ""))


@dataclass(frozen=True)
class Mount:
    """A bucket or a Volume in a container: `folder` (of a bucket: the part that is mounted, "" is all) at `path`."""

    scheme: str
    place: str
    folder: str
    path: str
    read_only: bool

    @property
    def uri(self) -> str:
        """How the paths begin that are found below `path`."""
        return f"{self.scheme}://{self.place}" + (f"/{self.folder}" if self.folder else "")

    @property
    def in_bucket(self) -> bool:
        return self.scheme != VOLUME


def mounts(inputs: Sequence[RemotePath], outputs: Sequence[RemotePath]) -> tuple[list[Mount], list[Mount]]:
    """What a container needs to read `inputs`, and what to write `outputs`: of each bucket the folder that all have in
    common, and each Volume once, which is all that Modal allows: one that is read and written is in both lists.
    """
    reads = [Mount(*place, folder, f"/mnt/in-{n}", True) for n, (place, folder) in enumerate(_places(inputs))]
    volumes = {mount.place: mount for mount in reads if not mount.in_bucket}
    writes = []
    for n, ((scheme, place), folder) in enumerate(_places(outputs)):
        there = volumes.get(place) if scheme == VOLUME else None
        writes.append(Mount(scheme, place, folder, there.path if there else f"/mnt/out-{n}", False))
    written = {mount.place for mount in writes if not mount.in_bucket}
    reads = [
        Mount(m.scheme, m.place, m.folder, m.path, False) if not m.in_bucket and m.place in written else m
        for m in reads
    ]
    return reads, writes


def _places(paths: Sequence[RemotePath]) -> list[tuple[tuple[str, str], str]]:
    folders: dict[tuple[str, str], list[list[str]]] = {}
    for path in paths:
        parts = path.folder.split("/") if path.folder else []
        folders.setdefault((path.scheme, path.place), []).append(parts)
    found = []
    for place, several in folders.items():
        common: list[str] = []
        for level in zip(*several, strict=False):
            if len(set(level)) > 1:
                break
            common.append(level[0])
        # A Volume is mounted as a whole.
        found.append((place, "" if place[0] == VOLUME else "/".join(common)))
    return found


def check_paths(
    read: Reader,
    *,
    inputs: Sequence[str],
    output: str,
    errors: str | None,
    bucket_secret: str | None,
    bucket_endpoint: str | None,
    scheduled: bool,
    local: bool,
) -> None:
    """Keep every problem of a job's paths, and of what reaching them takes."""
    before = len(read.problems)
    remote = [path for text in inputs if is_remote(text) and (path := read.parsed(_of("INPUT"), text))]
    here = [text for text in inputs if not is_remote(text)]
    if here and len(here) < len(inputs):
        read.problem(
            f"INPUT: {here[0]!r} is on this machine, and {next(filter(is_remote, inputs))!r} is not: "
            "a job reads its rows in one place"
        )
    answers = read.parsed(_of("--output"), output) if is_remote(output) else None
    if answers is not None:
        if _MAGIC.search(answers.path):
            read.problem(f"--output: {output!r} is a pattern; the answers need a name")
        elif not answers.path:
            read.problem(f"--output: {output!r} names no file in it, such as {answers.uri}answers.jsonl")
        if any(path == answers for path in remote):
            read.problem(f"--output: {output!r} is the input; the answers need a file of their own")
    failed = read.parsed(_of("--errors"), errors) if errors is not None and is_remote(errors) else None
    if failed is not None and any(path == failed for path in remote):
        read.problem(f"--errors: {errors!r} is the input; the errors need a file of their own")
    if errors is not None and is_remote(output) != is_remote(errors):
        read.problem(f"--errors: {errors!r} must be where the answers are, beside {output!r}")
    elif answers and failed and (answers.scheme, answers.place) != (failed.scheme, failed.place):
        read.problem(f"--errors: {errors!r} must be in the same place as the answers, {output!r}")
    if len(read.problems) == before:
        paths = [*remote, *filter(None, (answers, failed))]
        _check_buckets(read, paths, bucket_secret, bucket_endpoint, local)
    if scheduled and here:
        read.problem(
            f"INPUT: {here[0]!r} is on this machine, where a schedule cannot read it; put it into a Volume: "
            f"modal volume create NAME, then modal volume put NAME {here[0]} /, and name volume://NAME/…"
        )
    if scheduled and answers is None and not is_remote(output) and output != "-":
        read.problem(
            f"--output: {output!r} is on this machine, where a schedule cannot write; name volume://NAME/PATH or "
            "s3://BUCKET/KEY (with {time} or {date} in it there is a file for each run)"
        )
    if scheduled and output == "-":
        read.problem("--output: a schedule has no stdout; name volume://NAME/PATH or s3://BUCKET/KEY")


def _check_buckets(
    read: Reader, paths: Sequence[RemotePath], secret: str | None, endpoint: str | None, local: bool
) -> None:
    buckets = [path for path in paths if path.in_bucket]
    if secret is not None:
        read.rule("--bucket-secret", secret, names.object_name)
    for flag, given in (("--bucket-secret", secret), ("--bucket-endpoint", endpoint)):
        if given is not None and not buckets:
            read.problem(f"{flag}: no input or output is in a bucket (s3://BUCKET/KEY, gs://BUCKET/KEY)")
    if not buckets:
        return
    first = buckets[0]
    if local:
        read.problem(
            f"--local: {first.uri}: the local control plane has no cloud buckets (CloudBucketMount); "
            "volume://NAME/PATH works there"
        )
        return
    if len({path.scheme for path in buckets}) > 1:
        read.problem("INPUT: s3:// and gs:// want secrets of different kinds, and --bucket-secret names one")
    if secret is None:
        keys = REQUIRED_KEYS[first.scheme]
        read.problem(
            f"--bucket-secret: needed for {first.uri}: the name of a Secret of Modal's with {' and '.join(keys)} "
            "(modal secret create NAME --from-dotenv FILE)"
        )
    if endpoint is not None:
        if first.scheme == GCS:
            read.problem(f"--bucket-endpoint: gs:// is at {GCS_ENDPOINT}; the option is for s3://")
        elif not re.fullmatch(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?/?", endpoint):
            read.problem(
                f"--bucket-endpoint: {endpoint!r} is no URL of a host, such as https://ACCOUNT.r2.cloudflarestorage.com"
            )


def _of(flag: str) -> Callable[[str], RemotePath]:
    return lambda text: parse(flag, text)
