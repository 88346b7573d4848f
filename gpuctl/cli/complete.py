"""Completion of deployment names, from the records alone: no process is started, nothing is asked over a network.

May import: typer, `gpuctl.paths`, `gpuctl.target`.
"""

from __future__ import annotations

import os

import typer  # noqa: TC002 (typer reads the annotations at run time)

from gpuctl.target import Target


def deployment_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of what was deployed to the target that the command line names so far.

    `--local` often comes after the name: where there is none on Modal that would fit, this machine's are proposed.
    """
    local = ctx.params.get("local") or os.environ.get("GPUCTL_TARGET") == Target.LOCAL
    environment = ctx.params.get("env") or "*"
    found = [] if local else _names(Target.MODAL, environment, incomplete)
    return found or _names(Target.LOCAL, environment, incomplete)


def _names(target: Target, environment: str, incomplete: str) -> list[str]:
    from gpuctl.paths import state_dir

    try:
        found = (state_dir() / "deployments" / target).glob(f"{environment}/*.json")
        return sorted({path.stem for path in found if path.stem.startswith(incomplete)})
    except OSError:
        return []
