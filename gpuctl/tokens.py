"""The proxy token of each account: made once, after asking, and kept in a file that only this user may read.

A token opens every authenticated endpoint of a Modal workspace (or of the local plane), so one is enough.
The secret goes to stdout in `gpuctl token` and into request headers: never into argv, a record, a log, an
error.

May import: `gpuctl.errors`, `files`, `modal_cli`, `paths`, `reach`, `records`, `target`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpuctl.errors import GpuctlError, usage_error
from gpuctl.files import locked, write_private
from gpuctl.modal_cli import proxy_token_create_argv, shown
from gpuctl.paths import state_dir
from gpuctl.reach import account, environment_name, reach
from gpuctl.records import Records, now
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import ModalEnv, Runner

SCHEMA = 1
TOKEN_NAME = "gpuctl"  # noqa: S105 (what it is called in the workspace's list)


@dataclass(frozen=True)
class ProxyToken:
    id: str
    secret: str = field(repr=False)

    @property
    def bearer(self) -> str:
        """What goes after `Authorization: Bearer`, and what an OpenAI client takes as its api_key."""
        return f"{self.id}.{self.secret}"


class Tokens:
    """The tokens kept on this machine, in `STATE/tokens.json` (0600)."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "tokens.json"

    def kept(self, env: ModalEnv) -> ProxyToken | None:
        entry = self._read().get(account(env))
        return ProxyToken(entry["token_id"], entry["token_secret"]) if entry else None

    def token_for(self, env: ModalEnv, *, runner: Runner, may_create: Callable[[], bool]) -> ProxyToken:
        """The kept token, or a new one; on Modal `may_create` is asked first (it may raise)."""
        kept = self.kept(env)
        if kept is not None:
            return kept
        if env.target is Target.MODAL and not may_create():
            raise GpuctlError("no token was made", hint="this endpoint answers only with one")
        with locked(self._path.with_suffix(".lock")):
            kept = self.kept(env)  # another gpuctl may have made it while this one waited or asked
            if kept is not None:
                return kept
            token = _create(env, runner)
            self._keep(env, token)
            return token

    def forget(self, env: ModalEnv) -> None:
        """Drop the kept token, so that the next use makes a new one."""
        with locked(self._path.with_suffix(".lock")):
            tokens = self._read()
            if tokens.pop(account(env), None) is not None:
                self._write(tokens)

    def _keep(self, env: ModalEnv, token: ProxyToken) -> None:
        tokens = self._read()
        if env.target is Target.LOCAL:
            # There is one plane: what belonged to an earlier one opens nothing any more.
            tokens = {key: entry for key, entry in tokens.items() if not key.startswith("local/")}
        tokens[account(env)] = {"token_id": token.id, "token_secret": token.secret, "created_at": now()}
        self._write(tokens)

    def _write(self, tokens: dict[str, Any]) -> None:
        write_private(self._path, json.dumps({"schema": SCHEMA, "tokens": tokens}, indent=2) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            tokens = json.loads(self._path.read_text(encoding="utf-8"))["tokens"]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError):
            raise GpuctlError(f"{self._path}: not readable as gpuctl's tokens", hint="move it away") from None
        return dict(tokens)


def workspace_token(env: ModalEnv, runner: Runner, console: Console, *, yes: bool) -> ProxyToken:
    """The token of the account or plane behind `env`: kept, or made, on Modal after asking (or `yes`)."""

    def may_create() -> bool:
        return yes or console.confirm(
            "The endpoint wants a proxy token. Make one in your Modal workspace and keep it in a private file?",
            refused="--yes: needed to make a proxy token in your Modal workspace when nobody can be asked",
        )

    return Tokens(state_dir()).token_for(env, runner=runner, may_create=may_create)


def endpoint_token(
    name: str | None,
    target: Target | None,
    environment: str | None,
    *,
    new: bool,
    yes: bool,
    runner: Runner,
    console: Console,
) -> ProxyToken:
    """The token that the endpoint `name` wants; without a name, that of the target.

    `target=None`: none was asked for. Then it is the target of the only deployment that there is, else Modal.
    """
    records = Records(state_dir())
    if name is not None:
        where = target or Target.MODAL
        record = records.find(name, where, environment_name(where, environment))
        if not record.auth:
            raise usage_error(f"'{name}' was deployed with --no-auth: it wants no token")
    elif target is None:
        running = {record.target for record in records.all() if record.running}
        where = running.pop() if len(running) == 1 else Target.MODAL
    else:
        where = target
    env = reach(where)
    if new:
        Tokens(state_dir()).forget(env)
    return workspace_token(env, runner, console, yes=yes)


def _create(env: ModalEnv, runner: Runner) -> ProxyToken:
    argv = proxy_token_create_argv(TOKEN_NAME)
    done = runner.run(argv, env)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        raise GpuctlError(f"`{shown(argv)}` failed: {reason[0].removeprefix('Error: ')}")
    try:
        made = json.loads(done.stdout)
        return ProxyToken(made["Modal-Key"], made["Modal-Secret"])
    except (ValueError, KeyError, TypeError):
        # Not its output: that may hold the secret.
        raise GpuctlError(f"`{shown(argv)}` printed something else than a token") from None
