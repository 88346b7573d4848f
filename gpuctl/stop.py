"""Stop what gpuctl deployed. May import: `gpuctl.errors`, `modal_cli`, `paths`, `reach`, `records`, `target`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuctl.errors import GpuctlError
from gpuctl.modal_cli import app_stop_argv, shown
from gpuctl.paths import state_dir
from gpuctl.reach import environment_name, reach
from gpuctl.records import DeploymentRecord, Records
from gpuctl.target import Target

if TYPE_CHECKING:
    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import Runner


def stop_deployment(
    name: str, target: Target, environment: str | None, *, yes: bool, runner: Runner, console: Console
) -> DeploymentRecord:
    """The record of what was stopped. On Modal it asks first; on this machine, where nothing is lost, never."""
    records = Records(state_dir())
    record = records.find(name, target, environment_name(target, environment))
    env = reach(target)
    if target is Target.MODAL and not yes:
        question = f"Stop '{name}' on Modal (environment '{record.environment}')? Its containers end at once."
        if not console.confirm(question, refused="--yes: needed to stop when there is no terminal to ask on"):
            raise GpuctlError("not stopped")
    argv = app_stop_argv(record.app, environment=environment)
    console.detail(f"$ {shown(argv)}")
    done = runner.run(argv, env)
    if done.returncode != 0:
        reason = " ".join((done.stderr or done.stdout).split()).removeprefix("Error: ")
        if "already stopped" in reason.lower() or "not found" in reason.lower() or "No App" in reason:
            records.mark_stopped(record) if record.running else None
            raise GpuctlError(f"'{name}' was not running: {reason}")
        raise GpuctlError(f"`{shown(argv)}` failed: {reason}")
    console.done(f"stopped {name}")
    return records.mark_stopped(record)
