"""The micro-batcher and its queue against engines that the test controls."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmconv.errors import RefusedError
from runtime.cuda import CudaError, DeviceMemoryError
from runtime.serve.batching.batcher import Batcher, Policy
from runtime.serve.batching.fair_queue import FairQueue, Item
from runtime.serve.errors import Code, RequestError


class Engine:
    """Doubles its input; waits for `gate` when closed; remembers the rows of each execution."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[float]] = []
        self.error: BaseException | None = None

    def stage(self, shapes: Mapping[str, Any]) -> None:
        """It reads its inputs wherever they lie."""

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        assert self.gate.wait(20)
        self.batches.append(feeds["x"][:, 0].tolist())
        if self.error:
            raise self.error
        return {"y": feeds["x"] * 2}


def item(value: float, rows: int = 1, client: object = "a", **options: Any) -> Item:
    return Item({"x": np.full((rows, 3), value, np.float32)}, rows, client=client, **options)


async def hold(batcher: Batcher, engine: Engine) -> asyncio.Future:
    """Occupy the engine with one request, so that what follows queues."""
    engine.gate.clear()
    future = batcher.submit(item(-1, client="holder"))
    while batcher.pending:
        await asyncio.sleep(0.001)
    return future


def test_what_queued_during_an_execution_goes_out_as_one_batch() -> None:
    async def run() -> None:
        engine = Engine()
        batcher = Batcher([engine], Policy(max_rows=8))
        first = await hold(batcher, engine)
        futures = [batcher.submit(item(i, client=i)) for i in range(10)]
        engine.gate.set()
        results = await asyncio.gather(*futures)
        assert [r["y"][0, 0] for r in results] == [2 * i for i in range(10)]
        assert [len(b) for b in engine.batches] == [1, 8, 2]
        await first
        assert await batcher.close()

    asyncio.run(run())


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=30), st.integers(5, 9))
def test_every_request_gets_its_own_rows_and_no_batch_exceeds_the_limit(
    requests: list[tuple[int, int]], limit: int
) -> None:
    async def run() -> None:
        engine = Engine()
        batcher = Batcher([engine], Policy(max_rows=limit))
        await hold(batcher, engine)
        futures = [batcher.submit(item(n, rows, client)) for n, (rows, client) in enumerate(requests)]
        engine.gate.set()
        for n, ((rows, _), result) in enumerate(zip(requests, await asyncio.gather(*futures), strict=True)):
            np.testing.assert_array_equal(result["y"], np.full((rows, 3), 2 * n, np.float32))
        assert all(len(b) <= limit for b in engine.batches)
        # Each client's requests ran in the order they came.
        flat = [n for batch in engine.batches[1:] for n in dict.fromkeys(batch)]
        for client in range(4):
            own = [n for n in flat if requests[int(n)][1] == client]
            assert own == sorted(own)
        assert await batcher.close()

    asyncio.run(run())


def test_a_client_of_large_requests_does_not_hold_up_one_of_small_ones() -> None:
    async def run() -> None:
        queue = FairQueue()
        large = [item(i, 8, "large") for i in range(6)]
        for request in large:
            queue.push(request)
        small = [item(i, 1, "small") for i in range(6)]
        for request in small:
            queue.push(request)
        order = []
        while queue:
            order += queue.take(8, [])
        # All six rows of the small client go out beside or before the second large request.
        assert max(order.index(s) for s in small) < order.index(large[1])

    asyncio.run(run())


def test_priority_comes_first_and_shapes_are_not_mixed() -> None:
    async def run() -> None:
        queue = FairQueue()
        wide = Item({"x": np.zeros((1, 5), "f4")}, 1, client="w")
        low, high = item(1, client="l", priority=2), item(2, client="h", priority=1)
        for request in (low, wide, high):
            queue.push(request)
        assert queue.take(8, []) == [wide]  # priority 0
        assert queue.take(8, []) == [high, low]

    asyncio.run(run())


def test_cancelled_and_expired_requests_never_reach_the_engine() -> None:
    async def run() -> None:
        engine = Engine()
        batcher = Batcher([engine], Policy(max_rows=8))
        await hold(batcher, engine)
        cancelled = batcher.submit(item(1, client=1))
        expired = batcher.submit(item(2, client=2, timeout_ns=1_000_000))
        kept = batcher.submit(item(4, client=4))
        cancelled.cancel()
        with pytest.raises(RequestError) as caught:  # before the engine is free again
            await asyncio.wait_for(expired, 5)
        assert caught.value.code is Code.EXPIRED
        engine.gate.set()
        assert (await kept)["y"][0, 0] == 8
        assert engine.batches == [[-1.0], [4.0]]
        assert await batcher.close()

    asyncio.run(run())


def test_the_queue_is_bounded_and_sheds_only_while_overloaded() -> None:
    async def run() -> None:
        engine = Engine()
        batcher = Batcher([engine], Policy(max_rows=2, queue_size=5, burst_ns=50_000_000, shed_target_ns=1))
        await hold(batcher, engine)
        futures = [batcher.submit(item(i, client=i)) for i in range(5)]
        with pytest.raises(RequestError) as caught:
            batcher.submit(item(9))
        assert caught.value.code is Code.OVERLOADED
        assert batcher.retry_after >= 1
        batcher._standing = 1  # a backlog that has stood since long ago
        futures.append(asyncio.get_running_loop().create_future())
        futures.pop().cancel()
        engine.gate.set()
        await asyncio.gather(*futures)
        await asyncio.sleep(0.01)
        assert batcher._standing == 0  # the last batch took all that was left

        await hold(batcher, engine)
        queued = [batcher.submit(item(0)), batcher.submit(item(0))]
        batcher._standing = 1
        batcher._row_ns = 20_000_000.0  # two rows are done in less than the burst window: nobody is refused
        batcher.check()
        batcher.check()
        batcher._row_ns = 30_000_000.0
        batcher.check()  # the request that finds the backlog too old is still let in, the next are not
        with pytest.raises(RequestError, match="overloaded"):
            batcher.check()
        batcher.draining = True
        batcher.check()
        batcher.draining = False
        await asyncio.sleep(0.6)  # the engine ran all this time: still overloaded
        with pytest.raises(RequestError, match="overloaded"):
            batcher.check()
        engine.gate.set()
        await asyncio.gather(*queued)
        await asyncio.sleep(0.6)  # and now it was idle for most of it
        batcher.check()
        assert not batcher._shedding
        assert await batcher.close()

    asyncio.run(run())


def test_overload_does_not_starve_an_engine_whose_batches_take_as_long_as_single_rows() -> None:
    class Launches(Engine):
        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            time.sleep(0.01)
            return super().run(feeds)

    async def run() -> None:
        engine = Launches()
        batcher = Batcher([engine], Policy(max_rows=8, burst_ns=1, shed_target_ns=1))
        futures = []
        end = time.monotonic() + 1
        while time.monotonic() < end:  # far more than single rows could be answered
            with contextlib.suppress(RequestError):
                futures.append(batcher.submit(item(0, client=len(futures))))
            await asyncio.sleep(0.0005)
        await asyncio.gather(*futures)
        assert batcher._shedding
        later = engine.batches[len(engine.batches) // 2 :]
        assert sum(len(batch) for batch in later) / len(later) > 2
        assert await batcher.close()

    asyncio.run(run())


def test_queue_delay_waits_for_a_fuller_batch_but_not_for_long() -> None:
    async def run() -> None:
        engine = Engine()
        batcher = Batcher([engine], Policy(max_rows=4, delay_ns=60_000_000))
        await asyncio.gather(*(batcher.submit(item(i, client=i)) for i in range(4)))
        loop = asyncio.get_running_loop()
        began = loop.time()
        first = batcher.submit(item(1))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, batcher.submit(item(2)))
        assert 0.05 < loop.time() - began < 5
        assert [len(b) for b in engine.batches] == [4, 2]
        assert await batcher.close()

    asyncio.run(run())


def test_queue_delay_holds_for_several_instances_and_for_a_lone_request() -> None:
    async def run() -> None:
        engines = [Engine(), Engine()]
        batcher = Batcher(engines, Policy(max_rows=4, delay_ns=100_000_000, on_cpu=True))
        for _ in range(2):
            loop = asyncio.get_running_loop()
            began = loop.time()
            futures = [batcher.submit(item(0, client=0), alone=True)]
            for i in range(1, 3):
                await asyncio.sleep(0.01)
                futures.append(batcher.submit(item(i, client=i)))
            await asyncio.gather(*futures)
            assert 0.09 < loop.time() - began < 5
        assert [len(b) for e in engines for b in e.batches] == [3, 3]
        # A full batch waits for nothing, and what it leaves waits on its own account.
        began = loop.time()
        futures = [batcher.submit(item(i, client=i)) for i in range(5)]
        await asyncio.gather(*futures)
        assert 0.09 < loop.time() - began < 5
        assert sorted(len(b) for e in engines for b in e.batches) == [1, 3, 3, 4]
        assert await batcher.close()

    asyncio.run(run())


def test_several_instances_share_the_queue() -> None:
    async def run() -> None:
        engines = [Engine(), Engine()]
        batcher = Batcher(engines, Policy(max_rows=1))
        for engine in engines:
            engine.gate.clear()
        futures = [batcher.submit(item(i, client=i)) for i in range(2)]
        while batcher.pending:
            await asyncio.sleep(0.001)
        for engine in engines:
            engine.gate.set()
        await asyncio.gather(*futures)
        assert [len(e.batches) for e in engines] == [1, 1]
        assert await batcher.close()

    asyncio.run(run())


def test_a_lone_short_request_runs_on_the_loop() -> None:
    async def run() -> None:
        engine = Engine()
        batcher = Batcher([engine], Policy(max_rows=4, on_cpu=True))
        await batcher.submit(item(1), alone=True)  # nothing is known of the engine's speed yet: on its thread
        while not batcher._idle:  # the thread has answered and is on its way back to the queue
            await asyncio.sleep(0.001)
        batcher._row_ns = 1000.0  # known to be quick, however slow this machine is just now
        future = batcher.submit(item(2), alone=True)
        assert future.done()
        assert future.result()["y"][0, 0] == 4
        assert not batcher.submit(item(3)).done()
        batcher._row_ns = 1e9
        assert not batcher.submit(item(4), alone=True).done()
        assert await batcher.close()

    asyncio.run(run())


def test_each_of_several_engines_takes_its_share_and_leaves_one_more() -> None:
    async def run() -> None:
        engines = [Engine(), Engine()]
        batcher = Batcher(engines, Policy(max_rows=8))
        for engine in engines:
            engine.gate.clear()
        first = [batcher.submit(item(-1)), batcher.submit(item(-1))]
        while batcher.pending:
            await asyncio.sleep(0.001)
        futures = [batcher.submit(item(i)) for i in range(8)]
        engines[0].gate.set()  # of 8 waiting and 1 running elsewhere a third, of the 5 left and 1 again, and so on
        while batcher.pending:
            await asyncio.sleep(0.001)
        engines[1].gate.set()
        await asyncio.gather(*first, *futures)
        assert [len(b) for b in engines[0].batches] == [1, 3, 2, 2, 1]
        assert [len(b) for b in engines[1].batches] == [1]
        assert await batcher.close()

    asyncio.run(run())


@pytest.mark.parametrize(("waiting", "backlog"), [(5, False), (6, True)])
def test_several_engines_have_a_backlog_when_there_is_more_than_all_can_take(waiting: int, backlog: bool) -> None:
    async def run() -> None:
        engines = [Engine(), Engine()]
        batcher = Batcher(engines, Policy(max_rows=3))
        for engine in engines:
            engine.gate.clear()
        futures = [batcher.submit(item(-1)), batcher.submit(item(-1))]
        while batcher.pending:
            await asyncio.sleep(0.001)
        futures += [batcher.submit(item(i)) for i in range(waiting)]
        gate, engines[0].gate = engines[0].gate, threading.Event()
        gate.set()  # one takes its next batch and holds it
        while batcher.pending == waiting:
            await asyncio.sleep(0.001)
        assert bool(batcher._standing) is backlog
        for engine in engines:
            engine.gate.set()
        await asyncio.gather(*futures)
        await asyncio.sleep(0.01)
        assert batcher._standing == 0
        assert await batcher.close()

    asyncio.run(run())


def test_a_lone_request_has_an_engine_of_its_own() -> None:
    async def run() -> None:
        engine, solo = Engine(), Engine()
        batcher = Batcher([engine], Policy(max_rows=4, on_cpu=True), solo=solo)
        solo.gate.clear()
        lone = batcher.submit(item(1), alone=True)  # how long it takes is not known yet: on a thread
        await batcher.submit(item(2), alone=True)  # the engine for one request has one
        solo.gate.set()
        await lone
        await batcher.submit(item(3))
        while batcher._solo and batcher._solo.items:
            await asyncio.sleep(0.001)
        batcher._row_ns = 1000.0  # known to be quick
        assert batcher.submit(item(4), alone=True).done()
        assert solo.batches == [[1], [4]]
        assert engine.batches == [[2], [3]]
        assert await batcher.close()

    asyncio.run(run())


def test_what_the_lone_engine_holds_is_aborted_and_its_failure_is_fatal() -> None:
    async def run() -> None:
        fatal: list[BaseException] = []
        solo = Engine()
        batcher = Batcher([Engine()], Policy(max_rows=4), solo=solo, on_fatal=fatal.append)
        solo.gate.clear()
        lone = batcher.submit(item(1), alone=True)
        assert batcher.abort(RequestError("stopping", Code.UNAVAILABLE)) == 1
        solo.gate.set()
        with pytest.raises(RequestError, match="stopping"):
            await lone
        while batcher._solo and batcher._solo.items:
            await asyncio.sleep(0.001)
        solo.error = RuntimeError("lost")
        with pytest.raises(RequestError, match="the engine failed"):
            await batcher.submit(item(2), alone=True)
        assert fatal == [solo.error]
        assert await batcher.close()

    asyncio.run(run())


def test_a_refusal_is_the_requests_fault_only_if_the_engine_still_works() -> None:
    def refusal(cause: BaseException | None) -> RefusedError:
        error = RefusedError("cannot run /secret/path on this")
        error.__cause__ = cause
        return error

    async def run(cause: BaseException | None, probe: Any) -> tuple[Code, list[BaseException], str]:
        engine = Engine()
        fatal: list[BaseException] = []
        batcher = Batcher([engine], Policy(max_rows=4, probe=probe), on_fatal=fatal.append)
        engine.error = refusal(cause)
        with pytest.raises(RequestError) as caught:
            await batcher.submit(item(1))
        engine.error = None
        await batcher.submit(item(1))  # the thread is alive
        assert await batcher.close()
        return caught.value.code, fatal, caught.value.message

    def broken(runner: Any) -> None:
        raise RuntimeError("lost")

    code, fatal, message = asyncio.run(run(None, None))
    assert (code, fatal) == (Code.INVALID, [])
    assert "/secret" not in message
    assert asyncio.run(run(RuntimeError(), lambda runner: None))[:2] == (Code.INVALID, [])
    for probe in (None, broken):
        code, fatal, message = asyncio.run(run(RuntimeError(), probe))
        assert code is Code.INTERNAL
        assert len(fatal) == 1
        assert message == "the engine failed"


def test_a_request_that_the_engine_refuses_leaves_its_batch_alone() -> None:
    class Picky(Engine):
        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            time.sleep(0.01)
            found = super().run(feeds)
            if (feeds["x"] == 7).any():
                raise RefusedError("no such index") from ValueError()
            return found

    async def run() -> None:
        engine, fatal, began = Picky(), list[BaseException](), time.monotonic_ns()
        batcher = Batcher([engine], Policy(max_rows=8, probe=lambda runner: None), on_fatal=fatal.append)
        first = await hold(batcher, engine)
        futures = [batcher.submit(item(value, client=value)) for value in (5, 6, 7, 8)]
        engine.gate.set()
        await first
        found = await asyncio.gather(*futures, return_exceptions=True)
        assert isinstance(found[2], RequestError)
        assert found[2].code is Code.INVALID
        assert [answer["y"][0, 0] for answer in (found[0], found[1], found[3])] == [10, 12, 16]
        assert engine.batches[1:] == [[5, 6, 7, 8], [5], [6], [7], [8]]
        assert fatal == []
        assert await batcher.close()
        assert batcher._busy_ns <= time.monotonic_ns() - began, "no time is counted twice"

    asyncio.run(run())


def test_a_batch_that_the_gpu_has_no_room_for_is_refused_and_the_server_stays() -> None:
    async def run() -> None:
        engine = Engine()
        fatal: list[BaseException] = []
        batcher = Batcher([engine], Policy(max_rows=4), on_fatal=fatal.append)
        engine.error = DeviceMemoryError("cuda:0: no room for 512 MiB")
        with pytest.raises(RequestError, match="send fewer rows") as caught:
            await batcher.submit(item(1))
        assert caught.value.code is Code.OVERLOADED
        engine.error = None
        await batcher.submit(item(1))
        assert fatal == []
        engine.error = CudaError("an illegal memory access was encountered")
        with pytest.raises(RequestError, match="the engine failed"):
            await batcher.submit(item(1))
        assert fatal == [engine.error]
        assert await batcher.close()

    asyncio.run(run())


def test_abort_fails_what_is_queued_and_what_runs() -> None:
    async def run() -> None:
        engine = Engine()
        batcher = Batcher([engine], Policy(max_rows=1))
        running = await hold(batcher, engine)
        queued = batcher.submit(item(1))
        assert batcher.abort(RequestError("stopping", Code.UNAVAILABLE)) == 2
        for future in (running, queued):
            with pytest.raises(RequestError, match="stopping"):
                await future
        engine.gate.set()
        assert await batcher.close()

    asyncio.run(run())


def test_many_clients_are_forgotten() -> None:
    async def run() -> None:
        queue = FairQueue()
        for n in range(20_000):
            queue.push(item(0, client=n))
            queue.take(1, [])
        assert len(queue._tags) <= 4097

    asyncio.run(run())
