"""Classes, batches, concurrency and how many containers there are: through the real client in processes of its own."""

from __future__ import annotations

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
        other, extra = Greeter.with_options(env={"EXTRA": "yes"}, gpu="B200:99")(word=word, times=2).where.remote()
        assert extra == "yes" and other != task
    """
    word = uuid.uuid4().hex
    script(deployed, code, word=word)
    said = deployed.modal("app", "logs", "classes", "--source", "system").stdout
    assert said.count(": GPU B200:99 asked for; this machine has ") == 1
    # Both containers end after their scaledown_window of 2 s, by their exit hooks.
    eventually(lambda: marks(deployed, f"exit-{word}") == 2, seconds=10)


def test_concurrent_and_batched_inputs(deployed: TestPlane) -> None:
    code = """
        from collections import Counter
        together = Counter(function("together", "classes").map(range(8)))
        assert max(together.values()) == 4 and len(together) == 2, together
        assert len(set(function("in_threads", "classes").map(range(3)))) == 3
        batch = function("batch", "classes")
        assert list(batch.map(range(8))) == [(n, 4) for n in range(8)]
        began = time.monotonic()
        assert batch.remote(8) == (8, 1)
        assert 0.5 <= time.monotonic() - began < 1.5, "it waits for wait_ms, and not longer"
        many = function("two_at_most", "classes").with_concurrency(max_inputs=4)
        assert len(set(many.map(range(4)))) == 1
    """
    script(deployed, code)


def test_how_many_containers_there_are(deployed: TestPlane) -> None:
    code = """
        warm = function("warm", "classes")
        assert warm.get_current_stats().num_total_runners == 1, "min_containers"
        assert warm.update_autoscaler(min_containers=2).min_containers == 2
        while warm.get_current_stats().num_total_runners < 2:
            time.sleep(0.05)
        warm.update_autoscaler(min_containers=0)
        assert len(set(function("once", "classes").map(range(3)))) == 3, "single_use_containers"
        two = function("two_at_most", "classes")
        assert len(set(two.map(range(16)))) == 2, "max_containers"
        assert len(set(function("needs_64_cores", "classes").map(range(3)))) == 1
    """
    script(deployed, code)
    said = deployed.modal("app", "logs", "classes", "--source", "system").stdout
    assert "needs_64_cores: 3 containers would have work, 1 run: this machine" in said
