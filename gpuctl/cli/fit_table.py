"""How verdicts look to a person: one line for each GPU, or a few short ones where the terminal is narrow.

May import: the standard library; the values of `gpuctl.fit` and `gpuctl.fitting` as types only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuctl.fit.values import Candidate, PerGpu

_GIB = 2**30
_CELLS = 16
_HEADER = (
    "GPU", "VERDICT", "MEMORY OF EACH", "WEIGHTS", "KV", "ACT+GRAPHS", "RESERVE", "KV TOKENS", "LONGEST", "AT ONCE",
    "$/H", "DECODE", "PREFILL", "$/M",
)  # fmt: skip
_LEFT = 3  # columns of text; the others are numbers, aligned to the right
_MARKS = ("█", "▓", "▒", "░")  # weights, KV cache, activations and graphs, reserve
_PLAIN = ("#", "=", "-", ".")
_MISSING = "?"


def legend(*, unicode: bool) -> str:
    """What the bar's marks and the columns mean."""
    weights, kv, activation, reserve = _MARKS if unicode else _PLAIN
    return (
        f"Memory of one GPU in GiB: {weights} weights, {kv} KV cache, {activation} activations and CUDA graphs, "
        f"{reserve} reserve. LONGEST: tokens of one request; AT ONCE: requests of the context that was asked. "
        "DECODE and PREFILL (tokens a second) and $/M (million tokens) are estimates: docs/fit.md."
    )


def lines(candidates: Sequence[Candidate], *, width: int | None, unicode: bool) -> Iterator[str]:
    """The verdicts: a table where `width` (None: no limit) has room for it, else a paragraph for each."""
    rows = [_row(one, unicode=unicode) for one in candidates]
    widths = [max(len(row[i]) for row in (_HEADER, *rows)) for i in range(len(_HEADER))]
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        for one in candidates:
            yield from _paragraph(one, width=width, unicode=unicode)
        return
    yield _line(_HEADER, widths)
    for row, one in zip(rows, candidates, strict=True):
        yield _line(row, widths)
        if one.verdict != "fits":
            yield from _wrapped(one.reason, width, "  ")


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.ljust(size) if i < _LEFT else cell.rjust(size)
        for i, (cell, size) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _row(one: Candidate, *, unicode: bool) -> tuple[str, ...]:
    per_gpu = one.per_gpu
    return (
        named(one),
        str(one.verdict),
        bar(one, _CELLS, unicode=unicode),
        *([_MISSING] * 4 if per_gpu is None else [_gib(size) for size in _parts(per_gpu)]),
        _count(one.kv_cache_tokens),
        _count(one.max_context),
        _count(one.max_concurrency),
        _usd(one.usd_per_hour),
        _about(one.decode_tokens_per_s),
        _about(one.prefill_tokens_per_s),
        _MISSING if one.usd_per_million_tokens is None else f"~{one.usd_per_million_tokens:.2f}",
    )


def _paragraph(one: Candidate, *, width: int, unicode: bool) -> Iterator[str]:
    price = "" if one.usd_per_hour is None else f"  ${_usd(one.usd_per_hour)} an hour"
    yield f"{named(one)}  {one.verdict}{price}"
    per_gpu = one.per_gpu
    if per_gpu is not None:
        yield "  " + bar(one, max(min(_CELLS, width - 4), 4), unicode=unicode)
        weights, kv, activation, reserve = map(_gib, _parts(per_gpu))
        yield from _wrapped(
            f"{weights} weights + {kv} KV + {activation} activations and graphs + {reserve} reserve GiB",
            width,
            "  ",
        )
    if one.kv_cache_tokens is not None:
        yield from _wrapped(
            f"{_count(one.kv_cache_tokens)} tokens of KV cache; longest {_count(one.max_context)}; "
            f"{_count(one.max_concurrency)} requests at once",
            width,
            "  ",
        )
    if one.decode_tokens_per_s is not None:
        yield from _wrapped(
            f"{_about(one.decode_tokens_per_s)} tok/s decode, {_about(one.prefill_tokens_per_s)} prefill"
            + (
                ""
                if one.usd_per_million_tokens is None
                else f", ~${one.usd_per_million_tokens:.2f} a million tokens"
            ),
            width,
            "  ",
        )
    if one.verdict != "fits":
        yield from _wrapped(one.reason, width, "  ")


def named(one: Candidate) -> str:
    """As `--gpu` takes it."""
    return one.gpu if one.count == 1 else f"{one.gpu}:{one.count}"


def bar(one: Candidate, cells: int, *, unicode: bool) -> str:
    """The parts of one GPU's memory, to scale; what is there at all has a mark. What overflows it ends in `>`."""
    if one.per_gpu is None:
        return ""
    marks = _MARKS if unicode else _PLAIN
    sizes = [max(size, 0) for size in _parts(one.per_gpu)]
    whole = sum(sizes)
    if whole <= 0:
        return ""
    counts = [max(1, round(cells * size / whole)) if size else 0 for size in sizes]
    counts[counts.index(max(counts))] += cells - sum(counts)
    text = "".join(mark * count for mark, count in zip(marks, counts, strict=True))
    return text[:-1] + ">" if one.verdict == "no" and one.per_gpu.kv_cache <= 0 else text


def _parts(per_gpu: PerGpu) -> tuple[int, int, int, int]:
    """Bytes of weights, KV cache, activations with graphs and what is outside of torch, and reserve."""
    return (
        per_gpu.weights,
        per_gpu.kv_cache,
        per_gpu.activation + per_gpu.non_torch + per_gpu.graph,
        per_gpu.reserve,
    )


def wrapped(text: str, width: int | None, indent: str = "") -> list[str]:
    """Lines no wider than the terminal; one line where there is none."""
    return list(_wrapped(text, width, indent))


def _wrapped(text: str, width: int | None, indent: str) -> Iterator[str]:
    if width is None:
        yield indent + text
        return
    import textwrap

    yield from textwrap.wrap(
        text,
        max(width, 20),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f}"


def _count(number: int | None) -> str:
    return _MISSING if number is None else f"{number:,}"


def _usd(amount: float | None) -> str:
    return _MISSING if amount is None else f"{amount:.2f}"


def _about(number: float | None) -> str:
    """An estimate, to two digits: more would say that more is known."""
    if number is None:
        return _MISSING
    digits = len(str(int(number))) - 2
    return f"~{round(number, -digits) if digits > 0 else round(number):,.0f}"
