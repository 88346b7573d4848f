"""`gpuctl fit`: does a model fit, on which GPUs, and what would it cost. May import: typer, options.

Numbers are read as texts, so that one error can name every problem of a command (`FitSpec.from_options`).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpuctl.cli.options import Json, Quiet, complete_gpu, complete_model, number, text

if TYPE_CHECKING:
    from gpuctl.cli.console import Console
    from gpuctl.fit.values import Candidate
    from gpuctl.fitting import Assessment, Change
    from gpuctl.specs.fit import FitSpec


def fit(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="An alias, org/name[@revision] of Hugging Face, a folder with a config.json, or a config.json.",
            autocompletion=complete_model,
        ),
    ],
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="GPU",
            show_default=False,
            help="GPUs to judge, as for serve: H100, H100:2, or several: L4,L40S,H100:2. [default: all]",
            autocompletion=complete_gpu,
        ),
    ] = None,
    context: Annotated[
        str | None,
        number("Tokens of one request, question and answer together. [default: planned with up to 4096]"),
    ] = None,
    concurrency: Annotated[
        str | None,
        number(
            "Requests of that context at once. "
            "[default: one of the whole context, and 32 of up to 4096 tokens, as serve has it]"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        text(
            "DTYPE",
            "Type of the weights, as vLLM's --dtype. [default: the model's own]",
            ("bfloat16", "float16", "float32"),
        ),
    ] = None,
    quantization: Annotated[
        str | None,
        text(
            "METHOD",
            "Weights quantised this way, as vLLM's --quantization. [default: as they were published]",
            ("fp8",),
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        text(
            "DTYPE",
            "Type of the KV cache, as vLLM's --kv-cache-dtype. [default: that of the weights]",
            ("bfloat16", "fp8"),
        ),
    ] = None,
    lora: Annotated[
        str | None, number("Adapters (LoRA) that are loaded at once, each of rank 16. [default: 0]")
    ] = None,
    gpu_memory_utilization: Annotated[
        str | None, text("SHARE", "Share of a GPU's memory that the engine may take. [default: 0.92]")
    ] = None,
    tensor_parallel: Annotated[
        str | None, number("GPUs that each layer is split over. [default: all of the container]")
    ] = None,
    pipeline_parallel: Annotated[
        str | None, number("Stages that the layers are dealt out to. [default: 1]")
    ] = None,
    engine_version: Annotated[str | None, text("X.Y.Z", "The version of vLLM. [default: 0.32.0]")] = None,
    drop_unfit: Annotated[
        bool, typer.Option("--drop-unfit", help="Keep only the GPUs with which the engine would start.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Every choice of GPUs: also more of a card than will do."),
    ] = False,
) -> None:
    """Tell on which GPUs a model fits, and which to take.

    Where its memory goes, what it holds and what it costs; and where it fits nowhere, what to change. Exit
    code 0 whatever the answer is: it is in `verdict` of --json.
    """
    from gpuctl.cli.console import Console
    from gpuctl.fitting import assess_spec
    from gpuctl.specs.fit import FitSpec

    spec = FitSpec.from_options(
        model=model,
        gpu=gpu,
        context=context,
        concurrency=concurrency,
        dtype=dtype,
        quantization=quantization,
        kv_dtype=kv_dtype,
        lora=lora,
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        engine_version=engine_version,
        drop_unfit=drop_unfit,
    )
    console = Console(quiet=quiet, verbose=verbose, json=json)
    found, assessment, prices = assess_spec(spec)
    for note in found.notes:
        console.warn(note)
    if json:
        console.print_document(_document(spec, found.notes, assessment, prices.document()))
        return
    _show(spec, assessment, prices.said(), console)


def _show(spec: FitSpec, assessment: Assessment, prices: str, console: Console) -> None:
    import shutil

    from gpuctl.cli.fit_table import legend, lines, named, wrapped

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")

    def say(text: str, indent: str = "") -> None:
        for line in wrapped(text, width, indent):
            console.answer(line)

    if console.quiet:
        if assessment.pick is not None:
            console.answer(named(assessment.pick))
        return
    say(_about_model(assessment))
    if assessment.facts.architecture is not None:
        say(_about_ask(spec, assessment))
    console.answer("")
    everything = spec.gpu is not None or console.verbose
    shown = list(assessment.candidates) if everything else _few(assessment)
    if shown:
        for line in lines(shown, width=width, unicode=unicode):
            console.answer(line)
        console.answer("")
        say(legend(unicode=unicode))
    for assumption in dict.fromkeys(said for one in shown for said in one.assumptions):
        say(f"Note: {assumption}.")
    if len(shown) < len(assessment.candidates):
        say(
            "Each card with as few of it as will do; --verbose and --json have all, --gpu those that you name."
        )
    say(f"Prices: {prices}.")
    console.answer("")
    say(_conclusion(spec, assessment))
    if assessment.pick is None and not assessment.changes and not assessment.open:
        say("No other GPU of Modal, number of them, quantised build or context would make it fit.")
    for i, change in enumerate(assessment.changes):
        price = (
            "" if change.candidate.usd_per_hour is None else f", ${change.candidate.usd_per_hour:.2f} an hour"
        )
        say(f"{'What fits' if i == 0 else 'Or'}: {change.what}{price}:")
        console.answer("  " + _command(spec, change))


def _about_model(assessment: Assessment) -> str:
    facts = assessment.facts
    parts = [facts.name if facts.repo in (None, facts.name) else f"{facts.name} ({facts.repo})"]
    if facts.architecture is not None:
        total, active = facts.architecture.parameters, facts.architecture.active_parameters
        parts.append(f"{total / 1e9:.2f} billion parameters")
        if active < 0.9 * total:
            parts.append(f"{active / 1e9:.2f} of them active")
    if facts.weight_bytes is not None:
        parts.append(f"{facts.weight_bytes / 2**30:.1f} GiB of weights in its files")
    if facts.own_context is not None:
        parts.append(f"a context of {facts.own_context:,} tokens")
    return f"{', '.join(parts)}; from {facts.source}."


def _about_ask(spec: FitSpec, assessment: Assessment) -> str:
    from gpuctl.fitting import wanted

    what = wanted(assessment.ask, assessment.facts.own_context, spec.concurrency)
    return f"Planned for {what}, with vLLM {spec.engine_version}."


def _few(assessment: Assessment) -> list[Candidate]:
    """For each card the smallest number that fits, else that starts, else the largest; no card twice."""
    from gpuctl.fit.values import Verdict
    from gpuctl.fitting import SYNONYMS

    order = (Verdict.FITS, Verdict.TIGHT, Verdict.UNKNOWN, Verdict.NO)
    best: dict[str, Candidate] = {}
    for one in assessment.candidates:
        if one.gpu in SYNONYMS:
            continue
        before = best.get(one.gpu)
        if (
            before is None
            or order.index(one.verdict) < order.index(before.verdict)
            or (one.verdict is before.verdict is Verdict.NO)
        ):
            best[one.gpu] = one
    return list(best.values())


def _conclusion(spec: FitSpec, assessment: Assessment) -> str:
    from gpuctl.cli.fit_table import named
    from gpuctl.fit.values import Verdict

    pick = assessment.pick
    if pick is None:
        return f"{assessment.why[:1].upper()}{assessment.why[1:]}."
    price = "" if pick.usd_per_hour is None else f", ${pick.usd_per_hour:.2f} an hour"
    text = f"Take {named(pick)}{price}: {assessment.why}."
    unfit = [named(one) for one in assessment.candidates if one.verdict is Verdict.NO]
    if spec.gpu is not None and unfit:
        text += f" These do not fit: {', '.join(unfit)} (--drop-unfit leaves them out)."
    return text


def _command(spec: FitSpec, change: Change) -> str:
    """The question again, with the change: a line for a shell."""
    import shlex

    return "gpuctl " + shlex.join(_argv(spec, change))


def _argv(spec: FitSpec, change: Change) -> list[str]:
    """The question again, with the change, after `gpuctl`."""
    words = ["fit", change.model or spec.model, "--gpu", str(change.gpu)]
    same_model = change.model is None
    context = change.context if change.context is not None else spec.context
    for flag, value in (
        ("--context", context),
        ("--concurrency", spec.concurrency),
        ("--dtype", spec.dtype if same_model else None),
        ("--quantization", spec.quantization if same_model else None),
        ("--kv-dtype", spec.kv_dtype),
        ("--lora", spec.lora or None),
        ("--gpu-memory-utilization", spec.gpu_memory_utilization),
        ("--tensor-parallel", spec.tensor_parallel),
        ("--pipeline-parallel", spec.pipeline_parallel if spec.pipeline_parallel > 1 else None),
        ("--engine-version", spec.engine_version if spec.engine_version != default_version() else None),
    ):
        if value is not None and flag not in change.without:
            words += [flag, str(value)]
    return words


def default_version() -> str:
    """The engine's version that is taken unless told otherwise."""
    from gpuctl import catalog

    return catalog.vllm().version


def _document(
    spec: FitSpec, notes: tuple[str, ...], assessment: Assessment, prices: dict[str, Any]
) -> dict[str, Any]:
    """The document of --json (docs/json.md)."""
    from gpuctl.fitting import document

    facts, ask = assessment.facts, assessment.ask
    return {
        "model": {
            "name": facts.name,
            "repo": facts.repo,
            "revision": facts.revision,
            "kind": facts.kind,
            "context": facts.own_context,
            "parameters": None if facts.architecture is None else facts.architecture.parameters,
            "active_parameters": None if facts.architecture is None else facts.architecture.active_parameters,
            "weight_bytes": facts.weight_bytes,
            "source": facts.source,
            "notes": list(notes),
        },
        "ask": {
            "context": ask.context,
            "concurrency": spec.concurrency,
            "dtype": ask.dtype,
            "quantization": ask.quantization,
            "kv_dtype": ask.kv_dtype,
            "lora": ask.lora,
            "gpu_memory_utilization": ask.gpu_memory_utilization,
            "tensor_parallel": ask.tensor_parallel,
            "pipeline_parallel": ask.pipeline_parallel,
            "engine_version": ask.engine_version,
        },
        "candidates": [document(one) for one in assessment.candidates],
        "pick": None
        if assessment.pick is None
        else {"gpu": assessment.pick.gpu, "count": assessment.pick.count},
        "why": assessment.why,
        "change": _change_document(spec, assessment.changes[0]) if assessment.changes else None,
        "other_changes": [_change_document(spec, change) for change in assessment.changes[1:]],
        "prices": prices,
    }


def _change_document(spec: FitSpec, change: Change) -> dict[str, Any]:
    return {
        "what": change.what,
        "argv": ["gpuctl", *_argv(spec, change)],
        "command": _command(spec, change),
        "gpu": change.candidate.gpu,
        "count": change.candidate.count,
        "usd_per_hour": None if (usd := change.candidate.usd_per_hour) is None else round(usd, 6),
    }
