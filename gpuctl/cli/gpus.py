"""`gpuctl gpus`: the GPUs that Modal lends, and what they cost. May import: typer, options."""

from __future__ import annotations

from typing import Annotated

import typer

from gpuctl.cli.options import Json, Local, Quiet, Verbose, runner_of, target_of


def complete_sort(incomplete: str) -> list[str]:
    """What `--sort` takes."""
    from gpuctl.gpus import SORTS

    return [name for name in SORTS if name.startswith(incomplete)]


def gpus(
    ctx: typer.Context,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="BY",
            help="price, price-per-gib or name, the lowest first; or vram, total-vram, bandwidth, bf16, fp8, fp4, "
            "compute-capability, the highest first. Else from small to large.",
            show_default=False,
            autocompletion=complete_sort,
        ),
    ] = None,
    min_vram: Annotated[
        str | None,
        typer.Option(metavar="GIB", help="Only those with so much memory on one card.", show_default=False),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also what other clouds publish.")] = False,
    local: Local = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the GPUs that Modal lends, with what they can do and what they cost.

    VRAM is in GiB of one card, and TOTAL of as many as one container can have (MAX). GB/S is the memory's bandwidth;
    BF16, FP8 and FP4 are dense tensor throughput in TFLOPS; CC is the compute capability. Prices are of one card.
    """
    from gpuctl.cli.console import Console
    from gpuctl.gpus import check, clouds_of, header, offers, sources_said
    from gpuctl.prices import rates

    console = Console(quiet=quiet, verbose=verbose, json=json)
    least = check(sort, min_vram)
    with console.spinner("asking Modal for your prices"):
        prices = rates(target_of(local), runner=runner_of(ctx), console=console)
    found = offers(prices, sort=sort, min_vram=least)
    clouds = clouds_of(found) if compare else []
    if json:
        console.print_document(
            {"gpus": [offer.document(compare=compare) for offer in found], "prices": prices.document()}
        )
        return
    if not found:
        console.say(f"no GPU has {min_vram} GiB on one card; gpuctl gpus lists what there is")
        return
    console.table(header(clouds), [offer.cells(clouds) for offer in found])
    core, memory = prices.cpu_core.usd_per_hour, prices.memory_gib.usd_per_hour
    console.note(f"beside the GPUs: {core:.4f} $/h for a CPU core, {memory:.4f} $/h for a GiB of memory")
    console.note(f"prices: {prices.said()}")
    for line in sources_said(found, clouds):
        console.note(line)
