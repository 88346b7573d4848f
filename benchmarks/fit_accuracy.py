"""How right `gpuctl fit` is: against published measurements of vLLM, and beside others on the same rows.

    benchmarks/fit_accuracy.py                         # ours; the others' published figures
    benchmarks/fit_accuracy.py --peers VENV/bin/python # and theirs, computed in the same run

For the latter: `python -m venv VENV && VENV/bin/pip install hf-mem 'llm-d-planner[estimation]' accelerate torch`.
Exit code 1 where a target is missed. `--rows` shows every row.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuctl import catalog
from gpuctl.catalog.overheads import engine_constants
from gpuctl.fit import architecture, kv
from gpuctl.fit.quantization import Matcher
from gpuctl.fit.values import GIB, Ask, Candidate, Card, ModelFacts, Verdict
from gpuctl.fit.verdict import judge

DATA = Path(__file__).parent / "data"
CONFIGS = Path(catalog.__file__).parent / "configs"

QUANTITIES = ("weights", "kv", "tokens", "activation")
NAMED = {"weights": "weights", "kv": "KV GiB", "tokens": "KV tokens", "activation": "activation"}
WEIGHTS_MEAN, DENSE_MEAN, OTHER_MEAN, P90, OUTCOMES = 0.8, 3.0, 6.0, 10.0, 97.0  # percent

SIZED = ("ok", "oom_after_kv_sizing")  # outcomes whose sizes are measurements
STEP = (
    "tokens",
)  # the only size that is scored, from the row's own KV cache: nothing is said of such a row's outcome

# What others publish of themselves, where they were not run here.
PUBLISHED = (
    (
        "llm-d-planner",
        "weights 0.89 %; KV GiB 3-7 % dense, 10-29 % mixtures of experts, 12 % latent, up to 10 % multimodal; "
        "activation off by 212 % after a release of vLLM",
        "https://github.com/llm-d-incubation/llm-d-planner/blob/main/accuracy/accuracy_report.md",
    ),
    (
        "hf-mem",
        "no figure; weights and one request's cache, no engine",
        "https://pypi.org/project/hf-mem/0.5.6/",
    ),
    (
        "accelerate estimate-memory",
        "no figure; the size when loaded, no engine",
        "https://huggingface.co/docs/accelerate/usage_guides/model_size_estimator",
    ),
)


@dataclass(frozen=True)
class Row:
    """One measurement: what was run, and what vLLM said. Sizes in GiB for each GPU."""

    line: int
    model: str
    config: dict[str, Any]
    weight_bytes: int | None
    card: Card
    ask: Ask
    truth: dict[str, float]
    outcome: str
    only: tuple[str, ...]


@dataclass
class Score:
    """What one tool said of one row."""

    row: Row
    family: str
    said: dict[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None
    reason: str = ""

    def error(self, quantity: str) -> float | None:
        """In percent of the measurement, without its sign."""
        truth, said = self.row.truth.get(quantity), self.said.get(quantity)
        if truth is None or said is None or (self.row.only and quantity not in self.row.only):
            return None
        if self.row.outcome not in SIZED:  # it failed on the way: what it had printed is no steady state
            return None
        return abs(said / truth - 1) * 100


def load() -> tuple[list[Row], list[tuple[int, str, str]]]:
    """The rows that can be scored, and the others: line, model, why not."""
    shapes = json.loads((DATA / "fit_shapes.json").read_text(encoding="utf-8"))["models"]
    notes = {
        n["line"]: n for n in tomllib.loads((DATA / "fit_notes.toml").read_text(encoding="utf-8"))["row"]
    }
    rows, skipped = [], []
    with (DATA / "fit_truth.csv").open(encoding="utf-8", newline="") as file:
        for line, raw in enumerate(csv.DictReader(file), start=2):
            note = notes.get(line, {})
            shape = shapes.get(raw["model"])
            if "skip" in note:
                skipped.append((line, raw["model"], note["skip"]))
            elif shape is None:
                skipped.append((line, raw["model"], "its shapes were found nowhere"))
            else:
                rows.append(_row(line, raw, note, shape))
    return rows, skipped


def _row(line: int, raw: dict[str, str], note: dict[str, Any], shape: dict[str, Any]) -> Row:
    given: dict[str, Any] = {**raw, **note.get("set", {})}
    if "like" in shape:
        config = json.loads((CONFIGS / f"{shape['like']}.json").read_text(encoding="utf-8"))
        config.pop("quantization_config", None) if "quantization_config" in shape else None
    else:
        config = dict(shape["config"])
    if "quantization_config" in shape:
        config["quantization_config"] = shape["quantization_config"]
    tensor_parallel = int(given["tp"] or given["gpu_count"])
    dtype = given["dtype"]
    ask = Ask(
        context=int(given["max_model_len"]) if given["max_model_len"] else None,
        concurrency=1,
        dtype="float32" if dtype == "float32" else None,
        quantization="fp8" if dtype.startswith("fp8 (") else None,
        kv_dtype={"": None, "auto": None, "fp8 e4m3": "fp8"}.get(
            given["kv_cache_dtype"], given["kv_cache_dtype"]
        ),
        gpu_memory_utilization=float(given["gpu_mem_util"]) if given["gpu_mem_util"] else None,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=int(given["pp"] or 1),
        engine_version=given["vllm_version"],
        enforce_eager=bool(given.get("eager", False)),
        max_num_batched_tokens=given.get("batch"),
    )
    truth = {
        name: float(given[column])
        for name, column in (
            ("weights", "weights_gib"),
            ("kv", "kv_cache_gib"),
            ("tokens", "kv_cache_tokens"),
            ("activation", "activation_gib"),
        )
        if given[column]
    }
    return Row(
        line,
        raw["model"],
        config,
        shape.get("weight_bytes"),
        _card(given["gpu"], given["gpu_total_gib"]),
        ask,
        truth,
        given["outcome"],
        tuple(note.get("only", ())),
    )


def _card(name: str, visible_gib: str) -> Card:
    """The card of a row: with what CUDA showed of it where the row says, else as in the catalogue."""
    own = {"H100-80GB": "H100", "H100": "H100", "A100": "A100-80GB", "A100-80GB": "A100-80GB"}.get(name, name)
    gpu = catalog.gpus().get(own)
    capability = {"H100": (9, 0), "A100-80GB": (8, 0)}.get(own, (12, 0) if "5090" in name else None)
    size = float(visible_gib) if visible_gib else float((gpu.visible_gib if gpu else None) or 0)
    return Card(own, int(size * GIB), None, {}, capability, True, None)


def ours(rows: Iterable[Row]) -> list[Score]:
    """What `gpuctl fit` says of each."""
    made = []
    for row in rows:
        read = architecture.read(row.config, what=row.model)
        facts = ModelFacts(row.model, None, None, read, row.weight_bytes, "llm", read.context, "benchmark")
        count = (row.ask.tensor_parallel or 1) * row.ask.pipeline_parallel
        judged = judge(facts, row.card, count, row.ask, engine_constants(row.ask.engine_version))
        score = Score(row, read.family, verdict=judged.verdict, reason=judged.reason)
        _fill(score, judged)
        if row.only == STEP:
            score.said["tokens"] = _tokens_of(row, read)
            score.verdict = None
        made.append(score)
    return made


def _fill(score: Score, judged: Candidate) -> None:
    if judged.per_gpu is None:
        return
    memory = judged.per_gpu
    score.said = {
        "weights": memory.weights / GIB,
        "kv": memory.kv_cache / GIB,
        "tokens": float(judged.kv_cache_tokens or 0),
        "activation": memory.activation / GIB,
    }


def _tokens_of(row: Row, read: architecture.Architecture) -> float:
    """The tokens that the measured GiB of cache hold."""
    constants = engine_constants(row.ask.engine_version)
    kept = kv.cache_format(row.ask.kv_dtype, read.element_bytes)
    assert kept is not None
    pool = kv.pool(read, row.ask.tensor_parallel or 1, 1, kept, 2048, constants)
    assert pool is not None
    blocks = pool.blocks([int(row.truth["kv"] * GIB)])
    return pool.tokens(blocks, row.ask.context or 1, by_concurrency=constants.tokens_by_concurrency)


def theirs(python: str, rows: Sequence[Row]) -> dict[str, list[Score]]:
    """What the peers say of each, computed by their own code in their own interpreter.

    Left out are the rows with another type or quantisation than the checkpoint's.
    """
    asked = []
    for row in rows:
        if row.ask.dtype or row.ask.quantization:  # they have no option for it
            continue
        read = architecture.read(row.config, what=row.model)
        asked.append(
            {
                "line": row.line,
                "config": row.config,
                "tensors": [("U8", [row.weight_bytes], 1)] if row.weight_bytes else list(_checkpoint(read)),
                "memory_gib": row.card.memory_bytes / GIB,
                "utilization": row.ask.gpu_memory_utilization
                or engine_constants(row.ask.engine_version).gpu_memory_utilization,
                "tp": row.ask.tensor_parallel or 1,
                "pp": row.ask.pipeline_parallel,
                "context": row.ask.context or read.context,
                "kv_dtype": row.ask.kv_dtype,
            }
        )
    script = Path(__file__).with_name("fit_peers.py")
    done = subprocess.run(
        [python, str(script)], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the peers failed:\n{done.stderr[-2000:]}")
    by_line = {row.line: row for row in rows}
    families = {row.line: architecture.read(row.config, what=row.model).family for row in rows}
    found: dict[str, list[Score]] = {}
    for peer, said in json.loads(done.stdout).items():
        found[peer] = [
            Score(by_line[int(line)], families[int(line)], values) for line, values in said.items()
        ]
    return found


def _checkpoint(read: architecture.Architecture) -> Iterable[tuple[str, list[int], int]]:
    """What a checkpoint's headers would show: dtype, shape, how many. The shapes are those that transformers makes."""
    stored = read.quantization
    matcher = None if stored is None else Matcher(stored)
    kinds = {"fp8": "F8_E4M3", "int8": "I8", "mxfp4": "U8", "nvfp4": "U8", "int4": "I32"}
    for tensor in read.tensors():
        if not tensor.parameter:
            continue
        scheme = None
        if matcher is not None and tensor.linear:
            scheme = matcher.scheme([f"layers.0.{name}" for name in tensor.names], expert=tensor.copies > 1)
        if scheme is None:
            yield "BF16", [tensor.rows, tensor.columns], tensor.copies
            continue
        dtype = kinds.get(scheme.name, "U8")
        packed = {"I32": 32, "U8": 8}.get(dtype, 8) // scheme.bits
        yield dtype, [tensor.rows, tensor.columns // packed], tensor.copies
        yield "U8", [scheme.scales_of(tensor.rows, tensor.columns)], tensor.copies


def errors(scores: Iterable[Score], quantity: str, family: str | None = None) -> list[float]:
    """The errors of a quantity, in percent."""
    return [
        error
        for score in scores
        if family in (None, score.family) and (error := score.error(quantity)) is not None
    ]


def p90(values: Sequence[float]) -> float:
    """The 90th percentile, between the two nearest."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=10, method="inclusive")[-1]


def starts(score: Score) -> bool:
    return score.verdict in (Verdict.FITS, Verdict.TIGHT)


def missed(scores: Sequence[Score]) -> list[str]:
    """The targets that are missed, each in a line."""
    found = []
    if (mean := statistics.fmean(errors(scores, "weights"))) > WEIGHTS_MEAN:
        found.append(f"weights: mean {mean:.2f} % > {WEIGHTS_MEAN} %")
    for family in sorted({score.family for score in scores}):
        for quantity in ("kv", "tokens"):
            values = errors(scores, quantity, family)
            limit = DENSE_MEAN if family == "dense" else OTHER_MEAN
            if values and statistics.fmean(values) > limit:
                found.append(
                    f"{NAMED[quantity]}, {family}: mean {statistics.fmean(values):.2f} % > {limit} %"
                )
            if values and p90(values) > P90:
                found.append(f"{NAMED[quantity]}, {family}: 90th percentile {p90(values):.2f} % > {P90} %")
    judged = [score for score in scores if score.verdict not in (None, Verdict.UNKNOWN)]
    right = sum(starts(score) == (score.row.outcome == "ok") for score in judged)
    if right / len(judged) * 100 < OUTCOMES:
        found.append(f"outcomes: {right} of {len(judged)} right, fewer than {OUTCOMES} %")
    found += [
        f"line {score.row.line}: plain 'fits' for {score.row.outcome}"
        for score in scores
        if score.row.outcome.startswith("oom") and score.verdict is Verdict.FITS
    ]
    return found


def _table(title: str, scores: Sequence[Score]) -> None:
    print(f"\n{title}")
    print(f"{'':14}" + "".join(f"{NAMED[q]:>26}" for q in QUANTITIES))
    print(f"{'family':14}" + "".join(f"{'rows  mean %   p90 %':>26}" for _ in QUANTITIES))
    for family in [*sorted({score.family for score in scores}), None]:
        cells = []
        for quantity in QUANTITIES:
            values = errors(scores, quantity, family)
            cells.append(
                f"{len(values):>10}{statistics.fmean(values):>8.2f}{p90(values):>8.2f}"
                if values
                else f"{'-':>26}"
            )
        print(f"{family or 'all':14}" + "".join(f"{cell:>26}" for cell in cells))


def _each(scores: Sequence[Score]) -> None:
    for score in scores:
        row = score.row
        parts = []
        for quantity in QUANTITIES:
            truth, said = row.truth.get(quantity), score.said.get(quantity)
            if truth is not None and said is not None and score.error(quantity) is not None:
                parts.append(f"{quantity} {said:,.2f} ({truth:,.2f}, {said / truth * 100 - 100:+.2f} %)")
        verdict = f"{score.verdict or '-'} [{row.outcome}]"
        print(f"{row.line:>4} {row.model[-38:]:38} {verdict}; {'; '.join(parts)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with the peers installed")
    parser.add_argument("--rows", action="store_true", help="every row, too")
    arguments = parser.parse_args()
    rows, skipped = load()
    scores = ours(rows)
    print(f"{len(rows)} rows of benchmarks/data/fit_truth.csv scored, {len(skipped)} not:")
    for line, model, why in skipped:
        print(f"  line {line}, {model}: {why}")
    _table("gpuctl fit", scores)
    judged = [score for score in scores if score.verdict not in (None, Verdict.UNKNOWN)]
    right = [score for score in judged if starts(score) == (score.row.outcome == "ok")]
    print(f"\noutcomes: {len(right)} of {len(judged)} right ({len(right) / len(judged) * 100:.1f} %)")
    for score in judged:
        if score not in right:
            row = score.row
            print(f"  line {row.line}, {row.model}: {score.verdict} for {row.outcome}: {score.reason}")
    if arguments.rows:
        print()
        _each(scores)
    if arguments.peers:
        for peer, said in theirs(arguments.peers, rows).items():
            _table(f"{peer}, in this run, on the same rows", said)
            if arguments.rows:
                _each(said)
    else:
        print("\nothers, as they publish it (--peers runs them):")
        for peer, figure, source in PUBLISHED:
            print(f"  {peer}: {figure} ({source})")
    wrong = missed(scores)
    print()
    for target in wrong:
        print(f"MISSED {target}")
    if not wrong:
        print("all targets met")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
