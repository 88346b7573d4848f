"""Which GPUs a model fits, which of them to take, and what would make it fit. May import: catalog, configs, errors,
fit, prices, specs, target.

The arithmetic is in `gpuctl.fit`; here it is asked about each choice of GPUs, and its answers are compared. No network
but what `configs` asks, and no process.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpuctl import catalog
from gpuctl.errors import usage_error
from gpuctl.fit.values import GIB, Ask, Card, ModelFacts, Verdict
from gpuctl.specs.gpu import ANY, GpuChoice
from gpuctl.specs.serve import DEFAULT_CONCURRENCY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from gpuctl.configs import Found
    from gpuctl.fit.values import Candidate
    from gpuctl.prices import Rates
    from gpuctl.specs.fit import FitSpec
    from gpuctl.specs.gpu import GpuRequest

    Judge = Callable[[ModelFacts, Card, int, Ask], Candidate]

# What is planned for where nothing was asked: so many requests at once, each of so many tokens at most.
PLANNED_CONCURRENCY = DEFAULT_CONCURRENCY
PLANNED_CONTEXT = 4096  # tokens; what the arithmetic takes, too, where no context is asked

# More GPUs must cost so much less than fewer to be taken: what is split over them is also sent between them, and every
# one of them is one more that must be free. An assumption, not a measurement.
MORE_GPUS_AT_MOST = 0.75

_LEAST_DEFAULT_SEQS = 256  # vLLM's default on smaller cards (`EngineArgs.get_batch_defaults`)
_COUNTS = (1, 2, 4, 8)  # what a model's heads can be divided by; Modal has at most 8 in a container
# Other names of the same card, which is judged under its own: A100 is the 40 GB one, B200+ at least a B200.
SYNONYMS = {"A100": "A100-40GB", "B200+": "B200"}
_WORST_FIRST = (Verdict.NO, Verdict.UNKNOWN, Verdict.TIGHT, Verdict.FITS)


@dataclass(frozen=True)
class Change:
    """Something to ask for instead, that fits: what differs, for whom it is what it would be."""

    what: str
    gpu: GpuChoice
    model: str | None  # an alias or a repository of the catalogue; None: the same model
    context: int | None  # tokens; None: what was asked
    candidate: Candidate
    without: tuple[str, ...] = ()  # options of `gpuctl fit` that are left out


@dataclass(frozen=True)
class Assessment:
    """One model on several choices of GPUs. `pick`: the one to take, `why`; `changes`: the cheapest first."""

    facts: ModelFacts
    ask: Ask
    planned: bool  # whether the number of requests at once was not asked, but planned
    candidates: tuple[Candidate, ...]
    pick: Candidate | None
    why: str
    changes: tuple[Change, ...]

    @property
    def starts(self) -> tuple[Candidate, ...]:
        """Those with which the engine would start."""
        return tuple(one for one in self.candidates if one.verdict in (Verdict.FITS, Verdict.TIGHT))

    @property
    def open(self) -> bool:
        """Whether of one of them it is not known."""
        return any(one.verdict is Verdict.UNKNOWN for one in self.candidates)

    @property
    def unfit(self) -> tuple[Candidate, ...]:
        """Those with which it would not."""
        return tuple(one for one in self.candidates if one.verdict is Verdict.NO)


def assess_spec(spec: FitSpec) -> tuple[Found, Assessment, Rates]:
    """Answer `gpuctl fit`: what was found of the model, the verdicts, and the prices that they reckon with."""
    from gpuctl import prices
    from gpuctl.configs import find
    from gpuctl.target import Target

    found = find(spec.model)
    rates = prices.rates(Target.MODAL)
    ask = Ask(
        context=spec.context,
        concurrency=spec.concurrency or 1,
        dtype=spec.dtype,
        quantization=spec.quantization,
        kv_dtype=spec.kv_dtype,
        lora=spec.lora,
        gpu_memory_utilization=spec.gpu_memory_utilization,
        tensor_parallel=spec.tensor_parallel,
        pipeline_parallel=spec.pipeline_parallel,
        engine_version=spec.engine_version,
        max_num_seqs=many(spec.concurrency),
    )
    facts = facts_of(found)
    check_context("--context", spec.context, facts)
    assessment = assess(
        facts,
        spec.gpu,
        ask,
        concurrency=spec.concurrency,
        judge=judge_with(spec.engine_version, found),
        cards=cards(rates),
        siblings=lambda: siblings_of(found),
        drop_unfit=spec.drop_unfit,
        loosen=True,
    )
    return found, assessment, rates


def facts_of(found: Found) -> ModelFacts:
    """What was found of a model, as the arithmetic takes it. A usage error names the field that is wrong."""
    from gpuctl.fit.architecture import UnknownFamilyError, read

    architecture = None
    if found.config:
        try:
            architecture = read(
                found.config, what=f"MODEL: {found.name}: config.json", quantization=found.quantization
            )
        except UnknownFamilyError:
            architecture = None
    return ModelFacts(
        name=found.name,
        repo=found.repo,
        revision=found.revision,
        architecture=architecture,
        weight_bytes=_loaded_bytes(found),
        kind=_kind(found),
        own_context=None if architecture is None else architecture.context,
        source=found.source,
    )


def _loaded_bytes(found: Found) -> int | None:
    """Bytes of the weights as the engine holds them.

    A model that was published in 32 bits is loaded in 16 (vLLM `config/model.py`, `_resolve_auto_dtype`); a few
    32-bit tensors among others, such as scales, stay what they are.
    """
    counts = found.parameters
    if counts is None or found.weight_bytes is None or 2 * counts.get("F32", 0) <= sum(counts.values()):
        return found.weight_bytes
    return found.weight_bytes - 2 * counts["F32"]


# What the hub calls a model's task, and ours; the rest are language models.
_PIPELINES = {
    "feature-extraction": "embedding",
    "sentence-similarity": "embedding",
    "text-ranking": "reranker",
    "text-classification": "reranker",
    "automatic-speech-recognition": "speech",
    "text-to-speech": "speech",
    "text-to-image": "image",
    "image-to-image": "image",
    "image-text-to-text": "vision",
}


def _kind(found: Found) -> str:
    """What a model is for, from the name of its class, else from what the hub says."""
    classes = found.config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    if "Whisper" in name or "SpeechSeq2Seq" in name:
        return "speech"
    if name.endswith("ForSequenceClassification"):
        return "reranker"
    if "vision_config" in found.config:
        return "vision"
    if name.endswith("Model"):
        return "embedding"
    return _PIPELINES.get(found.pipeline or "", "llm")


def judge_with(version: str, found: Found) -> Judge:
    """The verdict, with the constants of this version of the engine.

    Weights of which it is not known how they are quantised are reckoned as 16 bits each: what fits so, fits; that what
    does not fit so does not fit, is not known.
    """
    from gpuctl.catalog.overheads import engine_constants
    from gpuctl.fit.verdict import judge

    constants = engine_constants(version)

    def judged(facts: ModelFacts, card: Card, count: int, ask: Ask) -> Candidate:
        one = judge(facts, card, count, ask, constants)
        if found.left_open is None or one.verdict is not Verdict.NO or one.per_gpu is None:
            return one
        return unknown(one, f"how its weights are stored is not known; with 16 bits each, {one.reason}")

    return judged


def unknown(one: Candidate, reason: str) -> Candidate:
    """The same choice of GPUs, of which nothing is known; `reason` says what is missing."""
    return dataclasses.replace(
        one,
        verdict=Verdict.UNKNOWN,
        reason=reason,
        per_gpu=None,
        kv_cache_tokens=None,
        max_context=None,
        max_concurrency=None,
        decode_tokens_per_s=None,
        prefill_tokens_per_s=None,
        usd_per_million_tokens=None,
    )


# Of a card whose visible memory nobody has published: as a share of its label, less than of any card that is known.
_LEAST_VISIBLE = 0.9


def cards(rates: Rates) -> dict[str, Card]:
    """Every card that Modal has, at these prices."""
    return {
        gpu.name: _card_of(gpu, float(rates.gpus[gpu.name].usd_per_second)) for gpu in catalog.gpus().values()
    }


def _card_of(gpu: catalog.Gpu, usd_per_second: float) -> Card:
    visible = gpu.vram_gib * _LEAST_VISIBLE if gpu.visible_gib is None else gpu.visible_gib
    # A card without bf16 (T4) runs such a model in fp16, at the same size.
    sixteen = gpu.tflops.get("bf16", gpu.tflops.get("fp16"))
    tflops = {**gpu.tflops, **({} if sixteen is None else {"bf16": sixteen})}
    return Card(
        name=gpu.name,
        memory_bytes=int(visible * GIB),
        bandwidth_bytes_per_s=None if gpu.bandwidth_gb_s is None else gpu.bandwidth_gb_s * 1e9,
        flops={kind: tflops[kind] * 1e12 for kind in ("bf16", "fp8", "fp4") if kind in tflops},
        compute_capability=gpu.compute_capability,
        measured=gpu.visible_gib is not None,
        usd_per_second=usd_per_second,
    )


def siblings_of(found: Found) -> list[tuple[str, ModelFacts]]:
    """Quantised builds of the same model in the catalogue, by the name to ask for."""
    from gpuctl.configs import of_ref
    from gpuctl.specs.model import ModelRef

    if found.repo is None:
        return []
    siblings = []
    for name in _quantised_builds(found.repo):
        sibling = facts_of(of_ref(ModelRef.parse(name), online=False))
        if sibling.architecture is not None:
            siblings.append((name, sibling))
    return siblings


# What makers append to the name of a model that they have quantised.
_QUANTISED = re.compile(
    r"(?:-(?:fp8|nvfp4|mxfp4|awq|gptq|int4|int8|w4a16|w8a8|4bit|8bit|dynamic|static))+$", re.I
)


def _quantised_builds(repo: str) -> list[str]:
    """Names of the catalogue's models that are called like this one, with a kind of quantisation after it."""
    own = repo.rpartition("/")[2].lower()
    found = []
    for model in catalog.models().values():
        theirs = (model.repo or "").rpartition("/")[2].lower()
        if theirs != own and _QUANTISED.sub("", theirs) == own:
            found.append(model.alias)
    return found


def many(concurrency: int | None) -> int | None:
    """The engine's --max-num-seqs to reckon with: its own default, unless more is asked.

    `serve` gives it fewer, which takes a little less memory than the default; to leave that out is on the safe side,
    and lets `fit` say what a bare vLLM would do.
    """
    return concurrency if concurrency is not None and concurrency > _LEAST_DEFAULT_SEQS else None


def wanted(ask: Ask, own_context: int | None, concurrency: int | None) -> str:
    """What is to fit at once, in words; `concurrency`: as asked."""
    planned = min(context for context in (PLANNED_CONTEXT, ask.context, own_context) if context is not None)
    if concurrency is not None:
        each = f"{ask.context or planned:,} tokens"
        return f"one request of {each}" if concurrency == 1 else f"{concurrency:,} requests of {each} at once"
    many_short = f"{PLANNED_CONCURRENCY} requests of {planned:,} tokens at once"
    if ask.context is not None and ask.context > planned:
        return f"one request of {ask.context:,} tokens, or {many_short}"
    return many_short


def requests_of(ask: Ask, concurrency: int | None) -> int:
    """How many requests at once, of the context that a `Candidate` counts them in, are all that was asked."""
    if concurrency is not None:
        return concurrency
    return PLANNED_CONCURRENCY if ask.context is None else 1


def check_context(flag: str, context: int | None, facts: ModelFacts) -> None:
    """Refuse a context above the model's own, as vLLM would when it starts."""
    if context is not None and facts.own_context is not None and context > facts.own_context:
        raise usage_error(
            f"{flag}: {context:,} tokens are more than the {facts.own_context:,} that {facts.name} was made for"
        )


def assess(
    facts: ModelFacts,
    request: GpuRequest | None,
    ask: Ask,
    *,
    concurrency: int | None,
    judge: Judge,
    cards: Mapping[str, Card],
    siblings: Callable[[], Sequence[tuple[str, ModelFacts]]] = tuple,
    most_gpus: int | None = None,
    drop_unfit: bool = False,
    loosen: bool = False,
) -> Assessment:
    """Judge every choice of `request` (None: all that Modal has), pick one, and where none fits find what would.

    `concurrency`: as asked (None: `PLANNED_CONCURRENCY` of up to `PLANNED_CONTEXT` tokens, and one of the whole
    context); `siblings`: quantised builds of the same model, by the name to ask for; `most_gpus`: in one container;
    `loosen`: where nothing else helps, try it without what the engine was told.
    """

    def judged(model: ModelFacts, choice: GpuChoice, asked: Ask = ask) -> Candidate:
        return judge_choice(model, choice, asked, concurrency=concurrency, judge=judge, cards=cards)

    choices = every_choice(ask) if request is None else list(request.choices)
    allowed = [choice for choice in choices if most_gpus is None or choice.count <= most_gpus]
    candidates = [judged(facts, choice) for choice in (choices if request is not None else allowed)]
    enough = requests_of(ask, concurrency)
    pick = pick_of(candidates, enough=enough)
    changes: list[Change] = []
    if any(one.verdict in (Verdict.NO, Verdict.TIGHT) for one in candidates) and not any(
        one.verdict in (Verdict.FITS, Verdict.UNKNOWN) for one in candidates
    ):
        changes = sorted(
            _changes(facts, request, ask, judged, siblings, most_gpus, enough, loosen=loosen),
            key=lambda change: _price(change.candidate),
        )
        if not changes and loosen:
            changes = sorted(
                _loosened(facts, ask, judged, enough), key=lambda change: _price(change.candidate)
            )
        if pick is not None:  # something starts: only what fits all of it is a change for the better
            changes = [change for change in changes if change.candidate.verdict is Verdict.FITS]
    why = _why(pick, candidates, named=request is not None)
    if drop_unfit:
        candidates = [one for one in candidates if one.verdict is not Verdict.NO]
    return Assessment(
        facts=facts,
        ask=ask,
        planned=concurrency is None,
        candidates=tuple(candidates),
        pick=pick,
        why=why,
        changes=tuple(changes),
    )


def every_choice(ask: Ask) -> list[GpuChoice]:
    """Every card of Modal, as many of them as make sense: as asked by the parallel sizes, else 1, 2, 4 and 8 in
    each pipeline stage.

    The other names of a card come last, so that of equals the plain name is taken.
    """
    wanted = None if ask.tensor_parallel is None else ask.tensor_parallel * ask.pipeline_parallel
    counts = tuple(ask.pipeline_parallel * each for each in _COUNTS) if wanted is None else (wanted,)
    return [
        GpuChoice(gpu.name, count)
        for gpu in sorted(catalog.gpus().values(), key=lambda gpu: gpu.name in SYNONYMS)
        for count in counts
        if count <= gpu.max_count
    ]


def judge_choice(
    facts: ModelFacts,
    choice: GpuChoice,
    ask: Ask,
    *,
    concurrency: int | None,
    judge: Judge,
    cards: Mapping[str, Card],
) -> Candidate:
    """The verdict on one choice, named as the user named it, with what had to be assumed about the card."""
    card, assumed = card_of(choice, cards)
    if concurrency is not None:
        candidate = judge(facts, card, choice.count, dataclasses.replace(ask, concurrency=concurrency))
    else:
        candidate = _planned(facts, card, choice.count, ask, judge)
    return dataclasses.replace(
        candidate, gpu=str(choice).partition(":")[0], assumptions=(*assumed, *candidate.assumptions)
    )


def _planned(facts: ModelFacts, card: Card, count: int, ask: Ask, judge: Judge) -> Candidate:
    """The verdict where no number of requests was asked: one of the whole context, and the planned ones."""
    many = dataclasses.replace(
        ask,
        concurrency=PLANNED_CONCURRENCY,
        context=None if ask.context is None else min(ask.context, PLANNED_CONTEXT),
    )
    planned = judge(facts, card, count, many)
    if ask.context is None:
        return planned
    whole = judge(facts, card, count, dataclasses.replace(ask, concurrency=1))
    worse = min(whole, planned, key=lambda one: _WORST_FIRST.index(one.verdict))
    return dataclasses.replace(
        whole,
        verdict=worse.verdict,
        reason=worse.reason,
        decode_tokens_per_s=planned.decode_tokens_per_s,
        prefill_tokens_per_s=planned.prefill_tokens_per_s,
        usd_per_million_tokens=planned.usd_per_million_tokens,
    )


def card_of(choice: GpuChoice, cards: Mapping[str, Card]) -> tuple[Card, tuple[str, ...]]:
    """The card to reckon with, and what that assumes of what Modal hands out."""
    if choice.type == ANY:
        smallest = min(cards.values(), key=lambda card: card.memory_bytes)
        return smallest, (f"any: assumed {smallest.name}, the smallest GPU that Modal may give",)
    card = cards[SYNONYMS.get(choice.type, choice.type)]
    gpu = catalog.gpus()[choice.type]
    if choice.type == "A100":
        return card, ("A100: assumed the 40 GB card; Modal may give the 80 GB one",)
    if choice.type == "B200+":
        return card, ("B200+: assumed a B200; Modal may give a B300, which has more memory",)
    if gpu.exact and not choice.exact:
        better = "an H200" if gpu.name == "H100" else "a better card"
        return card, (
            f"{gpu.name}: assumed an {gpu.name} with {gpu.vram_gib} GB; Modal may run it as {better}, "
            f"which {gpu.name}! forbids",
        )
    return card, ()


def document(one: Candidate) -> dict[str, Any]:
    """One verdict: GiB of the fullest GPU; tokens, context, requests and throughput of all GPUs together."""
    per_gpu = one.per_gpu

    def gib(size: int | None) -> float | None:
        return None if size is None else round(size / GIB, 3)

    return {
        "gpu": one.gpu,
        "count": one.count,
        "verdict": str(one.verdict),
        "reason": one.reason,
        "assumptions": list(one.assumptions),
        "weights_gib": gib(per_gpu.weights if per_gpu else None),
        "activation_gib": gib(per_gpu.activation if per_gpu else None),
        "non_torch_gib": gib(per_gpu.non_torch if per_gpu else None),
        "graph_gib": gib(per_gpu.graph if per_gpu else None),
        "kv_cache_gib": gib(per_gpu.kv_cache if per_gpu else None),
        "reserve_gib": gib(per_gpu.reserve if per_gpu else None),
        "kv_cache_tokens": one.kv_cache_tokens,
        "max_context": one.max_context,
        "max_concurrency": one.max_concurrency,
        "usd_per_hour": None if one.usd_per_hour is None else round(one.usd_per_hour, 6),
        "decode_tokens_per_s": one.decode_tokens_per_s,
        "prefill_tokens_per_s": one.prefill_tokens_per_s,
        "usd_per_million_tokens": one.usd_per_million_tokens,
    }


# -- which to take


def pick_of(candidates: Iterable[Candidate], *, enough: int) -> Candidate | None:
    """The cheapest that fits; else, of those that start, the cheapest of those that hold the most requests.

    `enough`: no more requests than these count. More GPUs are taken over fewer only where they cost less than
    `MORE_GPUS_AT_MOST` of them.
    """

    def holds(one: Candidate) -> int:
        return min(one.max_concurrency or 0, enough)

    found = list(candidates)
    fitting = [one for one in found if one.verdict is Verdict.FITS]
    if not fitting:
        starting = [one for one in found if one.verdict is Verdict.TIGHT]
        most = max(map(holds, starting), default=0)
        fitting = [one for one in starting if holds(one) == most]
    best: Candidate | None = None
    for one in sorted(fitting, key=lambda one: (one.count, _price(one))):
        factor = 1.0 if best is None or one.count == best.count else MORE_GPUS_AT_MOST
        if best is None or _price(one) < factor * _price(best):
            best = one
    return best


def _price(candidate: Candidate) -> float:
    return float("inf") if candidate.usd_per_hour is None else candidate.usd_per_hour


def spelled(candidate: Candidate) -> str:
    """As `--gpu` takes it."""
    return candidate.gpu if candidate.count == 1 else f"{candidate.gpu}:{candidate.count}"


# A context that only the size of the cache bounds is not taken to its last token: the arithmetic is not that exact.
_SHARE_OF_LONGEST = 0.9
_ROUND = 256  # tokens


def longest_of(candidate: Candidate, own: int | None) -> int | None:
    """The longest context to start an engine with, in tokens: the model's own, or nine tenths of what the cache has."""
    longest = candidate.max_context
    if longest is None or (own is not None and longest >= own):
        return own if longest is not None else None
    return max(int(longest * _SHARE_OF_LONGEST) // _ROUND * _ROUND, min(longest, _ROUND))


def _why(pick: Candidate | None, candidates: Sequence[Candidate], *, named: bool) -> str:
    """Why that one, in a clause; why none, where there is none."""
    if pick is None:
        if any(one.verdict is Verdict.UNKNOWN for one in candidates):
            return "whether it fits is not known"
        if not candidates:
            return "there is no such choice of GPUs"
        return (
            f"nothing fits: on {spelled(candidates[0])}, {candidates[0].reason}" if named else "nothing fits"
        )
    if pick.verdict is Verdict.TIGHT and len(candidates) == 1:
        return f"it starts, but {pick.reason}"
    if pick.verdict is Verdict.TIGHT:
        return f"none fits all that was asked; of those that start it holds the most for its price ({pick.reason})"
    same = [one for one in candidates if one.verdict is Verdict.FITS]
    what = "that fits"
    if len(same) == 1:
        return f"the only one {'of those named ' if named else ''}{what}"
    cheaper = [one for one in same if _price(one) < _price(pick)]
    if not cheaper:
        return f"the cheapest {what}"
    least = min(cheaper, key=_price)
    return (
        f"the cheapest {what}, but for more GPUs that save less than a quarter: "
        f"{spelled(least)} is ${_price(least):.2f} an hour"
    )


# -- what would make it fit


def _changes(
    facts: ModelFacts,
    request: GpuRequest | None,
    ask: Ask,
    judged: Callable[..., Candidate],
    siblings: Callable[[], Sequence[tuple[str, ModelFacts]]],
    most_gpus: int | None,
    enough: int,
    *,
    loosen: bool,
) -> Iterator[Change]:
    """Each kind of change at its cheapest: other GPUs, a quantised build, a shorter context."""
    # How the weights are stored was said of this model, not of another build of it.
    of_another = dataclasses.replace(ask, dtype=None, quantization=None) if loosen else ask
    every = [choice for choice in every_choice(ask) if most_gpus is None or choice.count <= most_gpus]

    def cheapest(
        model: ModelFacts, asked: Ask, choices: Sequence[GpuChoice]
    ) -> tuple[GpuChoice, Candidate] | None:
        verdicts = {choice: judged(model, choice, asked) for choice in choices}
        best = pick_of(verdicts.values(), enough=enough)
        return next(((choice, one) for choice, one in verdicts.items() if one is best), None)

    named = every if request is None else list(request.choices)
    if request is not None:
        other = cheapest(facts, ask, every)
        if other is not None:
            yield Change(f"on {other[0]}", other[0], None, None, other[1])
    for name, sibling in siblings():
        if ask.context is not None and sibling.own_context is not None and ask.context > sibling.own_context:
            continue
        other = cheapest(sibling, of_another, every)
        if other is not None:
            yield Change(f"{name}, a quantised build, on {other[0]}", other[0], name, None, other[1])
    if ask.context is not None:
        shorter = _shorter(facts, ask, judged, named)
        if shorter is not None:
            yield shorter


# What the engine may have been told that keeps a model from fitting: options of `gpuctl fit`, and an Ask without them.
_TOLD: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("--tensor-parallel", "--pipeline-parallel"), {"tensor_parallel": None, "pipeline_parallel": 1}),
    (("--gpu-memory-utilization",), {"gpu_memory_utilization": None}),
    (("--quantization",), {"quantization": None}),
    (("--dtype",), {"dtype": None}),
    (("--lora",), {"lora": 0}),
)


def _loosened(facts: ModelFacts, ask: Ask, judged: Callable[..., Candidate], enough: int) -> Iterator[Change]:
    """The cheapest GPUs without one of the things that the engine was told."""
    for flags, without in _TOLD:
        asked = dataclasses.replace(ask, **without)
        if asked == ask:
            continue
        verdicts = {choice: judged(facts, choice, asked) for choice in every_choice(asked)}
        best = pick_of(verdicts.values(), enough=enough)
        for choice, one in verdicts.items():
            if one is best:
                given = [flag for flag in flags if _was_given(ask, flag)]
                yield Change(f"without {' and '.join(given)}, on {choice}", choice, None, None, one, flags)


def _was_given(ask: Ask, flag: str) -> bool:
    return getattr(ask, flag.removeprefix("--").replace("-", "_")) not in (
        (None, 1) if flag == "--pipeline-parallel" else (None,)
    )


def _shorter(
    facts: ModelFacts, ask: Ask, judged: Callable[..., Candidate], choices: Sequence[GpuChoice]
) -> Change | None:
    """The GPUs that were asked for (of all: those with the most room), with the longest context that they have."""
    assert ask.context is not None
    best: Change | None = None
    for choice in choices:
        loose = judged(facts, choice, dataclasses.replace(ask, context=None))
        longest = longest_of(loose, facts.own_context)
        if loose.verdict in (Verdict.NO, Verdict.UNKNOWN) or not longest or longest >= ask.context:
            continue
        candidate = judged(facts, choice, dataclasses.replace(ask, context=longest))
        if candidate.verdict not in (Verdict.FITS, Verdict.TIGHT):
            continue
        if best is None or (longest, -_price(candidate)) > (best.context or 0, -_price(best.candidate)):
            best = Change(f"a context of {longest:,} tokens on {choice}", choice, None, longest, candidate)
    return best
