"""A spec becomes source. May import: gpuctl.errors, paths, specs, target; jinja2 where it is used.

Every value enters a template as a Python literal (`finalize`), so that no text of a user's can become code; what is
code already says so by its type (`Code`). The output is formatted as `ruff format` would leave it, by construction:
whatever can be long stands one per line with a trailing comma.
"""

from __future__ import annotations

import contextlib
import functools
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpuctl import __version__, paths
from gpuctl.errors import GpuctlError
from gpuctl.specs.engine_args import GPU_MEMORY_UTILIZATION, gives
from gpuctl.specs.resources import CACHES, Amount
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import jinja2

    from gpuctl import catalog
    from gpuctl.specs.batch import BatchSpec
    from gpuctl.specs.gpu import GpuRequest
    from gpuctl.specs.model import ModelRef
    from gpuctl.specs.serve import ServeSpec

_WIDTH = 88  # ruff's default


class Code(str):
    """Text that is Python already, and enters a template as it is."""

    __slots__ = ()


class Engine(Protocol):
    """What a spec says of the engine and its image, whichever verb it is of."""

    @property
    def model(self) -> ModelRef | None: ...
    @property
    def engine_build(self) -> catalog.Build: ...
    @property
    def vllm_version(self) -> str: ...
    @property
    def gpu(self) -> GpuRequest | None: ...
    @property
    def pipeline_parallel(self) -> int: ...
    @property
    def max_model_len(self) -> int | None: ...
    @property
    def engine_args(self) -> tuple[str, ...]: ...
    @property
    def env_vars(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def target(self) -> Target: ...


def render_serve(spec: ServeSpec, *, argv: Sequence[str], head: Sequence[str] = ()) -> str:
    """The module that serves `spec`, headed by the command `argv` (without the program's name) and what was decided."""
    context = {
        **engine_context(spec, spec.model),
        **resources_context(spec),
        "header": header(argv, head),
        "name": spec.name,
        "concurrency": spec.concurrency,
        "startup_timeout": spec.startup_timeout,
        "min_containers": spec.min_containers,
        "max_containers": spec.max_containers,
        "buffer_containers": spec.buffer_containers,
        "scaledown": spec.scaledown,
        "routing_region": spec.routing_region,
        "auth": spec.auth,
    }
    return rendered("serve/vllm.py.jinja", context)


def engine_context(spec: Engine, model: ModelRef) -> dict[str, Any]:
    """The values of the templates that start vLLM with `model`, and of its image."""
    build = spec.engine_build
    tiny = model.repo is None
    return {
        "tiny": tiny,
        "model": model.title,
        "pinned": model.pinned,
        "revision": model.revision or "main",
        "served_names": model.served_names,
        "vllm_version": spec.vllm_version,
        "tensor_parallel": 1 if spec.target is Target.LOCAL or spec.gpu is None else tensor_parallel(spec),
        "pipeline_parallel": spec.pipeline_parallel,
        "gpu_memory_utilization": None
        if gives(spec.engine_args, GPU_MEMORY_UTILIZATION)
        else build.gpu_memory_utilization,
        "max_model_len": spec.max_model_len,
        "engine_args": [*engine_args(model, build), *spec.engine_args],
        "build": build,
        "remove_command": f"python -m pip uninstall -y {' '.join(build.remove)}",
        "env": [*build.env.items(), *(OFFLINE if tiny else {}).items(), *spec.env_vars],
    }


def resources_context(spec: ServeSpec | BatchSpec) -> dict[str, Any]:
    """The values of the templates that say what a container is given."""
    caches = () if spec.model is None else CACHES
    return {
        "gpus": [str(choice) for choice in spec.gpu.choices] if spec.gpu else [],
        "tags": spec.tags,
        "apt": spec.apt,
        "pip": spec.pip,
        "secrets": spec.secrets,
        "secrets_from_env": spec.secrets_from_env,
        "volumes": [*caches, *((mount.name, mount.path) for mount in spec.volumes)],
        "cpu": spec.cpu,
        "memory": spec.memory,
        "ephemeral_disk": spec.ephemeral_disk,
        "region": spec.region,
        "cloud": spec.cloud,
    }


def rendered(template: str, context: Mapping[str, Any]) -> str:
    """A template with its values, each of which stands there as a Python literal unless it is `Code`."""
    return _environment().get_template(template).render(context)


def tensor_parallel(spec: Engine) -> int | None:
    """How many GPUs each layer is split over; None: only the container knows how many it has."""
    count = None if spec.gpu is None else spec.gpu.tensor_parallel
    return None if count is None else count // spec.pipeline_parallel


def engine_args(model: ModelRef, build: catalog.Build) -> list[str]:
    """The arguments that gpuctl gives the engine of itself, with this build."""
    return list(dict.fromkeys([*build.args, *(_TINY_ARGS if model.repo is None else ())]))


_TINY_ARGS = ("--load-format", "dummy", "--enforce-eager")
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # there is nothing to look up


def literal(value: object) -> str:
    """A Python literal of a text, a number, a truth value or None, spelled as `ruff format` spells it."""
    if isinstance(value, Code):
        return str(value)
    if isinstance(value, str):
        return _text_literal(str(value))
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    # A list or an object here is a mistake of the template: its parts are to be written one by one. An undefined
    # name must fail too, and its repr() does not; str() does.
    raise TypeError(f"no literal for {type(value).__name__}: {value}")


def header(argv: Sequence[str], head: Sequence[str] = ()) -> Code:
    """Comment lines with the command that made the file, on one line, whatever the arguments hold, and `head`.

    The command stands on the third line: in the first two, a comment that holds `coding:` would choose the encoding
    of the file (PEP 263).
    """
    command = " ".join(["gpuctl", *map(shell_word, argv)])
    decided = "".join(f"\n#\n# {line}" for text in head for line in [text])
    return Code(f"# Made with gpuctl {__version__}, by this command:\n#\n#     {command}{decided}")


def shell_word(text: str) -> str:
    """One word for a shell, on one line: as it is, '…', or $'…' where it holds what cannot be printed."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = (_shell_escape(character) for character in text)
    return "$'" + "".join(escaped) + "'"


def _shell_escape(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if character.isprintable():
        return character
    return {"\n": "\\n", "\t": "\\t"}.get(character) or f"\\U{ord(character):08x}"


def _text_literal(text: str) -> str:
    # ruff's choice of quotes: double, unless single ones need fewer escapes.
    quote = "'" if text.count('"') > text.count("'") else '"'
    body = "".join(
        "\\" + character if character in (quote, "\\") else _python_escape(character) for character in text
    )
    return quote + body + quote


def _python_escape(character: str) -> str:
    if character.isprintable():
        return character
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character)
    code = ord(character)
    return named or (
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )


def _after(value: str, before: str) -> Code:
    """A literal on the right of an assignment, in parentheses where only so the line is not too long."""
    text = literal(value)
    if len(before) + len(text) <= _WIDTH or 4 + len(text) > _WIDTH:
        return Code(text)
    return Code(f"(\n    {text}\n)")


def _amount(amount: Amount) -> Code:
    """What Modal takes for cpu= and memory=: a number, or (request, limit)."""
    if amount.limit is None:
        return Code(literal(amount.request))
    return Code(f"({literal(amount.request)}, {literal(amount.limit)})")


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates()),
        bytecode_cache=_compiled(),
        undefined=jinja2.StrictUndefined,
        finalize=literal,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - the output is Python, and `literal` is its escaping
    )
    filters: dict[str, Any] = {"after": _after, "amount": _amount}
    environment.filters.update(filters)
    return environment


def _compiled() -> jinja2.BytecodeCache | None:
    """Templates as Python compiled them, in the cache: compiling takes as long as all else that is done to render.

    What is there is found by the template's text, and by the versions that made it; where nothing can be kept, every
    command compiles for itself.
    """
    import jinja2

    class Compiled(jinja2.FileSystemBytecodeCache):
        def dump_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
            with contextlib.suppress(OSError):
                super().dump_bytecode(bucket)

    try:
        folder = paths.cache_dir() / "templates"
        folder.mkdir(mode=0o700, exist_ok=True)
    except (OSError, GpuctlError):
        return None
    # The options of the environment are part of what was compiled, and come with gpuctl's version.
    return Compiled(str(folder), f"%s-{__version__}-jinja{jinja2.__version__}")


def templates() -> Path:
    """The folder of the templates: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "templates", package.parent / "templates"):
        if (folder / "serve").is_dir():
            return folder
    raise GpuctlError(f"the templates are missing: looked in {package / 'templates'}; reinstall gpuctl")
