"""The verdict in the way of a deployment: GPUs chosen, refused or kept, and the context that they have room for.

Pure but for what it is given. May import: catalog, configs (its values), cost, errors, fit, fitting, prices (its
values), render, specs, target.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl import catalog
from gpuctl.catalog.overheads import engine_constants
from gpuctl.cost import cost_of
from gpuctl.errors import GpuctlError, usage_error
from gpuctl.fit.overheads import batch
from gpuctl.fit.values import GIB, Ask, Verdict
from gpuctl.fitting import (
    Assessment,
    assess,
    card_of,
    cards,
    check_context,
    facts_of,
    judge_choice,
    judge_with,
    longest_of,
    many,
    pick_of,
    requests_of,
    siblings_of,
    spelled,
    unknown,
    wanted,
)
from gpuctl.specs.engine_args import memory_args
from gpuctl.specs.fit import DTYPES, KV_DTYPES, quantizations
from gpuctl.specs.gpu import GpuChoice, GpuRequest
from gpuctl.specs.serve import not_for_chat
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gpuctl.configs import Found
    from gpuctl.fit.values import Candidate, Card, ModelFacts
    from gpuctl.fitting import Change, Judge
    from gpuctl.prices import Rates
    from gpuctl.specs.serve import ServeSpec

# Memory for the KV cache of the build for CPUs, in GiB: what the rendered file sets (catalog/engines.toml).
_CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"
_ALLOW_LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"  # with it, vLLM takes a context above the model's own
_SHARE = re.compile(r"0?\.[0-9]+|1(?:\.0+)?", re.ASCII)
_WHOLE = re.compile(r"[0-9]{1,9}", re.ASCII)


@dataclass(frozen=True)
class Settled:
    """A request whose GPUs and context are decided. `notes` and `warnings` are said; `head` stands in the file."""

    spec: ServeSpec
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class _Case:
    """All that a verdict rests on."""

    spec: ServeSpec
    facts: ModelFacts
    ask: Ask
    judge: Judge
    cards: dict[str, Card]
    found: Found
    rates: Rates
    argv: tuple[str, ...]
    has_context: bool = True

    @property
    def concurrency(self) -> int | None:
        return self.spec.concurrency if self.spec.concurrency_asked else None

    def assessed(self, request: GpuRequest | None, *, most_gpus: int | None = None) -> Assessment:
        return assess(
            self.facts,
            request,
            self.ask,
            concurrency=self.concurrency,
            judge=self.judge,
            cards=self.cards,
            siblings=lambda: siblings_of(self.found),
            most_gpus=most_gpus,
        )


def settle(
    spec: ServeSpec,
    found: Found,
    rates: Rates,
    *,
    argv: Sequence[str],
    chats: bool = True,
    has_context: bool = True,
    most_gpus: int | None = None,
) -> Settled:
    """Decide GPUs and context. A usage error where nothing can be decided, or where a GPU that was named does not do.

    `argv` is the command, from which the one that would work is made. `chats`: whether the model must.
    `has_context`: whether it has one, that is to be decided. `most_gpus`: of a container, where what runs there can use
    no more.
    """
    case = dataclasses.replace(_case(spec, found, rates, argv), has_context=has_context)
    if chats and case.facts.kind not in catalog.CHATS and not spec.force:
        raise usage_error(
            not_for_chat(case.facts.name, case.facts.kind),
            hint=f"that is what {case.facts.source} says; if it does chat, give --force",
        )
    settled = Settled(spec)
    if spec.auto:
        settled = _chosen(case, most_gpus)
    elif spec.gpu is not None:
        settled = _named(case, spec.gpu)
    return _on_cpu(case, settled) if spec.target is Target.LOCAL and has_context else settled


def starts_on(spec: ServeSpec, found: Found, rates: Rates) -> Callable[[GpuChoice], bool]:
    """Whether a choice of GPUs would not be refused for `spec`: what else might be asked for."""
    case = _case(spec, found, rates, ())

    def starts(choice: GpuChoice) -> bool:
        one = judge_choice(
            case.facts, choice, case.ask, concurrency=case.concurrency, judge=case.judge, cards=case.cards
        )
        return spec.force or one.verdict is not Verdict.NO

    return starts


def speed_on(
    spec: ServeSpec, found: Found, rates: Rates, choice: GpuChoice, *, context: int, requests: int
) -> Candidate:
    """How fast `spec` can be at best on a choice of GPUs, with so many requests of `context` tokens to do.

    At once it does as many of them as it was asked to, else as vLLM does by default on that card, and as fit.
    """
    case = _case(dataclasses.replace(spec, max_model_len=None), found, rates, ())
    card, _ = card_of(choice, case.cards)
    at_once = spec.concurrency
    if not spec.concurrency_asked:
        at_once = batch(card, case.ask, engine_constants(spec.vllm_version), context).requests
    return judge_choice(
        case.facts,
        choice,
        dataclasses.replace(case.ask, context=context),
        concurrency=max(1, min(at_once, requests)),
        judge=case.judge,
        cards=case.cards,
    )


def _case(spec: ServeSpec, found: Found, rates: Rates, argv: Sequence[str]) -> _Case:
    ask, unknowable = _ask(spec)
    facts = _with_context(spec, _facts(spec, found), unknowable)
    judge = _careful(judge_with(spec.vllm_version, found), unknowable, memory_args(spec.engine_args).lessens)
    return _Case(spec, facts, ask, judge, cards(rates), found, rates, tuple(argv))


# -- the three ways


def _chosen(case: _Case, most_gpus: int | None) -> Settled:
    """`--gpu auto`: the cheapest that fits within the smallest of Modal's plans that has one."""
    from gpuctl.catalog.pricing import pricing

    spec = case.spec
    limits = [plan.gpus // spec.max_containers for plan in pricing().plans]
    for most in (*(limit for limit in limits if limit), None):
        bounds = [bound for bound in (most, most_gpus) if bound is not None]
        assessment = case.assessed(None, most_gpus=min(bounds, default=None))
        pick = assessment.pick
        if pick is not None or not assessment.unfit:
            break
    if pick is None:
        raise _nothing_to_choose(case, assessment)
    reason = assessment.why
    paid = _affordable(case, pick, assessment.candidates)
    if paid != pick:
        pick, reason = paid, f"which --max-hourly-cost pays for; without it {spelled(pick)}"
    request = GpuRequest((GpuChoice(pick.gpu, pick.count),))
    what = spelled(pick)
    if pick.verdict is Verdict.FITS:
        why = f"the cheapest that fits {_wanted(case)}"
    else:
        why = f"nothing fits {_wanted(case)}; of what starts, it holds the most for its price"
    settled = _kept(case, request, [pick])
    return dataclasses.replace(
        settled,
        notes=(f"--gpu auto: {what}, {reason}", *settled.notes),
        head=(f"--gpu auto chose {what}: {why}.", *settled.head),
    )


def _affordable(case: _Case, pick: Candidate, candidates: Sequence[Candidate]) -> Candidate:
    """`pick`, if `--max-hourly-cost` pays for a container of it; else the pick among those of which it does.

    Where it pays for none that starts, `pick` again: what is wrong then is said with the cost.
    """
    spec, limit = case.spec, case.spec.max_hourly_cost
    if limit is None or spec.target is Target.LOCAL:
        return pick

    def pays(one: Candidate) -> bool:
        return cost_of(spec, (GpuChoice(one.gpu, one.count),), case.rates).dearest.most_usd <= limit

    if pays(pick):
        return pick
    return pick_of(filter(pays, candidates), enough=requests_of(case.ask, case.concurrency)) or pick


def _named(case: _Case, request: GpuRequest) -> Settled:
    """The GPUs that were named: all of them must do, unless the others are dropped, or it is forced."""
    spec = case.spec
    assessment = case.assessed(request)
    unfit = assessment.unfit
    pairs = list(zip(request.choices, assessment.candidates, strict=True))
    kept = [choice for choice, one in pairs if one.verdict is not Verdict.NO]
    if unfit and not spec.force and not (spec.drop_unfit and kept):
        raise _refused(case, assessment, kept)
    if unfit and spec.drop_unfit and kept:
        settled = _kept(
            case,
            dataclasses.replace(request, choices=tuple(kept)),
            [one for _, one in pairs if one not in unfit],
        )
        dropped = [f"--drop-unfit: without {spelled(one)}: {one.reason}" for one in unfit]
        return dataclasses.replace(settled, notes=(*dropped, *settled.notes))
    settled = _kept(case, request, [one for _, one in pairs if one not in unfit])
    forced = [
        f"--force: {case.facts.name} does not fit on {spelled(one)}{_taken_for(one)}: {one.reason}"
        for one in unfit
    ]
    return dataclasses.replace(settled, warnings=(*forced, *settled.warnings))


def _on_cpu(case: _Case, settled: Settled) -> Settled:
    """On this machine's CPU, whose cache has a size of its own: the context that it has room for, if none was asked."""
    if case.spec.max_model_len is not None:
        return settled
    length = _cpu_context(case)
    if length is None or (settled.spec.max_model_len or length) < length:
        return settled
    notes = list(settled.notes)
    if length < (settled.spec.max_model_len or case.facts.own_context or 0):
        notes.append(
            f"local: --max-model-len {length}: the KV cache of the build for CPUs "
            f"({catalog.vllm().cpu.env[_CPU_CACHE]} GiB) has room for no more"
        )
    return dataclasses.replace(
        settled, spec=dataclasses.replace(settled.spec, max_model_len=length), notes=tuple(notes)
    )


def _cpu_context(case: _Case) -> int | None:
    """The longest context that the CPU's cache has room for, up to the model's own; None: not known."""
    own, space = case.facts.own_context, catalog.vllm().cpu.env.get(_CPU_CACHE)
    if own is None or space is None:
        return None
    # What a token takes is the same on any device: seen on cards that have more than enough.
    roomy = max(case.cards.values(), key=lambda card: card.memory_bytes)
    for count in (1, 2, 4, 8):
        one = case.judge(case.facts, roomy, count, dataclasses.replace(case.ask, concurrency=1))
        if one.per_gpu is not None and one.kv_cache_tokens:
            token = count * one.per_gpu.kv_cache / one.kv_cache_tokens
            room = min(own, int(float(space) * GIB / token))
            return longest_of(dataclasses.replace(one, max_context=room), own)
    return None


def _kept(case: _Case, request: GpuRequest, candidates: Sequence[Candidate]) -> Settled:
    """With these GPUs: the context that all of them have room for, and what is to be said."""
    spec, own = case.spec, case.facts.own_context
    length = spec.max_model_len
    notes: list[str] = []
    warnings: list[str] = []
    for one in candidates:
        notes += [f"fit: {text}" for text in one.assumptions]
        if one.verdict is Verdict.UNKNOWN:
            warnings.append(f"whether {case.facts.name} fits on {spelled(one)} is not known: {one.reason}")
        else:
            notes.append(_line(case, one))
    if length is None and case.has_context:
        lengths = [longest_of(one, own) for one in candidates]
        known = [one for one in lengths if one is not None]
        if known and len(known) == len(lengths):
            length = min(known)
            bound = "the model's own" if length == own else "the longest that fits"
            notes.append(f"fit: --max-model-len {length}, {bound}")
        else:
            notes.append("fit: --max-model-len is left to the engine: the longest that fits is not known")
    return Settled(
        spec=dataclasses.replace(spec, gpu=request, max_model_len=length),
        notes=tuple(dict.fromkeys(notes)),
        warnings=tuple(warnings),
        candidates=tuple(candidates),
    )


def _line(case: _Case, one: Candidate) -> str:
    """The verdict on one choice, in a line."""
    parts = []
    if one.per_gpu is not None:
        each = " of each GPU" if one.count > 1 else ""
        parts.append(f"{one.per_gpu.weights / GIB:.1f} GiB of weights")
        if one.kv_cache_tokens is not None:
            parts.append(
                f"{one.per_gpu.kv_cache / GIB:.1f} of KV cache{each} ({one.kv_cache_tokens:,} tokens)"
            )
    said = ", ".join(parts)
    tight = f"; tight: {one.reason}" if one.verdict is Verdict.TIGHT else ""
    return f"fit: {case.facts.name} on {spelled(one)}: {said or one.reason}{tight}"


# -- refusals


def _refused(case: _Case, assessment: Assessment, kept: Sequence[GpuChoice]) -> GpuctlError:
    problems = [
        f"--gpu: {case.facts.name} does not fit on {spelled(one)}{_taken_for(one)}: {one.reason}"
        for one in assessment.unfit
    ]
    if kept:
        fix = command(case.argv, case.spec, gpu=",".join(map(str, kept)))
        return usage_error(problems, hint=f"{fix}  # what --drop-unfit leaves; --force deploys it as it is")
    return usage_error(problems, hint=_fix(case, assessment.changes) + "; --force deploys it as it is")


def _taken_for(one: Candidate) -> str:
    """What a GPU that Modal chooses among several was taken for."""
    said = next((text for text in one.assumptions if text.startswith(f"{one.gpu}: assumed ")), None)
    return "" if said is None else f" ({said.removeprefix(f'{one.gpu}: ')})"


def _nothing_to_choose(case: _Case, assessment: Assessment) -> GpuctlError:
    open_ = next((one for one in assessment.candidates if one.verdict is Verdict.UNKNOWN), None)
    if open_ is not None:
        return usage_error(
            f"--gpu auto: cannot choose for {case.facts.name}: {open_.reason}",
            hint=(
                f"`gpuctl fit {case.facts.name}` asks the hub about it; or " if not case.found.whole else ""
            )
            + "name the GPU, as in --gpu H100",
        )
    largest = assessment.candidates[-1]
    return usage_error(
        f"--gpu auto: {case.facts.name} fits on no GPU of Modal: on {spelled(largest)}, {largest.reason}",
        hint=_fix(case, assessment.changes),
    )


def _fix(case: _Case, changes: Sequence[Change]) -> str:
    """The cheapest change that keeps model and context, as the whole command; what is cheaper still, after it."""
    if not changes:
        return "nothing that Modal has would hold it: take another model"
    same = [change for change in changes if change.model is None and change.context is None]
    change = (same or list(changes))[0]
    said = f"{_changed(case, change)}  # fits: {change.what}{_an_hour(change)}"
    if change is not changes[0]:
        said += f"; cheaper: {_changed(case, changes[0])}{_an_hour(changes[0])}"
    return said


def _changed(case: _Case, change: Change) -> str:
    return command(
        case.argv, case.spec, gpu=str(change.gpu), model=change.model, max_model_len=change.context
    )


def _an_hour(change: Change) -> str:
    price = change.candidate.usd_per_hour
    return "" if price is None else f", ${price:.2f} an hour"


def command(
    argv: Sequence[str],
    spec: ServeSpec,
    *,
    gpu: str | None = None,
    model: str | None = None,
    max_model_len: int | None = None,
) -> str:
    """The command again with something else in it, as a line for a shell."""
    from gpuctl.render import shell_word

    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    own, rest = words[:end], words[end:]
    if model is not None:
        own = _with_model(own, spec, model)
    for flag, value in (("--gpu", gpu), ("--max-model-len", max_model_len)):
        if value is not None:
            own = _with_option(own, flag, str(value))
    return " ".join(["gpuctl", *map(shell_word, [*own, *rest])])


def _with_option(words: list[str], flag: str, value: str) -> list[str]:
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            return [*words[: i + 1], value, *words[i + 2 :]]
        if word.startswith(flag + "="):
            return [*words[:i], f"{flag}={value}", *words[i + 1 :]]
    return [*words, flag, value]


def _with_model(words: list[str], spec: ServeSpec, model: str) -> list[str]:
    """MODEL is the word that is one of its names and follows no option that takes a value."""
    names = {*spec.model.served_names, spec.model.title}
    for i, word in enumerate(words):
        if i and word.partition("@")[0] in names and not _takes_value(words[i - 1]):
            return [*words[:i], model, *words[i + 1 :]]
    return [*words, model]


_SWITCHES = (
    "--local", "--auth", "--no-auth", "--dry-run", "--wait", "--no-wait", "--yes", "--json", "--quiet", "--verbose",
    "--force", "--drop-unfit",
)  # fmt: skip


def _takes_value(word: str) -> bool:
    return word.startswith("--") and "=" not in word and word not in _SWITCHES


# -- what is asked


def _facts(spec: ServeSpec, found: Found) -> ModelFacts:
    try:
        return facts_of(found)
    except GpuctlError:
        if not spec.force:
            raise
        return facts_of(dataclasses.replace(found, config={}))


def _ask(spec: ServeSpec) -> tuple[Ask, list[str]]:
    """What is asked of the engine, and the arguments after `--` whose effect on memory is not reckoned."""
    memory = memory_args(spec.engine_args)
    unknowable = list(memory.unknowable)

    def one_of(flag: str, text: str | None, known: Iterable[str]) -> str | None:
        if text is None or text == "auto":
            return None
        if text not in known:
            unknowable.append(f"{flag} {text}")
        return text

    def whole(flag: str, text: str | None) -> int | None:
        if text is None:
            return None
        if not _WHOLE.fullmatch(text) or int(text) < 1:
            unknowable.append(f"{flag} {text}")
            return None
        return int(text)

    share = memory.gpu_memory_utilization
    if share is not None and (not _SHARE.fullmatch(share) or float(share) <= 0):
        unknowable.append(f"--gpu-memory-utilization {share}")
        share = None
    build = catalog.vllm().cuda
    ask = Ask(
        context=spec.max_model_len,
        concurrency=spec.concurrency,
        dtype=one_of("--dtype", memory.dtype, DTYPES),
        quantization=one_of("--quantization", memory.quantization, quantizations()),
        kv_dtype=one_of("--kv-cache-dtype", memory.kv_dtype, KV_DTYPES),
        lora=(whole("--max-loras", memory.max_loras) or 1) if memory.enable_lora else 0,
        gpu_memory_utilization=build.gpu_memory_utilization if share is None else float(share),
        pipeline_parallel=whole("--pipeline-parallel-size", memory.pipeline_parallel) or 1,
        engine_version=spec.vllm_version,
        enforce_eager=memory.enforce_eager or spec.model.repo is None,
        max_num_batched_tokens=whole("--max-num-batched-tokens", memory.max_num_batched_tokens),
        max_num_seqs=many(spec.concurrency),
    )
    return ask, unknowable


def _careful(judge: Judge, unknowable: Sequence[str], lessens: Sequence[str]) -> Judge:
    """The verdict, with what the arguments after `--` leave open."""

    def careful(facts: ModelFacts, card: Card, count: int, ask: Ask) -> Candidate:
        one = judge(facts, card, count, ask)
        if unknowable:
            return unknown(one, f"what {', '.join(unknowable)} does to memory is not reckoned here")
        if lessens and one.verdict is Verdict.NO:
            return unknown(one, f"without {', '.join(lessens)} it would not: {one.reason}")
        return one

    return careful


def _with_context(spec: ServeSpec, facts: ModelFacts, unknowable: Sequence[str]) -> ModelFacts:
    """Refuse a context above the model's own, unless the engine is told to take it: then it is the model's own."""
    told = "--hf-overrides" in unknowable or any(key == _ALLOW_LONG for key, _ in spec.env_vars)
    if not told and not spec.force:
        check_context("--max-model-len", spec.max_model_len, facts)
    if spec.max_model_len is None or facts.own_context is None:
        return facts
    return dataclasses.replace(facts, own_context=max(spec.max_model_len, facts.own_context))


def _wanted(case: _Case) -> str:
    """What was asked to fit at once, in words."""
    return wanted(case.ask, case.facts.own_context, case.concurrency)
