"""A light HTTP load generator: prepared bytes on keep-alive connections, closed or open loop, in a process of its own.

aiohttp takes more CPU per request than the server does, which on two cores would measure aiohttp.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


class Client(asyncio.Protocol):
    """One connection; `send` resolves to (status, seconds), status 0 when the connection broke."""

    def __init__(self, message: bytes) -> None:
        self.message = message
        self.buffer = b""
        self.done: asyncio.Future[int] | None = None
        self.open = False

    def connection_made(self, transport: Any) -> None:
        self.transport, self.open = transport, True

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._finish(0)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        match = LENGTH.search(self.buffer, 0, end)
        if len(self.buffer) - end - 4 >= (int(match[1]) if match else 0):
            status = int(self.buffer[9:12])
            self.buffer = b""
            self._finish(status)

    def _finish(self, status: int) -> None:
        if self.done and not self.done.done():
            self.done.set_result(status)

    async def send(self) -> tuple[int, float]:
        self.done = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self.transport.write(self.message)
        return await self.done, time.perf_counter() - began


async def connect(port: int, message: bytes) -> Client:
    loop = asyncio.get_running_loop()
    return (await loop.create_connection(lambda: Client(message), "127.0.0.1", port))[1]


async def closed_loop(
    port: int, message: bytes, clients: int, seconds: float, limit: int = 0
) -> list[tuple[int, float]]:
    """`clients` connections, each sending as soon as it has its answer."""
    results: list[tuple[int, float]] = []
    end = time.perf_counter() + seconds

    async def work() -> None:
        client = await connect(port, message)
        while time.perf_counter() < end and not (limit and len(results) >= limit):
            if not client.open:
                client = await connect(port, message)
            results.append(await client.send())
        client.transport.close()

    await asyncio.gather(*(work() for _ in range(clients)))
    return results


async def open_loop(port: int, message: bytes, rate: float, seconds: float) -> list[tuple[float, ...]]:
    """Requests at a fixed rate whatever the answers; each result ends with how late the request was sent, in s.

    Latency counts from the moment of sending: on a busy machine the generator itself falls behind its schedule, and
    that is not the server's doing. `summarize` shows the lag, so that a run in which it matters can be discarded.
    """
    results: list[tuple[float, ...]] = []
    free: list[Client] = []
    tasks: set[asyncio.Task[None]] = set()
    start = time.perf_counter()

    async def one(due: float) -> None:
        try:
            client = free.pop() if free else await connect(port, message)
            lag = time.perf_counter() - due
            status, seconds = await client.send()
            if client.open:
                free.append(client)
        except OSError:
            status, seconds, lag = 0, 0.0, 0.0
        results.append((status, seconds, lag))

    sent, total = 0, int(rate * seconds)
    while sent < total:
        now = time.perf_counter()
        while sent < total and start + sent / rate <= now:
            task = asyncio.create_task(one(start + sent / rate))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.001)
    await asyncio.gather(*tasks)
    for client in free:
        client.transport.close()
    return results


def http_message(model: str, body: bytes, length: int) -> bytes:
    """The bytes of one infer request."""
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\nInference-Header-Content-Length: {length}\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def summarize(results: Sequence[tuple[float, ...]], seconds: float) -> dict[str, Any]:
    """Counts by status, rate of 200s, latency percentiles in ms of 200s and of 503s, p99 of the generator's lag."""
    summary: dict[str, Any] = {"counts": dict(Counter(str(r[0]) for r in results))}
    summary["qps"] = sum(r[0] == 200 for r in results) / seconds
    for status in (200, 503):
        times = sorted(r[1] * 1e3 for r in results if r[0] == status)
        if times:
            summary[f"p50_{status}"] = times[len(times) // 2]
            summary[f"p99_{status}"] = times[int(len(times) * 0.99)]
            summary[f"max_{status}"] = times[-1]
    lags = sorted(r[2] * 1e3 for r in results if len(r) > 2)
    if lags:
        summary["lag_p99"] = lags[int(len(lags) * 0.99)]
    return summary


def load(
    port: int, body: bytes, length: int, *, rate: float = 0, clients: int = 0, seconds: float, limit: int = 0
) -> dict[str, Any]:
    """Run the generator in a process of its own; its summary."""
    arguments = json.dumps(
        {"port": port, "length": length, "rate": rate, "clients": clients, "seconds": seconds, "limit": limit}
    )
    done = subprocess.run([sys.executable, __file__, arguments], input=body, stdout=subprocess.PIPE, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def main() -> None:
    """The child process of `load`."""
    import uvloop

    a = json.loads(sys.argv[1])
    message = http_message("m", sys.stdin.buffer.read(), a["length"])
    began = time.perf_counter()
    if a["rate"]:
        work: Any = open_loop(a["port"], message, a["rate"], a["seconds"])
    else:
        work = closed_loop(a["port"], message, a["clients"], a["seconds"], a["limit"])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        results = runner.run(work)
    print(json.dumps(summarize(results, time.perf_counter() - began)))


if __name__ == "__main__":
    main()
