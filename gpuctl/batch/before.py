"""What is told of a job before it starts: its tokens, its time and what it costs. May import: batch (estimate, jobs,
sampling, tally, tokenizing), catalog, configs (values), cost, errors, fit, fitting, reach, specs, target, verdicts.

Rows are counted while they are staged, and a sample of them is kept; it is tokenised when the estimate is asked for,
so that a job which is there already is found before anybody waits for that.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpuctl.batch.answers import dumps
from gpuctl.batch.estimate import Estimate, Machine, Speed, Tokens, TooLong, spans
from gpuctl.batch.rows import Url
from gpuctl.batch.sampling import Sample, total
from gpuctl.batch.tally import Tally, answers_of, bare, cap_of
from gpuctl.batch.tastes import taste_of
from gpuctl.cost import cost_of, usd
from gpuctl.errors import usage_error
from gpuctl.fit.values import GIB
from gpuctl.specs.engine_args import gives
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from gpuctl.batch.jobs import Job
    from gpuctl.batch.plan import Decided
    from gpuctl.batch.sampling import Drawn
    from gpuctl.batch.tokenizing import Count, Loaded
    from gpuctl.cli.console import Console
    from gpuctl.fit.values import Candidate
    from gpuctl.specs.gpu import GpuChoice

# Bytes of text that are tokenised: a second or two. Of 1,000 rows with 2 kB each that is all of them.
_BUDGET = 2_000_000
_AROUND = 50  # tokens that a row may have beyond its bytes: what a chat template writes


class Watch:
    """What the rows are like, seen while they pass by."""

    def __init__(self, file: Path, *, context: int | None) -> None:
        self.tally = Tally(context)
        self.sample = Sample(file)

    def see(self, url: Url, body: Any) -> None:
        size = self.tally.see(url, body)
        self.sample.see(size, lambda: dumps([url, bare(url, body)]).encode())


@dataclass
class Before:
    """The estimate of a job, made when it is first asked for."""

    decided: Decided
    job: Job
    watch: Watch
    online: bool
    console: Console
    tastes: Iterable[tuple[Job, dict[str, Any]]] = ()  # jobs that ended here, and how

    asked: bool = False

    def tell(self) -> Estimate:
        """Say it, and what may go wrong. A usage error where no row can be answered."""
        estimate = self.estimate
        long = estimate.too_long
        if long is not None and long.rows == long.of and not self.decided.spec.force:
            raise usage_error(
                f"INPUT: {long.said()}, and nothing could be answered",
                hint="shorter rows, a model with a longer context, or a longer --max-model-len where the model has one"
                + ("" if long.all_rows else "; --force starts it nevertheless"),
            )
        for line in estimate.lines():
            self.console.say(line)
        tokens = estimate.tokens
        if tokens is not None and not tokens.capped and estimate.measured is None:
            self.console.note(
                "--max-tokens N says how long an answer may be, and so what all of it can cost at most"
            )
        if long is not None:
            self.console.warn(long.said())
        self._warn_of_cap(estimate)
        return estimate

    def _warn_of_cap(self, estimate: Estimate) -> None:
        cap = self.decided.spec.max_cost
        if cap is None or estimate.spans is None or estimate.spans.usd is None:
            return
        low, high = estimate.spans.usd
        if high > cap:
            will = "will" if low > cap else "may"
            self.console.warn(
                f"--max-cost: {usd(cap)} {will} be spent before all rows are answered, which by the estimate take "
                f"{estimate.cost_said()}; what is answered stays, and `gpuctl batch resume` goes on"
            )

    def document(self) -> dict[str, Any] | None:
        """`estimate` of `--json`; None where none was made, because the job was there already."""
        return self.estimate.document() if self.asked else None

    @functools.cached_property
    def estimate(self) -> Estimate:
        self.asked = True
        spec, rows = self.decided.spec, self.job.rows - self.job.bad - self.job.copies
        count = min(spec.max_containers, max(1, self.job.shards))
        containers = _containers(self.decided, count)
        price = self.decided.usd_per_hour
        taste = taste_of(self.job, self.tastes)
        if spec.model is None:
            if taste is not None:
                return Estimate(None, taste.expected(rows, count, price), None, containers, taste)
            return Estimate(None, None, "nobody knows how long a function takes" + self._taste, containers)
        if self.job.url == Url.IMAGES:
            found = None if taste is None else taste.expected(rows, count, price)
            slow = None if found else "how long a picture takes is not known here" + self._taste
            return Estimate(None, found, slow, containers, taste, pictures=self.watch.tally.pictures)
        tokens, long = self._tokens()
        if taste is not None:
            return Estimate(tokens, taste.expected(rows, count, price), None, containers, taste, long)
        if spec.target is Target.LOCAL:
            why = "not estimated for this machine's CPU, where nothing is charged"
            return Estimate(tokens, None, why, containers, None, long)
        if self.job.url == Url.TRANSCRIPTIONS:
            return Estimate(
                tokens, None, "how long recordings are is not known here" + self._taste, containers
            )
        machines = self._machines(tokens, count)
        if machines is None:
            unknown = f"how fast {spec.title} is on {spec.gpu or 'it'} is not known" + self._taste
            return Estimate(tokens, None, unknown, containers, None, long)
        found = spans(tokens, machines, count, timeout=spec.startup_timeout)
        endless = (
            "no end is known without --max-tokens, for the context is not known" if found is None else None
        )
        return Estimate(tokens, found, endless, containers, None, long)

    @property
    def _taste(self) -> str:
        """That a few rows would tell it, where there are more."""
        return _TASTE if self.job.rows > _TASTED else ""

    # -- tokens

    def _tokens(self) -> tuple[Tokens, TooLong | None]:
        """The tokens of all rows, and those that are too long."""
        spec, tally, sample = self.decided.spec, self.watch.tally, self.watch.sample
        counted = tally.rows if tally.bytes else 0
        loaded = self._loaded()
        with self.console.spinner("counting tokens …"):
            longest = list(sample.longest)
            rest = list(sample.rest(_BUDGET))
            requests = [_request(one) for one in (*longest, *rest)]
            counts = list(loaded.counter.count(requests))
        shared = loaded.counter.shared if loaded.missing is None else 0  # type: ignore[union-attr]
        most = float(sample.rest_bytes + _AROUND * sample.rest_rows)

        def all_of(values: list[int]) -> Any:
            return total(
                values[: len(longest)],
                list(zip((one.size for one in rest), values[len(longest) :], strict=True)),
                rest_rows=sample.rest_rows,
                rest_bytes=sample.rest_bytes,
                most=most,
            )

        tokens_in = all_of([count.low for count in counts])
        if loaded.missing is not None:
            high = all_of([count.high for count in counts])
            tokens_in = type(high)(tokens_in.low, (tokens_in.likely + high.likely) / 2, high.high)
        context = tally.context
        high_out: int | None = tally.capped_out
        if tally.open_answers:
            high_out = None if context is None else tally.capped_out + context * tally.open_answers
        if high_out is not None and tally.open_answers == tally.rows:
            # What the questions take of the context is left to no answer.
            high_out = max(tally.least_out, high_out - int(tokens_in.low))
        if not loaded.chats and self.job.url == Url.CHAT:
            self.console.warn(
                f"{spec.title} has no chat template, and the engine refuses chats without one: --task completions, "
                "or -- --chat-template FILE"
            )
        return Tokens(
            rows=tally.rows,
            tokenised=len(counts),
            tokens_in=tokens_in,
            shared=int(shared * max(0, counted - 1)),
            out_low=tally.least_out,
            out_high=high_out,
            capped=not tally.open_answers,
            missing=loaded.missing,
            not_counted=dict(tally.media) or None,
        ), _too_long(requests, counts, context, all_rows=len(counts) == tally.rows)

    def _loaded(self) -> Loaded:
        from gpuctl.batch.tokenizing import tokenizer_of

        spec = self.decided.spec
        assert spec.model is not None
        with self.console.spinner(f"fetching the tokenizer of {spec.title} …"):
            return tokenizer_of(
                spec.model,
                online=self.online,
                other_tokenizer=gives(spec.engine_args, "--tokenizer"),
                other_template=gives(spec.engine_args, "--chat-template"),
            )

    # -- GPUs

    def _machines(self, tokens: Tokens, containers: int) -> list[Machine] | None:
        """Each choice of GPUs; None where of one it is not known how fast it can be."""
        from gpuctl.batch.plan import endpoint

        decided = self.decided
        if decided.found is None or decided.rates is None or decided.spec.gpu is None or not tokens.rows:
            return None
        spec = endpoint(decided.spec)
        out = tokens.out_low if tokens.out_high is None else tokens.out_high
        machines = []
        for choice in decided.spec.gpu.choices:
            fast = self._speed(
                choice, tokens.tokens_in.low, tokens.out_low, tokens.rows, containers, fast=True
            )
            slow = self._speed(choice, tokens.tokens_in.high, out, tokens.rows, containers, fast=False)
            if fast is None or slow is None:
                return None
            cost = cost_of(spec, (choice,), decided.rates)
            machines.append(
                Machine(
                    str(choice),
                    fast[0],
                    slow[0],
                    slow[1],
                    (cost.cheapest.usd, cost.dearest.most_usd),
                )
            )
        return machines

    def _speed(
        self,
        choice: GpuChoice,
        tokens_in: float,
        tokens_out: float,
        rows: int,
        containers: int,
        *,
        fast: bool,
    ) -> tuple[Speed, float] | None:
        """At best, with rows of that mean length, and GiB of weights."""
        from gpuctl.batch.plan import endpoint
        from gpuctl.verdicts import speed_on

        decided = self.decided
        assert decided.found is not None
        assert decided.rates is not None
        one = speed_on(
            endpoint(decided.spec),
            decided.found,
            decided.rates,
            choice,
            context=max(16, min(int((tokens_in + tokens_out) / rows), self.watch.tally.context or 2**62)),
            requests=-(-rows // containers),
        )
        if one.per_gpu is None:
            return None
        if one.prefill_tokens_per_s is None and not tokens_out:
            return self._encoder(one, fast=fast)
        if one.prefill_tokens_per_s is None:
            return None
        if tokens_out and one.decode_tokens_per_s is None:
            return None
        decode = one.decode_tokens_per_s if tokens_out else None
        return Speed(one.prefill_tokens_per_s, decode), one.per_gpu.weights * one.count / GIB

    def _encoder(self, one: Candidate, *, fast: bool) -> tuple[Speed, float] | None:
        """Of a model of which only the size of its weights is known: 2 operations for each parameter and token."""
        from gpuctl.fitting import card_of, cards
        from gpuctl.specs.gpu import GpuChoice

        assert self.decided.rates is not None
        assert one.per_gpu is not None
        card, _ = card_of(GpuChoice(one.gpu, one.count), cards(self.decided.rates))
        flops = card.flops.get("bf16")
        if flops is None or not one.per_gpu.weights:
            return None
        # Files of 32 bits have half as many parameters as those of 16, and which they are is not known.
        parameters = one.per_gpu.weights / (4 if fast else 2)
        return Speed(flops * one.count / (2 * parameters), None), one.per_gpu.weights / GIB


_TASTE = "; --limit 100 does 100 rows for a taste, and then it is known"
_TASTED = 100  # rows that are a taste themselves


def _request(one: Drawn) -> tuple[Url, Any]:
    url, body = json.loads(one.kept)
    return Url(url), body


def _too_long(
    requests: Iterable[tuple[Url, Any]], counts: Sequence[Count], context: int | None, *, all_rows: bool
) -> TooLong | None:
    """Rows that the engine will refuse: their question, and the answer that they ask for, are more than the context."""
    if context is None:
        return None
    over = []
    for (url, body), count in zip(requests, counts, strict=True):
        answer = 0
        if answers_of(url, body):
            answer = cap_of(url, body) or 1
        if url is not Url.TRANSCRIPTIONS and count.low + answer > context:
            over.append(count.low)
    if not over:
        return None
    return TooLong(len(over), len(counts), max(over), context, all_rows)


def _containers(decided: Decided, count: int) -> str:
    gpu = decided.spec.gpu
    what = " or ".join(map(str, gpu.choices)) if gpu is not None else "container" + "s" * (count != 1)
    return f"{count:,} {what}" if gpu is None or count > 1 else f"one {what}"
