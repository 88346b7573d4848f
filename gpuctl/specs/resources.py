"""What a container is given, as options say it: shared by the verbs that deploy. May import: gpuctl.errors, specs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from gpuctl.specs import names
from gpuctl.specs.engine_args import RESERVED
from gpuctl.specs.reader import MOST, WHOLE, Reader, repeated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CLOUDS = ("aws", "gcp", "oci", "auto")

# On every App, so that Modal's bill can tell what gpuctl deployed, from any machine: `gpuctl cost --tag managed-by`.
OWN_TAG = ("managed-by", "gpuctl")

HUGGINGFACE_CACHE = "/root/.cache/huggingface"
VLLM_CACHE = "/root/.cache/vllm"
CACHES = (("huggingface-cache", HUGGINGFACE_CACHE), ("vllm-cache", VLLM_CACHE))

_DECIMAL = re.compile(r"[0-9]{1,10}(?:\.[0-9]{1,3})?", re.ASCII)
_DOLLARS = re.compile(r"[0-9]{1,7}(?:\.[0-9]{1,6})?", re.ASCII)
_REGION = re.compile(r"[a-z][a-z0-9-]{0,62}")
_DEBIAN = re.compile(r"[a-z0-9][a-z0-9.+-]*(?:=[A-Za-z0-9.+:~-]+)?")  # Debian policy 5.6.1, 5.6.12

# A Volume here would hide what starts the engine.
_SYSTEM = ("/bin", "/dev", "/etc", "/lib", "/lib64", "/opt", "/proc", "/run", "/sbin", "/sys", "/usr", "/var")
_KERNEL = ("/dev/", "/proc/", "/sys/")


@dataclass(frozen=True)
class VolumeMount:
    """A Volume of the user's, and where the container sees it."""

    name: str
    path: str


@dataclass(frozen=True)
class Amount:
    """How much of a resource to reserve, and the hard limit if there is one: `cpu` in cores, `memory` in MiB."""

    request: float
    limit: float | None = None


class ResourceReader(Reader):
    """The options of what is deployed."""

    def amount(self, flag: str, text: str | None, *, whole: bool, unit: str) -> Amount | None:
        if text is None:
            return None
        parts = [part.strip() for part in text.split(",")]
        pattern = WHOLE if whole else _DECIMAL
        numbers = [(int if whole else float)(part) for part in parts if pattern.fullmatch(part)]
        if len(numbers) != len(parts) or len(parts) > 2 or not all(0 < number <= MOST for number in numbers):
            self.problem(f"{flag}: {text!r} is not a positive number of {unit}")
            return None
        if len(numbers) == 2 and numbers[1] < numbers[0]:
            self.problem(f"{flag}: the limit in {text!r} is less than the request")
            return None
        return Amount(*numbers)

    def dollars(self, flag: str, text: str | None) -> Decimal | None:
        if text is None:
            return None
        if _DOLLARS.fullmatch(text.strip()) and Decimal(text.strip()) > 0:
            return Decimal(text.strip())
        self.problem(f"{flag}: {text!r} is not a positive number of US dollars, as in 8 or 12.50")
        return None

    def regions(self, text: str | None) -> tuple[str, ...]:
        if text is None:
            return ()
        regions = tuple(part.strip() for part in text.split(","))
        for region in regions:
            if not _REGION.fullmatch(region):
                self.problem(
                    f"--region: {region!r} is no region, such as us-east, eu or us-west-2 (several: a,b)"
                )
        return regions

    def pairs(self, flag: str, texts: Sequence[str], form: str) -> list[tuple[str, str]]:
        pairs = []
        for text in texts:
            key, equals, value = text.partition("=")
            if not equals or not key:
                self.problem(f"{flag}: {_shown(text, flag)} is not of the form {form}")
                continue
            pairs.append((key, value))
        for key in repeated([key for key, _ in pairs]):
            self.problem(f"{flag}: {key!r} is given twice")
        return pairs

    def env_vars(
        self, texts: Sequence[str], *, set_by_file: Mapping[str, str], from_env: Sequence[str]
    ) -> tuple[tuple[str, str], ...]:
        pairs = self.pairs("--env-var", texts, "KEY=VALUE")
        for key, value in pairs:
            self.rule("--env-var", key, names.variable)
            if not names.encodable(value):
                self.problem(f"--env-var: the value of {key} is not text that a variable can hold")
            if key == "VLLM_API_KEY":
                self.problem(f"--env-var: {key}: {RESERVED['--api-key']}")
            if key in set_by_file:
                self.problem(f"--env-var: {key} is set by gpuctl itself, to {set_by_file[key]!r}")
            if key in from_env:
                self.problem(f"--env-var: {key} is given by --secret-from-env too")
        return tuple(pairs)

    def tags(self, texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
        pairs = self.pairs("--tag", texts, "KEY=VALUE")
        for pair in pairs:
            for text in pair:
                self.rule("--tag", text, lambda text: names.tag(text, longest=63))
        return tuple(pairs)

    def volumes(self, texts: Sequence[str]) -> tuple[VolumeMount, ...]:
        mounts = []
        for text in texts:
            name, colon, path = text.partition(":")
            if not colon or not path:
                self.problem(f"--volume: {text!r} has no path; the form is NAME:PATH, as in data:/data")
                continue
            self.rule("--volume", name, names.object_name)
            self.rule("--volume", path, names.mount_path)
            if path in _SYSTEM or path.startswith(_KERNEL):
                self.problem(
                    f"--volume: {path} holds what the container itself needs; take another, such as /data"
                )
            for cache, at in CACHES:
                if name == cache or _overlap(path, at):
                    self.problem(
                        f"--volume: {text!r} collides with the cache {cache}, which is mounted at {at}"
                    )
            mounts.append(VolumeMount(name, path))
        for name in repeated([mount.name for mount in mounts]):
            self.problem(f"--volume: {name!r} is given twice; Modal mounts a Volume in one place only")
        for i, mount in enumerate(mounts):
            for other in mounts[:i]:
                if _overlap(mount.path, other.path):
                    self.problem(f"--volume: {mount.path} and {other.path} overlap")
        return tuple(mounts)


def _shown(text: str, flag: str) -> str:
    """A refused text as it may be printed: what was meant for a variable may be a secret."""
    return "an entry" if flag == "--env-var" else repr(text)


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(other + "/") or other.startswith(one + "/")


def python_package(text: str) -> str | None:
    if text.strip() != text or not text or text.startswith("-") or names.control_character(text):
        return f"{text!r} is no requirement, such as flashinfer-python==0.7.0"
    return None


def system_package(text: str) -> str | None:
    return (
        None
        if _DEBIAN.fullmatch(text)
        else f"{text!r} is no Debian package, such as ffmpeg or ffmpeg=7:4.4.2"
    )
