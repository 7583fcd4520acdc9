"""One engine: how its batches are gathered, and that its thread gives way."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.serve.batching.fair_queue import Item
from runtime.serve.batching.instance import NICENESS, Instance, give_way


class Anywhere:
    """A runner that reads its inputs wherever they lie."""

    def stage(self, shapes: dict[str, tuple[int, ...]]) -> None:
        return None


def items(*arrays: np.ndarray) -> list[Item]:
    async def make() -> list[Item]:
        return [Item({"x": array}, len(array)) for array in arrays]

    return asyncio.run(make())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 3))
def test_a_batch_is_the_rows_of_its_items_in_order(rows: list[int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    arrays = [draw.random((n, 2, 3), np.float32) for n in rows]
    instance = Instance(Anywhere())  # type: ignore[arg-type]
    for _ in range(2):  # the second time the buffer is there
        feeds = instance.gather(items(*arrays), capacity=4)
        np.testing.assert_array_equal(feeds["x"], np.concatenate(arrays))


def test_a_batch_is_gathered_where_the_runner_reads_it_from() -> None:
    memory = np.full((4, 3), -1, np.float32)

    class Staging:
        def stage(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
            assert shapes == {"x": (3, 3)}
            return {"x": memory[:3]}

    instance = Instance(Staging())  # type: ignore[arg-type]
    feeds = instance.gather(items(*(np.full((n, 3), n, np.float32) for n in (1, 2))), capacity=4)
    assert np.shares_memory(feeds["x"], memory)
    np.testing.assert_array_equal(memory[:, 0], [1, 2, 2, -1])
    assert instance.staging == {}


def test_a_lone_item_is_copied_only_if_it_lies_unaligned() -> None:
    instance = Instance(Anywhere())  # type: ignore[arg-type]
    aligned = np.zeros((1, 4), np.float32)
    assert instance.gather(items(aligned), capacity=4)["x"] is aligned
    unaligned = np.frombuffer(bytearray(17), np.float32, offset=1).reshape(1, 4)
    fed = instance.gather(items(unaligned), capacity=4)["x"]
    assert fed.flags.aligned
    np.testing.assert_array_equal(fed, unaligned)


@pytest.mark.skipif(sys.platform != "linux", reason="a niceness belongs to a thread on Linux only")
def test_only_the_calling_thread_and_those_it_starts_give_way() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    seen = []

    def work() -> None:
        give_way()
        seen.append(niceness())
        child = threading.Thread(target=lambda: seen.append(niceness()))
        child.start()
        child.join()

    before = niceness()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [min(19, before + NICENESS)] * 2
    assert niceness() == before
