"""Memory over a million requests, 500 reloads under load, 1,000 requests in flight at SIGTERM.

python tests/bench/serve_soak.py model.onnx [--requests 1000000] [--reloads 500] [--inflight 1000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from serve_load import connect, http_message, load
from serve_throughput import request_body, start_server


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(model: Path, requests: int) -> dict[str, object]:
    """Resident memory after the first tenth of the requests and after all."""
    server, ports = start_server(model)
    port = ports["http_port"]
    try:
        body, length = request_body(port)
        counts: Counter[str] = Counter()
        sizes = []
        for part in range(10):
            r = load(port, body, length, clients=32, seconds=3600, limit=requests // 10)
            counts.update(r["counts"])
            sizes.append(resident(server.pid))
            print(f"  {part + 1}0 %: {sizes[-1] / 2**20:.1f} MiB", file=sys.stderr)
        growth = sizes[-1] / sizes[0] - 1
        ok = growth < 0.02 and set(counts) == {"200"}
        return {"requests": sum(counts.values()), "counts": counts, "growth": growth, "ok": ok}
    finally:
        server.terminate()
        server.wait(60)


def reloads(model: Path, cycles: int) -> dict[str, object]:
    """SIGHUP onto a changed artefact, again and again, under 8 clients."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        for suffix in ("", ".json"):
            shutil.copy(f"{model}{suffix}", f"{path}{suffix}")
        manifest = json.loads(Path(f"{path}.json").read_text())
        command = [sys.executable, "-m", "runtime.serve", str(path), "--json", "--no-access-log"]
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        server = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert server.stdout
        assert server.stderr
        port = json.loads(server.stdout.readline())["http_port"]
        server.stdout.readline()
        body, length = request_body(port)
        done = threading.Event()
        totals: Counter[str] = Counter()

        def work() -> None:
            while not done.is_set():
                totals.update(load(port, body, length, clients=8, seconds=2)["counts"])

        thread = threading.Thread(target=work)
        thread.start()
        swapped, first = 0, 0
        for cycle in range(cycles):
            manifest["created"] = f"cycle {cycle}"  # another manifest is another version of the artefact
            staged = Path(f"{path}.json.new")
            staged.write_text(json.dumps(manifest))
            staged.replace(f"{path}.json")
            server.send_signal(signal.SIGHUP)
            while True:
                line = server.stderr.readline()
                if "is in service" in line or "not loaded" in line or not line:
                    swapped += "is in service" in line
                    break
            if cycle == cycles // 10:
                first = resident(server.pid)
        done.set()
        thread.join()
        growth = resident(server.pid) / first - 1
        server.terminate()
        code = server.wait(60)
        ok = swapped == cycles and set(totals) == {"200"} and code == 0
        return {"cycles": swapped, "counts": totals, "exit": code, "growth": growth, "ok": ok}


def drain(model: Path, count: int) -> dict[str, object]:
    """`count` requests sent, then SIGTERM: all must be answered."""
    server, ports = start_server(model, "--burst-window", "60")  # what is asked is the drain, not what is shed
    body, length = request_body(ports["http_port"])
    message = http_message("m", body, length)

    async def run() -> Counter[int]:
        clients = [await connect(ports["http_port"], message) for _ in range(count)]
        tasks = [asyncio.create_task(client.send()) for client in clients]
        await asyncio.sleep(0.02)
        server.send_signal(signal.SIGTERM)
        return Counter(status for status, _ in await asyncio.gather(*tasks))

    seen = asyncio.run(run())
    began = time.monotonic()
    code = server.wait(60)
    return {"counts": seen, "exit": code, "seconds": time.monotonic() - began, "ok": seen == {200: count} and code == 0}


def main() -> None:
    """Measure and print; exit 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--reloads", type=int, default=500)
    parser.add_argument("--inflight", type=int, default=1000)
    args = parser.parse_args()
    results = {}
    if args.inflight:
        results["drain"] = drain(args.model, args.inflight)
    if args.reloads:
        results["reload"] = reloads(args.model, args.reloads)
    if args.requests:
        results["memory"] = memory(args.model, args.requests)
    print(json.dumps(results, indent=1))
    sys.exit(not all(r["ok"] for r in results.values()))


if __name__ == "__main__":
    main()
