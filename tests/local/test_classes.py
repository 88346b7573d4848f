"""Classes, batches, concurrency and how many containers there are: through the real client in processes of its own."""

from __future__ import annotations

import os
import re
import uuid
from typing import TYPE_CHECKING

import pytest

from .planes import eventually
from .test_calls import marks, script

if TYPE_CHECKING:
    from .planes import TestPlane


@pytest.fixture(scope="module")
def deployed(plane: TestPlane) -> TestPlane:
    """A plane on which `classes.py` is deployed as `classes`."""
    done = plane.modal("deploy", "classes.py")
    assert "Greeter.*: no memory snapshot is taken" in " ".join(f"{done.stdout} {done.stderr}".split())
    return plane


def test_classes_with_parameters_and_options(deployed: TestPlane) -> None:
    code = """
        Greeter = modal.Cls.from_name("classes", "Greeter")
        assert Greeter().greet.remote("you") == ("hello you", ["snap", "enter"])
        two = Greeter(word=word, times=2)
        assert two.greet.remote("me")[0] == word * 2 + " me"
        assert list(two.spell.remote_gen()) == list(word)
        task, extra = two.where.remote()
        assert extra is None and Greeter(word=word, times=2).where.remote() == (task, None)
        optioned = Greeter.with_options(env={"EXTRA": "yes"}, gpu="B200:99")(word=word, times=2)
        other, extra = optioned.where.remote()
        assert extra == "yes" and other != task
        for instance in (two, optioned):
            assert instance.update_autoscaler(scaledown_window=2).scaledown_window == 2
    """
    word = uuid.uuid4().hex
    script(deployed, code, word=word)
    said = deployed.modal("app", "logs", "classes", "--source", "system").stdout
    assert said.count(": GPU B200:99 asked for; this machine has ") == 1
    # Both containers end after their scaledown_window, by their exit hooks.
    eventually(lambda: marks(deployed, f"exit-{word}") == 2, seconds=60)


def test_inheritance_and_every_type_of_parameter(deployed: TestPlane) -> None:
    code = """
        Derived = modal.Cls.from_name("classes", "Derived")
        least = Derived(text=text)
        assert least.parameters.remote() == (text, -(2**40), False, b"\\0")
        assert least.inherited.remote() == ["base", "derived"]
        most = Derived(text=text + "é", number=2**40, flag=True, data=bytes(range(256)))
        assert most.parameters.remote() == (text + "é", 2**40, True, bytes(range(256)))
        try:
            most.fails.remote()
        except KeyError as error:
            assert error.args == (text + "é",)
        for wrong in ({}, {"text": 3}, {"text": text, "other": 1}):
            try:
                Derived(**wrong).parameters.remote()
            except (modal.exception.InvalidError, TypeError):
                pass
            else:
                raise AssertionError(wrong)
        least.update_autoscaler(scaledown_window=2)
    """
    text = uuid.uuid4().hex
    script(deployed, code, text=text)
    eventually(lambda: marks(deployed, f"exit-{text}") == 2, seconds=60)  # of both classes


def test_a_class_that_is_not_ready_in_time_is_a_timeout_for_who_waits(deployed: TestPlane) -> None:
    code = """
        try:
            modal.Cls.from_name("classes", "Late")().never.remote()
        except modal.exception.FunctionTimeoutError as error:
            print(error)
    """
    said = script(deployed, code)
    assert "Late.* cannot start: not ready within its startup_timeout of 1 s" in said


def test_concurrent_and_batched_inputs(deployed: TestPlane) -> None:
    code = """
        from collections import Counter
        together = Counter(function("together", "classes").map(range(8), kwargs={"name": name}))
        assert list(together.values()) == [4, 4], "each container has the four that it may have, or none would end"
        assert len(set(function("in_threads", "classes").map(range(3)))) == 3
        batch = function("batch", "classes")
        assert list(batch.map(range(8))) == [(n, 4) for n in range(8)], "a full batch does not wait"
        hasty = batch.with_batching(max_batch_size=4, wait_ms=500)
        hasty.remote(0)
        began = time.monotonic()
        assert hasty.remote(8) == (8, 1)
        assert 0.5 <= time.monotonic() - began < 30, "it waits for wait_ms, and not for a minute"
        wider = function("together", "classes").with_concurrency(max_inputs=8)
        assert len(set(wider.map(range(8), kwargs={"name": name + "-wider"}))) == 1
    """
    script(deployed, code, name=uuid.uuid4().hex)


def test_an_input_that_ends_its_containers_does_not_take_others_with_it(deployed: TestPlane) -> None:
    code = """
        calls = [function("deadly", "classes").spawn(n) for n in range(4)]
        assert modal.FunctionCall.gather(*calls[1:]) == [1, 2, 3]
        calls[0].cancel()
    """
    script(deployed, code)


def test_a_deployment_resets_what_was_changed_live(deployed: TestPlane) -> None:
    code = """
        once, variant = function("once", "classes"), function("once", "classes").with_options(timeout=9)
        for changed in (once, variant):
            if change:
                changed.autoscaler.update(max_containers=7, scaledown_window=5)
            assert changed.autoscaler.settings().max_containers == (7 if change else None)
    """
    script(deployed, code, change=True)
    deployed.modal("deploy", "classes.py")  # of the same
    script(deployed, code, change=False)


def test_how_many_containers_there_are(deployed: TestPlane) -> None:
    code = """
        def running(function, number):
            while function.get_current_stats().num_total_runners != number:
                time.sleep(0.05)
        warm = function("warm", "classes")
        running(warm, 1)  # min_containers
        assert warm.update_autoscaler(min_containers=3).min_containers == 3
        running(warm, 3)
        warm.update_autoscaler(min_containers=0, max_containers=1)
        running(warm, 1)  # at once, although the scaledown_window is ten minutes
        stats = warm.get_current_stats()
        assert (stats.backlog, stats.num_running_inputs) == (0, 0)
        assert len(set(function("once", "classes").map(range(3)))) == 3, "single_use_containers"
        two = function("two_at_most", "classes")
        assert len(set(two.map(range(16), kwargs={"name": name}))) == 2, "max_containers"
        large = function("needs_64_cores", "classes")
        calls = [large.spawn(n, name) for n in range(3)]
        while large.get_current_stats().num_running_inputs != 1:
            time.sleep(0.05)
        assert large.get_current_stats().backlog == 2
        function("go", "classes").remote(name)
        assert len(set(modal.FunctionCall.gather(*calls))) == 1
    """
    script(deployed, code, name=uuid.uuid4().hex)
    said = deployed.modal("app", "logs", "classes", "--source", "system").stdout
    assert re.search(r"needs_64_cores: [23] containers would have work, 1 run: this machine", said)


def test_a_busy_function_has_no_more_containers_than_the_machine_holds(deployed: TestPlane) -> None:
    code = """
        one_core = function("one_core", "classes")
        for _ in range(6):
            list(one_core.map(range(100), order_outputs=False))
        assert one_core.get_current_stats().num_total_runners <= cores
    """
    script(deployed, code, cores=len(os.sched_getaffinity(0)))
