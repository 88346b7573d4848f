"""GPUs: what the driver says is there, who gets which, and what a container sees of them. No GPU is needed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gpuctl.local import sandbox
from gpuctl.local.gpus import Card, Gpus, cards, driver_libraries

if TYPE_CHECKING:
    from pathlib import Path

INFORMATION = """\
Model: \t\t NVIDIA H100 80GB HBM3
IRQ:   \t\t {minor}
GPU UUID: \t GPU-{minor:08x}-0000-0000-0000-000000000000
Bus Type: \t PCIe
Device Minor: \t {minor}
GPU Excluded:\t No
"""
FOUR = [Card(n, f"GPU-{n}", "NVIDIA L4") for n in range(4)]


def test_what_the_driver_says(tmp_path: Path) -> None:
    assert cards(tmp_path / "none") == []
    for minor in (10, 2):
        folder = tmp_path / f"0000:{minor:02x}:00.0"
        folder.mkdir()
        (folder / "information").write_text(INFORMATION.format(minor=minor))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "information").write_text("GPU UUID: ???\nDevice Minor: x\n")
    assert cards(tmp_path) == [
        Card(n, f"GPU-{n:08x}-0000-0000-0000-000000000000", "NVIDIA H100 80GB HBM3") for n in (2, 10)
    ]


def test_what_images_of_their_own_need_of_the_driver() -> None:
    listing = """2 libs found in cache `/etc/ld.so.cache'
\tlibnvidia-ml.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libnvidia-ml.so.1
\tlibnvidia-ml.so.1 (libc6) => /lib/i386-linux-gnu/libnvidia-ml.so.1
\tlibcuda.so.1 (libc6) => /lib/i386-linux-gnu/libcuda.so.1
\tlibcuda.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libcuda.so.1
\tlibcuda.so (libc6,AArch64) => /usr/lib/aarch64-linux-gnu/libcuda.so
\tlibcudart.so.12 (libc6,x86-64) => /usr/local/cuda/lib64/libcudart.so.12
\tlibc.so.6 (libc6,x86-64, OS ABI: Linux 3.2.0) => /lib/x86_64-linux-gnu/libc.so.6
"""
    assert driver_libraries(listing) == {
        "lib64/libnvidia-ml.so.1": "/lib/x86_64-linux-gnu/libnvidia-ml.so.1",
        "lib64/libcuda.so.1": "/lib/x86_64-linux-gnu/libcuda.so.1",
        "lib64/libcuda.so": "/usr/lib/aarch64-linux-gnu/libcuda.so",
    }
    assert driver_libraries("") == {}


def test_a_card_has_one_container_at_a_time() -> None:
    async def run() -> None:
        gpus = Gpus(FOUR)
        assert await gpus.take("cpu", 0) == ()
        assert await gpus.take("too many", 5) == ()  # never that many here: it runs on the CPU
        assert await gpus.take("a", 3) == tuple(FOUR[:3])
        big = asyncio.create_task(gpus.take("big", 2))
        small = asyncio.create_task(gpus.take("small", 1))
        withdrawn = asyncio.create_task(gpus.take("withdrawn", 4))
        await asyncio.sleep(0)
        # In turn: the one that is free waits for the container that came first.
        assert not gpus.ready(1)
        assert not small.done()
        gpus.withdraw("withdrawn")
        assert await withdrawn is None
        gpus.give_back("a")
        first, second = await big, await small
        assert first is not None
        assert second is not None
        assert not set(first) & set(second)
        assert len(gpus.free) == 1
        cancelled = asyncio.create_task(gpus.take("cancelled", 4))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        for task in ("big", "small", "never had any"):
            gpus.give_back(task)
        assert gpus.free == FOUR
        assert gpus.ready(4)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("mine", "seen"),
    [
        ((), set()),
        ((1,), {"nvidia1", "nvidiactl", "nvidia-uvm"}),
        ((0, 12), {"nvidia0", "nvidia12", "nvidiactl", "nvidia-uvm"}),
        (None, {"nvidia0", "nvidia1", "nvidia12", "nvidiactl", "nvidia-uvm"}),
    ],
)
def test_a_container_sees_its_own_cards_alone(mine: tuple[int, ...] | None, seen: set[str]) -> None:
    filesystem = sandbox.Filesystem(gpus=mine)
    devices = {"nvidia0", "nvidia1", "nvidia12", "nvidiactl", "nvidia-uvm"}
    assert {device for device in devices if filesystem._may_see(device)} == seen
