"""How a target is reached: the environment of the `modal` child, and the Modal Environment that it will use.

May import: `gpuctl.errors`, `gpuctl.paths`, `gpuctl.target`, `gpuctl.modal_cli`, `gpuctl.local.client`,
`gpuctl.specs.names`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl.errors import GpuctlError, usage_error
from gpuctl.modal_cli import ModalEnv
from gpuctl.paths import cache_dir, found_as, state_dir
from gpuctl.specs import names
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_ENVIRONMENT = "main"

NO_CREDENTIALS = "no credentials for Modal: run `modal setup`, or use --local (this machine, no account)"


def reach(target: Target) -> ModalEnv:
    """The child's environment. For the local target: of the plane that runs, which is started where none does."""
    if target is Target.MODAL:
        check_credentials()
        return ModalEnv.modal()
    from gpuctl.local import client

    plane = client.ensure_up(state_dir() / "local", cache_dir() / "local")
    return ModalEnv.local(plane.client_env())


def plane_is_down() -> bool:
    """Whether there is no local control plane and none is missed: never started, or stopped by the user.

    One that was killed, as by a crash of the machine, is missed: what was deployed comes back with it.
    """
    from gpuctl.local import client

    folder = state_dir() / "local"
    return client.running(folder) is None and not client.was_killed(folder)


def lost(target: Target) -> GpuctlError | None:
    """What to say where a target that was reached is there no longer; of Modal's cloud its client tells that."""
    if target is Target.MODAL:
        return None
    from gpuctl.local import client

    folder = state_dir() / "local"
    if client.running(folder) is not None or client.coming_back(folder):
        return None
    how = "was killed" if client.was_killed(folder) else "was stopped"
    return GpuctlError(
        f"the local control plane {how}",
        hint=f"`{own('gpuctl')} local up` brings it back, and what is deployed there; "
        f"its log: {own('gpuctl')} local logs",
    )


_LITTLE = 1 << 20  # bytes: with less than that nothing is stored any more


def disk_is_full(target: Target) -> Path | None:
    """The folder of this machine's plane, where its disk has no room; None where it has, or the target is Modal's."""
    if target is not Target.LOCAL:
        return None
    folder = state_dir() / "local"
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return folder if disk.f_bavail * disk.f_frsize < _LITTLE else None


def environment_name(target: Target, wanted: str | None) -> str:
    """The Modal Environment that a command works in, as the client would choose it. It names folders of ours too."""
    flag = "--env"
    if not wanted and target is Target.MODAL:
        flag = (
            "MODAL_ENVIRONMENT"
            if os.environ.get("MODAL_ENVIRONMENT")
            else "the environment of Modal's profile"
        )
        wanted = os.environ.get("MODAL_ENVIRONMENT") or _profile().get("environment")
    name = wanted or DEFAULT_ENVIRONMENT
    wrong = names.environment_name(name)
    if wrong:
        raise usage_error(f"{flag}: {wrong}")
    return name


_ENVIRONMENT = re.compile(r"[Ee]nvironment '(?P<name>[^']+)' (?:was )?(?:not found|does not exist)")


def no_environment(text: str, target: Target) -> GpuctlError | None:
    """Modal's complaint about an Environment that does not exist, as ours; None where that is not what it says."""
    missing = _ENVIRONMENT.search(text)
    if missing is None:
        return None
    name = missing["name"]
    return usage_error(
        f"--env: there is no environment named '{name}'",
        hint=f"{modal_command(target)} environment create {shlex.quote(name)}",
    )


def modal_command(target: Target) -> str:
    """How the user's shell runs Modal's client for a target: with the plane's settings, where it is this machine."""
    return f"{own('gpuctl')} local exec -- modal" if target is Target.LOCAL else own("modal")


def own(program: str) -> str:
    """How the user's shell, where it stands, runs a program that is installed beside gpuctl."""
    folder = Path(sys.executable).parent
    try:
        here = Path.cwd()
    except FileNotFoundError:  # deleted under the shell that stands in it
        here = Path("/")
    return found_as(folder / program, folder=here, path=os.environ.get("PATH", os.defpath))


def check_credentials(environ: Mapping[str, str] | None = None) -> None:
    """Refuse early where there are plainly none; what the client makes of those that exist is its answer."""
    environ = os.environ if environ is None else environ
    if environ.get("MODAL_TOKEN_ID") or environ.get("MODAL_OAUTH_REFRESH_TOKEN"):
        return
    profile = _profile(environ)
    if not (profile.get("token_id") or profile.get("oauth_refresh_token")):
        raise usage_error(NO_CREDENTIALS)


def account(env: ModalEnv) -> str:
    """A name for whose tokens are used, that changes when the account or the plane does; not a secret."""
    variables = env.variables
    if env.target is Target.MODAL and not variables.get("MODAL_TOKEN_ID"):
        name, _ = _active_profile(variables)
        return f"{env.target}/{name}"
    digest = hashlib.sha256(variables.get("MODAL_TOKEN_ID", "").encode()).hexdigest()
    return f"{env.target}/{digest[:16]}"


def _profile(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    return _active_profile(os.environ if environ is None else environ)[1]


def _active_profile(environ: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The name and content of the active profile in Modal's configuration file; empty when there is none."""
    path = Path(environ.get("MODAL_CONFIG_PATH") or Path.home() / ".modal.toml").expanduser()
    try:
        profiles = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "default", {}
    tables = {name: table for name, table in profiles.items() if isinstance(table, dict)}
    active = [name for name, table in tables.items() if table.get("active")]
    name = environ.get("MODAL_PROFILE") or (active[0] if active else "default")
    return name, tables.get(name, {})
