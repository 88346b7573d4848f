"""Does it fit. May import: gpuctl.fit, the standard library."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl.fit import kv, overheads, quantization, roofline, weights
from gpuctl.fit.values import GIB, Candidate, PerGpu, Verdict

if TYPE_CHECKING:
    from gpuctl.fit.architecture import Architecture
    from gpuctl.fit.kv import Format, Pool
    from gpuctl.fit.overheads import Batch, EngineConstants
    from gpuctl.fit.quantization import Quantization
    from gpuctl.fit.values import Ask, Card, ModelFacts

PLANNED_CONTEXT = 4096  # tokens, where none was asked for
_HALF = 2  # bytes
_ELEMENT_BYTES = {"float32": 4, "float": 4}
_BFLOAT16 = (8, 0)  # the least compute capability that has bfloat16
_DISAGREE = 0.03  # between what the shapes and what the files say, from which on the files count
_DRAFT = 2.0  # a layer for speculation in layers of the model: it can have embeddings of its own
_PLAIN = 0.9  # of the size in 16 bits: files from which on are not quantised
_BY_WEIGHT = 1.2  # encoders and diffusion: what runs beside the weights, as a share of them


@dataclass(frozen=True)
class _Plan:
    """What is asked of which model, with what was left open filled in."""

    architecture: Architecture
    quantization: Quantization | None
    element: int
    cache: Format
    tensor_parallel: int
    pipeline_parallel: int
    context: int
    model_len: int
    longest: int
    batch: Batch
    scale: float
    assumptions: tuple[str, ...]


def judge(facts: ModelFacts, card: Card, count: int, ask: Ask, constants: EngineConstants) -> Candidate:
    """Whether `count` of a card run a model as asked, and what is left for the cache.

    KV cache = utilisation x visible memory - weights - activation - non-torch (- graphs, where the engine counts them
    in), on the fullest GPU (vLLM `Worker.determine_available_memory`). Up to 0.19 graphs come on top of the
    utilisation: what it leaves has to hold them.
    """
    if facts.architecture is None:
        return _by_weight(facts, card, count, ask, constants)
    plan = _plan(facts, _loaded(facts.architecture, facts.kind), card, count, ask, constants)
    if isinstance(plan, Candidate):
        return plan
    architecture, tp, pp = plan.architecture, plan.tensor_parallel, plan.pipeline_parallel
    padding = None
    if plan.quantization is not None and plan.quantization.mxfp4_kernels:
        padding = weights.mxfp4_padding(card.compute_capability, stored=constants.mxfp4_stored)
    each = weights.per_stage(architecture, tp, pp, plan.element, plan.quantization, padding)
    adapters = overheads.lora(architecture, ask.lora, tp, pp) if ask.lora else 0
    each = [int(size * plan.scale) + adapters for size in each]
    peaks = [
        overheads.activation(
            architecture,
            plan.batch,
            constants,
            tensor_parallel=tp,
            pipeline_parallel=pp,
            element_bytes=plan.element,
            last=stage == pp - 1,
        )
        for stage in range(pp)
    ]
    libraries = overheads.non_torch(constants, tp, pp, card.compute_capability)
    layers = max(len(part) for part in weights.stages(len(architecture.layers), pp))
    graphs = overheads.graph(architecture, constants, ask, layers)
    utilisation = ask.gpu_memory_utilization or constants.gpu_memory_utilization
    budget = int(card.memory_bytes * utilisation)
    inside = graphs if constants.graph_in_budget else 0
    free = [budget - size - peak - libraries - inside for size, peak in zip(each, peaks, strict=True)]
    fullest = min(range(pp), key=lambda stage: free[stage])
    room = free[fullest]
    memory = PerGpu(
        weights=each[fullest],
        activation=peaks[fullest],
        non_torch=libraries,
        graph=graphs,
        kv_cache=max(0, room),
        reserve=max(
            0, card.memory_bytes - each[fullest] - peaks[fullest] - libraries - graphs - max(0, room)
        ),
    )
    pool = kv.pool(architecture, tp, pp, plan.cache, plan.batch.tokens, constants)
    blocks = pool.blocks(free) if pool else 0
    reach = (pool.longest(blocks, plan.longest) if pool else plan.longest) if room > 0 else 0
    at_once = (blocks // pool.request(plan.context) if pool else plan.batch.requests) if room > 0 else 0
    tokens = 0
    if pool and room > 0:
        tokens = pool.tokens(blocks, plan.model_len, by_concurrency=constants.tokens_by_concurrency)
    rest = card.memory_bytes - budget - constants.context - (0 if constants.graph_in_budget else graphs)
    verdict, reason = _say(plan, card, ask, constants, pool, room, budget, rest, reach, at_once, free)
    refused = _loading(plan, card, ask, constants)
    if refused:
        verdict, reason = Verdict.NO, refused
    price = None if card.usd_per_second is None else card.usd_per_second * 3600 * count
    found = Candidate(
        gpu=card.name,
        count=count,
        verdict=verdict,
        reason=reason,
        assumptions=(*plan.assumptions, *_about(card, constants)),
        per_gpu=memory,
        kv_cache_tokens=tokens,
        max_context=reach,
        max_concurrency=at_once,
        usd_per_hour=price,
    )
    return _with_speed(found, plan, card, ask, sum(each) * tp, price)


def _loaded(architecture: Architecture, kind: str) -> Architecture:
    """The part that the engine loads: a model that embeds has no use for the matrix of its output's vocabulary."""
    if kind != "embedding":
        return architecture
    last = tuple(tensor for tensor in architecture.last if not tensor.names[0].startswith("lm_head"))
    return dataclasses.replace(architecture, last=last)


def _plan(
    facts: ModelFacts,
    architecture: Architecture,
    card: Card,
    count: int,
    ask: Ask,
    constants: EngineConstants,
) -> _Plan | Candidate:
    """What was asked, with what was left open filled in; or why it cannot be."""

    def answer(verdict: Verdict, reason: str) -> Candidate:
        price = None if card.usd_per_second is None else card.usd_per_second * 3600 * count
        return Candidate(card.name, count, verdict, reason, architecture.assumptions, usd_per_hour=price)

    if not constants.known:
        return answer(Verdict.UNKNOWN, f"what the older engine of vLLM {constants.version} takes is unknown")
    assumptions = list(architecture.assumptions)
    tp, pp = ask.tensor_parallel or max(1, count // ask.pipeline_parallel), ask.pipeline_parallel
    if tp * pp != count:
        return answer(Verdict.NO, f"tensor parallel {tp} x pipeline parallel {pp} is not {count} GPUs")
    refused = _indivisible(architecture, tp, pp)
    if refused:
        return answer(Verdict.NO, refused)
    chosen = _stored(facts, architecture, ask, constants, assumptions)
    if isinstance(chosen, tuple):
        return answer(*chosen)
    stored = chosen
    if stored is not None and card.compute_capability and stored.needs > card.compute_capability:
        needs = ".".join(map(str, stored.needs))
        return answer(Verdict.NO, f"{stored.method} weights need compute capability {needs}")
    if ask.dtype in ("bfloat16", "bf16") and card.compute_capability and card.compute_capability < _BFLOAT16:
        return answer(Verdict.NO, "bfloat16 needs compute capability 8.0; float16 would do")
    element = _ELEMENT_BYTES.get(ask.dtype or "", architecture.element_bytes)
    cache = kv.cache_format(_cache_name(ask, stored, constants), element)
    if cache is None:
        return answer(Verdict.UNKNOWN, f"gpuctl does not know the cache format {ask.kv_dtype!r}")
    own = facts.own_context or architecture.context
    if own is None and ask.context is None:
        return answer(Verdict.UNKNOWN, "the model's own context is unknown")
    if own is not None and ask.context is not None and ask.context > own:
        return answer(Verdict.NO, f"{ask.context:,} tokens are more than the model's own context of {own:,}")
    longest = own or ask.context or PLANNED_CONTEXT
    scale = _scale(facts, architecture, stored, ask, assumptions)
    if scale is None:
        what = stored.method if stored is not None else architecture.model_type
        return answer(
            Verdict.UNKNOWN, f"how large {what!r} weights are is unknown: no file of weights was seen"
        )
    if ask.lora:
        assumptions.append(f"adapters of rank {overheads.LORA_RANK}, the engine's default")
    return _Plan(
        architecture=architecture,
        quantization=stored,
        element=element,
        cache=cache,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        context=ask.context or min(longest, PLANNED_CONTEXT),
        model_len=ask.context or longest,
        longest=longest,
        batch=overheads.batch(card, ask, constants, ask.context or longest),
        scale=scale,
        assumptions=tuple(assumptions),
    )


def _stored(
    facts: ModelFacts,
    architecture: Architecture,
    ask: Ask,
    constants: EngineConstants,
    assumptions: list[str],
) -> Quantization | tuple[Verdict, str] | None:
    """How the weights are in memory, None: in 16 bits; or why it cannot be as asked."""
    stored, asked = architecture.quantization, ask.quantization
    named = f"vLLM {constants.version}".rstrip()
    release = constants.release
    if asked and stored is not None and stored.method != asked:
        if not quantization.goes_as(stored.method, asked):
            return Verdict.NO, f"the weights are {stored.method}: the engine refuses {asked!r} for them"
        assumptions.append(f"the weights are {stored.method} already; {asked!r} changes nothing")
    elif asked and stored is None:
        online = quantization.ON_THE_FLY.get(asked)
        if online is None:
            plain = facts.weight_bytes is not None and (
                facts.weight_bytes > _PLAIN * weights.in_files(architecture)
            )
            if plain and asked in quantization.STORED_ONLY:
                return (
                    Verdict.NO,
                    f"the weights are not quantised, and the engine does not make {asked!r} of them",
                )
            return Verdict.UNKNOWN, f"gpuctl does not know what the engine makes of quantization {asked!r}"
        if release < online.since:
            first = ".".join(map(str, online.since))
            return Verdict.NO, f"{named} has no quantization {asked!r}, {first} is the first that has"
        stored = quantization.on_the_fly(asked)
    beside = None if stored is None else quantization.plugin(stored.method, release)
    if stored is not None and beside:
        assumptions.append(f"{named} has no {stored.method} of its own: assumed that {beside} is installed")
    return stored


def _loading(plan: _Plan, card: Card, ask: Ask, constants: EngineConstants) -> str | None:
    """Why the weights cannot be loaded, where the engine has all of them in 16 bits before it quantises them."""
    online = quantization.ON_THE_FLY.get(ask.quantization or "")
    if online is None or plan.architecture.quantization is not None or constants.release >= online.streamed:
        return None
    most = max(
        weights.per_stage(
            plan.architecture, plan.tensor_parallel, plan.pipeline_parallel, plan.element, None, None
        )
    )
    if most <= card.memory_bytes - constants.context:
        return None
    return (
        f"vLLM {constants.version} loads all {most / GIB:.1f} GiB in 16 bits before it makes {ask.quantization} of "
        f"them; from {'.'.join(map(str, online.streamed))} on it does so layer by layer"
    )


def _indivisible(architecture: Architecture, tp: int, pp: int) -> str | None:
    """Why a model cannot be split so, as the engine would refuse it."""
    if architecture.heads % tp:
        return f"{architecture.heads} attention heads cannot be divided over {tp} GPUs (tensor parallel)"
    for layer in architecture.layers:
        for cache in layer.caches:
            heads = getattr(cache, "kv_heads", 0)
            if heads and heads % tp and tp % heads:
                return f"{heads} key-value heads cannot be divided over {tp} GPUs (tensor parallel)"
    if pp > len(architecture.layers):
        return f"{len(architecture.layers)} layers cannot be dealt out to {pp} stages (pipeline parallel)"
    experts = architecture.experts
    if experts is not None and experts.intermediate % tp:
        return f"experts of width {experts.intermediate} cannot be divided over {tp} GPUs (tensor parallel)"
    return None


def _cache_name(ask: Ask, stored: Quantization | None, constants: EngineConstants) -> str | None:
    """The cache's format: as asked, else as the checkpoint has it, where the engine follows that."""
    if ask.kv_dtype not in (None, "auto") or stored is None or stored.kv_cache is None:
        return ask.kv_dtype
    if stored.method == "modelopt" and not constants.checkpoint_kv:
        return None
    return stored.kv_cache


def _scale(
    facts: ModelFacts,
    architecture: Architecture,
    stored: Quantization | None,
    ask: Ask,
    assumptions: list[str],
) -> float | None:
    """By how much the weights that the shapes give are to be multiplied, so that they are those of the files.

    The files decide where the two disagree by more than what the engine leaves out of them (layers for speculation):
    then something is stored in a way that the configuration does not tell. Without files, None where the shapes or
    the format are not known.
    """
    own = architecture.quantization
    unknown_format = own is not None and own.scheme is None and not own.rules
    if facts.weight_bytes is None:
        return None if unknown_format or not architecture.known else 1.0
    shape = weights.in_files(architecture)
    ratio = facts.weight_bytes / shape
    if own is None and abs(ratio / 2 - 1) < _DISAGREE:  # in 32 bits, which the engine does not load as such
        return 1.0
    if unknown_format or not architecture.known:
        return ratio
    if stored is not own or ask.dtype == "float32":
        return 1.0
    left_out = _DRAFT * architecture.drafts / len(architecture.layers)
    if 1 - _DISAGREE < ratio < 1 + _DISAGREE + left_out:
        return 1.0
    assumptions.append(
        f"the files have {facts.weight_bytes / GIB:.1f} GiB where the shapes say {shape / GIB:.1f}: the files count"
    )
    return ratio


def _say(
    plan: _Plan,
    card: Card,
    ask: Ask,
    constants: EngineConstants,
    pool: Pool | None,
    room: int,
    budget: int,
    rest: int,
    reach: int,
    at_once: int,
    free: list[int],
) -> tuple[Verdict, str]:
    """The verdict and its reason, the worst first."""
    margin = int(constants.margin * budget)
    needed = overheads.warm_up(plan.architecture, constants)
    if room <= 0:
        return Verdict.NO, (
            f"weights and overheads are {-room / GIB:.1f} GiB more than the budget of {budget / GIB:.1f} GiB "
            "that the engine has of each GPU"
        )
    wanted = ask.context or plan.context
    if reach < wanted:
        held = (
            f"the KV cache of {room / GIB:.1f} GiB holds a request of {reach:,} tokens, not one of {wanted:,}"
        )
        return Verdict.NO, held
    if rest < 0 or (not constants.graph_in_budget and rest < needed):
        return Verdict.NO, (
            f"what gpu_memory_utilization leaves ({(card.memory_bytes - budget) / GIB:.1f} GiB) does not hold CUDA "
            f"graphs and warm-up, which vLLM {constants.version} does not count in"
        )
    if at_once < ask.concurrency:
        return Verdict.TIGHT, (
            f"holds {at_once:,} of {ask.concurrency:,} requests of {plan.context:,} tokens at once; the others wait"
        )
    if not plan.architecture.known:
        return Verdict.TIGHT, f"fits as an ordinary decoder, but {plan.architecture.model_type!r} may be none"
    if pool is not None:
        short = [bytes_ - margin for bytes_ in free]
        blocks = pool.blocks(short) if min(short) > 0 else 0
        enough = max(pool.request(wanted), ask.concurrency * pool.request(plan.context))
        if blocks - 1 < enough:
            return Verdict.TIGHT, (
                f"{at_once:,} requests of {plan.context:,} tokens at once, but {margin / GIB:.1f} GiB less would not "
                "do, and the arithmetic can be as far off"
            )
    elif room < margin:
        return Verdict.TIGHT, f"fits with {room / GIB:.1f} GiB to spare, and the arithmetic can be as far off"
    if not constants.graph_in_budget and rest < needed + margin:
        return Verdict.TIGHT, (
            f"starts with {rest / GIB:.1f} GiB outside of gpu_memory_utilization, close to what warm-up takes"
        )
    return Verdict.FITS, f"{at_once:,} requests of {plan.context:,} tokens at once"


def _about(card: Card, constants: EngineConstants) -> tuple[str, ...]:
    """What the figures rest on, where it is not a measurement of this card and this version."""
    said = []
    if not card.measured:
        said.append(f"the visible memory of {card.name} is taken from its label")
    if constants.measured_on is None:
        said.append(
            f"nobody has measured vLLM {constants.version or 'of this version'}: overheads are raised ones"
        )
    elif not card.name.upper().startswith("H100"):
        said.append(f"overheads were measured on H100 with vLLM {constants.measured_on}")
    return tuple(said)


def _with_speed(
    found: Candidate, plan: _Plan, card: Card, ask: Ask, weight_bytes: int, price: float | None
) -> Candidate:
    """With what it can reach at best: of requests that do not fit at once, only those that do count."""
    from dataclasses import replace

    if found.verdict in (Verdict.NO, Verdict.UNKNOWN) or not found.max_concurrency:
        return found
    speed = roofline.roofline(
        replace(plan.architecture, quantization=plan.quantization),
        card,
        found.count,
        tensor_parallel=plan.tensor_parallel,
        weight_bytes=weight_bytes,
        kv=plan.cache,
        concurrency=min(ask.concurrency, found.max_concurrency),
        context=plan.context,
    )
    if plan.element > _HALF:  # no source says how fast a card multiplies 32 bits
        return found
    cost = None
    if price is not None and speed.decode:
        cost = price / 3600 / speed.decode * 1e6
    return replace(
        found,
        decode_tokens_per_s=speed.decode,
        prefill_tokens_per_s=speed.prefill,
        usd_per_million_tokens=cost,
    )


def _by_weight(facts: ModelFacts, card: Card, count: int, ask: Ask, constants: EngineConstants) -> Candidate:
    """An encoder or a diffusion model, of which only the size of the weights is known: it has no KV cache."""
    price = None if card.usd_per_second is None else card.usd_per_second * 3600 * count
    if facts.weight_bytes is None:
        return Candidate(
            card.name, count, Verdict.UNKNOWN, "neither its shapes nor the size of its weights is known"
        )
    if facts.kind in ("llm", "vision"):
        if facts.weight_bytes > card.memory_bytes * count and not ask.quantization:
            return Candidate(
                card.name,
                count,
                Verdict.NO,
                f"its weights alone, {facts.weight_bytes / GIB:.1f} GiB, are more than the GPUs have",
                usd_per_hour=price,
            )
        return Candidate(
            card.name,
            count,
            Verdict.UNKNOWN,
            f"{facts.weight_bytes / GIB:.1f} GiB of weights, but what it keeps of a request is unknown",
            usd_per_hour=price,
        )
    utilisation = ask.gpu_memory_utilization or constants.gpu_memory_utilization
    budget = int(card.memory_bytes * utilisation)
    beside = int(facts.weight_bytes * (_BY_WEIGHT - 1)) + constants.non_torch
    room = budget - facts.weight_bytes - beside
    memory = PerGpu(
        weights=facts.weight_bytes,
        activation=beside - constants.non_torch,
        non_torch=constants.non_torch,
        graph=0,
        kv_cache=0,
        reserve=max(0, card.memory_bytes - facts.weight_bytes - beside),
    )
    said = ("judged by the size of its weights, and a fifth more for what runs beside them",)
    if room < 0:
        over = f"{-room / GIB:.1f} GiB more than the {budget / GIB:.1f} GiB that may be taken"
        verdict, reason = Verdict.NO, f"weights and overheads are {over}"
    elif room < constants.margin * budget:
        verdict, reason = (
            Verdict.TIGHT,
            f"weights of {facts.weight_bytes / GIB:.1f} GiB, with little to spare",
        )
    else:
        verdict, reason = Verdict.FITS, f"weights of {facts.weight_bytes / GIB:.1f} GiB"
    return Candidate(
        card.name, count, verdict, reason, (*said, *_about(card, constants)), memory, usd_per_hour=price
    )
