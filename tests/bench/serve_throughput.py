"""Server throughput against raw in-process ONNX Runtime, interleaved: python tests/bench/serve_throughput.py model.onnx

Each round times, one after another, `session.run` in a process of its own with the same number of threads (batch 1, and
as large a batch as there are clients) and `wrk` against the server at each number of clients; the medians over the
rounds are compared. The raw batch says what batching could gain at most, with a server that costs nothing; the load
generator shares the cores. wrk: apt-get install wrk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

RAW = """
import os, sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
name, shape = session.get_inputs()[0].name, session.get_inputs()[0].shape[1:]
for line in sys.stdin:
    seconds, batch = line.split()
    feeds = {name: np.random.rand(int(batch), *shape).astype(np.float32)}
    for _ in range(3): session.run(None, feeds)
    n, cpu, start = 0, time.process_time(), time.perf_counter()
    while (elapsed := time.perf_counter() - start) < float(seconds):
        session.run(None, feeds)
        n += int(batch)
    print(n / elapsed, (time.process_time() - cpu) / n * 1e6, flush=True)
"""
LUA = """
wrk.method = "POST"
local f = io.open("{body}", "rb")
wrk.body = f:read("*all")
f:close()
wrk.headers["Inference-Header-Content-Length"] = "{length}"
wrk.headers["Content-Type"] = "application/octet-stream"
function done(summary, latency, requests)
  io.write(string.format("RESULT %d %d %d %d %d %d\\n", summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), summary.errors.status, summary.errors.connect + summary.errors.read
    + summary.errors.write + summary.errors.timeout))
end
"""


def start_server(model: Path, *flags: str) -> tuple[subprocess.Popen[str], dict[str, int]]:
    """A server on free ports, ready."""
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--json"]
    command = [sys.executable, "-m", "runtime.serve", str(model), "--model-name", "m", *ports, *flags]
    log = Path(tempfile.gettempdir()) / f"serve-bench-{os.getpid()}.log"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
    assert process.stdout
    listening = json.loads(process.stdout.readline() or '{"event": "failed"}')
    if listening["event"] != "listening":
        sys.exit(log.read_text()[-500:])
    json.loads(process.stdout.readline())
    return process, listening


def request_body(port: int) -> tuple[bytes, int]:
    """One row for the served model as a binary request, and its JSON length."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/m") as answer:
        spec = json.load(answer)["inputs"][0]
    shape = [1, *spec["shape"][1:]]
    data = np.random.default_rng(0).random(shape, np.float32).tobytes()
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": spec["name"],
                    "shape": shape,
                    "datatype": spec["datatype"],
                    "parameters": {"binary_data_size": len(data)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    return header + data, len(header)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wrk(port: int, script: Path, clients: int, seconds: float) -> dict[str, float]:
    """One wrk run."""
    threads = "1"
    out = subprocess.run(
        [
            "wrk",
            "-t",
            threads,
            "-c",
            str(clients),
            "-d",
            f"{seconds:g}s",
            "-s",
            str(script),
            f"http://127.0.0.1:{port}/v2/models/m/infer",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    match = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", out)
    assert match, out
    n, us, p50, p99, status, broken = map(int, match.groups())
    return {"qps": n / us * 1e6, "requests": n, "p50": p50 / 1e3, "p99": p99 / 1e3, "status": status, "broken": broken}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--flags", default="", help="further flags of the server, one string")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    clients = [int(c) for c in args.clients.split(",")]
    server, ports = start_server(args.model, "--threads", str(args.threads), *args.flags.split())
    raw = subprocess.Popen(
        [sys.executable, "-c", RAW, str(args.model), str(args.threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert raw.stdin
    assert raw.stdout
    rows: dict[int, list[dict[str, float]]] = {c: [] for c in clients}
    raws: list[tuple[float, float]] = []

    def run_raw(batch: int) -> tuple[float, float]:
        raw.stdin.write(f"{args.seconds / 2} {batch}\n")  # type: ignore[union-attr]
        raw.stdin.flush()  # type: ignore[union-attr]
        qps, cpu_us = map(float, raw.stdout.readline().split())  # type: ignore[union-attr]
        return qps, cpu_us

    try:
        with tempfile.TemporaryDirectory() as folder:
            body, length = request_body(ports["http_port"])
            (Path(folder) / "body").write_bytes(body)
            script = Path(folder) / "post.lua"
            script.write_text(LUA.format(body=Path(folder) / "body", length=length))
            wrk(ports["http_port"], script, max(clients), 1)
            for _ in range(args.rounds):
                for count in clients:
                    raws.append(run_raw(1))
                    ceiling = run_raw(count)[0]
                    time.sleep(0.1)
                    before = cpu_seconds(server.pid)
                    result = wrk(ports["http_port"], script, count, args.seconds)
                    result["cpu_us"] = (cpu_seconds(server.pid) - before) / result["requests"] * 1e6
                    result["ratio"] = result["qps"] / raws[-1][0]
                    result["raw_batch"] = ceiling / raws[-1][0]
                    rows[count].append(result)
    finally:
        server.terminate()
        raw.terminate()
        server.wait(60)
    summary = {
        "model": args.model.name,
        "threads": args.threads,
        "raw_qps": statistics.median(q for q, _ in raws),
        "raw_cpu_us": statistics.median(c for _, c in raws),
        "clients": {c: {k: statistics.median(r[k] for r in rows[c]) for k in rows[c][0]} for c in clients},
    }
    if args.json:
        print(json.dumps(summary, indent=1))
        return
    print(
        f"{args.model.name}, {args.threads} threads; raw batch 1: {summary['raw_qps']:.0f} qps, "
        f"{summary['raw_cpu_us']:.0f} us CPU"
    )
    print("clients    qps  ratio  raw batch  p50 ms  p99 ms  CPU us/request  CPU ratio  errors")
    for c in clients:
        r = summary["clients"][c]
        print(
            f"{c:7} {r['qps']:6.0f} {r['ratio']:6.2f} {r['raw_batch']:10.2f} {r['p50']:7.2f} {r['p99']:7.2f}"
            f" {r['cpu_us']:15.0f} {r['cpu_us'] / summary['raw_cpu_us']:10.2f} {r['status'] + r['broken']:7.0f}"
        )


if __name__ == "__main__":
    main()
