"""What is deployed: gpuctl's records joined with one `modal app list`.

May import: `gpuctl.errors`, `modal_cli`, `paths`, `reach`, `records`, `target`, `times`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpuctl.errors import GpuctlError
from gpuctl.modal_cli import app_list_argv
from gpuctl.modal_cli import shown as as_typed
from gpuctl.paths import state_dir
from gpuctl.reach import environment_name, no_environment, plane_is_down, reach
from gpuctl.records import DeploymentRecord, Records, place
from gpuctl.target import Target
from gpuctl.times import age

if TYPE_CHECKING:
    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import Runner

STOPPED = "stopped"


@dataclass(frozen=True)
class Row:
    """One deployment as it stands. `state` is Modal's own word."""

    record: DeploymentRecord
    state: str
    containers: int

    def document(self) -> dict[str, Any]:
        """One element of `ps --json` (docs/json.md)."""
        record = self.record
        return {
            "name": record.name,
            "target": record.target.value,
            "environment": record.environment,
            "model": record.model.served_name,
            "revision": record.model.revision,
            "gpu": ",".join(record.gpu) or None,
            "state": self.state,
            "containers": self.containers,
            "url": record.url,
            "base_url": record.base_url,
            "app_id": record.app_id,
            "deployed_at": record.deployed_at,
        }

    def cells(self) -> tuple[str, ...]:
        record = self.record
        return (
            record.name,
            record.model.repo or record.model.served_name,
            ",".join(record.gpu) or ("cpu" if record.target is Target.LOCAL else "-"),
            self.state,
            str(self.containers),
            (record.url if self.state != STOPPED else "") or "-",
            age(record.deployed_at),
        )


def deployments(
    target: Target, environment: str | None, *, every: bool, runner: Runner, console: Console
) -> list[Row]:
    """Newest first; stopped ones only where `every`. Costs one `modal` process; a plane that is down stays so."""
    wanted = environment_name(target, environment)
    records = Records(state_dir()).all(target, wanted)
    if target is Target.LOCAL and plane_is_down():
        console.say(
            "the local control plane is not running, so nothing runs here (start it: gpuctl local up)"
        )
        return [Row(record, STOPPED if not record.running else "down", 0) for record in records if every]
    apps = _apps(target, environment, runner, console)
    rows = [_row(record, apps) for record in records]
    shown = [row for row in rows if every or row.state != STOPPED]
    if not shown:
        console.say(
            f"nothing of gpuctl's is deployed on {place(target, wanted)}"
            + (" any more; what was: gpuctl ps --all" if rows else "; deploy a model: gpuctl serve MODEL")
            + (" --local" if target is Target.LOCAL else "" if rows else " --gpu TYPE")
        )
    return shown


def _apps(target: Target, environment: str | None, runner: Runner, console: Console) -> list[dict[str, Any]]:
    argv = app_list_argv(environment=environment)
    console.detail(f"$ {as_typed(argv)}")
    done = runner.run(argv, reach(target))
    if done.returncode != 0:
        missing = no_environment(done.stderr, target)
        if missing is not None:
            raise missing
        raise GpuctlError(
            f"`{as_typed(argv)}` failed: {' '.join(done.stderr.split()).removeprefix('Error: ')}"
        )
    try:
        return list(json.loads(done.stdout))
    except ValueError:
        raise GpuctlError(f"`{as_typed(argv)}` printed no JSON: {done.stdout[:200]}") from None


def _row(record: DeploymentRecord, apps: list[dict[str, Any]]) -> Row:
    """By app id; by name where the same name was deployed again behind gpuctl's back."""
    for app in apps:
        if app["app_id"] == record.app_id and not _is_stopped(app):
            return Row(record, str(app["state"]), int(app["tasks"]))
    for app in apps:
        if app["description"] == record.name and not _is_stopped(app) and app["state"] == "deployed":
            again = dataclasses.replace(record, app_id=str(app["app_id"]))
            return Row(again, str(app["state"]), int(app["tasks"]))
    return Row(record, STOPPED, 0)


def _is_stopped(app: dict[str, Any]) -> bool:
    return bool(app.get("stopped_at")) or str(app["state"]).startswith("stopp")
