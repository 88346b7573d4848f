"""Does it fit. May import: gpuctl.fit, the standard library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuctl.fit import kv, overheads, weights
from gpuctl.fit.values import GIB, Candidate, PerGpu, Verdict

if TYPE_CHECKING:
    from gpuctl.fit.overheads import EngineConstants
    from gpuctl.fit.values import Ask, Card, ModelFacts

PLANNED_CONTEXT = 4096  # tokens, where none was asked for


def judge(facts: ModelFacts, card: Card, count: int, ask: Ask, constants: EngineConstants) -> Candidate:
    """Whether `count` of a card run a model as asked, and what is left for the cache.

    KV cache = utilisation x visible memory - weights - activation - non-torch (- graphs, where the engine counts them
    in), on the fullest GPU (vLLM `Worker.determine_available_memory`).
    """

    def answer(verdict: Verdict, reason: str) -> Candidate:
        return Candidate(card.name, count, verdict, reason)

    architecture = facts.architecture
    if architecture is None:
        return answer(Verdict.UNKNOWN, "the model's shapes are unknown")
    tp, pp = ask.tensor_parallel or count // ask.pipeline_parallel, ask.pipeline_parallel
    if tp * pp != count:
        return answer(Verdict.NO, f"tensor parallel {tp} x pipeline parallel {pp} is not {count} GPUs")
    if architecture.heads % tp:
        return answer(
            Verdict.NO,
            f"{architecture.heads} attention heads cannot be divided over {tp} GPUs (tensor parallel)",
        )
    longest = facts.own_context or architecture.context
    if longest is None:
        return answer(Verdict.UNKNOWN, "the model's own context is unknown")
    context = ask.context or min(longest, PLANNED_CONTEXT)
    made = overheads.batch(card, ask, constants, ask.context or longest)
    element = architecture.element_bytes
    each = weights.per_stage(architecture, tp, pp, element, None)
    utilisation = ask.gpu_memory_utilization or constants.gpu_memory_utilization
    peak = overheads.activation(architecture, made, constants, tensor_parallel=tp, element_bytes=element)
    non_torch = constants.non_torch if tp == 1 else constants.non_torch_parallel
    layers = max(len(part) for part in weights.stages(len(architecture.layers), pp))
    graphs = overheads.graph(constants, ask, layers)
    inside = graphs if constants.graph_in_budget else 0
    budget = int(card.memory_bytes * utilisation)
    free = [budget - size - peak - non_torch - inside for size in each]
    pool = kv.pool(architecture, tp, pp, element, made.tokens)
    blocks = pool.blocks(free)
    fullest = min(range(pp), key=lambda i: free[i])
    room = max(0, free[fullest])
    per_gpu = PerGpu(
        weights=each[fullest],
        activation=peak,
        non_torch=non_torch,
        graph=graphs,
        kv_cache=room,
        reserve=max(0, card.memory_bytes - each[fullest] - peak - non_torch - graphs - room),
    )
    reach = pool.longest(blocks, longest)
    at_once = blocks // pool.request(context)
    tokens = pool.tokens(blocks, ask.context or longest, by_concurrency=constants.tokens_by_concurrency)
    verdict, reason = Verdict.FITS, f"{at_once:,} requests of {context:,} tokens at once"
    if free[fullest] <= 0:
        short = -free[fullest] / GIB
        verdict = Verdict.NO
        reason = f"weights and overheads are {short:.1f} GiB more than the {budget / GIB:.1f} GiB budget"
    elif reach < context:
        verdict = Verdict.NO
        reason = f"one request can have {reach:,} tokens, fewer than {context:,}"
    elif at_once < ask.concurrency:
        verdict = Verdict.TIGHT
        reason = f"holds {at_once:,} of {ask.concurrency:,} requests of {context:,} tokens; the others wait"
    return Candidate(
        gpu=card.name,
        count=count,
        verdict=verdict,
        reason=reason,
        per_gpu=per_gpu,
        kv_cache_tokens=tokens,
        max_context=reach,
        max_concurrency=at_once,
        usd_per_hour=None if card.usd_per_second is None else card.usd_per_second * 3600 * count,
    )
