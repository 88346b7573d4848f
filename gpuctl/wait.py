"""Wait until a chat request completes, and say which stage it is in meanwhile.

Two things are watched at once, each in a thread that reports to the loop in `wait_until_answers`: the app's log
(`modal app logs -f`), which tells the stages and a crash; and the endpoint itself, which is asked through its
public URL until it answers. An answer ends the wait well; a crash ends it at once, and so do the app's or the
local control plane's own end, and the deadline.
May import: `gpuctl.errors`, `gpuctl.modal_cli`, `gpuctl.target`, `gpuctl.tokens`.
"""

from __future__ import annotations

import collections
import contextlib
import json
import queue
import re
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from gpuctl.errors import GpuctlError
from gpuctl.modal_cli import app_logs_argv, shown
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import Follower, ModalEnv, Runner
    from gpuctl.tokens import ProxyToken

STAGES = ("image", "container", "weights", "engine", "first_answer")

DOING = {
    "container": "waiting for a container",
    "weights": "starting vLLM and loading the weights",
    "engine": "starting the engine",
    "first_answer": "asking a first question",
}

# How long a container may take to be found and its image to be pulled, on top of its own start-up time.
PULL_ALLOWANCE = 900.0
# A token that was just made may be unknown to the routers for a moment.
REFUSED_ALLOWANCE = {Target.MODAL: 20.0, Target.LOCAL: 2.0}
# A URL that was just made, too.
NOT_FOUND_ALLOWANCE = 30.0
# A changed deployment answered, but no new container was seen: the answer may be the old one's.
OLD_CONTAINER_ALLOWANCE = 15.0
# What is gone may be back at once: a control plane that was killed comes back with any command.
LOST_ALLOWANCE = 1.0
# After a crash was seen, the rest of its last words.
LAST_WORDS = 0.4
TAIL = 20

QUESTION = "Say hello in one short sentence."


# -- the log


@dataclass(frozen=True)
class LogLine:
    """One line of `modal app logs --timestamps --show-container-id`."""

    at: float | None  # seconds since the epoch, whole
    container: str | None
    text: str

    _PREFIX = re.compile(
        r"^(?P<at>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?[+-]\d\d:\d\d) (?:(?P<container>ta-\S+) )?(?P<text>.*)$"
    )
    _COLOR = re.compile(r"\x1b\[[0-9;]*m")

    @classmethod
    def parse(cls, raw: str) -> LogLine:
        raw = cls._COLOR.sub("", raw)
        match = cls._PREFIX.match(raw)
        if match is None:
            return cls(None, None, raw)
        at = datetime.fromisoformat(match["at"]).timestamp()
        return cls(at, match["container"], match["text"])


# The line that begins each stage: those that the deployed file prints, and vLLM's own (0.32).
BEGINS = (
    ("weights", re.compile(r"^\[serve\] container up")),
    # The later ones are for weights that are made up (`--load-format dummy`), whose loading it does not log.
    (
        "engine",
        re.compile(r"Loading weights took |Model loading took |KV cache layout|KV cache (?:size|memory):"),
    ),
    ("first_answer", re.compile(r"^\[serve\] engine listening")),
)
READY = re.compile(r"^\[serve\] ready")

CRASH = re.compile(
    r"^\[serve\] engine (?:exited with code|not ready within|refused the first question)"
    r"|^Runner failed with "  # Modal: the container's process ended by itself
    r"|\bcontainer \S+ (?:exited|ended|died) (?:with|by|on) (?!code 0\b|status 0\b)"
    # The local plane: an exception at import or in `@modal.enter`, after which the process ends as it should.
    r"|^container ta-\S+ (?:could not be started: |exited with code 0 before it was ready)"
)

# What the log says, and what helps; the first that matches anything in the log is shown. An honest short list.
HINTS = (
    (
        re.compile(r"is greater than the derived max_model_len"),
        "--max-model-len is more than the model was made for: give less, or leave it out",
    ),
    (
        re.compile(
            r"KV cache is needed, which is larger than the available|estimated maximum model length is"
        ),
        "the context does not fit beside the weights: a smaller --max-model-len, or a GPU with more memory",
    ),
    (
        re.compile(
            r"CUDA out of memory|OutOfMemoryError|No available memory for the cache blocks"
            r"|Free memory on device .* is less than desired"
        ),
        "out of GPU memory: a bigger GPU, more of them (--gpu TYPE:2), or a smaller --max-model-len",
    ),
    (
        re.compile(
            r"exited with (?:code -9|signal 9|code 137)\b|exit code 137|OOMKilled|[Oo]ut of memory: Killed"
        ),
        "killed, most likely for want of memory: more with --memory, or a smaller model",
    ),
    (
        re.compile(r"GatedRepoError|gated repo|401 Client Error|Access to model .* is restricted"),
        "the model is gated: accept its licence on huggingface.co, then put HF_TOKEN in a secret and name it "
        "with --secret (or use --secret-from-env HF_TOKEN)",
    ),
    (
        re.compile(r"RepositoryNotFoundError|RevisionNotFoundError|404 Client Error"),
        "the model, or that revision of it, is not on the hub (or is private: HF_TOKEN in a --secret)",
    ),
    (
        re.compile(
            r"Model architectures \[.*\] (?:are not supported|failed to be inspected)"
            r"|does not recognize this architecture"
        ),
        "this vLLM does not know the model's architecture: try a newer one with --vllm-version",
    ),
    (
        re.compile(r"has no chat template|default chat template is no longer|must provide a chat template"),
        "the model has no chat template: use its instruct variant, or pass one: -- --chat-template FILE",
    ),
    (
        re.compile(r"error: unrecognized arguments: |error: argument "),
        "vLLM refused a flag that was given after `--`",
    ),
    (
        re.compile(
            r"LocalEntryNotFoundError|Name or service not known|Connection error|Max retries exceeded"
        ),
        "the container could not reach the hub to download the model",
    ),
    (
        re.compile(r"OSError: Can't load the configuration of|is not a valid model identifier"),
        "there is no such model, or the container could not reach the hub: check MODEL and its revision",
    ),
    (
        re.compile(r"pydantic_core\._pydantic_core\.ValidationError: "),
        "vLLM refused a setting; it says which above: what follows `--` reaches it untouched",
    ),
    (re.compile(r"[Aa]ddress already in use|Errno 98"), "the port is taken by another process"),
    (
        re.compile(r"No space left on device"),
        "the disk is full: more with --ephemeral-disk, or empty the Volumes",
    ),
    (
        re.compile(r"ModuleNotFoundError[:(].{0,3}No module named '"),
        "a Python package is missing in the image: add it with --pip",
    ),
    (
        re.compile(r"^ImportError: "),
        "a Python package in the image is broken, or does not fit the others: see --pip and --vllm-version",
    ),
)


def hint_for(lines: list[str]) -> str | None:
    """What would help, judged by the whole log of the container that failed."""
    for pattern, hint in HINTS:
        if any(pattern.search(line) for line in lines):
            return hint
    return None


class Log:
    """What the log has told: the stage, whether the engine is ready, whether the container crashed.

    Lines of containers that were up before `began` (an earlier deployment's, shutting down) count for nothing.
    """

    def __init__(self, *, began: float | None) -> None:
        self._began = began
        self._old: set[str] = set()
        self._lines: collections.deque[str] = collections.deque(maxlen=5000)
        self.stage = "container"
        self.container_seen = False
        self.ready = False
        self.crash: str | None = None

    def add(self, raw: str) -> bool:
        """Take one line; False where it is an earlier deployment's."""
        line = LogLine.parse(raw)
        if line.container in self._old:
            return False
        if self._began is not None and line.at is not None and line.at < int(self._began):
            if line.container:
                self._old.add(line.container)
            return False
        self._lines.append(line.text)
        for stage, pattern in BEGINS:
            if pattern.search(line.text) and STAGES.index(stage) > STAGES.index(self.stage):
                self.stage = stage
                self.container_seen = True
        if READY.search(line.text):
            self.ready = True
        if self.crash is None and CRASH.search(line.text):
            self.crash = line.text
        return True

    def lines(self) -> list[str]:
        return list(self._lines)

    def tail(self) -> list[str]:
        """Its last lines; without the traceback of the file that was deployed, which says the crash again."""
        kept: list[str] = []
        crashed = skipping = False
        for line in self._lines:
            crashed = crashed or line == self.crash
            if skipping:
                skipping = line.startswith(" ")  # the first line that is not indented is the exception
            elif crashed and line.startswith("Traceback (most recent call last):"):
                skipping = True
            elif line.strip():
                kept.append(line)
        return kept[-TAIL:]


# -- the endpoint


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, as which model, with which token (None: the endpoint takes no authentication)."""

    base_url: str
    model: str
    token: ProxyToken | None
    target: Target


@dataclass(frozen=True)
class Asked:
    """One attempt. `status` is None where there was no HTTP answer at all."""

    status: int | None
    body: str = field(repr=False, default="")
    seconds: float = 0.0
    chat: bool = True

    @property
    def text(self) -> str:
        """The model's words; a reasoning model may have spent the few tokens on thinking."""
        try:
            choice = json.loads(self.body)["choices"][0]
            message = choice["message"] if self.chat else {"content": choice["text"]}
        except (ValueError, LookupError, TypeError):
            return ""
        return str(
            message.get("content") or message.get("reasoning") or message.get("reasoning_content") or ""
        )

    @property
    def answered(self) -> bool:
        return self.status == 200 and '"choices"' in self.body

    @property
    def reason(self) -> str:
        """The body of a refusal, in one line."""
        with contextlib.suppress(ValueError, LookupError, TypeError):
            error = json.loads(self.body)["error"]
            return str(error["message"] if isinstance(error, dict) else error)
        return " ".join(self.body.split())[:300]


def ask(endpoint: Endpoint, *, chat: bool = True, timeout: float = 120.0) -> Asked:
    """One request through the endpoint's public URL: a chat, or a completion for a model that cannot chat."""
    import urllib.error
    import urllib.request

    question: dict[str, Any] = {"model": endpoint.model, "max_tokens": 24}
    question |= {"messages": [{"role": "user", "content": QUESTION}]} if chat else {"prompt": QUESTION}
    request = urllib.request.Request(  # noqa: S310 (the URL is the deployment's own)
        f"{endpoint.base_url}/{'chat/completions' if chat else 'completions'}",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json", "User-Agent": "gpuctl"},
    )
    if endpoint.token is not None:
        request.add_unredirected_header("Authorization", f"Bearer {endpoint.token.bearer}")
    # A proxy that the user has for the internet must not get what is meant for this machine.
    proxies = [urllib.request.ProxyHandler({})] if endpoint.target is Target.LOCAL else []
    began = time.monotonic()
    try:
        with urllib.request.build_opener(*proxies).open(request, timeout=timeout) as response:
            return Asked(response.status, response.read().decode(errors="replace"), time.monotonic() - began)
    except urllib.error.HTTPError as error:
        with error:
            return Asked(error.code, error.read().decode(errors="replace"), time.monotonic() - began)
    except (OSError, ValueError) as error:  # refused, reset, timed out, cut off in the middle
        return Asked(None, str(error), time.monotonic() - began)


class StoppedError(GpuctlError):
    """Somebody stopped the app while its answer was waited for: nothing stands any more."""


class _Prober(threading.Thread):
    """Asks again and again, in its own thread, and reports each outcome."""

    def __init__(self, endpoint: Endpoint, log: Log, reports: queue.Queue[Asked | str]) -> None:
        super().__init__(daemon=True)
        self._endpoint = endpoint
        self._log = log
        self._reports = reports
        self._stopped = False
        self.wake = threading.Event()

    def run(self) -> None:
        while not self._stopped:
            asked = ask(self._endpoint)
            if asked.status == 400 and "chat template" in asked.body:
                # A base model: it completes texts, and that is all that can be waited for.
                asked = replace(ask(self._endpoint, chat=False), chat=False)
            self._reports.put(asked)
            self.wake.wait(self._pause(asked))
            self.wake.clear()

    def stop(self) -> None:
        self._stopped = True
        self.wake.set()

    def _pause(self, asked: Asked) -> float:
        """Often when it is about to answer or costs nothing, seldom while Modal is loading weights."""
        if asked.status == 429:
            return 1.0
        if self._log.ready:
            return 0.05
        if self._log.stage == "first_answer" or self._endpoint.target is Target.LOCAL:
            return 0.2
        return 1.0


# -- the wait


@dataclass(frozen=True)
class Ready:
    """The endpoint answered: with what, and how many seconds each stage took (`container` … `first_answer`)."""

    text: str
    seconds: dict[str, float]


def wait_until_answers(
    endpoint: Endpoint,
    *,
    app_id: str,
    env: ModalEnv,
    environment: str | None,
    startup_timeout: float,
    began: float | None,
    expect_new_container: bool,
    lost: Callable[[], GpuctlError | None],
    runner: Runner,
    console: Console,
) -> Ready:
    """Return once a chat request completed; raise `GpuctlError` on a crash, a refusal or the deadline.

    `lost` says whether the target itself is gone, as a control plane that was killed is.

    `began`: when this deployment began (seconds since the epoch), or None when nothing was deployed before it
    under this name; older log lines are an earlier deployment's. `expect_new_container`: the answer of a
    container of an earlier deployment is not enough.
    """
    reports: queue.Queue[Asked | str] = queue.Queue()
    log = Log(began=began)
    argv = app_logs_argv(app_id, follow=True, timestamps=True, container_ids=True, environment=environment)
    prober = _Prober(endpoint, log, reports)
    watch = _Watch(log, endpoint, console, startup_timeout, expect_new_container)
    follower: Follower | None = None
    console.detail(f"$ {shown(argv)}")
    with console.spinner(DOING["container"]):
        try:
            follower = runner.follow(argv, env, reports.put)
            restarts, restart_at, well_ended = 0, 0.0, False
            prober.start()
            while True:
                with contextlib.suppress(queue.Empty):
                    report = reports.get(timeout=0.1)
                    if isinstance(report, str):
                        watch.line(report)
                        if log.ready or log.stage == "first_answer":
                            prober.wake.set()
                    else:
                        ready = watch.asked(report)
                        if ready is not None:
                            return ready
                watch.tick()
                watch.there(lost())
                # `logs -f` ends when the connection does; it is started again, a few times.
                ended = follower.returncode()
                if ended is not None and restarts < 5 and reports.empty():
                    if not restart_at:
                        restart_at = time.monotonic() + 1.0
                    elif time.monotonic() >= restart_at:
                        # It ends well where the app did, and only there. Twice, to be sure.
                        if ended == 0 and well_ended:
                            watch.stopped()
                        well_ended = ended == 0
                        restarts, restart_at = restarts + 1, 0.0
                        follower = runner.follow(argv, env, reports.put)
        finally:
            prober.stop()
            if follower is not None:
                follower.cancel()


class _Watch:
    """The judgement: given what the log and the endpoint say, go on, return, or raise."""

    def __init__(
        self, log: Log, endpoint: Endpoint, console: Console, startup_timeout: float, expect_new: bool
    ) -> None:
        self._log = log
        self._endpoint = endpoint
        self._console = console
        self._expect_new = expect_new
        self._startup_timeout = startup_timeout
        self._began = time.monotonic()
        self._shown_at = 0.0
        self._stage_began = self._began
        self._seconds: dict[str, float] = {}
        self._since: dict[str, float] = {}  # when a refusal of each kind was first met
        self._crashed_at: float | None = None
        self._lost_at: float | None = None
        self._begin_stage("container")

    def line(self, raw: str) -> None:
        if not self._log.add(raw):
            return
        self._console.detail(raw)
        if self._log.crash and self._crashed_at is None:
            self._crashed_at = time.monotonic()
        if self._log.stage != self._stage:
            self._end_stage()
            self._begin_stage(self._log.stage)

    def asked(self, asked: Asked) -> Ready | None:
        """Judge one attempt; the stages' seconds with the answer, None to go on."""
        status = asked.status
        if asked.answered:
            if self._expect_new and not self._log.container_seen:
                if self._lasts("old", OLD_CONTAINER_ALLOWANCE):
                    self._console.note(
                        "it answers, but no new container was seen: it may be the previous one"
                    )
                else:
                    return None
            if self._expect_new and self._log.container_seen and not self._log.ready:
                return None  # the old container answers while the new one starts
            if self._crashed_at is not None:
                return None
            if not asked.chat:
                self._console.warn(
                    "the model has no chat template: it answers at /v1/completions, but cannot chat"
                )
            self._stage = "first_answer"
            self._end_stage()
            return Ready(asked.text, self._seconds)
        if status in (401, 403):
            if self._lasts("refused", REFUSED_ALLOWANCE[self._endpoint.target]):
                raise GpuctlError(
                    f"the endpoint refuses the token (HTTP {status}): {asked.reason}",
                    hint="it may have been deleted: see `modal workspace proxy-tokens list`; "
                    "`gpuctl token --new` makes another",
                )
        elif status == 404:
            if self._lasts("missing", NOT_FOUND_ALLOWANCE):
                raise GpuctlError(f"the endpoint's URL answers 404: {asked.reason}", hint="was it stopped?")
        elif status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429):
            raise GpuctlError(
                f"the endpoint refused a chat request (HTTP {status}): {asked.reason}",
                hint=hint_for([asked.body]),
            )
        else:  # 503 from zero, 429 when busy, 5xx of a router, no connection yet
            self._since.clear()
        return None

    def tick(self) -> None:
        now = time.monotonic()
        if self._crashed_at is not None and now - self._crashed_at > LAST_WORDS:
            self._show_tail()
            raise GpuctlError(
                f"the container crashed while {DOING[self._stage]}: {self._log.crash}",
                hint=hint_for(self._log.lines()),
            )
        if now - self._began > self._startup_timeout + PULL_ALLOWANCE:
            self._show_tail()
            raise GpuctlError(
                f"no answer after {now - self._began:.0f} s, while {DOING[self._stage]}",
                hint=hint_for(self._log.lines()) or "give it longer with --startup-timeout",
            )
        if now - self._shown_at >= 0.5:
            self._shown_at = now
            self._console.progress(f"{DOING[self._stage]} … {now - self._stage_began:.0f} s")

    def there(self, lost: GpuctlError | None) -> None:
        """Raise what `lost` says, when the target has been gone for a moment."""
        if lost is None:
            self._lost_at = None
            return
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at = now
        if now - self._lost_at > LOST_ALLOWANCE:
            self._show_tail()
            raise GpuctlError(f"{'; '.join(lost.problems)} while {DOING[self._stage]}", hint=lost.hint)

    def stopped(self) -> None:
        self._show_tail()
        raise StoppedError(f"the app was stopped while {DOING[self._stage]}")

    def _begin_stage(self, stage: str) -> None:
        self._stage = stage
        self._shown_at = 0.0
        if not self._console.live:
            self._console.say(f"  {DOING[stage]} …")

    def _end_stage(self) -> None:
        now = time.monotonic()
        self._seconds[self._stage] = round(now - self._stage_began, 3)
        self._console.done(f"{self._stage.replace('_', ' ')}: {self._seconds[self._stage]:.1f} s")
        self._stage_began = now

    def _lasts(self, what: str, allowance: float) -> bool:
        """Whether `what` has been met for longer than allowed."""
        return time.monotonic() - self._since.setdefault(what, time.monotonic()) > allowance

    def _show_tail(self) -> None:
        tail = self._log.tail()
        if tail:
            self._console.error_block(f"the last {len(tail)} lines of its log:", tail)
