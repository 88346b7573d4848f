"""What will be done: the rendered source, what it costs, and what to say before.

May import: configs (its values), cost, prices (its values), render, catalog, specs, target, verdicts.

Pure: no network, and no disk but the templates and the catalogue. `--dry-run` shows the same plan that a deploy
executes, so the preview cannot lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl import catalog
from gpuctl.render import engine_args, render_serve
from gpuctl.specs.engine_args import GPU_MEMORY_UTILIZATION, gives
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuctl.cli.console import Console
    from gpuctl.configs import Found
    from gpuctl.cost import Cost
    from gpuctl.fit.values import Candidate
    from gpuctl.prices import Rates
    from gpuctl.specs.serve import ServeSpec

# What says how to show or to ask, not what to make: the same file comes of a command with and without them.
_ONLY_TALK = {
    "--dry-run", "--json", "--quiet", "-q", "--verbose", "-v", "--yes", "-y", "--wait", "--no-wait", "--detach",
    "--events", "--overwrite",
}  # fmt: skip
_ONLY_TALK_WITH_VALUE = {"--render"}


@dataclass(frozen=True)
class Plan:
    """A decided deployment. `argv` is the command that heads the file.

    `notes` and `warnings` are said before anything happens; `cost` is None where nothing is charged; `candidates` are
    the verdicts on the GPUs that may be handed out.
    """

    spec: ServeSpec
    source: str
    digest: str  # sha256 of the source, hexadecimal
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    cost: Cost | None
    candidates: tuple[Candidate, ...]
    argv: tuple[str, ...]

    def tell(self, console: Console) -> None:
        """What is to be known before: notes, then warnings, which `--quiet` does not silence."""
        for note in self.notes:
            console.note(note)
        for warning in self.warnings:
            console.warn(warning)


def plan_serve(
    spec: ServeSpec,
    found: Found,
    *,
    argv: Sequence[str],
    revision: str | None = None,
    rates: Rates | None = None,
) -> Plan:
    """Decide. `found`: what is known of the model; `argv`: the user's command line; `revision`: the exact commit,
    where it has been resolved; `rates`: the prices to reckon with, None: the catalogue's.

    A usage error where the model does not fit on a GPU that was asked for.
    """
    command = tuple(command_of(argv, spec.target))
    head: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    own = _whole_context(spec, found)
    if own is not None:
        spec = dataclasses.replace(spec, max_model_len=own)
    else:
        from gpuctl.verdicts import settle

        settled = settle(spec, found, rates or _list_prices(), argv=with_target(argv, spec.target))
        spec, head, said = settled.spec, settled.head, settled.notes
        warnings, candidates = settled.warnings, settled.candidates
    if revision is not None:
        spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, revision=revision))
    cost = lowered = None
    gpu = spec.gpu
    if gpu is not None and spec.target is not Target.LOCAL:
        from gpuctl.cost import cost_of, within

        rates = rates or _list_prices()
        if spec.max_hourly_cost is not None:
            from gpuctl.verdicts import starts_on

            spec, lowered = within(spec, gpu.choices, rates, starts=starts_on(spec, found, rates))
        cost = cost_of(spec, gpu.choices, rates)
    source = render_serve(spec, argv=command, head=head)
    notes = [*_notes(spec), *found.notes, *said]
    if lowered:
        notes.append(lowered)
    if cost is not None:
        notes += cost.notes()
    return Plan(
        spec=spec,
        source=source,
        digest=hashlib.sha256(source.encode()).hexdigest(),
        notes=tuple(notes),
        warnings=(*warnings, *(() if cost is None else cost.warnings())),
        cost=cost,
        candidates=candidates,
        argv=command,
    )


def _whole_context(spec: ServeSpec, found: Found) -> int | None:
    """The context of `tiny` on this machine, all of which fits: what `settle` says too, without importing its rooms.

    None: not so simple.
    """
    if spec.model.repo is not None or spec.gpu is not None or spec.auto or spec.target is not Target.LOCAL:
        return None
    if spec.max_model_len is not None or spec.engine_args or found.config is None:
        return None
    return int(found.config["max_position_embeddings"])


def _list_prices() -> Rates:
    from gpuctl.prices import from_catalogue

    return from_catalogue("nobody was asked")


def command_of(argv: Sequence[str], target: Target) -> Iterator[str]:
    """The command without what only says how to show it, and with the target that the environment gave."""
    words = with_target(argv, target)
    end = words.index("--") if "--" in words else len(words)
    own, engines = words[:end], words[end:]
    rest = iter(own)
    for word in rest:
        if word in _ONLY_TALK_WITH_VALUE:
            next(rest, None)
        elif word not in _ONLY_TALK and word.partition("=")[0] not in _ONLY_TALK_WITH_VALUE:
            yield word
    yield from engines


def with_target(argv: Sequence[str], target: Target) -> list[str]:
    """The command as it was typed, with the target that the environment gave."""
    words = list(argv)
    own = words[: words.index("--")] if "--" in words else words
    if target is Target.LOCAL and "--local" not in own:
        words.insert(1, "--local")
    return words


def _notes(spec: ServeSpec) -> Iterator[str]:
    model = spec.model
    if spec.gpu is not None:
        yield from spec.gpu.warnings
    if model.repo is None:
        yield f"{model.title} is a random model: a real engine and a real tokenizer, but its answers are nonsense"
    elif not model.pinned:
        yield (
            f"{model.repo}@{model.revision or 'main'} is not pinned: "
            "deploying resolves it to an exact commit and writes that into the file"
        )
    entry = model.entry
    token_given = bool(spec.secrets) or "HF_TOKEN" in spec.secrets_from_env
    if entry is not None and entry.gated and not token_given:
        modal = "gpuctl local exec -- modal" if spec.target is Target.LOCAL else "modal"
        yield (
            f"{model.repo} is gated: accept its licence at https://huggingface.co/{model.repo}, put a line HF_TOKEN=… "
            f"into a file, say hf.env, then `{modal} secret create huggingface --from-dotenv hf.env`, "
            "and add --secret huggingface"
        )
    for package in spec.pip:
        if "==" not in package and "@" not in package:
            yield f"--pip {package}: not an exact version (NAME==VERSION), so another build may get another one"
    since = spec.engine_build.since
    if since is not None and _release(spec.vllm_version) < _release(since):
        yield (
            f"--vllm-version {spec.vllm_version}: the image, {spec.engine_build.base}, suits vLLM since {since}; "
            "older ones are built for CUDA 12, and what they compile at start may fail"
        )
    if not spec.auth:
        yield "--no-auth: whoever has the URL can use the endpoint"
    if spec.target is Target.LOCAL:
        yield from _local_notes(spec)


def _release(version: str) -> tuple[int, ...]:
    """The three numbers of a version, which `--vllm-version` has checked."""
    return tuple(int(number) for number in re.findall(r"[0-9]+", version)[:3])


def _local_notes(spec: ServeSpec) -> Iterator[str]:
    cpu, cuda = catalog.vllm().cpu, catalog.vllm().cuda
    asked = f"; the GPU asked for, {spec.gpu}, is in the file, but not used" if spec.gpu else ""
    yield (
        f"local: the engine is {cpu.package} {spec.vllm_version} on this machine's CPU{asked}. On Modal only the "
        f"engine's build and the device would differ: {', '.join(_on_modal(spec, cpu, cuda))}"
    )
    if spec.model.repo is not None:
        size = spec.model.download_gib
        much = f"about {size:.0f} GiB" if size else "of unknown size"
        yield f"local: the weights ({much}) are downloaded to this machine and run on its CPU; for a rehearsal use tiny"
    if spec.max_hourly_cost is not None:
        yield "local: nothing is charged here, so --max-hourly-cost lowers nothing; on Modal it may"


def _on_modal(spec: ServeSpec, cpu: catalog.Build, cuda: catalog.Build) -> Iterator[str]:
    """What the file would say there that it does not say here, and the other way round."""
    yield f"{cuda.package} {spec.vllm_version} on {cuda.base}"
    if spec.gpu is None:
        yield "a GPU"
    elif spec.gpu.tensor_parallel == 1:
        yield f"{spec.gpu}"
    else:
        yield f"{spec.gpu} with the model split over the container's GPUs"
    if not gives(spec.engine_args, GPU_MEMORY_UTILIZATION):
        yield f"of whose memory the engine takes {cuda.gpu_memory_utilization:.0%}"
    there = [*engine_args(spec.model, cuda), *spec.engine_args, *cuda.env]
    only_here = [word for word in (*engine_args(spec.model, cpu), *cpu.env) if word not in there]
    yield f"without the settings for a CPU ({', '.join(only_here)})"
