"""Deployment records: what gpuctl deployed, one JSON file each, in one documented shape (docs/records.md).

Modal's own list knows an app's name and state, and nothing of models, GPUs or URLs, so this is what `ps`
joins with it. No credential is ever written here. May import: `gpuctl.errors`, `gpuctl.files`, `gpuctl.target`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from gpuctl.errors import GpuctlError, usage_error
from gpuctl.files import write_private
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SCHEMA = 1


@dataclass(frozen=True)
class ModelRecord:
    alias: str | None
    repo: str | None  # None: the deployed file makes the model itself
    revision: str | None  # the exact commit; None where there is no repository
    served_name: str  # what a request's `model` says


@dataclass(frozen=True)
class EngineRecord:
    name: str
    version: str


@dataclass(frozen=True)
class LimitsRecord:
    concurrency: int
    min_containers: int
    max_containers: int
    buffer_containers: int | None
    scaledown_seconds: int
    startup_timeout_seconds: int
    max_model_len: int | None


@dataclass(frozen=True)
class SourceRecord:
    path: str  # the file that was deployed, kept beside the records
    sha256: str


@dataclass(frozen=True)
class DeploymentRecord:
    """One deployment. Times are ISO 8601 in UTC."""

    name: str
    target: Target
    environment: str
    app_id: (
        str  # empty, as the URLs are: a deploy began and was killed, so what stands must be found by the name
    )
    server: str
    url: str
    base_url: str
    auth: bool
    model: ModelRecord
    engine: EngineRecord
    gpu: tuple[str, ...]
    limits: LimitsRecord
    argv: tuple[str, ...]
    source: SourceRecord
    deployed_at: str
    stopped_at: str | None
    gpuctl_version: str
    modal_version: str
    schema: int = SCHEMA
    usd_per_hour: float | None = (
        None  # of one container, as was said; None: not charged, or an older gpuctl's
    )

    def document(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> DeploymentRecord:
        """The inverse of `document`; fields that a later gpuctl added are passed over."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in document.items() if key in known}
        values["target"] = Target(values["target"])
        values["gpu"] = tuple(values["gpu"])
        values["argv"] = tuple(values["argv"])
        values["model"] = ModelRecord(**values["model"])
        values["engine"] = EngineRecord(**values["engine"])
        values["limits"] = LimitsRecord(**values["limits"])
        values["source"] = SourceRecord(**values["source"])
        return cls(**values)

    @property
    def app(self) -> str:
        """What Modal's client takes for the app: its id, or, where the deploy was killed, its name."""
        return self.app_id or self.name

    @property
    def running(self) -> bool:
        """Whether gpuctl did not stop it itself (somebody else may have: Modal's list tells)."""
        return self.stopped_at is None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Records:
    """The records of this machine: `STATE/deployments/TARGET/ENVIRONMENT/NAME.json`."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "deployments"

    def path(self, target: Target, environment: str, name: str) -> Path:
        return self._folder / target.value / environment / f"{name}.json"

    def save(self, record: DeploymentRecord) -> Path:
        path = self.path(record.target, record.environment, record.name)
        write_private(path, json.dumps(record.document(), indent=2) + "\n")
        return path

    def get(self, target: Target, environment: str, name: str) -> DeploymentRecord | None:
        path = self.path(target, environment, name)
        return self._read(path) if "/" not in name and path.is_file() else None

    def all(self, target: Target | None = None, environment: str | None = None) -> list[DeploymentRecord]:
        """Newest first."""
        pattern = f"{target.value if target else '*'}/{environment or '*'}/*.json"
        found = [self._read(path) for path in self._folder.glob(pattern)]
        return sorted(found, key=lambda record: record.deployed_at, reverse=True)

    def find(self, name: str, target: Target, environment: str) -> DeploymentRecord:
        """The record of `name`, or a usage error that says what is near, or where else it is."""
        record = self.get(target, environment, name)
        if record is not None:
            return record
        elsewhere = [other for other in self.all() if other.name == name]
        if elsewhere:
            other = elsewhere[0]
            use = []
            if other.target is not target:
                use.append("--local" if other.target is Target.LOCAL else "the command without --local")
            if other.environment != environment:
                use.append(f"--env {other.environment}")
            raise usage_error(
                f"no deployment named {name!r} on {place(target, environment)}, but there is one on "
                f"{place(other.target, other.environment)}: use {' and '.join(use)}"
            )
        known = [record.name for record in self.all(target, environment)]
        raise usage_error(
            f"no deployment named {name!r} on {place(target, environment)}{_near(name, known)}",
            hint="gpuctl ps" + (" --local" if target is Target.LOCAL else ""),
        )

    def mark_stopped(self, record: DeploymentRecord) -> DeploymentRecord:
        stopped = dataclasses.replace(record, stopped_at=now())
        self.save(stopped)
        return stopped

    def remove(self, record: DeploymentRecord) -> None:
        self.path(record.target, record.environment, record.name).unlink(missing_ok=True)

    @staticmethod
    def _read(path: Path) -> DeploymentRecord:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["schema"] > SCHEMA:
                raise GpuctlError(f"{path}: written by a newer gpuctl (schema {document['schema']})")
            return DeploymentRecord.from_document(document)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GpuctlError(
                f"{path}: not a deployment record: {error}", hint="move the file away and deploy again"
            ) from error


def place(target: Target, environment: str) -> str:
    """Where a deployment is, in words; on this machine Environments other than the first are rare."""
    if target is Target.MODAL:
        return f"Modal (environment '{environment}')"
    return "this machine" + (f" (environment '{environment}')" if environment != "main" else "")


def _near(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(repr(one) for one in near)}?"
    return f"; there are: {', '.join(sorted(known)[:8])}" if known else "; nothing is deployed there"
