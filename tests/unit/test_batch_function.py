"""The user's own function as a worker of `gpuctl batch` has it: every kind of function, and every way to fail."""

from __future__ import annotations

import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pieces
from gpuctl.errors import GpuctlError
from gpuctl.specs.batch import FunctionRef

Outcomes = dict[int, Any]
Run = Callable[..., Outcomes]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes the processor of a function in work.py."""
    path = list(sys.path)

    def load(code: str, name: str = "process", **constants: Any) -> Any:
        (tmp_path / "work.py").write_text(code, encoding="utf-8")
        sys.modules.pop("work", None)
        values = {
            "FUNCTION_FILE": str(tmp_path / "work.py"),
            "FUNCTION_NAME": name,
            "CONCURRENCY": 1,
            "BATCH_SIZE": None,
            "ROW_TIMEOUT": None,
            **constants,
        }
        return pieces.module("batch/function.py.jinja", folder=tmp_path, constants=values).FunctionProcessor()

    yield load
    sys.path[:] = path
    sys.modules.pop("work", None)


def run(processor: Any, rows: list[Any]) -> Outcomes:
    """All rows through it, as the container's loop does it."""
    waiting = list(enumerate(rows))[::-1]
    flying: set[int] = set()
    ended: Outcomes = {}
    deadline = time.monotonic() + 60
    while waiting or flying:
        while waiting and len(flying) < processor.capacity:
            key, row = waiting.pop()
            processor.start(key, {"row": key, "id": str(key), "url": "function", "body": row})
            flying.add(key)
        for key, outcome in processor.step():
            flying.remove(key)
            assert key not in ended
            ended[key] = outcome
        assert time.monotonic() < deadline
    return ended


MODES = [{}, {"CONCURRENCY": 4}, {"ROW_TIMEOUT": 60.0}]
PLAIN = "def process(row):\n    return {'twice': 2 * row['n']}\n"
ASYNC = "async def process(row):\n    return {'twice': 2 * row['n']}\n"
CLASS = """
class Model:
    def __init__(self):
        self.factor = 2
    def process(self, row):
        return {'twice': self.factor * row['n']}
"""
CALLABLE = CLASS.replace("process", "__call__")
LISTS = "def process(rows):\n    return [{'twice': 2 * row['n']} for row in rows]\n"
ASYNC_LISTS = "async " + LISTS


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("code", "name", "size"),
    [
        (PLAIN, "process", None),
        (ASYNC, "process", None),
        (CLASS, "Model", None),
        (CALLABLE, "Model", None),
        (CLASS + "\nmodel = Model()\n", "model.process", None),
        (LISTS, "process", 8),
        (ASYNC_LISTS, "process", 3),
    ],
)
def test_every_kind_of_function(
    load: Callable[..., Any], code: str, name: str, size: int | None, mode: dict[str, Any]
) -> None:
    ended = run(load(code, name, BATCH_SIZE=size, **mode), [{"n": n} for n in range(50)])
    assert ended == {n: {"twice": 2 * n} for n in range(50)}


def test_lists_are_full_and_the_last_has_the_rest(load: Callable[..., Any]) -> None:
    code = "sizes = []\ndef process(rows):\n    sizes.append(len(rows))\n    return rows\n"
    run(load(code, BATCH_SIZE=8), list(range(50)))
    assert sys.modules["work"].sizes == [8] * 6 + [2]


FAILS = """
def check(n):
    if n % 10 == 3:
        raise ValueError(f"cannot do {n}")

def process(row):
    check(row)
    return row

def process_all(rows):
    return [process(row) for row in rows]
"""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "size"), [("process", None), ("process_all", 16)])
def test_a_row_that_raises_fails_alone_and_says_where(
    load: Callable[..., Any], name: str, size: int | None, mode: dict[str, Any]
) -> None:
    ended = run(load(FAILS, name, BATCH_SIZE=size, **mode), list(range(40)))
    for n, outcome in ended.items():
        if n % 10 != 3:
            assert outcome == n
        else:
            assert outcome.code == "exception"
            assert outcome.retry
            where = '(work.py:4, in check: raise ValueError(f"cannot do {n}"))'
            assert outcome.message == f"ValueError: cannot do {n} {where}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("raised", ["SystemExit(3)", "KeyboardInterrupt", "GeneratorExit", "StopIteration"])
def test_what_would_end_a_program_is_of_the_row(
    load: Callable[..., Any], raised: str, mode: dict[str, Any]
) -> None:
    (failed,) = run(load(f"def process(row):\n    raise {raised}\n", **mode), [1]).values()
    assert failed.code == "exception"
    assert failed.message.startswith(raised.partition("(")[0])


def test_a_row_that_is_tried_again_is_the_same_row(load: Callable[..., Any]) -> None:
    processor = load("def process(row):\n    row['n'] += 1\n    raise ValueError(row['n'])\n")
    row = {"n": 1}
    assert [run(processor, [row])[0].message[:13] for _ in range(2)] == ["ValueError: 2"] * 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("rows[1:]", "0 answers came back for 1 rows"),
        ("None", "a list of rows was given, and NoneType came back"),
        ("(row for row in rows)", "a list of rows was given, and generator came back"),
    ],
)
def test_a_list_of_rows_wants_as_many_answers(load: Callable[..., Any], returned: str, message: str) -> None:
    ended = run(load(f"def process(rows):\n    return {returned}\n", BATCH_SIZE=4), list(range(6)))
    assert len(ended) == 6
    for failed in ended.values():
        assert (failed.code, failed.retry, failed.message) == ("wrong_answers", False, message)


@pytest.mark.parametrize(
    ("code", "name", "problem"),
    [
        ("def process(row):\n    yield row\n", "process", "work.py:process yields"),
        ("async def process(row):\n    yield row\n", "process", "work.py:process yields"),
        ("class Model:\n    def process(self, row):\n        yield row\n", "Model", "work.py:Model yields"),
        ("class Model:\n    pass\n", "Model", "neither a method process nor __call__"),
        ("process = 3\n", "process", "work.py:process is no function or class, but int"),
        ("def process():\n    pass\n", "process", "work.py:process must take a row"),
        ("def process(a, b):\n    pass\n", "process", "work.py:process must take a row"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_row(
    load: Callable[..., Any], code: str, name: str, problem: str
) -> None:
    with pytest.raises(TypeError, match=problem):
        load(code, name)


SLOW = """
import time, {imports}
{kind} process(row):
    {sleep}(600 if row == 2 else 0)
    return row
"""


@pytest.mark.parametrize(
    "code",
    [
        SLOW.format(imports="os", kind="def", sleep="time.sleep"),
        SLOW.format(imports="asyncio", kind="async def", sleep="await asyncio.sleep"),
    ],
    ids=["thread", "coroutine"],
)
def test_a_row_that_takes_too_long_is_left_behind(load: Callable[..., Any], code: str) -> None:
    ended = run(load(code, ROW_TIMEOUT=0.5), [1, 2, 3, 4])
    failed = ended.pop(1)
    assert (failed.code, failed.retry) == ("timeout", True)
    assert failed.message == "no answer within 0.5 s"
    assert ended == {0: 1, 2: 3, 3: 4}


def test_a_lost_device_ends_the_container(load: Callable[..., Any]) -> None:
    code = "def process(row):\n    raise RuntimeError('CUDA error: device-side assert triggered')\n"
    with pytest.raises(RuntimeError, match="CUDA error"):
        run(load(code), [1])


def test_calls_run_at_once(load: Callable[..., Any]) -> None:
    """Each call waits for the others: less than 4 at once would never end."""
    code = "import threading\nbarrier = threading.Barrier(4)\ndef process(row):\n    barrier.wait(60)\n    return row\n"
    before = threading.active_count()
    assert len(run(load(code, CONCURRENCY=4), list(range(8)))) == 8
    assert threading.active_count() <= before + 4


def test_a_quick_function_has_many_rows_at_hand_and_a_slow_one_few(load: Callable[..., Any]) -> None:
    code = """
        import time
        def process(row):
            if row.get("slow"):
                time.sleep(0.05)
            return row["n"]
    """
    processor = load(textwrap.dedent(code))
    least = processor.capacity
    assert run(processor, [{"n": n} for n in range(2000)]) == {n: n for n in range(2000)}
    assert processor.capacity > least
    quick = processor.capacity
    assert run(processor, [{"n": n, "slow": True} for n in range(20)]) == {n: n for n in range(20)}
    assert processor.capacity < quick
    for key in range(2):
        processor.start(key, {"body": {"n": key, "slow": True}})
    assert len(processor.step()) == 1, "what has ended is not kept back for what has not"
    assert processor.give_back() == [1]
    assert processor.step() == []


@pytest.mark.parametrize(
    ("code", "name", "near"),
    [
        ("def process(row):\n    return row\n", "proces", "; did you mean 'process'?"),
        ("class Model:\n    def process(self, row): ...\n", "process", ""),
        ("def outer():\n    def process(row): ...\n", "process", ""),
    ],
)
def test_a_function_that_the_file_cannot_have_is_refused_before_anything_starts(
    tmp_path: Path, code: str, name: str, near: str
) -> None:
    file = tmp_path / "work.py"
    file.write_text(code)
    with pytest.raises(GpuctlError) as refused:
        FunctionRef.parse(f"{file}:{name}")
    assert refused.value.problems == (f"MODEL: {file} has no {name!r}{near}",)


@pytest.mark.parametrize(
    "code",
    [
        "if True:\n    def process(row): ...\n",
        "try:\n    from fast import process\nexcept ImportError:\n    from slow import work as process\n",
        "process = print\n",
        "process: object = print\n",
        "first, *process = 1, 2\n",
        "from all_of_it import *\n",
        "def __getattr__(name): ...\n",
        "globals()['pro' + 'cess'] = print\n",
        "def process[T](row: T) -> T ???\n",  # maybe of a Python that is newer than this one
    ],
)
def test_a_function_that_may_be_there_is_not_refused(tmp_path: Path, code: str) -> None:
    file = tmp_path / "work.py"
    file.write_text(code)
    assert FunctionRef.parse(f"{file}:process") == FunctionRef(file, "process")
    assert FunctionRef.parse(f"{file}:process.of_a_part") is not None
